"""StepCache and EasyCache decide as published, on random signals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_cache.strategies import EasyCache, Policy, StepCache, Time
from omni_cache.strategies.base import Around, Made


def run(policy: Policy, entering: list[Tensor], results: list[Tensor], held: bool) -> list[bool]:
    """Which calls are computed; the model returns ``results[i]`` where call ``i`` computes."""
    signal, gate = policy.signal, policy.gate("cond", 0)
    assert signal is not None
    state, computed, made = gate.begin(), [], []
    last: Tensor | None = None
    for index, (entered, result) in enumerate(zip(entering, results, strict=True)):
        at, total = Time(index), len(results)
        distance = None
        must = len(made) < 2 or gate.foretell(at, total) is not None
        if not must and gate.compares(state):
            past = signal.look_back(made[:2])
            now, before = (past, past) if held else (entered, last)
            measured = signal.measure(now, before, (), Around(past=past))  # type: ignore[arg-type]
            distance = signal.distance(measured.tolist())
        verdict = gate.decide(state, at, total, distance)
        reuse = verdict.reuse and not must
        state = verdict.if_reused if reuse else verdict.if_computed
        if not reuse:
            made.insert(0, Made(entered, (result if held else result - entered,)))
        computed.append(not reuse)
        last = entered
    return computed


def walk(seed: int, steps: int, speed: float, batch: int = 2) -> list[Tensor]:
    """A random walk of ``(batch, 3, 4)`` tensors."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(steps, batch, 3, 4, generator=generator)
    sizes = torch.rand(steps, 1, 1, 1, generator=generator) * speed
    sizes[0] = 1.0
    return list((moves * sizes).cumsum(0))


@settings(max_examples=250)
@given(
    seed=st.integers(0, 2**16),
    steps=st.integers(1, 40),
    speed=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    thresholds=st.lists(st.floats(0.5, 1.0), min_size=1, max_size=3),
    data=st.data(),
)
def test_stepcache_decides_as_published(
    seed: int, steps: int, speed: float, thresholds: list[float], data: Any
) -> None:
    countdowns = data.draw(
        st.lists(st.integers(1, 5), min_size=len(thresholds), max_size=len(thresholds))
    )
    results = walk(seed, steps, speed)
    kept: list[np.ndarray[Any, Any]] = []
    countdown, expected = 0, []
    for result in results:
        skip = False
        if len(kept) >= 2:
            if countdown > 1:
                countdown, skip = countdown - 1, True
            elif countdown == 1:
                countdown = 0
            else:
                one, other = (each.reshape(len(each), -1) for each in kept[-2:])
                norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
                similarity = float(((one * other).sum(1) / norms).mean())
                for threshold, count in zip(thresholds, countdowns, strict=True):
                    if abs(similarity - threshold) < 1e-5:
                        return  # too near to tell in another precision
                    if similarity > threshold:
                        countdown, skip = count, True
                        break
        if not skip:
            kept.append(result.double().numpy())
        expected.append(not skip)
    strategy = StepCache(sim_thresholds=thresholds, skip_countdowns=countdowns)
    assert run(strategy.policy(None), results, results, held=True) == expected


@settings(max_examples=250)
@given(
    seed=st.integers(0, 2**16),
    steps=st.integers(1, 40),
    speeds=st.tuples(st.sampled_from([0.02, 0.1, 0.5]), st.sampled_from([0.02, 0.1, 0.5])),
    threshold=st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    retained=st.integers(0, 8),
    last=st.booleans(),
)
def test_easycache_decides_as_published(
    seed: int,
    steps: int,
    speeds: tuple[float, float],
    threshold: float,
    retained: int,
    last: bool,
) -> None:
    entering, results = walk(seed, steps, speeds[0]), walk(seed + 1, steps, speeds[1])
    inputs, outputs = ([each.double().numpy() for each in one] for one in (entering, results))
    error, rate, expected = 0.0, None, []
    previous = computed_input = computed_output = None
    for step, (x, v) in enumerate(zip(inputs, outputs, strict=True)):
        compute = True
        if step < retained or (last and step >= steps - 1):
            error = 0.0
        elif previous is not None and rate is not None:
            assert computed_output is not None
            error += rate * np.abs(x - previous).mean() / np.abs(computed_output).mean()
            if abs(error - threshold) < 1e-5:
                return  # too near to tell in another precision
            compute = error >= threshold
            error = 0.0 if compute else error
        if compute:
            if computed_input is not None and computed_output is not None:
                moved = np.abs(x - computed_input).mean()
                rate = np.abs(v - computed_output).mean() / moved
            computed_input, computed_output = x, v
        previous = x
        expected.append(compute)
    strategy = EasyCache(threshold=threshold, retention_steps=retained, force_last_step=last)
    assert run(strategy.policy(None), entering, results, held=False) == expected


def test_what_has_not_moved_predicts_nothing() -> None:
    signal = EasyCache().policy(None).signal
    assert signal is not None
    assert math.isnan(signal.distance([1.0, 1.0, 1.0, 0.0]))
    assert math.isnan(signal.distance([1.0, float("nan"), 1.0, 1.0]))


@pytest.mark.parametrize("similarity", [float("nan"), -1.0])
def test_results_that_turn_or_are_not_finite_are_computed(similarity: float) -> None:
    gate = StepCache().policy(None).gate("cond", 0)
    verdict = gate.decide(gate.begin(), Time(3), None, similarity)
    assert (verdict.reuse, verdict.if_computed) == (False, gate.begin())
