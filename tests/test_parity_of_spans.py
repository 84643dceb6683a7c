"""Blocks that always run: the same schedules and outputs as the peers, live, on eight blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cache_dit
import pytest
import torch
from cache_dit import DBCacheConfig
from diffusers import hooks as peer
from diffusers_models import CASES, ModelCase, sample
from torch import Tensor

import omni_cache

pytestmark = pytest.mark.slow

STEPS = 20
MODELS = {name: CASES[name].deep for name in ("flux", "wan", "qwen_image")}
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


def ours(case: ModelCase, **flags: Any) -> Found:
    model = case.build()
    omni_cache.enable(model, inner="eager", strict=True, **flags)
    with omni_cache.generation(STEPS), omni_cache.branch("cond"):
        outputs = denoise(model, case)
    (trajectory,) = omni_cache.summary(model).trajectories
    return [step.computed for step in trajectory.steps], outputs


def of_cache_dit(case: ModelCase, **config: Any) -> Found:
    model = case.build()
    settings = DBCacheConfig(num_inference_steps=STEPS, enable_separate_cfg=False, **config)
    cache_dit.enable_cache(model, cache_config=settings)
    try:
        outputs = denoise(model, case)
        stats, *_ = cache_dit.summary(model, logging=False)
        return [step not in stats.cached_steps for step in range(STEPS)], outputs
    finally:
        cache_dit.disable_cache(model)


def of_diffusers(case: ModelCase, threshold: float) -> Found:
    model: Any = case.build()
    lists = [getattr(model, name) for name in case.block_lists]
    last, computed = lists[-1][-1], [False] * STEPS
    calls = 0

    def attended(*_: Any) -> None:
        computed[calls] = True

    # The hooks replace a block's forward, so its attention runs in computed steps only.
    (getattr(last, "attn", None) or last.attn1).register_forward_hook(attended)
    model.enable_cache(peer.FirstBlockCacheConfig(threshold=threshold))

    def call(**inputs: Any) -> Any:
        nonlocal calls
        with model.cache_context("cond"):
            output = model(**inputs)
        calls += 1
        return output

    outputs = denoise(call, case)
    return computed, outputs


def assert_same(mine: Found, theirs: Found) -> None:
    assert mine[0] == theirs[0]
    for one, other in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    # Both kinds of step occur often enough to be worth comparing.
    assert 5 <= sum(mine[0]) <= STEPS - 5, sum(mine[0])


@pytest.mark.parametrize(
    ("model", "threshold"), [("flux", 0.3), ("wan", 0.07), ("qwen_image", 0.4)]
)
def test_first_block_cache_is_that_of_diffusers(model: str, threshold: float) -> None:
    case = MODELS[model]
    mine = ours(case, cache="first_block_cache", threshold=threshold)
    assert_same(mine, of_diffusers(case, threshold))


# model, fn_compute_blocks, bn_compute_blocks, residual_diff_threshold
SPANS = [
    ("flux", 1, 0, 0.3),
    ("flux", 4, 2, 0.3),
    ("wan", 1, 0, 0.08),
    ("wan", 4, 3, 0.1),
    ("qwen_image", 3, 2, 0.4),
]


@pytest.mark.parametrize(("model", "first", "last", "threshold"), SPANS)
def test_dbcache_is_that_of_cache_dit(model: str, first: int, last: int, threshold: float) -> None:
    case = MODELS[model]
    flags: dict[str, Any] = {"residual_diff_threshold": threshold, "max_warmup_steps": 2}
    mine = ours(case, cache="dbcache", fn_compute_blocks=first, bn_compute_blocks=last, **flags)
    theirs = of_cache_dit(case, Fn_compute_blocks=first, Bn_compute_blocks=last, **flags)
    assert_same(mine, theirs)


KNOBS: dict[str, dict[str, Any]] = {
    "warm-up": {"max_warmup_steps": 6},
    "warm-up with gaps": {"max_warmup_steps": 12, "warmup_interval": 2},
    "so many in all": {"max_cached_steps": 7},
    "so many in a row": {"max_continuous_cached_steps": 2},
    "accumulated": {"max_accumulated_residual_diff_threshold": 3.0},
    "all of them": {
        "max_warmup_steps": 4,
        "warmup_interval": 3,
        "max_cached_steps": 9,
        "max_continuous_cached_steps": 3,
        "max_accumulated_residual_diff_threshold": 5.0,
        "residual_diff_threshold": 0.45,
    },
}


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_is_that_of_cache_dit(name: str) -> None:
    case = MODELS["qwen_image"]
    flags = {"max_warmup_steps": 2, "residual_diff_threshold": 0.9, **KNOBS[name]}
    mine = ours(case, cache="dbcache", fn_compute_blocks=1, **flags)
    assert_same(mine, of_cache_dit(case, Fn_compute_blocks=1, Bn_compute_blocks=0, **flags))
