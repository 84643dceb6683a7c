"""What each form of timestep tells, row by row of docs/trajectories.md.

The threshold reuses whatever there is, so that a call that was put into a wrong trajectory takes a
residual from there; `Witness` sees it in the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    MAGCACHE,
    TOKENS,
    ToyTransformer,
    compiled,
    computed,
    gaussian,
    reasons,
)

import omni_cache

pytestmark = pytest.mark.usefixtures("no_grad")

FIRST, REUSED = True, False


class Witness:
    """A compiled model, and the residuals that any prediction of it may have been made of."""

    def __init__(self, batch: int = 1, **flags: Any) -> None:
        self.batch = batch
        self.model = ToyTransformer()
        self.cached = compiled(self.model, **(flags or ALWAYS_REUSE))
        self.position_ids = torch.zeros(TOKENS, TOKENS)
        self.residuals: list[tuple[object, Tensor]] = []

    def prompts(self, generation: object, branches: Iterable[str]) -> dict[str, Tensor]:
        """New prompts for the branches of a generation."""
        names = {name: f"{generation} {name}" for name in branches}
        return {name: gaussian(each, self.batch, 5, CHANNELS) for name, each in names.items()}

    def __call__(self, place: object, timestep: Any, prompt: Tensor) -> None:
        """Call the model for a place, a branch of a generation, whose residuals alone may serve."""
        latents = gaussian(len(self.residuals), self.batch, TOKENS, CHANNELS)
        self.residuals.append((place, self._residual(latents, timestep, prompt)))
        prediction = self.cached(latents, timestep, prompt, self.position_ids)
        stream = self.model.embed(latents)
        sources = {
            source
            for source, residual in self.residuals
            if torch.allclose(self.model.project(stream + residual), prediction, atol=1e-5)
        }
        assert sources == {place}

    def _residual(self, latents: Tensor, timestep: Any, prompt: Tensor) -> Tensor:
        """What the block loop adds to the hidden states, (B, S, WIDTH)."""
        passed: list[Tensor] = []
        hooks = [
            self.model.embed.register_forward_hook(lambda *call: passed.append(call[-1])),
            self.model.project.register_forward_pre_hook(lambda *call: passed.append(*call[-1])),
        ]
        self.model(latents, timestep, prompt, self.position_ids)
        for hook in hooks:
            hook.remove()
        before, after = passed
        return after - before

    def loop(
        self,
        steps: Sequence[tuple[float, Sequence[str]]],
        generation: object = 0,
        form: Callable[[float], Any] = lambda value: torch.tensor([value]),
        prompts: dict[str, Tensor] | None = None,
    ) -> None:
        """Run a generation, given by each step's timestep and the branches that it calls."""
        prompts = prompts or self.prompts(generation, sorted({b for _, bs in steps for b in bs}))
        for timestep, branches in steps:
            for branch in branches:
                self((generation, branch), form(timestep), prompts[branch])

    @property
    def schedule(self) -> list[list[bool]]:
        return computed(self.model)


def per_token(value: float, clean: int = 0) -> Tensor:
    """One timestep per token, 0 for those of a picture that conditions a video."""
    timesteps = torch.full((2, TOKENS), value)
    timesteps[:, :clean] = 0
    return timesteps


FORMS: dict[str, Callable[[float], Any]] = {
    "a Python int": int,
    "a Python float": float,
    "a tensor without dimensions": torch.tensor,
    "(1,)": lambda value: torch.tensor([value]),
    "(B,)": lambda value: torch.full((2,), value),
    "(B, S)": per_token,
    "(B, S), some tokens clean": lambda value: per_token(value, clean=2),
    "int64": lambda value: torch.full((2,), int(value)),
    "bfloat16": lambda value: torch.full((2,), value, dtype=torch.bfloat16),
    "1 to 0": lambda value: torch.full((2,), value / 1000),
    "rising": lambda value: torch.full((2,), 1000 - value),
    "0 to 1": lambda value: torch.full((2,), 1 - value / 1000),
}


