"""Models whose latents are not shaped like their prediction are scheduled as plain ones are.

A learned variance doubles the channels of the prediction; a control image or a mask lies beside the
latents. The channels come last in sequences of tokens and second in pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from toy_pipeline import ToyModel
from toy_transformer import ALWAYS_REUSE, CHANNELS, WIDTH, compiled, gaussian

import omni_cache

STEPS = 8
MAGCACHE: dict[str, Any] = {
    "cache": "magcache",
    "mag_ratios": [1.0] * STEPS,
    "threshold": 9.0,
    "max_skip_steps": 2,
}

LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "tokens": ((6,), -1),
    "picture": ((2, 3), 1),
    "video": ((3, 2, 2), 1),
}
"""Sizes other than batch and channels, and where the channels lie."""

KINDS: dict[str, tuple[int, int]] = {
    "plain": (0, 0),
    "control image": (CHANNELS, 0),
    "mask": (1, 0),
    "learned sigma": (0, CHANNELS),
    "control image, learned sigma": (CHANNELS, CHANNELS),
}
"""How many channels lie beside the latents, and beside the noise that is predicted."""


class Unlike(ToyModel):
    """The toy with other numbers of channels, for latents of any layout."""

    def __init__(self, kind: str, layout: str) -> None:
        super().__init__()
        beside, sigma = KINDS[kind]
        self.channel = LAYOUTS[layout][1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Linear(CHANNELS + beside, WIDTH)
            self.project = nn.Linear(WIDTH, CHANNELS + sigma)
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        x = hidden_states.movedim(self.channel, -1)
        noise = super().forward(x.flatten(1, -2), timestep, prompt)
        return noise.unflatten(1, x.shape[1:-1]).movedim(-1, self.channel)


class Loop:
    """A pipeline over such a model, and the same loop written by hand."""

    def __init__(self, kind: str, layout: str) -> None:
        self.transformer, self.scheduler = Unlike(kind, layout), FlowMatchEulerDiscreteScheduler()
        (beside, _), (sizes, self.channel) = KINDS[kind], LAYOUTS[layout]

        def made(name: str, channels: int) -> Tensor:
            return gaussian(name, 1, *sizes, channels).movedim(-1, self.channel).contiguous()

        self.noise = lambda: made("noise", CHANNELS)
        self.beside = made("beside", beside) if beside else None

    def given(self, latents: Tensor) -> Tensor:
        if self.beside is None:
            return latents
        return torch.cat([latents, self.beside], self.channel)

    def predict(self, model: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return model(*inputs).narrow(self.channel, 0, CHANNELS)

    @torch.no_grad()
    def __call__(self, prompts: int, named: bool, keeps: bool, change: int | None) -> None:
        """Generate; ``keeps`` the first latents, and ``change`` a prompt before a step."""
        words = [gaussian(each, 1, 5, CHANNELS) for each in range(prompts)]
        latents = self.noise()
        first = latents if keeps else None
        self.scheduler.set_timesteps(STEPS)
        for step, timestep in enumerate(self.scheduler.timesteps):
            if step == change:
                words[0] = gaussian("another", 1, 5, CHANNELS)
            noises = []
            for number, prompt in enumerate(words):
                context = self.transformer.cache_context(f"branch {number}")
                with context if named else nullcontext():
                    inputs = self.given(latents), timestep.expand(1), prompt
                    noises.append(self.predict(self.transformer, *inputs))
            noise = torch.stack(noises).mean(0)
            (latents,) = self.scheduler.step(noise, timestep, latents, return_dict=False)
        del first

    @torch.no_grad()
    def by_hand(self, model: Callable[..., Tensor], prompts: int, keeps: bool) -> None:
        words = [gaussian(each, 1, 5, CHANNELS) for each in range(prompts)]
        latents = self.noise()
        first = latents if keeps else None
        for step in range(STEPS):
            timestep = torch.tensor([1000.0 * (1 - step / STEPS)])
            noises = [
                self.predict(model, self.given(latents), timestep, prompt) for prompt in words
            ]
            latents = latents - torch.stack(noises).mean(0) / STEPS
        del first


def schedule(target: Any) -> list[list[tuple[bool, str]]]:
    return [
        [(step.computed, step.reason) for step in each.steps]
        for each in omni_cache.summary(target).trajectories
    ]


UNLIKE = [kind for kind in KINDS if kind != "plain"]


def in_layouts(kinds: Iterable[str]) -> list[Any]:
    """Every kind as tokens, and one in every layout; all in all with --exhaustive."""
    return [
        pytest.param(kind, layout, marks=() if few else pytest.mark.exhaustive)
        for kind, layout in product(kinds, LAYOUTS)
        for few in [layout == "tokens" or kind == "control image"]
    ]


@pytest.mark.parametrize(("kind", "layout"), in_layouts(UNLIKE))
def test_in_a_pipeline_the_schedule_is_that_of_the_plain_model(kind: str, layout: str) -> None:
    plain, unlike = (
        omni_cache.enable(Loop(each, layout), inner="eager", **MAGCACHE) for each in ("plain", kind)
    )
    for prompts, named, keeps in (
        (1, True, False),
        (1, False, False),
        (1, False, True),
        (2, True, True),
        (2, False, True),
        (2, False, False),
    ):
        for pipe in (plain, unlike):
            pipe(prompts, named, keeps, None)
        assert schedule(unlike) == schedule(plain), (prompts, named, keeps)
        assert [len(each) for each in schedule(unlike)] == [STEPS] * prompts
        reused = sum(not computed for each in schedule(unlike) for computed, _ in each)
        assert reused >= prompts * STEPS // 2


@pytest.mark.parametrize(("kind", "layout"), in_layouts(UNLIKE))
def test_in_a_loop_of_ones_own_the_schedule_is_that_of_the_plain_model(
    kind: str, layout: str
) -> None:
    plain, unlike = (Loop(each, layout) for each in ("plain", kind))
    models = [compiled(each.transformer, **MAGCACHE) for each in (plain, unlike)]
    for prompts, keeps in ((1, False), (1, True), (2, False), (2, True)):
        for loop, model in zip((plain, unlike), models, strict=True):
            loop.by_hand(model, prompts, keeps)
        assert schedule(unlike.transformer) == schedule(plain.transformer), (prompts, keeps)
        assert [len(each) for each in schedule(unlike.transformer)] == [STEPS] * prompts


@pytest.mark.parametrize(("kind", "layout"), in_layouts(KINDS))
def test_another_prompt_is_still_seen(kind: str, layout: str) -> None:
    pipe = omni_cache.enable(Loop(kind, layout), inner="eager", **ALWAYS_REUSE)
    for change in (1, 2, 5, STEPS - 1):
        for named in (True, False):
            pipe(2, named, False, change)
            changed, other = schedule(pipe)
            assert [step for step, (computed, _) in enumerate(changed) if computed] == [0, change]
            assert [step for step, (computed, _) in enumerate(other) if computed] == [0]
