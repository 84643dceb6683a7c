"""TeaCache's gate against the rule written out with numpy, over random signals and settings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from omni_cache import TeaCacheConfig
from omni_cache.strategies import Decision, Gate, Step

IDENTITY = (1.0, 0.0)


def make_gate(
    rel_l1_thresh: float, coefficients: tuple[float, ...] = IDENTITY, force_last_step: bool = False
) -> Gate:
    config = TeaCacheConfig(
        rel_l1_thresh=rel_l1_thresh, coefficients=coefficients, force_last_step=force_last_step
    )
    return config.bind(None).make_gate("cond", 0)


def decide(
    gate: Gate, index: int, signal: Tensor, total: int | None = None, can_reuse: bool = True
) -> Decision:
    reads: list[int] = []

    def read(verdict: Tensor) -> list[float]:
        reads.append(verdict.numel())
        values: list[float] = verdict.tolist()
        return values

    decision = gate.decide(
        Step(
            index=index,
            num_inference_steps=total,
            can_reuse=can_reuse,
            signal=signal,
            read=read,
        )
    )
    assert len(reads) <= 1, "a call may cost one device-to-host read"
    return decision


def decide_all(gate: Gate, signals: list[Tensor]) -> list[Decision]:
    return [
        decide(gate, index, signal, len(signals), can_reuse=index > 0)
        for index, signal in enumerate(signals)
    ]


def walk(*values: float) -> list[Tensor]:
    """Signals of one element each, so that distances are easy to name."""
    return [torch.tensor([float(value)]) for value in values]


@given(
    seed=st.integers(0, 2**32 - 1),
    speed=st.floats(0.001, 0.5),
    steps=st.integers(2, 30),
    coefficients=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    threshold=st.floats(0.01, 2),
)
def test_decides_as_the_rule_says(
    seed: int, speed: float, steps: int, coefficients: list[float], threshold: float
) -> None:
    generator = np.random.default_rng(seed)
    signals = np.cumsum(generator.normal(0, speed, (steps, 3, 7)), axis=0) + 1
    rescale = np.poly1d(coefficients)

    computed, distances, accumulations = [True], [], []
    accumulated = 0.0
    for current, previous in zip(signals[1:], signals[:-1], strict=True):
        distance = np.abs(current - previous).mean() / (np.abs(previous).mean() + 1e-8)
        accumulated += abs(rescale(distance))
        assume(not math.isclose(accumulated, threshold, rel_tol=1e-4))
        distances.append(distance)
        accumulations.append(accumulated)
        computed.append(not accumulated < threshold)
        if computed[-1]:
            accumulated = 0.0

    gate = make_gate(threshold, tuple(coefficients))
    decisions = decide_all(gate, [torch.tensor(each, dtype=torch.float32) for each in signals])
    assert [each.compute for each in decisions] == computed
    assert [each.distance for each in decisions[1:]] == pytest.approx(distances, rel=1e-4)
    found = [each.accumulated for each in decisions[1:]]
    assert found == pytest.approx(accumulations, rel=1e-3, abs=1e-5)


def test_accumulates_over_reused_steps_and_starts_anew_after_a_computed_one() -> None:
    decisions = decide_all(make_gate(0.25), walk(1, 1.1, 1.21, 1.331, 1.4641))
    assert [each.reason for each in decisions] == [
        "first step",
        "below threshold",
        "below threshold",
        "threshold reached",
        "below threshold",
    ]
    assert [each.accumulated for each in decisions] == [
        None,
        *(pytest.approx(value, rel=1e-4) for value in (0.1, 0.2, 0.3, 0.1)),
    ]


def test_the_very_threshold_computes() -> None:
    gate = make_gate(0.5, coefficients=(0.25,))
    computed = [each.compute for each in decide_all(gate, walk(1, 2, 3, 4))]
    assert computed == [True, False, True, False]


def test_a_threshold_of_zero_computes_even_what_stands_still() -> None:
    assert all(each.compute for each in decide_all(make_gate(0), walk(1, 1, 1)))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_signal_that_is_not_finite_computes_and_is_forgotten(broken: float) -> None:
    gate = make_gate(1e6)
    decisions = decide_all(gate, walk(1, 1.5, broken, 1, 1.5, 2))
    # The step after it is compared with it, and so knows nothing either.
    assert [each.compute for each in decisions] == [True, False, True, True, False, False]
    assert [each.reason for each in decisions[2:4]] == ["non-finite distance"] * 2
    assert decisions[-2].accumulated == pytest.approx(0.5)


def test_a_polynomial_that_overflows_computes() -> None:
    decisions = decide_all(make_gate(1e6, (1e308, 0.0, 0.0)), walk(1, 1000))
    assert decisions[1].compute
    assert decisions[1].reason == "non-finite distance"


def test_a_constant_zero_signal_reuses() -> None:
    decisions = decide_all(make_gate(0.1), walk(0, 0, 0))
    assert [each.compute for each in decisions] == [True, False, False]


@pytest.mark.parametrize("force", [True, False])
def test_the_last_step_is_computed_on_demand(force: bool) -> None:
    gate = make_gate(1e6, force_last_step=force)
    decisions = decide_all(gate, walk(1, 1, 1, 1))
    assert [each.compute for each in decisions] == [True, False, False, force]
    assert (decisions[-1].reason == "last step") is force


def test_an_unknown_number_of_steps_has_no_last_step() -> None:
    gate = make_gate(1e6, force_last_step=True)
    decisions = [decide(gate, index, torch.ones(2), None, index > 0) for index in range(60)]
    assert not any(each.compute for each in decisions[1:])


@pytest.mark.parametrize("lost", ["residual", "last step"])
def test_a_step_that_is_computed_anyway_is_what_the_next_is_compared_with(lost: str) -> None:
    gate = make_gate(0.5, force_last_step=True)
    decide(gate, 0, torch.tensor([1.0]), can_reuse=False)
    decide(gate, 1, torch.tensor([1.4]))
    total, can_reuse = (3, True) if lost == "last step" else (None, False)
    assert decide(gate, 2, torch.tensor([2.0]), total, can_reuse).compute
    after = decide(gate, 3, torch.tensor([2.2]))
    assert (after.distance, after.accumulated) == (pytest.approx(0.1), pytest.approx(0.1))


def test_an_overruled_step_starts_anew() -> None:
    gate = make_gate(0.5)
    decide_all(gate, walk(1, 1.4))
    gate.overrule()
    assert decide(gate, 2, torch.tensor([1.68])).accumulated == pytest.approx(0.2)


def test_a_fork_is_forgotten() -> None:
    gate = make_gate(0.5)
    decide_all(gate, walk(1, 1.2))
    forked = decide(gate.fork(), 2, torch.tensor([1.5]))
    assert decide(gate, 2, torch.tensor([1.5])) == forked
    assert decide(gate, 3, torch.tensor([1.5])).distance == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_is_that_of_one_signal(dtype: torch.dtype) -> None:
    gate = make_gate(0.5)
    assert gate.memory_bytes == 0
    signal = torch.ones(3, 5, dtype=dtype)
    decide(gate, 0, signal, can_reuse=False)
    assert gate.memory_bytes == signal.nbytes


def test_the_signal_may_be_overwritten_after_the_decision() -> None:
    gate, signal = make_gate(1e6), torch.ones(4)
    decide(gate, 0, signal, can_reuse=False)
    signal.mul_(2)
    assert decide(gate, 1, torch.full((4,), 1.5)).distance == pytest.approx(0.5)
