"""TaylorSeer: the schedule of diffusers' hooks, and their outputs where both forecast one thing.

By default the hooks forecast what each attention returns; here it is what all the blocks add. So
the hooks are put around what the blocks add, and their default is shown to be another definition.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import hooks as peer
from diffusers_models import CASES, ModelCase
from parity import Found, assert_same, farthest, of_diffusers, ours_of_all
from torch import Tensor, nn

STEPS = 24
MODELS = {name: CASES[name] for name in ("flux", "wan")}
# cache_interval, disable_cache_before_step, disable_cache_after_step, max_order
SETTINGS = [(5, 3, None, 1), (3, 4, None, 2), (4, 2, 20, 1)]


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


@cache
def mine(name: str) -> list[Found]:
    """What is left here by each of the settings."""
    flags = {
        str(settings): {
            "cache": "taylorseer",
            "cache_interval": every,
            "disable_cache_before_step": before,
            "disable_cache_after_step": after,
            "forecast_order": order,
        }
        for settings in SETTINGS
        for every, before, after, order in (settings,)
    }
    return list(ours_of_all(MODELS[name], STEPS, flags).values())


def theirs(
    case: ModelCase, settings: tuple[int, int, int | None, int], of_stacks: bool = False
) -> Found:
    every, before, after, order = settings
    config = peer.TaylorSeerCacheConfig(
        cache_interval=every,
        disable_cache_before_step=before,
        disable_cache_after_step=after,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*\.added"] if of_stacks else None,
    )

    def stack_up(model: Any) -> None:
        for name in case.block_lists:
            stack = Stack(getattr(model, name), returns_text=len(case.block_lists) > 1)
            setattr(model, name, nn.ModuleList([stack]))

    return of_diffusers(case, STEPS, config, stack_up if of_stacks else None)


@pytest.mark.parametrize("name", MODELS)
def test_taylorseer_is_that_of_diffusers(name: str) -> None:
    schedules = []
    for settings, found in zip(SETTINGS, mine(name), strict=True):
        assert_same(found, theirs(MODELS[name], settings, of_stacks=True))
        schedules.append(found.computed)
    assert len(set(map(tuple, schedules))) == len(SETTINGS)


def test_by_default_diffusers_forecasts_something_else_at_the_same_steps() -> None:
    found, other = mine("flux")[0], theirs(MODELS["flux"], SETTINGS[0])
    assert found.computed == other.computed
    assert farthest(found, other) > 1e-3
