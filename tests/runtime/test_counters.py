"""What a summary counts: graphs that were compiled, reads of the host, bytes that were copied."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from test_device_read import pretended_device
from torch import Tensor, nn
from toy_transformer import (
    CHANNELS,
    MAGCACHE,
    TEACACHE,
    TOKENS,
    WIDTH,
    Loop,
    ToyTransformer,
    compiled,
    computed,
    gaussian,
)

import omni_cache
from omni_cache.runtime import reading
from omni_cache.runtime.counters import Counters, Tally, current_tally
from omni_cache.runtime.history import History

pytestmark = pytest.mark.usefixtures("no_grad")

RESIDUAL = TOKENS * WIDTH * 4
"""Bytes of the toy's residual, (1, TOKENS, WIDTH) in float32."""


class Pipeline:
    """Two experts."""

    def __init__(self, **second: int) -> None:
        self.transformer, self.transformer_2 = ToyTransformer(), ToyTransformer(**second)


def counters(target: Any) -> Counters:
    return omni_cache.summary(target).counters


def call(model: nn.Module, tokens: int = TOKENS, step: int = 0) -> Tensor:
    latents, prompt = gaussian(tokens, 1, tokens, CHANNELS), gaussian("cond", 1, 5, CHANNELS)
    result: Tensor = model(latents, torch.tensor([900.0 - step]), prompt)
    return result


def enabled(model: Any, **flags: Any) -> Any:
    return omni_cache.enable(model, inner="eager", **(flags or TEACACHE))


# --- graphs ---------------------------------------------------------------------------------------


def test_one_graph_is_compiled_once_whatever_the_number_of_calls() -> None:
    model = enabled(ToyTransformer())
    assert counters(model) == Counters()
    for _ in range(2):
        Loop(("cond", "uncond")).run(model)
        assert counters(model) == Counters(compiles=1)


@pytest.mark.parametrize("form", ["enabled", "compiled"])
def test_other_sizes_compile_a_region_again(form: str) -> None:
    model = ToyTransformer()
    run = enabled(model) if form == "enabled" else compiled(model)
    call(run)
    assert counters(run) == Counters(compiles=1)
    call(run, tokens=2 * TOKENS)  # for any number of tokens
    assert counters(run) == Counters(compiles=2, recompiles=1)
    call(run, tokens=3 * TOKENS)
    assert counters(run) == Counters(compiles=2, recompiles=1)


def test_other_thresholds_compile_nothing_and_other_flags_count_anew() -> None:
    model = enabled(ToyTransformer())
    call(model)
    enabled(model, **{**TEACACHE, "rel_l1_thresh": 0.5})
    call(model)
    assert counters(model) == Counters(compiles=1)
    enabled(model, **TEACACHE, forecast="newton")
    assert counters(model) == Counters()
    call(model)
    assert counters(model) == Counters(compiles=1)


def test_experts_of_one_class_share_a_graph_that_counts_for_the_first() -> None:
    pipe = Pipeline(seed=1)
    enabled(pipe)
    call(pipe.transformer)
    call(pipe.transformer_2)
    summary = omni_cache.summary(pipe)
    assert summary.by_model == {"transformer": Counters(compiles=1), "transformer_2": Counters()}

    call(pipe.transformer_2, tokens=2 * TOKENS)
    summary = omni_cache.summary(pipe)
    assert summary.by_model["transformer_2"] == Counters(compiles=1)
    assert summary.counters == Counters(compiles=2)


def test_experts_of_two_depths_have_a_graph_each() -> None:
    pipe = Pipeline(blocks=3)
    enabled(pipe)
    for _ in range(2):
        call(pipe.transformer)
        call(pipe.transformer_2)
    assert list(omni_cache.summary(pipe).by_model.values()) == [Counters(compiles=1)] * 2


def test_nothing_is_counted_without_a_cache() -> None:
    model = enabled(ToyTransformer(), cache="none")
    call(model)
    assert counters(model) == Counters()


# --- reads ----------------------------------------------------------------------------------------


def test_teacache_reads_once_a_call_where_tensors_lie_on_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ToyTransformer()
    cached = compiled(model, **TEACACHE)
    with pretended_device(monkeypatch) as reads:
        Loop(("cond", "uncond")).run(cached)
        first = counters(model)
        assert (first.reads, sum(reads)) == (16, 16)
        Loop(("cond", "uncond")).run(cached)
    since = counters(model) - first
    assert since[:3] == (0, 0, 16)
    for each in (first, since):
        assert 16 * 8 <= each.copied_bytes <= 16 * 64 * 8  # a few numbers a read, in float64
    assert any(False in each for each in computed(model))


def test_what_is_read_in_one_copy_is_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "on_host", lambda tensor: False)
    monkeypatch.setattr(torch, "Event", lambda device: Mock())  # which the CPU has none of
    tally = Tally()
    token = current_tally.set(tally)
    try:
        few, many = (reading.Reading(torch.ones(count, dtype=torch.float64)) for count in (2, 5))
        for _ in range(2):  # they are known the second time
            reading.read([few, many])
            assert tally.counters == Counters(reads=1, copied_bytes=7 * 8)
        reading.Reading(torch.ones(3)).fetch()  # comes by itself
        assert tally.counters == Counters(reads=1, copied_bytes=7 * 8 + 3 * 4)
    finally:
        current_tally.reset(token)


def test_magcache_reads_until_it_knows_which_inputs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ToyTransformer()
    cached = compiled(model, **MAGCACHE)
    with pretended_device(monkeypatch) as reads:
        Loop(("cond", "uncond"), explicit=True).run(cached)
        found = counters(model)
    assert found.reads == sum(reads) == sum(reads[:6]) == 4
    assert found[:2] == (1, 0)
    assert any(False in each for each in computed(model))


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_residuals_that_are_kept_elsewhere_are_copied_when_they_are_made(dtype: str) -> None:
    """``cpu:0`` is where nothing on the CPU says that it is, so that all that is kept moves."""
    model = ToyTransformer()
    cached = compiled(model, **MAGCACHE, history_device="cpu:0", history_dtype=dtype)
    Loop().run(cached)
    made = sum(computed(model)[0])
    size = RESIDUAL if dtype == "float32" else RESIDUAL // 2
    assert 0 < made < 8
    assert counters(model) == Counters(compiles=1, copied_bytes=made * size)


def test_they_are_copied_back_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ToyTransformer()
    cached = compiled(model, **MAGCACHE, history_device="cpu:0")
    operands = History.operands

    def made_elsewhere(history: History, *args: Any) -> list[Tensor]:
        history.home = torch.device("cpu:0")
        return operands(history, *args)

    monkeypatch.setattr(History, "operands", made_elsewhere)
    Loop().run(cached)
    assert counters(model).copied_bytes == 8 * RESIDUAL  # every step moves one, either way


# --- the table ------------------------------------------------------------------------------------


def test_the_table_tells_only_what_one_would_not_expect() -> None:
    model = enabled(ToyTransformer())
    call(model)
    assert "since enabled" not in str(omni_cache.summary(model))
    call(model, tokens=2 * TOKENS)
    assert "since enabled: 1 graphs compiled again" in str(omni_cache.summary(model))