@pytest.mark.parametrize("form", FORMS)
def test_generations_of_different_length_are_told_apart_by_the_timestep_alone(form: str) -> None:
    witness = Witness(batch=2)
    # The very same tensors in every generation: nothing but the timestep tells them apart.
    prompts = witness.prompts("any", "ab")

    for number, steps in enumerate((5, 3, 4)):
        timesteps = [1000.0 - 992 * step // steps for step in range(steps)]
        loop = [(timestep, "ab") for timestep in timesteps]
        witness.loop(loop, number, FORMS[form], prompts)
        # The first number compiles a graph of its own, in which other tensors enter the blocks.
        firsts = 2 if number == 0 and form.startswith("a Python") else 1
        assert witness.schedule == [[FIRST] * firsts + [REUSED] * (steps - firsts)] * 2


def test_where_every_number_compiles_a_graph_of_its_own_residuals_fit_all_of_them() -> None:
    witness = Witness(dynamic=False, **ALWAYS_REUSE)
    witness.loop([(timestep, "a") for timestep in (900.0, 700.0, 500.0)], form=float)
    assert witness.schedule == [[FIRST, REUSED, REUSED]]


ORDERS = {
    "the branch that stays comes first": ("a", "abc", "a"),
    "the branch that stays comes last": ("a", "bca", "a"),
    "another one stays": ("abc", "b", "abc"),
    "they take turns": ("a", "b", "c"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_branch_count_that_changes_mixes_no_branches(order: str) -> None:
    witness = Witness()
    timesteps = [1000.0 - 100 * step for step in range(9)]
    for repeats in (1, 2, 3):
        parts = [part for part in ORDERS[order] for _ in range(repeats)]
        witness.loop(list(zip(timesteps, parts, strict=False)), repeats)


def test_a_branch_that_ends_leaves_the_first_alone() -> None:
    """Guidance in an interval: 1, 3 and 1 branches."""
    witness = Witness()
    steps = zip((900.0, 800, 700, 600, 500, 400), ("a", "a", "abc", "abc", "a", "a"), strict=True)
    witness.loop(list(steps))

    assert witness.schedule == [[FIRST] + [REUSED] * 5, [FIRST, REUSED], [FIRST, REUSED]]


@pytest.mark.parametrize("flags", [ALWAYS_REUSE, MAGCACHE], ids=["teacache", "magcache"])
def test_a_branch_that_was_left_out_computes_and_counts_the_steps_of_the_loop(flags: Any) -> None:
    witness = Witness(**flags)
    branches = ("a", "a", "ab", "ab", "a", "ab")
    witness.loop([(900.0 - 100 * step, each) for step, each in enumerate(branches)])

    assert reasons(witness.model)[1][2] == "a step was left out"
    trajectories = omni_cache.summary(witness.model).trajectories
    assert {each.steps[-1].index for each in trajectories} == {len(branches) - 1}


def test_branches_that_share_a_prompt_are_told_apart_by_their_order() -> None:
    """Perturbed attention: the perturbed branch has the prompt of the conditional one."""
    witness = Witness()
    prompt, negative = gaussian("cond", 1, 5, CHANNELS), gaussian("uncond", 1, 5, CHANNELS)
    prompts = {"cond": prompt, "uncond": negative, "perturbed": prompt}
    branches = ("cond", "uncond", "perturbed")
    witness.loop([(900.0 - 100 * step, branches) for step in range(4)], prompts=prompts)

    # Which of the two the second step begins with is unclear, so both compute it.
    unclear = [FIRST, FIRST, REUSED, REUSED]
    assert witness.schedule == [unclear, [FIRST, REUSED, REUSED, REUSED], unclear]


@pytest.mark.parametrize("order", ["abc", "bca", "cab"])
def test_branches_with_timesteps_of_their_own_are_computed(order: str) -> None:
    """Each conditions on other tokens: the mean tells steps apart, and here it tells nothing."""
    witness = Witness(batch=2)
    prompts = witness.prompts(0, "abc")
    for timestep in (900.0, 800.0, 700.0, 600.0):
        for branch in order:
            witness(branch, per_token(timestep, clean="abc".index(branch)), prompts[branch])


# --- timesteps that come again --------------------------------------------------------------------

HEUN = (900.0, 700.0, 700.0, 500.0, 500.0, 300.0, 300.0)


@pytest.mark.parametrize("branches", ["a", "ab", "abc"])
def test_evaluations_at_one_timestep_have_a_trajectory_each(branches: str) -> None:
    """A second-order solver, of which nobody tells."""
    witness = Witness()
    for generation in range(2):
        witness.loop([(timestep, branches) for timestep in HEUN], generation)

    assert len(witness.schedule) == 2 * len(branches)
    # The second call of such a twin may be the other one's.
    assert witness.schedule[-1] == [FIRST, FIRST, REUSED]


@pytest.mark.parametrize("order", ORDERS)
def test_evaluations_at_one_timestep_mix_no_branches_when_their_count_changes(order: str) -> None:
    parts = [part for part in ORDERS[order] for _ in range(3)]
    Witness().loop(list(zip(HEUN, parts, strict=False)))


@pytest.mark.parametrize("branches", ["a", "ab"])
def test_a_timestep_that_never_moves_is_computed(branches: str) -> None:
    witness = Witness()
    witness.loop([(500.0, branches)] * 20)

    assert not any(REUSED in schedule for schedule in witness.schedule)


def test_with_generation_and_branch_a_timestep_that_comes_again_is_the_next_step() -> None:
    witness = Witness()
    prompts = witness.prompts(0, "ab")
    with omni_cache.generation(len(HEUN)):
        for timestep in HEUN:
            for name in "ab":
                with omni_cache.branch(name):
                    witness(name, torch.tensor([timestep]), prompts[name])

    assert witness.schedule == [[FIRST] + [REUSED] * (len(HEUN) - 1)] * 2


@pytest.mark.parametrize("branches", ["a", "ab"])
def test_steps_that_bfloat16_cannot_tell_apart_are_one_step(branches: str) -> None:
    """1000 and 999 are one number in bfloat16, as are 985 and 983."""
    witness = Witness()
    steps = [(timestep, branches) for timestep in (1000.0, 999.0, 992.0, 985.0, 983.0, 976.0)]
    witness.loop(steps, form=lambda value: torch.tensor([value], dtype=torch.bfloat16))

    # Each call at one number has a trajectory of its own, which computes after a step without it.
    firsts, seconds = witness.schedule[: len(branches)], witness.schedule[len(branches) :]
    assert firsts == [[FIRST, FIRST, REUSED, REUSED]] * len(branches)
    assert seconds == [[FIRST, FIRST]] * len(branches)


# --- generations of one step ----------------------------------------------------------------------


@pytest.mark.parametrize("second", [400.0, 900.0], ids=["below", "above"])
@pytest.mark.parametrize("named", [False, True], ids=["inferred", "branch"])
def test_a_generation_of_one_step_is_not_gone_on_with(named: bool, second: float) -> None:
    witness = Witness()
    for number, timestep in enumerate((500.0, second)):
        prompts = witness.prompts(number, "a")
        if named:
            with omni_cache.branch("a"):
                witness.loop([(timestep, "a")], number, prompts=prompts)
        else:
            witness.loop([(timestep, "a")], number, prompts=prompts)


def test_inputs_made_anew_for_every_step_are_known_by_their_contents() -> None:
    witness = Witness()
    for step in range(5):
        witness("a", torch.tensor([900.0 - step]), gaussian("a", 1, 5, CHANNELS))

    assert witness.schedule == [[FIRST, REUSED, REUSED, REUSED, REUSED]]


def test_latents_that_a_multistep_scheduler_keeps_are_no_sign_of_another_branch() -> None:
    model, kept = ToyTransformer(), []
    cached = compiled(model, **ALWAYS_REUSE)
    prompt = gaussian("a", 1, 5, CHANNELS)
    for step in range(4):
        kept.append(gaussian(step, 1, TOKENS, CHANNELS))
        cached(kept[-1], torch.tensor([900.0 - step]), prompt)

    assert computed(model) == [[FIRST, REUSED, REUSED, REUSED]]


# --- any loop -------------------------------------------------------------------------------------

STEPS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "abc", "bca", "cb"]), max_size=6)
COURSES: dict[str, Callable[[int, int], float]] = {
    "falling": lambda step, branch: 1000.0 * math.exp(-step / 4),
    "rising": lambda step, branch: 1000.0 - 1000.0 * math.exp(-step / 4),
    "repeated": lambda step, branch: 1000.0 * math.exp(-(step // 2) / 4),
    "each branch its own": lambda step, branch: 1000.0 * math.exp(-step / 4) - 40 * branch,
}
LOOPS = st.tuples(STEPS, st.integers(0, 4), st.sampled_from(sorted(COURSES)))


def test_no_loop_after_any_other_is_given_a_residual_of_another_branch_or_generation() -> None:
    """As long as branches have prompts of their own and the caller keeps them."""
    witness = Witness()

    @settings(max_examples=60)
    @given(st.lists(LOOPS, max_size=3))
    def check(loops: list[tuple[list[str], int, str]]) -> None:
        omni_cache.refresh(witness.model)
        witness.residuals.clear()
        kept = [witness.prompts(number, "abc") for number in range(len(loops))]
        for number, (steps, start, course) in enumerate(loops):
            for step, branches in enumerate(steps, start):
                for branch in branches:
                    timestep = torch.tensor([COURSES[course](step, "abc".index(branch))])
                    witness((number, branch), timestep, kept[number][branch])

    check()
