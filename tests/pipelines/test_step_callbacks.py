"""Callbacks that change the prompt or the guidance in the middle of a loop, as diffusers' may.

The changed step is computed, and the loop goes on at the step where it is: the strategies still
know which step is the last, which ratio belongs to a step, and when all can be freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from toy_pipeline import ToyPipeline, magcache_schedule
from toy_transformer import ALWAYS_REUSE, CHANNELS, TOKENS, ToyTransformer, gaussian

import omni_cache

STEPS = 12
LAST = STEPS - 1

CHANGES = [(0,), (4,), (STEPS - 3,), (STEPS - 2,), (LAST,), (2, 3, 8), range(STEPS)]
"""After which steps a callback changes something; after the last one nothing comes any more."""

RATIOS = [1.0, 0.99, 1.02, 0.95, 1.04, 0.9, 1.08, 0.97, 0.93, 1.1, 0.85, 0.6]
MAGCACHE: dict[str, Any] = {
    "cache": "magcache",
    "mag_ratios": RATIOS,
    "threshold": 0.3,
    "max_skip_steps": 3,
    "retention_ratio": 0.2,
}
FORCED: dict[str, Any] = {**ALWAYS_REUSE, "force_last_step": True}


class Made(NamedTuple):
    """A call of the model: for which branch, at which step, with what, and what came of it."""

    branch: str
    step: int
    latents: Tensor
    timestep: Tensor
    words: Tensor
    noise: Tensor


Callback = Callable[["Guided", int], None]


class Guided(ToyPipeline):
    """Guides with a branch for each of its prompts, which a callback may replace, drop or add."""

    prompts: dict[str, Tensor]
    guidance: float

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], callback: Callback, steps: int = STEPS
    ) -> list[Made]:
        self.prompts = {name: words(name) for name in prompts}
        self.guidance, latents, made = 2.0, gaussian(0, 1, TOKENS, CHANNELS), []
        self.scheduler.set_timesteps(steps)
        for step, timestep in enumerate(self.scheduler.timesteps):
            noises = {}
            for name, prompt in self.prompts.items():
                branch = self.transformer.cache_context(name)
                with branch if self.names_branches else nullcontext():
                    noises[name] = self.transformer(latents, timestep.expand(1), prompt)
                made.append(Made(name, step, latents, timestep.expand(1), prompt, noises[name]))
            guided = noises["cond"]
            if "uncond" in noises:
                guided = noises["uncond"] + self.guidance * (guided - noises["uncond"])
            (latents,) = self.scheduler.step(guided, timestep, latents, return_dict=False)
            callback(self, step)
        return made


def words(name: object) -> Tensor:
    return gaussian(name, 1, 5, CHANNELS)


def replace_prompt(pipe: Guided, step: int) -> None:
    pipe.prompts["cond"] = words(f"after step {step}")


def replace_in_place(pipe: Guided, step: int) -> None:
    pipe.prompts["cond"].copy_(words(f"after step {step}"))


def replace_all(pipe: Guided, step: int) -> None:
    for name in pipe.prompts:
        pipe.prompts[name] = words(f"{name} after step {step}")


def replace_prompt_and_guidance(pipe: Guided, step: int) -> None:
    replace_prompt(pipe, step)
    pipe.guidance += 1


def change_guidance(pipe: Guided, step: int) -> None:
    pipe.guidance += 1


def end_guidance(pipe: Guided, step: int) -> None:
    pipe.prompts.pop("uncond", None)


def end_guidance_with_another_prompt(pipe: Guided, step: int) -> None:
    end_guidance(pipe, step)
    replace_prompt(pipe, step)


REPLACING: dict[str, tuple[Callback, set[str]]] = {
    "the prompt": (replace_prompt, {"cond"}),
    "the prompt in place": (replace_in_place, {"cond"}),
    "all prompts": (replace_all, {"cond", "uncond"}),
    "prompt and guidance": (replace_prompt_and_guidance, {"cond"}),
    "the guidance": (change_guidance, set()),
}
"""What a callback does, and of which branches it changes the prompt."""


def at(steps: Sequence[int], change: Callback) -> Callback:
    return lambda pipe, step: change(pipe, step) if step in steps else None


def enabled(names: bool = True, **flags: Any) -> Guided:
    return omni_cache.enable(Guided(names_branches=names), inner="eager", **flags)


def trajectories(pipe: Any, branches: Sequence[str]) -> dict[str, Any]:
    """By branch; in the order of their first calls where the pipeline names none."""
    found = omni_cache.summary(pipe).trajectories
    assert len(found) == len(branches)
    return dict(zip(branches, found, strict=True))


def computed_steps(trajectory: Any) -> list[int]:
    return [step.index for step in trajectory.steps if step.computed]


def check_predictions(made: Sequence[Made], found: dict[str, Any]) -> None:
    """A computed step predicts what the model does; a reused one adds what its last one added.

    The toy's first and last layers are linear, so that a residual of the same branch and prompt
    moves a prediction by no more than the latents have moved.
    """
    model, latest = ToyTransformer(), dict[str, Made]()
    moves = model.project.weight @ model.embed.weight
    for each in made:
        (step,) = (one for one in found[each.branch].steps if one.index == each.step)
        if step.computed:
            plain = model(each.latents, each.timestep, each.words)
            torch.testing.assert_close(each.noise, plain, rtol=0, atol=1e-5)
            latest[each.branch] = each
        else:
            base = latest[each.branch]
            moved = base.noise + (each.latents - base.latents) @ moves.T
            torch.testing.assert_close(each.noise, moved, rtol=0, atol=1e-5)


def check_nothing_is_held(pipe: Guided) -> None:
    held = list(pipe.transformer._compiled_call_impl.state.latest.trajectories.values())
    assert held
    for each in held:
        assert each.memory_bytes > 0
        assert (each.history.kept, each.signal) == ([], None)


@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
@pytest.mark.parametrize(
    "prompts",
    # Two branches show all that one does, and that they are told apart.
    [
        pytest.param(("cond",), id="one", marks=pytest.mark.exhaustive),
        pytest.param(("cond", "uncond"), id="two"),
    ],
)
@pytest.mark.parametrize("what", REPLACING)
def test_the_changed_step_is_computed_and_the_last_one_still_known(
    what: str, prompts: tuple[str, ...], named: bool
) -> None:
    change, concerned = REPLACING[what]
    pipe = enabled(named, **FORCED)
    for steps in CHANGES:
        made = pipe(prompts, at(steps, change))
        found = trajectories(pipe, prompts)
        for branch, trajectory in found.items():
            assert [step.index for step in trajectory.steps] == list(range(STEPS))
            changed = {step + 1 for step in steps if step < LAST and branch in concerned}
            assert computed_steps(trajectory) == sorted({0, LAST} | changed), (branch, steps)
        if change is not replace_in_place:  # the words of earlier calls are overwritten
            check_predictions(made, found)
        check_nothing_is_held(pipe)


@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
@pytest.mark.parametrize("what", REPLACING)
def test_every_step_goes_by_the_ratio_of_its_place(what: str, named: bool) -> None:
    change, concerned = REPLACING[what]
    pipe = enabled(named, **MAGCACHE)
    for steps in CHANGES:
        made = pipe(("cond", "uncond"), at(steps, change))
        found = trajectories(pipe, ("cond", "uncond"))
        for branch, trajectory in found.items():
            changed = {step + 1 for step in steps if branch in concerned}
            expected = magcache_schedule(MAGCACHE, STEPS, must=changed)
            assert computed_steps(trajectory) == expected, (branch, steps)
        if change is not replace_in_place:
            check_predictions(made, found)
        check_nothing_is_held(pipe)


@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
@pytest.mark.parametrize("change", [end_guidance, end_guidance_with_another_prompt])
@pytest.mark.parametrize("flags", [FORCED, MAGCACHE], ids=["teacache", "magcache"])
def test_guidance_may_end(flags: dict[str, Any], change: Callback, named: bool) -> None:
    pipe = enabled(named, **flags)
    for end in (0, 4, STEPS - 3, STEPS - 2):
        made = pipe(("cond", "uncond"), at([end], change))
        found = trajectories(pipe, ("cond", "uncond"))
        must = {end + 1} if change is end_guidance_with_another_prompt else set()
        if flags is FORCED:
            assert computed_steps(found["cond"]) == sorted({0, LAST} | must)
            assert computed_steps(found["uncond"]) == [0]
        else:
            assert computed_steps(found["cond"]) == magcache_schedule(MAGCACHE, STEPS, must=must)
        assert [step.index for step in found["uncond"].steps] == list(range(end + 1))
        check_predictions(made, found)
        if end < STEPS - 2:  # else the branch might still come at the last step
            check_nothing_is_held(pipe)


@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
def test_a_branch_that_misses_the_last_step_alone_is_freed_by_the_next_generation(
    named: bool,
) -> None:
    pipe = enabled(named, **FORCED)
    pipe(("cond", "uncond"), at([STEPS - 2], end_guidance))
    ended = list(pipe.transformer._compiled_call_impl.state.latest.trajectories.values())
    pipe(("cond",), at([], end_guidance))
    assert len(ended) == 2
    assert all((each.history.kept, each.signal) == ([], None) for each in ended)


@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
@pytest.mark.parametrize("flags", [FORCED, MAGCACHE], ids=["teacache", "magcache"])
def test_guidance_may_begin_and_pause(flags: dict[str, Any], named: bool) -> None:
    """A branch joins at the step where the loop is, and computes when it is back."""
    pipe = enabled(named, **flags)
    uncond = words("uncond")

    def guide(pipe: Guided, step: int) -> None:
        pipe.prompts.pop("uncond", None)
        if step + 1 in (3, 4, 5, 8, 9, 10, 11):
            pipe.prompts["uncond"] = uncond

    made = pipe(("cond",), guide)
    found = trajectories(pipe, ("cond", "uncond"))
    assert [step.index for step in found["uncond"].steps] == [3, 4, 5, 8, 9, 10, 11]
    if flags is FORCED:
        assert computed_steps(found["cond"]) == [0, LAST]
        assert computed_steps(found["uncond"]) == [3, 8, LAST]
    else:
        assert computed_steps(found["cond"]) == magcache_schedule(MAGCACHE, STEPS)
        called = [3, 4, 5, 8, 9, 10, 11]
        expected = magcache_schedule(MAGCACHE, STEPS, must={3, 8}, called=called)
        assert computed_steps(found["uncond"]) == expected
    check_predictions(made, found)
    check_nothing_is_held(pipe)


class Batched(ToyPipeline):
    """Guides with both prompts in one batch, until a callback halves it."""

    @torch.no_grad()
    def __call__(self, end: int) -> None:
        prompts = torch.cat([words("uncond"), words("cond")])
        latents = gaussian(0, 1, TOKENS, CHANNELS)
        self.scheduler.set_timesteps(STEPS)
        for step, timestep in enumerate(self.scheduler.timesteps):
            batch = latents.expand(len(prompts), -1, -1).contiguous()
            noise = self.transformer(batch, timestep.expand(len(prompts)), prompts)
            if len(prompts) == 2:
                noise = noise[:1] + 2 * (noise[1:] - noise[:1])
            (latents,) = self.scheduler.step(noise, timestep, latents, return_dict=False)
            if step == end:
                prompts = prompts.chunk(2)[-1]


@pytest.mark.parametrize("flags", [FORCED, MAGCACHE], ids=["teacache", "magcache"])
def test_a_batch_may_be_halved_where_guidance_ends(flags: dict[str, Any]) -> None:
    pipe = omni_cache.enable(Batched(), inner="eager", **flags)
    for end in (0, 4, STEPS - 2):
        pipe(end)
        (trajectory,) = omni_cache.summary(pipe).trajectories
        assert [step.index for step in trajectory.steps] == list(range(STEPS))
        expected = sorted({0, end + 1, LAST})
        if flags is MAGCACHE:
            expected = magcache_schedule(MAGCACHE, STEPS, must={end + 1})
        assert computed_steps(trajectory) == expected, end
        check_nothing_is_held(pipe)


def test_a_change_after_the_last_step_is_none_of_the_next_generations() -> None:
    pipe = enabled(**FORCED)
    first = pipe(("cond", "uncond"), at([], replace_prompt))
    pipe(("cond", "uncond"), at([LAST], replace_all))
    again = pipe(("cond", "uncond"), at([], replace_prompt))
    assert all(torch.equal(one.noise, other.noise) for one, other in zip(first, again, strict=True))
