"""Loops are counted as they are run, and time is kept by what a loop has taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from omni_cache.tuning.budget import Budget


@dataclass
class Clock:
    """Tells the time that a test sets."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def budget(clock: Clock, minutes: float = 6.0, judged: int = 16) -> Budget:
    found = Budget(
        "default", 16, lambda *_: None, limit_seconds=60 * minutes, judged=judged, clock=clock
    )
    found.calls = 28
    return found


def run(found: Budget, clock: Clock, loops: int, seconds: float) -> None:
    for _ in range(loops):
        clock.now += seconds
        found.count(28)


def test_loops_that_are_quick_enough_are_limited_by_their_number() -> None:
    clock = Clock()
    found = budget(clock)
    run(found, clock, 16, 0.4)
    assert found.left == 400 - 16


def test_slow_loops_are_limited_by_time_with_that_of_judging_set_aside() -> None:
    clock = Clock()
    found = budget(clock)
    run(found, clock, 1, 20.0)  # compiles
    assert found.left == 400 - 1  # nothing is known of a loop
    run(found, clock, 20, 2.0)
    # 300 seconds are 150 loops, and judging takes 3.5 for each of 16 samples.
    assert found.left == pytest.approx(150 - 56)


def test_whoever_runs_what_is_left_ends_in_time() -> None:
    clock = Clock()
    found = budget(clock, judged=8)
    run(found, clock, 2, 1.5)
    while found.left >= 1:
        run(found, clock, 1, 1.5)
    for _ in range(28):  # 3.5 loops for each judged sample
        clock.now += 1.5
    assert 350 < clock.now - 100 <= 360


def test_shares_of_loops_count_as_such() -> None:
    clock = Clock()
    found = budget(clock, judged=0)
    run(found, clock, 1, 5.0)
    for _ in range(10):
        clock.now += 1.0
        found.count(7)
    assert found.loops == pytest.approx(1 + 10 / 4)
    assert found.left == pytest.approx((360 - 15) / 4)


def test_what_was_interrupted_counts() -> None:
    clock = Clock()
    found = budget(clock, judged=0)
    found.earlier, found.earlier_seconds = 100.0, 300.0
    run(found, clock, 11, 1.0)
    assert found.seconds == pytest.approx(311)
    assert found.left == pytest.approx(49)


def test_without_a_limit_time_does_not_count() -> None:
    clock = Clock()
    found = budget(clock, minutes=math.inf)
    run(found, clock, 16, 1e6)
    assert found.left == 400 - 16
    assert found.announcement == "at most 400 loops of one sample, and those that judge"
    assert budget(clock).announcement.endswith(", within 6 minutes")
