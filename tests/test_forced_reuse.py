"""Which residual a step reuses: the last computed one, as long as it is finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers_models import CASES, sample
from eager_reference import capture_residual, forced_reuse
from one_trace import OneTrace, cached
from torch import Tensor

import omni_cache

ALWAYS: dict[str, dict[str, Any]] = {
    "teacache": {"cache": "teacache", "coefficients": (1.0, 0.0), "rel_l1_thresh": 1e6},
    "magcache": {
        "cache": "magcache",
        "mag_ratios": [1.0],
        "max_skip_steps": 100,
        "retention_ratio": 0,
    },
}
"""Flags with which each strategy reuses whatever there is to reuse."""

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""(entry + (exit - entry)) rounds twice, and the model's epilogue carries that on."""


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def relative_change(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


def test_the_residual_is_that_of_the_last_computed_step() -> None:
    case = CASES["pixart"]
    model = case.build()
    every_second = {**ALWAYS["magcache"], "max_skip_steps": 1}
    trace = OneTrace({"every second": cached(**every_second)})
    compiled = torch.compile(model, backend=trace, fullgraph=True)
    with omni_cache.generation(), omni_cache.branch("cond"):
        outputs = [sample(compiled(**case.inputs(step))) for step in range(6)]
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.computed for step in trajectory.steps] == [True, False] * 3
    for step in (1, 3, 5):
        residual = capture_residual(model, case, case.inputs(step - 1))
        expected = forced_reuse(model, case, case.inputs(step), residual)
        torch.testing.assert_close(outputs[step], expected, **TOLERANCE)


def test_what_is_not_finite_is_never_reused() -> None:
    case = CASES["pixart"]
    model = case.build()
    trace = OneTrace({name: cached(**flags) for name, flags in ALWAYS.items()})
    compiled = torch.compile(model, backend=trace, fullgraph=True)

    def run(strategy: str, broken_step: int) -> list[str]:
        """Reasons for computing, "" for a reused step, of a generation with NaN at one step."""
        trace.chosen = strategy
        omni_cache.refresh(model)
        for step in range(4):
            inputs = case.inputs(step)
            if step == broken_step:
                inputs["hidden_states"] = inputs["hidden_states"] * torch.nan
            with omni_cache.branch("cond", step_index=step):
                output = sample(compiled(**inputs))
            assert output.isfinite().all() == (step != broken_step)
            if step != broken_step:
                expected = sample(model(**inputs))
                assert relative_change(output, expected) < 0.5
        (trajectory,) = omni_cache.summary(model).trajectories
        return [step.reason if step.computed else "" for step in trajectory.steps]

    # The signal tells at once, and what such a step leaves is not reused after it.
    distance, residual = "non-finite distance", "non-finite residual"
    assert run("teacache", broken_step=1) == ["first step", distance, residual, ""]
    assert run("teacache", broken_step=0) == ["first step", residual, "", ""]
    # A strategy without a signal reuses a good residual, and never one that is not.
    assert run("magcache", broken_step=0) == ["first step", "non-finite residual", "", ""]
