"""MagCache's gate against the rule written out, and against diffusers' own hook."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import mag_cache as peer
from driving import computed, drive, reasons
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_transformer import CHANNELS, TOKENS, ToyTransformer, compiled, gaussian

import omni_cache
from omni_cache import MagCache
from omni_cache.strategies import Gate, Time, Verdict
from omni_cache.strategies.gates import Ratio, nearest_interpolation


def make_gate(branch: str = "cond", position: int = 0, **flags: Any) -> Gate:
    return MagCache(**flags).policy(None).gate(branch, position)


def drive_all(gate: Gate, total: int, told: bool = True) -> list[Verdict]:
    """The verdicts on a whole generation, in which every computed step leaves a residual."""
    return drive(gate, [None] * total, total if told else None)


def rounds_a_half(length: int, steps: int) -> bool:
    """Whether a step lies half-way between two ratios, where rounding is a matter of precision."""
    doubled = [2 * step * (length - 1) for step in range(steps)]
    return steps > 1 and any(d % (steps - 1) == 0 and d // (steps - 1) % 2 for d in doubled)


def published_rule(
    ratios: list[float], threshold: float, max_skip_steps: int, retention_ratio: float
) -> tuple[list[bool], list[float]]:
    """For each step whether it is computed, and the accumulated error before any reset."""
    accumulated_ratio, error, skipped = 1.0, 0.0, 0
    found, errors = [], []
    for step, ratio in enumerate(ratios):
        skip = False
        if step >= int(retention_ratio * len(ratios) + 0.5):
            accumulated_ratio *= ratio
            error += abs(1 - accumulated_ratio)
            skipped += 1
            errors.append(error)
            skip = step > 0 and error <= threshold and skipped <= max_skip_steps
            if not skip:
                accumulated_ratio, error, skipped = 1.0, 0.0, 0
        found.append(not skip)
    return found, errors


def hooked(config: peer.MagCacheConfig) -> list[bool]:
    """For each step whether diffusers' hook computes it."""
    state, schedule = peer.MagCacheState(), []
    manager: Any = SimpleNamespace(_context="cond", get_state=lambda: state)
    hook = peer.MagCacheHeadHook(manager, config)
    hidden = torch.zeros(1, 1, 1)
    metadata: Any = SimpleNamespace(
        hidden_states_argument_name="hidden_states",
        _get_parameter_from_args_kwargs=lambda *_: hidden,
        return_encoder_hidden_states_index=None,
    )
    hook._metadata = metadata
    hook.fn_ref = SimpleNamespace(original_forward=lambda *_: hidden)
    for step in range(config.num_inference_steps):
        state.step_index = step
        hook.new_forward(torch.nn.Identity(), hidden)
        schedule.append(state.should_compute)
        state.previous_residual = hidden
    return schedule


@settings(max_examples=1000)
@given(
    ratios=st.lists(st.floats(0.5, 1.5), min_size=1, max_size=60),
    steps=st.integers(1, 60),
    threshold=st.floats(0, 1),
    max_skip_steps=st.integers(0, 8),
    retention_ratio=st.floats(0, 1),
)
def test_decides_as_the_rule_says(
    ratios: list[float], steps: int, threshold: float, max_skip_steps: int, retention_ratio: float
) -> None:
    gate = make_gate(
        threshold=threshold,
        max_skip_steps=max_skip_steps,
        retention_ratio=retention_ratio,
        mag_ratios=ratios,
    )
    verdicts = drive_all(gate, steps)
    each_step = [ratios[round(float(at))] for at in np.linspace(0, len(ratios) - 1, steps)]
    if rounds_a_half(len(ratios), steps) or steps == 1:
        each_step = list(nearest_interpolation(tuple(ratios), steps))
    schedule, errors = published_rule(each_step, threshold, max_skip_steps, retention_ratio)
    assert computed(verdicts) == schedule
    # The same bits.
    assert [each.accumulated for each in verdicts if each.accumulated is not None] == errors


@settings(max_examples=1000)
@given(
    ratios=st.lists(st.floats(0.8, 1.2), min_size=1, max_size=40),
    steps=st.integers(1, 40),
    threshold=st.floats(0, 0.5),
    max_skip_steps=st.integers(0, 8),
    retention_ratio=st.floats(0, 1),
)
def test_decides_as_the_hook_of_diffusers(
    ratios: list[float], steps: int, threshold: float, max_skip_steps: int, retention_ratio: float
) -> None:
    assume(not rounds_a_half(len(ratios), steps))
    flags: dict[str, Any] = {
        "threshold": threshold,
        "max_skip_steps": max_skip_steps,
        "retention_ratio": retention_ratio,
    }
    # In double precision, so that none of its decisions hangs on rounding.
    theirs = torch.tensor(ratios, dtype=torch.float64)
    config = peer.MagCacheConfig(mag_ratios=theirs, num_inference_steps=steps, **flags)
    gate = make_gate(mag_ratios=ratios, **flags)
    assert computed(drive_all(gate, steps)) == hooked(config)


def test_reasons_say_why() -> None:
    ratios = [1.0, 1.0, 1.0, 1.1, 1.0, 1.0, 1.5, 1.0]
    gate = make_gate(threshold=0.25, max_skip_steps=2, retention_ratio=0.25, mag_ratios=ratios)
    assert reasons(drive_all(gate, len(ratios))) == [
        "first step",
        "retention",
        "below threshold",
        "below threshold",
        "max_skip_steps",
        "below threshold",
        "threshold reached",
        "below threshold",
    ]


