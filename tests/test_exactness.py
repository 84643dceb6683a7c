"""A cache that never reuses is the plain model, whatever compiles its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from diffusers_models import CASES, ModelCase, sample
from one_trace import OneTrace, cached
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

import omni_cache
from omni_cache import omni_cache_backend

STEPS = (0, 7, 14, 21)

NEVER: dict[str, dict[str, Any]] = {
    "teacache": {"cache": "teacache", "coefficients": (1.0, 0.0), "rel_l1_thresh": 0},
    "magcache": {
        "cache": "magcache",
        "mag_ratios": [1.0],
        "threshold": 0,
        "max_skip_steps": 0,
        "retention_ratio": 0,
    },
}
"""Flags with which each strategy decides on every step, and always computes."""


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def run(model: Callable[..., Any], case: ModelCase) -> list[Tensor]:
    return [sample(model(**case.inputs(step))) for step in STEPS]


def relative_change(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_never_reusing_equals_the_plain_graph_bit_for_bit(case: ModelCase) -> None:
    model = case.build()
    trace = OneTrace(
        {
            **{name: cached(strict=True, **flags) for name, flags in NEVER.items()},
            "plain": lookup_backend("eager"),
        }
    )
    compiled = torch.compile(model, backend=trace, fullgraph=True)
    trace.chosen = "plain"
    plain = run(compiled, case)
    for strategy in NEVER:
        trace.chosen = strategy
        omni_cache.refresh(model)
        outputs = run(compiled, case)
        assert all(map(torch.equal, outputs, plain)), strategy
        # One trajectory: the timestep is found and followed in every class.
        (trajectory,) = omni_cache.summary(model).trajectories
        assert [step.computed for step in trajectory.steps] == [True] * len(STEPS)
        assert all(step.distance is not None for step in trajectory.steps[1:])


def test_torch_compile_by_name_equals_plain_torch_compile() -> None:
    case = CASES["pixart"]
    model = case.build()
    plain = run(torch.compile(model, backend="eager"), case)
    torch._dynamo.reset()
    options = {"inner": "eager", **NEVER["teacache"]}
    compiled = torch.compile(model, backend="omni_cache", options=options)
    assert all(map(torch.equal, run(compiled, case), plain))
    assert omni_cache.summary(model).computed_steps == len(STEPS)


class Spy:
    """An inner compiler that runs graphs as they are, and remembers what it was called with."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.extra: list[dict[str, Any]] = []

    def __call__(
        self, graph: GraphModule, example_inputs: list[Tensor], **extra: Any
    ) -> Callable[..., Any]:
        self.graphs.append(graph)
        self.extra.append(extra)
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        assert len(example_inputs) == len(placeholders)
        return graph.forward


@pytest.fixture(scope="module")
def pixart() -> nn.Module:
    return CASES["pixart"].build()


def test_every_kind_of_inner_compiler_is_exact(pixart: nn.Module) -> None:
    case, spy = CASES["pixart"], Spy()
    torch._dynamo.register_backend(compiler_fn=spy, name="omni_cache_test_spy")
    inners = {"aot_eager": "aot_eager", "registered": "omni_cache_test_spy", "callable": spy}
    flags = NEVER["teacache"]
    trace = OneTrace({name: cached(**flags, inner=inner) for name, inner in inners.items()})
    compiled = torch.compile(pixart, backend=trace)
    plain = run(pixart, case)
    for name in inners:
        trace.chosen = name
        assert max(map(relative_change, run(compiled, case), plain)) < 1e-6, name
        assert omni_cache.summary(pixart).computed_steps == len(STEPS)
    assert len(spy.graphs) == 2 * 4  # prologue, body, epilogue, reuse


def test_mode_and_inner_options_reach_the_inner_compiler(pixart: nn.Module) -> None:
    bare, flagged, modal = Spy(), Spy(), Spy()
    flags = NEVER["teacache"]
    trace = OneTrace(
        {
            "bare": cached(**flags, inner=bare),
            "flagged": cached(
                **flags, inner=flagged, mode="max-autotune", inner_options={"depth": 2}
            ),
            # This is how torch.compile(mode=...) arrives.
            "modal": partial(
                omni_cache_backend, mode="max-autotune", options={**flags, "inner": modal}
            ),
        }
    )
    torch.compile(pixart, backend=trace)(**CASES["pixart"].inputs())
    assert bare.extra == [{}] * 4
    assert flagged.extra == [{"mode": "max-autotune", "options": {"depth": 2}}] * 4
    assert modal.extra == [{"mode": "max-autotune"}] * 4


def test_cache_none_compiles_the_whole_graph_once(pixart: nn.Module) -> None:
    spy = Spy()
    options = {"cache": "none", "inner": spy, "mode": "default", "inner_options": {"depth": 2}}
    compiled = torch.compile(pixart, backend="omni_cache", options=options)
    omni_cache.refresh(pixart)
    assert all(map(torch.equal, run(compiled, CASES["pixart"]), run(pixart, CASES["pixart"])))
    assert len(spy.graphs) == 1
    assert spy.extra == [{"mode": "default", "options": {"depth": 2}}]
    assert omni_cache.summary(pixart).trajectories == ()
