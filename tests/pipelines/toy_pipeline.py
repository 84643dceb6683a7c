"""A pipeline around the toy transformer, written like those of diffusers, with its schedulers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor
from toy_transformer import CHANNELS, TOKENS, ToyTransformer, gaussian

STEPS = 8


class ToyModel(ToyTransformer, CacheMixin):
    """The toy transformer with the ``cache_context`` that diffusers' transformers have."""


class ToyPipeline:
    """Guides with two branches, which it names unless told otherwise."""

    def __init__(
        self, transformer: Any = None, scheduler: Any = None, names_branches: bool = True
    ) -> None:
        self.transformer = ToyModel() if transformer is None else transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler
        self.names_branches = names_branches

    @torch.no_grad()
    def __call__(
        self, prompt: str = "a fox", seed: int = 0, steps: int = STEPS, stop: int | None = None
    ) -> Tensor:
        """The latents for a prompt; raises `InterruptedError` after `stop` calls of the model."""
        words = {name: gaussian(name, 1, 5, CHANNELS) for name in (prompt, "blurry")}
        latents, calls = gaussian(seed, 1, TOKENS, CHANNELS), 0
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            noises = []
            for context, embedding in zip(("cond", "uncond"), words.values(), strict=True):
                if calls == stop:
                    raise InterruptedError
                named = self.transformer.cache_context(context)
                with named if self.names_branches else nullcontext():
                    noises.append(self.transformer(latents, timestep.expand(1), embedding))
                calls += 1
            guided = noises[1] + 2 * (noises[0] - noises[1])
            (latents,) = self.scheduler.step(guided, timestep, latents, return_dict=False)
        return latents


def magcache_schedule(
    flags: Mapping[str, Any],
    steps: int,
    must: Collection[int] = (),
    called: Sequence[int] | None = None,
) -> list[int]:
    """The steps that MagCache computes, by the rule as it is published.

    Args:
        flags: of the strategy, all of them, with a ratio for each step of the schedule.
        steps: of the whole schedule.
        must: steps that are computed whatever the ratios say.
        called: the steps at which the model is called, if not at all of them.
    """
    retained = int(flags["retention_ratio"] * steps + 0.5)
    calls = range(steps) if called is None else called
    computed, ratio, error, skipped = [], 1.0, 0.0, 0
    for step in calls:
        ratio *= flags["mag_ratios"][step]
        skipped, error = skipped + 1, error + abs(1 - ratio)
        reuse = error <= flags["threshold"] and skipped <= flags["max_skip_steps"]
        if not reuse or step < retained or step in must or step == calls[0]:
            computed.append(step)
            ratio, error, skipped = 1.0, 0.0, 0
    return computed