def test_no_residual_computes_and_starts_anew() -> None:
    gate = make_gate(mag_ratios=[1.0, 1.05, 1.05], retention_ratio=0)
    *_, lost, after = drive(gate, [None] * 3, 3, lost=(0, 1))
    assert (lost.reuse, lost.reason) == (False, "no residual")
    assert (after.reuse, after.accumulated) == (True, pytest.approx(0.05))


def test_deciding_twice_is_deciding_once_and_an_overruled_step_starts_anew() -> None:
    gate = make_gate(mag_ratios=[1.05] * 9, retention_ratio=0, threshold=1, max_skip_steps=9)
    state = Ratio(1.05, 1, 0.05)
    verdict = gate.decide(state, Time(2), 9, None)
    assert verdict == gate.decide(state, Time(2), 9, None)
    assert verdict.reuse
    after = gate.decide(verdict.if_computed, Time(3), 9, None)
    assert after.accumulated == pytest.approx(0.05)


def test_steps_beyond_the_last_ratio_are_computed() -> None:
    gate = make_gate(mag_ratios=[1.0, 1.05], retention_ratio=0, threshold=1)
    verdicts = drive(gate, [None] * 4, 2)
    assert computed(verdicts) == [True, False, True, True]
    assert reasons(verdicts)[2:] == ["no ratio"] * 2


@torch.no_grad()
def test_a_number_of_steps_that_was_assumed_and_exceeded_is_told() -> None:
    model = ToyTransformer()
    cached = compiled(model, cache="magcache", mag_ratios=[1.0], max_skip_steps=99)
    prompt = gaussian("cond", 1, 5, CHANNELS)

    def run(steps: int) -> list[bool]:
        with omni_cache.generation(), omni_cache.branch("cond"):
            for step in range(steps):
                cached(gaussian(step, 1, TOKENS, CHANNELS), torch.tensor([99.0 - step]), prompt)
        (trajectory,) = omni_cache.summary(model).trajectories
        return [each.computed for each in trajectory.steps]

    assert run(28) == [True] * 3 + [False] * 25
    with pytest.warns(UserWarning, match=r"28 were assumed.*num_inference_steps=") as told:
        schedules = [run(30) for _ in range(2)]
    assert len(told) == 1
    assert schedules == [[True] * 3 + [False] * 25 + [True] * 2] * 2


def test_each_branch_follows_its_own_ratios() -> None:
    policy = MagCache(
        mag_ratios={"cond": [1.0, 1.0], "uncond": [1.0, 1.5]}, retention_ratio=0
    ).policy(None)

    def second_step_computes(branch: str, position: int) -> bool:
        return computed(drive_all(policy.gate(branch, position), 2))[1]

    assert not second_step_computes("cond", 1)
    assert second_step_computes("uncond", 0)
    # A branch of another name goes by its place among the branches, or else by the first ratios.
    assert not second_step_computes("branch 0", 0)
    assert second_step_computes("branch 1", 1)
    assert not second_step_computes("branch 2", 2)


@pytest.mark.parametrize(("told", "assumed"), [(True, 10), (False, 28)])
def test_28_steps_are_assumed_when_nobody_says(told: bool, assumed: int) -> None:
    gate = make_gate(retention_ratio=0.5, mag_ratios=[1.0])
    found = reasons(drive_all(gate, assumed, told))
    retained = ["first step", *["retention"] * (assumed // 2 - 1)]
    assert found[: len(retained)] == retained
    assert "retention" not in found[len(retained) :]


def test_the_steps_outside_of_start_and_end_are_computed() -> None:
    gate = make_gate(retention_ratio=0, mag_ratios=[1.0], max_skip_steps=99, start=0.25, end=0.75)
    within = ["below threshold"] * 6
    expected = ["first step", *["before start"] * 2, *within, *["after end"] * 3]
    assert reasons(drive_all(gate, 12)) == expected


def test_what_was_skipped_before_the_end_counts_no_more_after_it() -> None:
    gate = make_gate(retention_ratio=0, mag_ratios=[1.05] * 4, threshold=1, end=0.5)
    *_, last = drive_all(gate, 4)
    assert last.if_computed == last.if_reused == gate.begin()


# --- interpolation -------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 120))
def test_ratios_are_interpolated_as_published(length: int, steps: int) -> None:
    ratios = tuple(float(index) for index in range(length))
    found = nearest_interpolation(ratios, steps)
    if steps == 1:
        assert found == ratios[-1:]
    else:
        places = np.round(np.arange(steps) * ((length - 1) / (steps - 1))).astype(int)
        assert found == tuple(np.array(ratios)[places])


@given(st.integers(2, 60), st.integers(1, 120))
def test_ratios_are_interpolated_as_diffusers_does(length: int, steps: int) -> None:
    # Half-way between two entries, diffusers rounds what single precision has made of the half.
    assume(not rounds_a_half(length, steps))
    ratios = [float(index) for index in range(length)]
    expected = peer.nearest_interp(torch.tensor(ratios), steps).tolist()
    assert list(nearest_interpolation(tuple(ratios), steps)) == expected
