"""TeaCache decides as the published rule does on random signals, alone and in the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import omni_cache
from omni_cache.backends.teacache import (
    CacheContext,
    TeaCacheConfig,
    TeaCacheHook,
    TeaCacheState,
    apply_teacache_hook,
)

NUMBERS = st.floats(-4, 4, width=32)
SIGNALS = st.lists(
    st.lists(NUMBERS, min_size=4, max_size=4).map(lambda each: torch.tensor(each)[None]),
    min_size=1,
    max_size=10,
)
COEFFICIENTS = st.lists(st.floats(-3, 3), min_size=5, max_size=5)
THRESHOLDS = st.floats(1e-3, 3)


def distances(signals: Sequence[Tensor]) -> list[float]:
    """``mean|m - m'| / (mean|m'| + 1e-8)``, in float64; the means of float32 differ by rounding."""
    pairs = zip(signals[1:], signals, strict=False)
    double = [(now.double(), before.double()) for now, before in pairs]
    return [
        float((now - before).abs().mean() / (before.abs().mean() + 1e-8)) for now, before in double
    ]


def decisions(
    signals: Sequence[Tensor], coefficients: Sequence[float], threshold: float
) -> tuple[list[bool], list[float], bool]:
    """Which calls compute, what has accumulated after each, and whether none is a close call."""
    rescale = np.poly1d(coefficients)
    computes, accumulated, is_clear = [True], [0.0], True
    for distance in distances(signals):
        change = accumulated[-1] + abs(float(rescale(distance)))
        is_clear &= abs(change - threshold) > 1e-4 * (1 + change)
        computes.append(not change < threshold)
        accumulated.append(0.0 if computes[-1] else change)
    return computes, accumulated, is_clear


@settings(max_examples=500)
@given(SIGNALS, COEFFICIENTS, THRESHOLDS)
def test_the_hook_decides_by_the_published_rule(
    signals: Any, coefficients: Any, threshold: float
) -> None:
    expected, accumulated, is_clear = decisions(signals, coefficients, threshold)
    hook, state = TeaCacheHook(TeaCacheConfig(threshold, coefficients)), TeaCacheState()
    for signal, computes, change in zip(signals, expected, accumulated, strict=True):
        got = hook._should_compute_full_transformer(state, signal)
        if is_clear:
            assert got is computes
            assert abs(state.accumulated_rel_l1_distance - change) <= 1e-3 * (1 + change)
        state.previous_modulated_input = signal
        state.cnt += 1


def test_a_first_call_forgets_and_a_call_without_signal_before_does_not() -> None:
    hook = TeaCacheHook(TeaCacheConfig(0.2, [0.0, 0.0, 0.0, 1.0, 0.0]))
    state = TeaCacheState(cnt=0, accumulated_rel_l1_distance=0.1)
    assert hook._should_compute_full_transformer(state, torch.ones(1))
    assert state.accumulated_rel_l1_distance == 0.0
    state = TeaCacheState(cnt=3, accumulated_rel_l1_distance=0.1)
    assert hook._should_compute_full_transformer(state, torch.ones(1))
    assert state.accumulated_rel_l1_distance == 0.1
    state.reset()
    assert (state.cnt, state.accumulated_rel_l1_distance) == (0, 0.0)


def test_what_is_not_a_number_computes() -> None:
    hook = TeaCacheHook(TeaCacheConfig(1e9, [0.0, 0.0, 0.0, 1.0, 0.0]))
    state = TeaCacheState(cnt=1, previous_modulated_input=torch.full((2,), float("nan")))
    assert hook._should_compute_full_transformer(state, torch.ones(2))


class Adding(nn.Module):
    """Its blocks add the number of the step, and its signals come one after the other."""

    signals: Sequence[Tensor] = ()
    step = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.step


def extract(module: Any, hidden_states: Tensor) -> CacheContext:
    signal, left = module.signals[module.step], hidden_states + module.step
    return CacheContext(signal, hidden_states, None, signal, lambda: (left,), lambda given: given)


@settings(max_examples=100)
@given(SIGNALS, COEFFICIENTS, THRESHOLDS)
def test_the_runtime_decides_and_reuses_by_the_published_rule(
    signals: Any, coefficients: Any, threshold: float
) -> None:
    expected, _, is_clear = decisions(signals, coefficients, threshold)
    if not is_clear:
        return
    model = Adding()
    omni_cache.register_extractor(model, extract)
    config = TeaCacheConfig(threshold, coefficients)
    apply_teacache_hook(model, config, inner="eager")
    hidden, held = torch.zeros(1, 4), 0
    with torch.no_grad():
        model.signals = signals
        for step, computes in enumerate(expected):
            held = step if computes else held
            model.step = step
            result = model(hidden)
            assert torch.equal(result, torch.full((1, 4), float(held)))
