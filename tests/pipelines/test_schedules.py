"""Schedulers of every kind, each heard by what it has: timesteps, and a count if it keeps one.

The number of steps is that of the scheduler's timesteps, which a second-order method repeats; and a
step is what its place among them says, wherever a loop begins.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from toy_pipeline import ToyPipeline
from toy_transformer import ALWAYS_REUSE, CHANNELS, TOKENS, gaussian

import omni_cache

FORCED: dict[str, Any] = {**ALWAYS_REUSE, "force_last_step": True}
LIST = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]


def by_number(scheduler: Any, steps: int) -> None:
    scheduler.set_timesteps(steps)


def by_list(scheduler: Any, steps: int) -> None:
    scheduler.set_timesteps(timesteps=LIST[-steps:])


SCHEDULERS: dict[str, tuple[str, dict[str, Any], Callable[[Any, int], None]]] = {
    # Without a step_index.
    "ddpm": ("DDPMScheduler", {}, by_number),
    "ddpm, list": ("DDPMScheduler", {}, by_list),
    "ddim": ("DDIMScheduler", {}, by_number),
    "ddim, cogvideox": ("CogVideoXDDIMScheduler", {}, by_number),
    # Repeats a timestep, and has no step_index.
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, by_number),
    "pndm, runge-kutta": ("PNDMScheduler", {}, by_number),
    # With one.
    "euler": ("EulerDiscreteScheduler", {}, by_number),
    "euler, list": ("EulerDiscreteScheduler", {}, by_list),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}, by_number),
    "dpm": ("DPMSolverMultistepScheduler", {}, by_number),
    "dpm, list": ("DPMSolverMultistepScheduler", {}, by_list),
    "unipc": ("UniPCMultistepScheduler", {}, by_number),
    "lms": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}, by_number),
    # Evaluates the model twice a step.
    "heun": ("HeunDiscreteScheduler", {}, by_number),
    "heun, list": ("HeunDiscreteScheduler", {}, by_list),
    "heun, flow": ("FlowMatchHeunDiscreteScheduler", {}, by_number),
    "kdpm2": ("KDPM2DiscreteScheduler", {}, by_number),
}


class Scheduled(ToyPipeline):
    """Calls its model at the timesteps of any scheduler, as they are or as a share of 1000."""

    def __init__(self, name: str, branches: int = 1, names_branches: bool = True) -> None:
        kind, config, self.set = SCHEDULERS[name]
        super().__init__(
            scheduler=getattr(diffusers, kind)(**config), names_branches=names_branches
        )
        self.branches = branches

    @torch.no_grad()
    def __call__(self, steps: int, share: bool = False) -> int:
        """The number of steps, as many as the scheduler has timesteps."""
        prompts = {
            f"prompt {each}": gaussian(each, 1, 5, CHANNELS) for each in range(self.branches)
        }
        latents = gaussian("noise", 1, TOKENS, CHANNELS)
        self.set(self.scheduler, steps)
        generator = torch.Generator().manual_seed(0)
        for timestep in self.scheduler.timesteps:
            scaled = latents
            if hasattr(self.scheduler, "scale_model_input"):
                scaled = self.scheduler.scale_model_input(latents, timestep)
            given = timestep.reshape(1).float() / (1000 if share else 1)
            noises = []
            for name, prompt in prompts.items():
                named = self.transformer.cache_context(name)
                with named if self.names_branches else nullcontext():
                    noises.append(self.transformer(scaled, given, prompt))
            takes = "generator" in self.scheduler.step.__code__.co_varnames
            extra = {"generator": generator} if takes else {}
            noise = torch.stack(noises).mean(0)
            latents = self.scheduler.step(noise, timestep, latents, return_dict=False, **extra)[0]
        return len(self.scheduler.timesteps)


def enabled(pipe: Any, **flags: Any) -> Any:
    return omni_cache.enable(pipe, inner="eager", **flags)


def computed_steps(pipe: Any) -> list[list[int]]:
    return [
        [step.index for step in each.steps if step.computed]
        for each in omni_cache.summary(pipe).trajectories
    ]


def indexes(pipe: Any) -> list[list[int]]:
    return [[step.index for step in each.steps] for each in omni_cache.summary(pipe).trajectories]


@pytest.mark.parametrize("name", SCHEDULERS)
# Two branches show all that one does, and that they are told apart.
@pytest.mark.parametrize("branches", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_the_first_and_the_last_step_are_known(name: str, branches: int) -> None:
    pipe = enabled(Scheduled(name, branches), **FORCED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for steps, share in ((10, False), (10, True), (5, False), (10, False)):
            total = pipe(steps, share)
            assert indexes(pipe) == [list(range(total))] * branches
            assert computed_steps(pipe) == [[0, total - 1]] * branches
    held = pipe.transformer._compiled_call_impl.state.latest.trajectories
    assert all((each.history.kept, each.signal) == ([], None) for each in held.values())
