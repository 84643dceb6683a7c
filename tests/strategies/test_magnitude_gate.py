"""MagCache's gate against the rule written out, over random ratios and settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.hooks.mag_cache import nearest_interp
from hypothesis import assume, given
from hypothesis import strategies as st

from omni_cache import MagCacheConfig
from omni_cache.strategies import Decision, Gate, Step
from omni_cache.strategies.magcache import nearest_interpolation


def no_read(tensor: torch.Tensor) -> list[float]:
    raise AssertionError("MagCache decides on the host and reads nothing from the device")


def decide(gate: Gate, index: int, total: int | None, can_reuse: bool) -> Decision:
    return gate.decide(
        Step(
            index=index,
            num_inference_steps=total,
            can_reuse=can_reuse,
            signal=None,
            read=no_read,
        )
    )


def decide_all(config: MagCacheConfig, total: int, branch: str = "cond") -> list[Decision]:
    """The decisions on a whole generation, in which every computed step leaves a residual."""
    gate = config.bind(None).make_gate(branch, 0)
    return [decide(gate, index, total, can_reuse=index > 0) for index in range(total)]


def published_rule(
    ratios: list[float], threshold: float, max_skip_steps: int, retention_ratio: float
) -> tuple[list[bool], list[float]]:
    """For each step whether it is computed, and the accumulated error before any reset."""
    accumulated_ratio, error, skipped = 1.0, 0.0, 0
    computed, errors = [], []
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
        computed.append(not skip)
    return computed, errors


@given(
    ratios=st.lists(st.floats(0.5, 1.5), min_size=1, max_size=60),
    threshold=st.floats(0, 1),
    max_skip_steps=st.integers(0, 8),
    retention_ratio=st.floats(0, 1),
)
def test_decides_as_the_rule_says(
    ratios: list[float], threshold: float, max_skip_steps: int, retention_ratio: float
) -> None:
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skip_steps,
        retention_ratio=retention_ratio,
        mag_ratios=ratios,
    )
    decisions = decide_all(config, len(ratios))
    computed, errors = published_rule(ratios, threshold, max_skip_steps, retention_ratio)
    assert [each.compute for each in decisions] == computed
    measured = [each.accumulated for each in decisions if each.accumulated is not None]
    assert measured == pytest.approx(errors)


def test_reasons_say_why() -> None:
    ratios = [1.0, 1.0, 1.0, 1.1, 1.0, 1.0, 1.5, 1.0]
    config = MagCacheConfig(
        threshold=0.25, max_skip_steps=2, retention_ratio=0.25, mag_ratios=ratios
    )
    assert [each.reason for each in decide_all(config, len(ratios))] == [
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
    config = MagCacheConfig(mag_ratios=[1.0, 1.05, 1.05], retention_ratio=0)
    gate = config.bind(None).make_gate("cond", 0)
    decide(gate, 0, 3, can_reuse=False)
    lost = decide(gate, 1, 3, can_reuse=False)
    assert (lost.compute, lost.reason) == (True, "no residual")
    after = decide(gate, 2, 3, can_reuse=True)
    assert (after.compute, after.accumulated) == (False, pytest.approx(0.05))


def test_a_fork_is_forgotten_and_an_overruled_step_starts_anew() -> None:
    config = MagCacheConfig(mag_ratios=[1.05] * 9, retention_ratio=0, threshold=1, max_skip_steps=9)
    gate = config.bind(None).make_gate("cond", 0)
    decide(gate, 0, 9, can_reuse=False)
    decide(gate, 1, 9, can_reuse=True)
    forked = decide(gate.fork(), 2, 9, can_reuse=True)
    assert decide(gate, 2, 9, can_reuse=True) == forked
    gate.overrule()
    assert decide(gate, 3, 9, can_reuse=True).accumulated == pytest.approx(0.05)


def test_steps_beyond_the_last_ratio_are_computed() -> None:
    config = MagCacheConfig(mag_ratios=[1.0, 1.05], retention_ratio=0, threshold=1)
    gate = config.bind(None).make_gate("cond", 0)
    decisions = [decide(gate, index, 2, can_reuse=index > 0) for index in range(4)]
    assert [each.compute for each in decisions] == [True, False, True, True]
    assert [each.reason for each in decisions[2:]] == ["no ratio"] * 2


def test_a_number_of_steps_that_was_assumed_and_exceeded_is_told() -> None:
    gate = MagCacheConfig(mag_ratios=[1.0]).bind(None).make_gate("cond", 0)
    assert not decide(gate, 27, None, can_reuse=True).compute
    with pytest.warns(UserWarning, match=r"28 were assumed.*num_inference_steps="):
        assert decide(gate, 28, None, can_reuse=True).compute


def test_each_branch_follows_its_own_ratios() -> None:
    config = MagCacheConfig(
        mag_ratios={"cond": [1.0, 1.0], "uncond": [1.0, 1.5]}, retention_ratio=0
    )
    bound = config.bind(None)

    def second_step_computes(branch: str, position: int) -> bool:
        gate = bound.make_gate(branch, position)
        decide(gate, 0, 2, can_reuse=False)
        return decide(gate, 1, 2, can_reuse=True).compute

    assert not second_step_computes("cond", 1)
    assert second_step_computes("uncond", 0)
    # A branch of another name goes by its place among the branches, or else by the first ratios.
    assert not second_step_computes("branch 0", 0)
    assert second_step_computes("branch 1", 1)
    assert not second_step_computes("branch 2", 2)


@pytest.mark.parametrize(("told", "assumed"), [(10, 10), (None, 28)])
def test_28_steps_are_assumed_when_nobody_says(told: int | None, assumed: int) -> None:
    config = MagCacheConfig(retention_ratio=0.5, mag_ratios=[1.0])
    gate = config.bind(None).make_gate("cond", 0)
    reasons = [decide(gate, index, told, can_reuse=True).reason for index in range(assumed)]
    retained = ["first step", *["retention"] * (assumed // 2 - 1)]
    assert reasons[: len(retained)] == retained
    assert "retention" not in reasons[len(retained) :]


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
    doubled = [2 * step * (length - 1) for step in range(steps)]
    assume(steps == 1 or not any(d % (steps - 1) == 0 and d // (steps - 1) % 2 for d in doubled))
    ratios = [float(index) for index in range(length)]
    expected = nearest_interp(torch.tensor(ratios), steps).tolist()
    assert list(nearest_interpolation(tuple(ratios), steps)) == expected
