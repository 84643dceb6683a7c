"""A generation may bring a strategy of its own, for which nothing is compiled."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_transformer import (
    ALWAYS_REUSE,
    MAGCACHE,
    NEVER_REUSE,
    TEACACHE,
    FlakyCompiler,
    Loop,
    ToyTransformer,
    compiled,
    computed,
    reasons,
    same,
)

import omni_cache
from omni_cache import CacheContext, DBCache, TaylorSeer

LOOP = Loop(("cond", "uncond"))
COMPILED: dict[str, Any] = {**NEVER_REUSE, "forecast": "newton", "forecast_order": 2}
"""Graphs with a signal and three residuals."""

REQUESTS: dict[str, dict[str, Any]] = {
    "another threshold": TEACACHE,
    "another gate": MAGCACHE,
    "another forecast": {**TEACACHE, "forecast": "newton", "forecast_axis": "step"},
    "a forecast at fixed steps": {
        "cache": "taylorseer",
        "cache_interval": 3,
        "disable_cache_before_step": 2,
        "forecast_order": 2,
    },
    "none": {"cache": "none"},
}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(way: str, **flags: Any) -> tuple[torch.nn.Module, Callable[..., Tensor]]:
    """A model, and what runs it."""
    model = ToyTransformer()
    if way == "bare":
        return model, compiled(model, **flags)
    return model, omni_cache.enable(model, **{"inner": "eager", **flags})


def requested(run: Callable[..., Tensor], **request: Any) -> list[Tensor]:
    with omni_cache.generation(**{"num_inference_steps": LOOP.steps, **request}):
        return LOOP.run(run)


def test_a_request_gets_what_a_model_compiled_for_it_gives() -> None:
    model, run = made("enabled", **COMPILED)
    schedules = []
    for name, request in REQUESTS.items():
        found = requested(run, **request)
        schedules.append(computed(model))
        other, alone = made("enabled", **request)
        assert same(found, requested(alone)), name
        assert name == "none" or computed(other) == schedules[-1], name
    *cached, none = schedules
    assert none == [[True] * 8] * 2
    assert all(1 < sum(each[0]) < 8 for each in cached)


@pytest.mark.parametrize("way", ["bare", "enabled"])
def test_no_request_compiles_anything(way: str) -> None:
    inner = FlakyCompiler()
    model, run = made(way, inner=inner, **COMPILED)
    requested(run)
    compilations = inner.compilations
    assert compilations > 0
    for request in REQUESTS.values():
        requested(run, **request)
    assert inner.compilations == compilations
    # What came before is forgotten: the model's own strategy rules again.
    requested(run)
    assert computed(model) == [[True] * 8] * 2


def test_none_computes_all_gives_its_reason_and_keeps_nothing() -> None:
    model, run = made("enabled", **ALWAYS_REUSE)
    requested(run, cache="none")
    assert reasons(model) == [["first step", *["cache='none'"] * 7]] * 2
    assert omni_cache.summary(model).memory_bytes == 0


def test_a_request_holds_no_more_residuals_than_its_forecast_weighs() -> None:
    model, run = made("enabled", **COMPILED)
    requested(run)
    deep = omni_cache.summary(model).memory_bytes
    requested(run, **NEVER_REUSE)
    assert omni_cache.summary(model).memory_bytes == deep / 2  # of residuals and signals


def test_two_requests_in_threads_do_not_disturb_each_other() -> None:
    _, run = made("enabled", **COMPILED)
    requests = list(REQUESTS.values())
    alone = [requested(run, **request) for request in requests]
    barrier = threading.Barrier(len(requests), timeout=120)

    def in_step(*args: Tensor) -> Tensor:
        barrier.wait()
        return run(*args)

    @torch.no_grad()  # is a thread's own affair
    def one(request: dict[str, Any]) -> list[Tensor]:
        return requested(in_step, **request)

    with ThreadPoolExecutor(len(requests)) as threads:
        found = list(threads.map(one, requests))
    assert all(same(mine, expected) for mine, expected in zip(found, alone, strict=True))
    assert not same(found[0], found[1])


def test_a_strategy_object_may_be_changed_by_flags() -> None:
    model, run = made("enabled", **COMPILED)
    requested(run, cache=TaylorSeer(cache_interval=3), disable_cache_before_step=1)
    assert computed(model)[0] == [True, False, True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"cache": "teacach"}, "cache='teacach' is not allowed (did you mean 'teacache'?)"),
        ({"cache": 3}, "cache=3 is not allowed"),
        ({"cache": "teacache", "thresh": 1}, "unknown flag 'thresh'"),
        ({"cache": "teacache", "inner": "eager"}, "unknown flag 'inner'"),
        ({"cache": "none", "threshold": 1}, "unknown flag 'threshold' for cache='none'"),
        ({"cache": "teacache", "rel_l1_thresh": -1}, "rel_l1_thresh=-1 is not allowed"),
        ({"rel_l1_thresh": 1}, "cache=None is not allowed; cache must be given where there are"),
    ],
)
def test_what_is_no_strategy_is_refused_at_once(request_: dict[str, Any], message: str) -> None:
    with (
        pytest.raises(ValueError, match="^" + re.escape(message)),
        omni_cache.generation(**request_),
    ):
        raise AssertionError("the context was entered")


@pytest.mark.parametrize("way", ["bare", "enabled"])
@pytest.mark.parametrize(
    ("flags", "request_", "lacking"),
    [
        (TEACACHE, {**TEACACHE, "forecast": "newton"}, "2 kept residuals, where it has 1"),
        (TEACACHE, {"cache": DBCache(fn_compute_blocks=1)}, "1 first and 0 last blocks that"),
        (MAGCACHE, TEACACHE, "the signal 'auto', where it has None"),
        ({"cache": "none"}, MAGCACHE, "a cache, where it has none"),
    ],
)
def test_what_is_not_compiled_is_refused_at_the_first_call(
    way: str, flags: dict[str, Any], request_: dict[str, Any], lacking: str
) -> None:
    _, run = made(way, **flags)
    with pytest.raises(ValueError, match=rf"needs {lacking}.* omni_cache.enable or torch.compile"):
        requested(run, **request_)
    # A model without a cache computes all of it as it is.
    requested(run, cache="none")
    requested(run)


def test_a_signal_that_the_user_chose_serves_every_strategy_that_compares_one() -> None:
    model, run = made("enabled", **NEVER_REUSE, signal="timestep_embedding")
    requested(run, **ALWAYS_REUSE)
    assert [sum(each) for each in computed(model)] == [1, 1]


def test_a_model_with_an_extractor_takes_requests_too() -> None:
    class Apart(ToyTransformer):
        pass

    def extract(module: Any, states: Tensor, timestep: Tensor, prompt: Tensor) -> CacheContext:
        x = module.embed(states)
        time = module.embed_prompt(prompt).mean(1) + module.embed_time(timestep[:, None] / 500)

        def blocks() -> tuple[Tensor, ...]:
            y = x
            for block in module.blocks:
                y = block(y, time, None)
            return (y,)

        return CacheContext(x, x, None, time, blocks, module.project)

    omni_cache.register_extractor(Apart, extract)
    try:
        model = omni_cache.enable(Apart(), inner="eager", **NEVER_REUSE)
        requested(model, **ALWAYS_REUSE)
        assert [sum(each) for each in computed(model)] == [1, 1]
        with pytest.raises(ValueError, match="2 kept residuals"):
            requested(model, **TEACACHE, forecast="newton")
    finally:
        omni_cache.register_extractor(Apart, None)
