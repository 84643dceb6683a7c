"""TeaCache's gate against the rule written out with numpy, over random signals and settings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from driving import computed, distances, drive, reasons
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    TOKENS,
    WIDTH,
    Block,
    Loop,
    ToyTransformer,
    compiled,
)

import omni_cache
from omni_cache import TeaCache
from omni_cache.strategies import Gate, Time, Verdict
from omni_cache.strategies.gates import Accumulated

IDENTITY = (1.0, 0.0)


def make_gate(rel_l1_thresh: float, coefficients: Any = IDENTITY, **flags: Any) -> Gate:
    strategy = TeaCache(rel_l1_thresh=rel_l1_thresh, coefficients=coefficients, **flags)
    return strategy.policy(None).gate("cond", 0)


def drive_along(gate: Gate, signals: list[Tensor], total: int | None = None) -> list[Verdict]:
    """The verdicts on a loop whose number of steps is known."""
    return drive(gate, distances(signals), len(signals) if total is None else total)


def walk(*values: float) -> list[Tensor]:
    """Signals of one element each, so that distances are easy to name."""
    return [torch.tensor([float(value)]) for value in values]


def published_rule(
    moves: list[float], coefficients: list[float], threshold: float, last: bool
) -> tuple[list[bool], list[float]]:
    """For each step whether it is computed; from the second on, the accumulation before a reset."""
    rescale = np.poly1d(coefficients)
    accumulated, found, accumulations = 0.0, [True], []
    for move in moves:
        accumulated += abs(rescale(move))
        accumulations.append(float(accumulated))
        found.append(not accumulated < threshold or (last and len(found) == len(moves)))
        if found[-1]:
            accumulated = 0.0
    return found, accumulations


@settings(max_examples=1000)
@given(
    seed=st.integers(0, 2**32 - 1),
    speed=st.floats(0.001, 0.5),
    steps=st.integers(2, 30),
    coefficients=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    threshold=st.floats(0.01, 2),
    last=st.booleans(),
)
def test_decides_as_the_rule_says(
    seed: int, speed: float, steps: int, coefficients: list[float], threshold: float, last: bool
) -> None:
    generator = np.random.default_rng(seed)
    signals = np.cumsum(generator.normal(0, speed, (steps, 3, 7)), axis=0) + 1
    expected = [
        np.abs(current - previous).mean() / (np.abs(previous).mean() + 1e-8)
        for current, previous in zip(signals[1:], signals[:-1], strict=True)
    ]
    first, *moves = distances([torch.tensor(each, dtype=torch.float32) for each in signals])
    assert moves == pytest.approx(expected, rel=1e-4)

    gate = make_gate(threshold, coefficients, force_last_step=last)
    verdicts = drive(gate, [first, *moves], steps)
    schedule, accumulations = published_rule(moves, coefficients, threshold, last)
    assert computed(verdicts) == schedule
    measured = slice(1, -1 if last else None)
    assert [each.distance for each in verdicts[measured]] == moves[: -1 if last else None]
    found = [each.accumulated for each in verdicts[measured]]
    assert found == accumulations[: -1 if last else None]  # the same bits


def test_accumulates_over_reused_steps_and_starts_anew_after_a_computed_one() -> None:
    verdicts = drive_along(make_gate(0.25), walk(1, 1.1, 1.21, 1.331, 1.4641))
    assert reasons(verdicts) == [
        "first step",
        "below threshold",
        "below threshold",
        "threshold reached",
        "below threshold",
    ]
    assert [each.accumulated for each in verdicts] == [
        None,
        *(pytest.approx(value, rel=1e-4) for value in (0.1, 0.2, 0.3, 0.1)),
    ]


def test_the_very_threshold_computes() -> None:
    gate = make_gate(0.5, coefficients=(0.25,))
    assert computed(drive_along(gate, walk(1, 2, 3, 4))) == [True, False, True, False]


def test_a_threshold_of_zero_computes_even_what_stands_still() -> None:
    assert all(computed(drive_along(make_gate(0), walk(1, 1, 1))))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_signal_that_is_not_finite_computes_and_is_forgotten(broken: float) -> None:
    verdicts = drive_along(make_gate(1e6), walk(1, 1.5, broken, 1, 1.5, 2))
    # The step after it is compared with it, and so knows nothing either.
    assert computed(verdicts) == [True, False, True, True, False, False]
    assert reasons(verdicts)[2:4] == ["non-finite distance"] * 2
    assert verdicts[-2].accumulated == pytest.approx(0.5)


def test_a_polynomial_that_overflows_computes() -> None:
    verdicts = drive_along(make_gate(1e6, (1e308, 0.0, 0.0)), walk(1, 1000))
    assert (verdicts[1].reuse, verdicts[1].reason) == (False, "non-finite distance")


def test_a_constant_zero_signal_reuses() -> None:
    assert computed(drive_along(make_gate(0.1), walk(0, 0, 0))) == [True, False, False]


@pytest.mark.parametrize("force", [True, False])
def test_the_last_step_is_computed_on_demand(force: bool) -> None:
    verdicts = drive_along(make_gate(1e6, force_last_step=force), walk(1, 1, 1, 1))
    assert computed(verdicts) == [True, False, False, force]
    assert (verdicts[-1].reason == "last step") is force


def test_an_unknown_number_of_steps_has_no_last_step() -> None:
    gate = make_gate(1e6, force_last_step=True)
    verdicts = drive(gate, distances(walk(*[1] * 60)), total=None)
    assert not any(computed(verdicts)[1:])


def test_the_steps_outside_of_start_and_end_are_computed() -> None:
    gate = make_gate(1e6, start=0.25, end=0.75)
    verdicts = drive_along(gate, walk(*[1] * 12))
    within = ["below threshold"] * 6
    assert reasons(verdicts) == ["first step", *["before start"] * 2, *within, *["after end"] * 3]
    # 28 steps are assumed where nobody says: 7 to 21.
    found = computed(drive(gate, distances(walk(*[1] * 30)), total=None))
    assert found == [not 7 <= step < 21 for step in range(30)]


def test_a_share_of_the_steps_is_rounded_to_whole_ones() -> None:
    for steps, begins in ((9, 2), (10, 3), (11, 3)):  # 2.25, 2.5, 2.75
        found = computed(drive_along(make_gate(1e6, start=0.25), walk(*[1] * steps)))
        assert found == [step < begins for step in range(steps)]


@pytest.mark.parametrize("lost", ["residual", "last step"])
def test_what_accumulated_before_a_step_that_is_computed_anyway_is_forgotten(lost: str) -> None:
    gate = make_gate(0.5, force_last_step=True)
    moves = distances(walk(1, 1.4, 2, 2.2))
    total, without = (3, (0,)) if lost == "last step" else (None, (0, 2))
    verdict = drive(gate, moves[:3], total, without)[-1]
    assert not verdict.reuse
    after = gate.decide(verdict.if_computed, Time(3), None, moves[3])
    assert (after.distance, after.accumulated) == (pytest.approx(0.1), pytest.approx(0.1))


def test_a_verdict_that_is_overruled_leaves_what_a_computed_step_leaves() -> None:
    gate = make_gate(0.5)
    verdict = gate.decide(Accumulated(0.1), Time(1), None, 0.2)
    assert verdict.reuse
    assert verdict.if_computed == gate.begin()


def test_deciding_twice_is_deciding_once() -> None:
    gate, state = make_gate(0.5), Accumulated(0.2)
    verdicts = {gate.decide(state, Time(2), 9, 0.1) for _ in range(3)}
    assert verdicts == {gate.decide(Accumulated(0.2), Time(2), 9, 0.1)}


# --- what the runtime keeps of the signal ---------------------------------------------------------


@torch.no_grad()
def test_a_step_that_is_computed_anyway_is_what_the_next_is_compared_with() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE, start=0.5, signal="embed_time")
    Loop(explicit=True).run(cached)
    moments = torch.tensor(Loop().timesteps) / 500
    signals = list(model.embed_time(moments[:, None]))
    (trajectory,) = omni_cache.summary(model).trajectories
    found = [step.distance for step in trajectory.steps]
    assert found == [*[None] * 4, *(pytest.approx(d, rel=1e-4) for d in distances(signals)[4:])]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_is_that_of_one_residual_and_one_signal(dtype: torch.dtype) -> None:
    model = ToyTransformer().to(dtype)
    cached = compiled(model, **ALWAYS_REUSE)
    with omni_cache.generation(), omni_cache.branch("cond"):
        for step in range(3):
            latents = torch.full((1, TOKENS, CHANNELS), float(step), dtype=dtype)
            cached(latents, None, torch.ones(1, 5, CHANNELS, dtype=dtype))
    assert omni_cache.summary(model).memory_bytes == 2 * TOKENS * WIDTH * dtype.itemsize


class SignalIsInput(nn.Module):
    """What is compared is a view of what the caller passes."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Flatten(2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.entry(hidden_states)
        for block in self.blocks:
            x = block(x, timestep.expand(1, WIDTH), None)
        return x.relu()


@torch.no_grad()
def test_the_signal_may_be_overwritten_after_the_call() -> None:
    model = SignalIsInput().eval().requires_grad_(False)
    cached = compiled(model, **ALWAYS_REUSE, signal="entry")
    latents = torch.ones(1, TOKENS, 4, WIDTH // 4)
    with omni_cache.generation(), omni_cache.branch("cond"):
        for step in range(4):
            cached(latents, torch.tensor([9.0 - step]))
            latents *= 1.5  # as schedulers step in place
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.distance for step in trajectory.steps] == [None, *[pytest.approx(0.5)] * 3]
