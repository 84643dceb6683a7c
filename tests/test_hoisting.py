"""With hoisting every transformer of diffusers computes and reuses what it does without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_models import CASES, ModelCase, sample
from one_trace import OneTrace, cached
from report_coverage import hoisted_shares
from test_every_transformer import IDENTITY, REPORTS
from torch import Tensor
from torch._dynamo import lookup_backend

import omni_cache
from omni_cache.capture.function import CapturedFunction
from omni_cache.explanation import examine
from omni_cache.options import CompileOptions
from omni_cache.runtime.model_state import states_of_module

STEPS = (0, 7, 14)

FEW = ("flux", "pixart", "wan")
"""A joint stream, cross-attention, and cross-attention with normalised keys."""

COVERED = {
    name: case for name, case in CASES.items() if REPORTS[case.class_name].status == "covered"
}


def as_a_pipeline(case: ModelCase) -> list[dict[str, Any]]:
    """The inputs of all steps, as the same objects where they stay."""
    first = case.inputs(STEPS[0])
    return [
        {
            name: first[name] if _are_equal(value, first[name]) else value
            for name, value in case.inputs(step).items()
        }
        for step in STEPS
    ]


def _are_equal(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize(
    "name",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive) for name in COVERED],
)
@torch.no_grad()
def test_it_stays_exact(name: str) -> None:
    case = COVERED[name]
    model, inputs = case.build(), as_a_pipeline(case)
    never, always = ({**IDENTITY, "rel_l1_thresh": each} for each in (0, 1e6))
    trace = OneTrace(
        {
            "plain": lookup_backend("eager"),
            "reused": cached(**always),
            "hoisted": cached(**never, hoist=True),
            "hoisted, rolled": cached(**never, hoist=True, blocks="rolled"),
            "hoisted, reused": cached(**always, hoist=True),
        }
    )
    compiled = CapturedFunction(model, backend=trace)
    held: list[int] = []

    def loop(chosen: str) -> list[Tensor]:
        trace.chosen = chosen
        omni_cache.refresh(model)
        with omni_cache.generation(len(STEPS) + 1), omni_cache.branch("cond"):
            results = [sample(compiled(**each)) for each in inputs]
            runs = [state.latest for state in states_of_module(model) if state.latest is not None]
            kept = [each.constants for run in runs for each in run.trajectories.values()]
            held.append(sum(len(each.results) for each in kept if each is not None))
        return results

    plain, reused = loop("plain"), loop("reused")
    assert all(map(torch.equal, loop("hoisted"), plain))
    assert all(map(torch.equal, loop("hoisted, rolled"), plain))
    assert all(map(torch.equal, loop("hoisted, reused"), reused))
    assert not torch.equal(reused[-1], plain[-1])
    if name in FEW:
        assert held[:2] == [0, 0]
        assert all(each > 0 for each in held[2:])


def test_shares_are_those_of_what_is_taken_out() -> None:
    case = CASES["pixart"]
    found = examine(case.build(), (), case.inputs(), CompileOptions.parse(IDENTITY))
    (analysis,) = (each.analysis for each in found.graphs)
    assert analysis is not None
    shares = hoisted_shares(analysis, 10**9)
    assert set(shares) == {"constants", "modulations"}
    assert all(0 <= share <= 1 for pair in shares.values() for share in pair)
    assert shares["constants"][1] > 0.1  # keys, values and the projection of the text
    assert shares["modulations"][1] > 0.2
    assert analysis.hoisted is None
