"""Loops that begin in the middle of the schedule, as image-to-image does, for any strength.

A ratio belongs to a place in the schedule, so that what begins late looks up the ratios of the
steps that it takes, and is known to end where the schedule ends.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from toy_pipeline import ToyPipeline, magcache_schedule
from toy_transformer import ALWAYS_REUSE, CHANNELS, TOKENS, gaussian

import omni_cache

STEPS = 12
BEGINS = (0, 1, 3, 6, 10, 11, 2)

FORCED: dict[str, Any] = {**ALWAYS_REUSE, "force_last_step": True}
MAGCACHE: dict[str, Any] = {
    "cache": "magcache",
    # Much changes at both ends, so that a table that is shifted or stretched shows.
    "mag_ratios": [1.0, 0.5, 0.6, 0.97, 1.02, 0.99, 1.03, 0.98, 0.9, 0.6, 0.5, 0.4],
    "threshold": 0.3,
    "max_skip_steps": 3,
    "retention_ratio": 0.1,
}

SCHEDULERS: dict[str, tuple[Any, int]] = {
    # Whose last timestep is not 1.0, which as a loop's only one could be a share of the first.
    "flow": (partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=3.0), 1),
    "euler": (diffusers.EulerDiscreteScheduler, 1),
    "unipc": (diffusers.UniPCMultistepScheduler, 1),
    "uncounted": (diffusers.DDIMScheduler, 1),
    "second order": (diffusers.FlowMatchHeunDiscreteScheduler, 2),
}
"""With the number of timesteps that a step has."""


class ImageToImage(ToyPipeline):
    """Leaves out the first steps, and tells its scheduler so or leaves that to the timesteps."""

    def __init__(self, name: str, branches: int, names_branches: bool, tells: bool) -> None:
        kind, self.order = SCHEDULERS[name]
        super().__init__(scheduler=kind(), names_branches=names_branches)
        self.names, self.tells = [f"prompt {each}" for each in range(branches)], tells

    @torch.no_grad()
    def __call__(self, begin: int, steps: int = STEPS, share: bool = False) -> range:
        """The places in the schedule that were gone through."""
        prompts = [gaussian(name, 1, 5, CHANNELS) for name in self.names]
        latents, scheduler = gaussian("picture", 1, TOKENS, CHANNELS), self.scheduler
        scheduler.set_timesteps(steps)
        first = begin * self.order
        if self.tells and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        for timestep in scheduler.timesteps[first:]:
            given = timestep.reshape(1).float() / (1000 if share else 1)
            noises = []
            for name, prompt in zip(self.names, prompts, strict=True):
                named = self.transformer.cache_context(name)
                with named if self.names_branches else nullcontext():
                    noises.append(self.transformer(latents, given, prompt))
            noise = torch.stack(noises).mean(0)
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return range(first, len(scheduler.timesteps))


def enabled(pipe: ImageToImage, **flags: Any) -> ImageToImage:
    return omni_cache.enable(pipe, inner="eager", **flags)


def steps_of(pipe: ImageToImage, computed_only: bool = False) -> list[list[int]]:
    return [
        [step.index for step in each.steps if step.computed or not computed_only]
        for each in omni_cache.summary(pipe).trajectories
    ]


@pytest.mark.parametrize("tells", [True, False], ids=["begin index", "sliced timesteps"])
# Two branches show all that one does, and that they are told apart.
@pytest.mark.parametrize("branches", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
@pytest.mark.parametrize("name", [name for name, (_, order) in SCHEDULERS.items() if order == 1])
def test_every_step_goes_by_the_ratio_of_its_place_wherever_the_loop_begins(
    name: str, branches: int, tells: bool
) -> None:
    for named in (True, False):
        pipe = enabled(ImageToImage(name, branches, named, tells), **MAGCACHE)
        for begin in BEGINS:
            places = pipe(begin, share=begin % 2 == 1)
            assert steps_of(pipe) == [list(places)] * branches, (named, begin)
            expected = magcache_schedule(MAGCACHE, STEPS, called=places)
            assert steps_of(pipe, computed_only=True) == [expected] * branches, (named, begin)


@pytest.mark.parametrize("tells", [True, False], ids=["begin index", "sliced timesteps"])
@pytest.mark.parametrize("name", [name for name, (_, order) in SCHEDULERS.items() if order == 1])
def test_the_last_step_is_known_wherever_the_loop_begins(name: str, tells: bool) -> None:
    pipe = enabled(ImageToImage(name, 2, True, tells), **FORCED)
    for steps in (STEPS, 7):
        for begin in (each for each in BEGINS if each < steps):
            places = pipe(begin, steps)
            expected = sorted({begin, places[-1]})
            assert steps_of(pipe, computed_only=True) == [expected] * 2, begin
            held = pipe.transformer._compiled_call_impl.state.latest.trajectories
            assert all((each.history.kept, each.signal) == ([], None) for each in held.values())


@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
def test_a_second_order_scheduler_is_begun_in_the_middle(named: bool) -> None:
    pipe = enabled(ImageToImage("second order", 2, named, True), **FORCED)
    for begin in BEGINS:
        places = pipe(begin)
        assert steps_of(pipe) == [list(places)] * 2, begin
        expected = sorted({places[0], places[-1]})
        assert steps_of(pipe, computed_only=True) == [expected] * 2, begin
