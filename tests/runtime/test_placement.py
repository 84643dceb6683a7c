"""Which trajectory a call belongs to: told by contexts, or inferred from the timestep.

With a threshold that reuses whatever there is, a step is computed exactly when it is the first of
its trajectory, so that the schedule shows where each call was placed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
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
from omni_cache.runtime.place import MAX_BRANCHES

pytestmark = pytest.mark.usefixtures("no_grad")

FIRST, REUSED = True, False

FORMS: dict[str, Callable[[float], Any]] = {
    "scalar": torch.tensor,
    "one per sample": lambda value: torch.full((2,), value),
    "one per token": lambda value: torch.full((2, TOKENS), value),
    "bfloat16": lambda value: torch.full((2,), value, dtype=torch.bfloat16),
    "integers": lambda value: torch.full((2,), int(value)),
}


class Calls:
    """A model that is called with a timestep, and a prompt by its name."""

    def __init__(self, **flags: Any) -> None:
        self.model = ToyTransformer()
        self.cached = compiled(self.model, **(flags or ALWAYS_REUSE))
        self.prompts: dict[str, Tensor] = {}

    def __call__(self, timestep: Any, prompt: str = "cond") -> Tensor:
        words = self.prompts.setdefault(prompt, gaussian(prompt, 1, 5, CHANNELS))
        return self.cached(gaussian(timestep, 1, TOKENS, CHANNELS), timestep, words)

    def run(self, timesteps: Sequence[float], prompts: Sequence[str] = ("cond",)) -> None:
        for timestep in timesteps:
            for prompt in prompts:
                self(torch.tensor([timestep]), prompt)

    @property
    def schedule(self) -> list[list[bool]]:
        return computed(self.model)

    @property
    def timesteps(self) -> list[list[float | None]]:
        trajectories = omni_cache.summary(self.model).trajectories
        return [[step.timestep for step in each.steps] for each in trajectories]


# --- from the timestep ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_in_any_form_tells_step_and_generation(form: str) -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    prompt, latents = gaussian("p", 2, 5, CHANNELS), gaussian("x", 2, TOKENS, CHANNELS)

    for _ in range(2):
        for timestep in (992.0, 640.0, 320.0):
            cached(latents.clone(), FORMS[form](timestep), prompt)

    assert computed(model) == [[FIRST, REUSED, REUSED]]
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.timestep for step in trajectory.steps] == [992.0, 640.0, 320.0]


@pytest.mark.parametrize("number", [float, int])
def test_a_number_tells_step_and_generation(number: type) -> None:
    calls = Calls()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for timestep in (1000, 700, 400):
                calls(number(timestep))

    assert calls.timesteps == [[1000.0, 700.0, 400.0]]
    # The first graph is made for the first number alone, so the step after it computes, once.
    assert calls.schedule == [[FIRST, REUSED, REUSED]]


def test_the_first_number_counts_as_the_first_step() -> None:
    calls = Calls(**MAGCACHE)
    calls.prompts["cond"] = gaussian("cond", 1, 5, CHANNELS)

    calls(1000.0)
    calls(900.0)

    assert calls.timesteps == [[1000.0, 900.0]]
    assert reasons(calls.model) == [["first step", "below threshold"]]


@pytest.mark.parametrize(
    "timesteps", [(900.0, 600.0, 300.0), (0.0, 0.4, 0.8)], ids=["fall", "rise"]
)
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_time_may_fall_or_rise(timesteps: tuple[float, ...], branches: int) -> None:
    calls = Calls()
    prompts = ("a", "b", "c")[:branches]

    for _ in range(3):
        calls.run(timesteps, prompts)

    assert calls.schedule == [[FIRST, REUSED, REUSED]] * branches
    assert calls.timesteps == [pytest.approx(timesteps)] * branches


def test_a_jump_back_is_a_new_generation() -> None:
    calls = Calls()
    calls.run((900.0, 800.0, 700.0))
    calls.run((850.0, 750.0))

    assert calls.timesteps == [[850.0, 750.0]]
    assert calls.schedule == [[FIRST, REUSED]]


def test_a_branch_may_end_and_a_branch_may_begin() -> None:
    calls = Calls()
    calls.run((900.0, 800.0), ("cond", "uncond"))
    calls.run((700.0, 600.0), ("cond",))
    calls.run((500.0,), ("cond", "another"))

    # Other words than before are another branch, whatever the order.
    calls.run((400.0, 300.0), ("cond", "another"))
    assert calls.schedule == [[FIRST] + [REUSED] * 6, [FIRST, REUSED], [FIRST, REUSED, REUSED]]


def test_more_calls_at_one_timestep_than_a_step_can_have_branches() -> None:
    calls = Calls()
    names = [f"prompt {number}" for number in range(MAX_BRANCHES + 1)]
    with pytest.warns(UserWarning, match="more than 16 calls at one step") as seen:
        calls.run((900.0, 800.0), names)

    # The last one has no place; it is computed.
    assert len(seen) == 1
    assert calls.schedule == [[FIRST, REUSED]] * MAX_BRANCHES


def test_without_timestep_and_context_every_call_is_computed_and_one_warning_says_why() -> None:
    calls = Calls()
    with pytest.warns(
        UserWarning, match=r"no timestep and no context.*omni_cache\.generation"
    ) as seen:
        outputs = [calls(None) for _ in range(3)]

    assert len(seen) == 1
    assert omni_cache.summary(calls.model).trajectories == ()
    plain = calls.model(gaussian(None, 1, TOKENS, CHANNELS), None, calls.prompts["cond"])
    assert all(torch.allclose(each, plain, atol=1e-6) for each in outputs)


# --- from contexts --------------------------------------------------------------------------------


def test_contexts_need_no_timestep() -> None:
    calls = Calls()
    with omni_cache.generation(3):
        for _ in range(3):
            for name in ("cond", "uncond"):
                with omni_cache.branch(name):
                    calls(None, name)

    assert calls.schedule == [[FIRST, REUSED, REUSED]] * 2
    assert [each.branch for each in omni_cache.summary(calls.model).trajectories] == [
        "cond",
        "uncond",
    ]


def test_contexts_are_believed_whatever_the_timestep_says() -> None:
    calls = Calls()
    with omni_cache.generation(), omni_cache.branch("cond"):
        calls.run((500.0, 500.0, 900.0, 100.0))

    assert calls.schedule == [[FIRST, REUSED, REUSED, REUSED]]


def test_each_generation_starts_afresh_although_the_timestep_goes_on() -> None:
    calls = Calls()
    for timesteps in ((900.0, 800.0), (700.0, 600.0)):
        with omni_cache.generation(), omni_cache.branch("cond"):
            calls.run(timesteps)

    assert calls.timesteps == [[700.0, 600.0]]
    assert calls.schedule == [[FIRST, REUSED]]


def test_a_generation_without_branches_infers_them_from_the_timestep() -> None:
    calls = Calls()
    with omni_cache.generation(3):
        calls.run((900.0, 600.0, 300.0), ("cond", "uncond"))
        assert calls.schedule == [[FIRST, REUSED, REUSED]] * 2
        # A loop that starts over within the generation sees nothing of the one before.
        calls.run((900.0, 600.0), ("cond", "uncond"))
        assert calls.schedule == [[FIRST, REUSED]] * 2


def test_a_branch_without_a_generation_takes_the_generation_from_the_timestep() -> None:
    calls = Calls()
    for _ in range(2):
        # In an order that changes from step to step: the names tell them apart.
        for timestep, order in ((900.0, "ab"), (600.0, "ba"), (300.0, "ab")):
            for name in order:
                with omni_cache.branch(name):
                    calls.run((timestep,), (name,))

    assert calls.schedule == [[FIRST, REUSED, REUSED]] * 2
    assert calls.timesteps == [[900.0, 600.0, 300.0]] * 2


def test_a_branch_that_comes_again_at_one_timestep_is_a_new_generation() -> None:
    calls = Calls()
    for _ in range(2):
        with omni_cache.branch("cond"):
            calls.run((900.0,))

    assert calls.schedule == [[FIRST]]


def test_a_step_index_alone_tells_step_and_generation() -> None:
    calls = Calls(**{**MAGCACHE, "threshold": 1e9, "max_skip_steps": 9})
    for _ in range(2):
        for index in range(4):
            with omni_cache.branch("cond", step_index=index):
                calls(None)

    assert calls.schedule == [[FIRST, REUSED, REUSED, REUSED]]


def test_steps_that_were_left_out_make_the_next_one_compute() -> None:
    calls = Calls()
    for index in (0, 1, 5, 6):
        with omni_cache.branch("cond", step_index=index):
            calls(None)

    assert calls.schedule == [[FIRST, REUSED, FIRST, REUSED]]


def test_a_step_index_reaches_the_strategy() -> None:
    """MagCache computes the first tenth of the steps: of 30, that is 0 to 2."""
    calls = Calls(**MAGCACHE)
    with omni_cache.generation(30):
        for index in (1, 2, 3):
            with omni_cache.branch("cond", step_index=index):
                calls(None)

    assert reasons(calls.model) == [["first step", "retention", "below threshold"]]


def test_a_step_index_that_goes_back_starts_the_generation_over() -> None:
    calls = Calls()
    with omni_cache.generation():
        for index in (3, 4, 0, 1):
            with omni_cache.branch("cond", step_index=index):
                calls(None)

    assert calls.schedule == [[FIRST, REUSED]]


def test_generations_may_be_nested() -> None:
    calls = Calls()
    with omni_cache.generation(), omni_cache.branch("cond"):
        calls(None)
        with omni_cache.generation():
            # The branch belongs to the outer generation.
            with pytest.warns(UserWarning, match="no timestep and no context"):
                calls(None)
            with omni_cache.branch("cond"):
                calls(None)
                assert calls.schedule == [[FIRST]]
        last = calls(None)

    fresh = Calls()
    with omni_cache.generation(), omni_cache.branch("cond"):
        fresh(None)
        assert torch.equal(fresh(None), last)


# --- announced ------------------------------------------------------------------------------------


def test_an_announced_number_of_steps_serves_generation_after_generation() -> None:
    calls = Calls(**MAGCACHE)
    calls.run((1000.0,))
    omni_cache.refresh(calls.model, num_inference_steps=20)

    for _ in range(2):
        calls.run((900.0, 800.0, 700.0))
        # A tenth of 20 steps is computed, not of the 8 in the config.
        assert reasons(calls.model) == [["first step", "retention", "below threshold"]]


def test_a_loop_after_the_announced_one_is_not_taken_for_its_continuation() -> None:
    calls = Calls()
    calls.run((1000.0,))
    omni_cache.refresh(calls.model, num_inference_steps=2)

    with omni_cache.branch("cond"):
        calls.run((900.0, 500.0))
        assert calls.schedule == [[FIRST, REUSED]]
        with pytest.warns(UserWarning, match="after the last of 2 steps"):
            calls.run((900.0, 700.0, 500.0))
        assert reasons(calls.model) == [["first step", "below threshold", "after the last step"]]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, 2.0, "28", True])
def test_a_number_of_steps_must_be_a_positive_integer(steps: Any) -> None:
    allowed = "num_inference_steps must be an integer >= 1 or None"
    with pytest.raises(ValueError, match=allowed), omni_cache.generation(steps):
        pass
    with pytest.raises(ValueError, match=allowed):
        omni_cache.refresh(ToyTransformer(), num_inference_steps=steps)


@pytest.mark.parametrize("name", ["", None, 1])
def test_a_branch_must_have_a_name(name: Any) -> None:
    with (
        pytest.raises(ValueError, match="name must be a non-empty string"),
        omni_cache.branch(name),
    ):
        pass


@pytest.mark.parametrize("step", [-1, 1.0, "1"])
def test_a_step_index_must_be_a_natural_number(step: Any) -> None:
    with (
        pytest.raises(ValueError, match="step_index must be an integer >= 0 or None"),
        omni_cache.branch("cond", step),
    ):
        pass
