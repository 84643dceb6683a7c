"""A generation around a pipeline's call may bring a strategy of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_pipeline import STEPS, ToyPipeline
from toy_transformer import ALWAYS_REUSE, NEVER_REUSE, TEACACHE, FlakyCompiler, computed

import omni_cache

ALL = [[True] * STEPS] * 2


@pytest.mark.parametrize("names_branches", [True, False])
def test_a_pipeline_follows_the_generation_around_it_and_then_its_own_strategy(
    names_branches: bool,
) -> None:
    inner = FlakyCompiler()
    pipe = ToyPipeline(names_branches=names_branches)
    expected = pipe()
    omni_cache.enable(pipe, inner=inner, **ALWAYS_REUSE)
    cached = pipe()
    compilations, schedules = inner.compilations, {}
    requests: dict[str, dict[str, Any]] = {
        "teacache": {**TEACACHE, "rel_l1_thresh": 0.2},
        "dense": {"cache": "taylorseer", "cache_interval": 2, "forecast": "hold"},
        "none": {"cache": "none"},
    }
    for name, request in requests.items():
        with omni_cache.generation(**request):
            latents = pipe()
        schedules[name] = computed(pipe)
        assert torch.equal(latents, expected) is (name == "none")
        assert torch.equal(pipe(), cached)
    assert schedules["none"] == ALL
    assert schedules["dense"] == [[True, True, True, False, True, False, True, False]] * 2
    assert schedules["teacache"] not in (ALL, schedules["dense"])
    assert inner.compilations == compilations > 0


def test_a_schedule_by_share_knows_the_pipelines_number_of_steps() -> None:
    pipe = ToyPipeline()
    omni_cache.enable(pipe, inner="eager", **NEVER_REUSE)
    with omni_cache.generation(cache="teacache", rel_l1_thresh=1e9, start=0.5, coefficients=[1, 0]):
        pipe(steps=6)
    assert computed(pipe) == [[True] * 3 + [False] * 3] * 2
