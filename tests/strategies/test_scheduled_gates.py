"""Gates that go by the step: which steps they compute, whatever is measured."""

from __future__ import annotations

import cache_dit
import pytest
from driving import computed, drive, reasons

from omni_cache import DBCache
from omni_cache.strategies import Time
from omni_cache.strategies.gates import Limit, Threshold, WarmUp
from omni_cache.strategies.masks import PRESETS, from_bins, preset
from omni_cache.strategies.schedules import Compute, Interval, Mask, Refresh, Reuse

STILL = [0.0] * 24
"""Distances at which every step is reused that may be."""
BELOW = "below threshold"


def bits(text: str) -> list[bool]:
    return [each == "1" for each in text.replace(" ", "")]


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_are_those_of_cache_dit_for_any_number_of_steps(name: str) -> None:
    for steps in (4, 6, *range(8, 300)):
        theirs = cache_dit.steps_mask(total_steps=steps, mask_policy=name)
        assert list(preset(name, steps)) == theirs, steps


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_computes_the_first_and_the_last_step_of_any_number(name: str) -> None:
    for steps in range(1, 100):
        mask = preset(name, steps)
        assert len(mask) == steps
        assert mask[0] == mask[-1] == 1


def test_bins_take_turns() -> None:
    assert from_bins((2, 1, 1), (1, 3)) == (1, 1, 0, 1, 0, 0, 0, 1)
    assert from_bins((1,), (2, 1)) == (1, 0, 0, 0)


def test_an_interval_begins_after_the_warm_up() -> None:
    gate = Interval(Reuse(), every=4, first=3, until=17)
    verdicts = drive(gate, STILL[:20])
    assert computed(verdicts) == bits("111 0 1000 1000 1000 1 111")
    assert reasons(verdicts)[1:5] == ["warm-up", "warm-up", "as scheduled", "interval"]
    assert reasons(verdicts)[-1] == "cool-down"


def test_an_interval_of_one_computes_everything() -> None:
    assert all(computed(drive(Interval(Reuse(), every=1, first=0), STILL)))


def test_a_mask_leaves_the_other_steps_to_the_gate_within() -> None:
    mask = from_bins((2, 1, 1), (4, 4))
    assert computed(drive(Mask(Reuse(), mask), STILL[:12])) == bits("11 0000 1 0000 1")
    within = Mask(Limit(Threshold(0.1), running=2), mask)
    assert computed(drive(within, STILL[:12])) == bits("11 0010 1 0010 1")
    assert reasons(drive(within, STILL[:7]))[6] == "step mask"


def test_what_comes_after_a_mask_is_computed() -> None:
    assert computed(drive(Mask(Reuse(), (1, 0, 0)), STILL[:5])) == bits("10011")


def test_a_preset_goes_by_the_number_of_steps() -> None:
    gate = Mask(Reuse(), "fast")
    assert gate.schedules
    assert not Mask(Reuse(), (1, 0)).schedules
    for steps in (12, 28, 50):
        found = computed(drive(gate, [0.0] * steps, steps))
        assert found == [bool(each) for each in preset("fast", steps)]
    # Where nobody says how many there are, 28.
    assert computed(drive(gate, [0.0] * 28)) == [bool(each) for each in preset("fast", 28)]


def test_at_a_refresh_warm_up_and_limits_count_anew() -> None:
    within = WarmUp(Limit(Threshold(0.1), most=3), steps=2)
    once, repeats = Refresh(within, 8), Refresh(within, 8, repeats=True)
    assert computed(drive(once, STILL)) == bits("11000111 11000111 11111111")
    assert computed(drive(repeats, STILL)) == bits("11000111 11000111 11000111")
    assert reasons(drive(once, STILL))[7:11] == ["max_cached_steps", "refresh", "warm-up", BELOW]
    assert [each for each in range(24) if repeats.begins_anew(Time(each))] == [8, 16]
    assert [each for each in range(24) if once.begins_anew(Time(each))] == [8]
    assert not any(Refresh(within).begins_anew(Time(each)) for each in range(24))


def test_a_gate_that_computes_gives_its_reason() -> None:
    verdicts = drive(Compute(Reuse(), "because"), STILL[:3], lost=())
    assert (computed(verdicts), set(reasons(verdicts))) == ([True] * 3, {"because"})


def test_a_static_mask_measures_nothing() -> None:
    strategy = DBCache(steps_computation_mask="ultra", steps_computation_policy="static")
    policy = strategy.policy(None)
    assert policy.signal is None
    assert not policy.gate("cond", 0).measures
    # The same graphs serve both.
    assert strategy.guard() == DBCache().guard()


def test_a_mask_takes_the_place_of_the_warm_up() -> None:
    gate = DBCache(steps_computation_mask=[1, 0, 0, 1, 0], max_warmup_steps=4).policy(None)
    assert computed(drive(gate.gate("cond", 0), STILL[:5])) == bits("10010")
