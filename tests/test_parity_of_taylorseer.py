"""TaylorSeer: the schedule of diffusers' hooks, and their outputs where both forecast one thing.

By default the hooks forecast what each attention returns; here it is what all the blocks add. So
the hooks are put around what the blocks add, and their default is shown to be another definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import hooks as peer
from diffusers_models import CASES, ModelCase, sample
from torch import Tensor, nn

import omni_cache

STEPS = 24
MODELS = {name: CASES[name] for name in ("flux", "wan")}
# cache_interval, disable_cache_before_step, disable_cache_after_step, max_order
SETTINGS = [(5, 3, None, 1), (3, 4, None, 2), (4, 2, 20, 1)]
Found = tuple[list[bool], list[Tensor]]
"""Whether each step was computed, and the outputs."""


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def denoise(model: Callable[..., Any], case: ModelCase) -> list[Tensor]:
    """The outputs of an Euler loop, in which an error made at one step reaches all later ones."""
    inputs, outputs = case.inputs(), []
    begin = inputs["timestep"]
    for step in range(STEPS):
        outputs.append(sample(model(**inputs)))
        moved = inputs["hidden_states"] - outputs[-1] / STEPS
        timestep = begin * (1 - (step + 1) / STEPS)
        inputs = {**inputs, "hidden_states": moved, "timestep": timestep}
    return outputs


class Added(nn.Module):
    """What a stack of blocks adds to the text and to the image."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        image, text = hidden_states, encoder_hidden_states
        for block in self.blocks:
            left = block(image, text, *args, **kwargs)
            text, image = left if isinstance(left, tuple) else (text, left)
        return text - encoder_hidden_states, image - hidden_states


class Stack(nn.Module):
    """The same blocks as one, with a module for the hooks to find."""

    def __init__(self, blocks: nn.ModuleList, returns_text: bool) -> None:
        super().__init__()
        self.added = Added(blocks)
        self.returns_text = returns_text

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        text, image = self.added(hidden_states, encoder_hidden_states, *args, **kwargs)
        image = hidden_states + image
        return (encoder_hidden_states + text, image) if self.returns_text else image


def ours(case: ModelCase, settings: tuple[int, int, int | None, int]) -> Found:
    every, before, after, order = settings
    model = case.build()
    omni_cache.enable(
        model,
        cache="taylorseer",
        cache_interval=every,
        disable_cache_before_step=before,
        disable_cache_after_step=after,
        forecast_order=order,
        inner="eager",
        strict=True,
    )
    with omni_cache.generation(STEPS), omni_cache.branch("cond"):
        outputs = denoise(model, case)
    (trajectory,) = omni_cache.summary(model).trajectories
    return [step.computed for step in trajectory.steps], outputs


def theirs(case: ModelCase, settings: tuple[int, int, int | None, int], **forecast: Any) -> Found:
    every, before, after, order = settings
    model: Any = case.build()
    computed, calls = [False] * STEPS, 0

    def attended(*_: Any) -> None:
        computed[calls] = True

    last = getattr(model, case.block_lists[-1])[-1]
    (getattr(last, "attn", None) or last.attn1).to_q.register_forward_hook(attended)
    if forecast:
        for name in case.block_lists:
            stack = Stack(getattr(model, name), returns_text=len(case.block_lists) > 1)
            setattr(model, name, nn.ModuleList([stack]))
    model.enable_cache(
        peer.TaylorSeerCacheConfig(
            cache_interval=every,
            disable_cache_before_step=before,
            disable_cache_after_step=after,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            **forecast,
        )
    )

    def call(**inputs: Any) -> Any:
        nonlocal calls
        with model.cache_context("cond"):
            output = model(**inputs)
        calls += 1
        return output

    outputs = denoise(call, case)
    return computed, outputs


def farthest(mine: Found, other: Found) -> float:
    pairs = zip(mine[1], other[1], strict=True)
    return max(float((one - two).abs().max()) for one, two in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_taylorseer_is_that_of_diffusers(name: str) -> None:
    schedules = []
    for settings in SETTINGS:
        mine = ours(MODELS[name], settings)
        other = theirs(MODELS[name], settings, cache_identifiers=[r".*\.added"])
        assert mine[0] == other[0], settings
        assert farthest(mine, other) < 1e-4, settings
        assert 5 <= sum(mine[0]) <= STEPS - 5
        schedules.append(mine[0])
    assert len(set(map(tuple, schedules))) == len(SETTINGS)


def test_by_default_diffusers_forecasts_something_else_at_the_same_steps() -> None:
    mine, other = ours(MODELS["flux"], SETTINGS[0]), theirs(MODELS["flux"], SETTINGS[0])
    assert mine[0] == other[0]
    assert farthest(mine, other) > 1e-3
