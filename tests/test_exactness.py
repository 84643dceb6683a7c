"""A computed step is the plain model's, bit for bit; a reused one is the eager formula's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from cross_section import cross_section
from diffusers_models import CASES, REPRESENTATIVES, ModelCase, sample
from eager_reference import capture_residual, forced_reuse
from one_trace import OneTrace, cached
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

import omni_cache
from omni_cache import omni_cache_backend
from omni_cache.runtime.trajectory import StepRecord

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

ALWAYS: dict[str, dict[str, Any]] = {
    "teacache": {**NEVER["teacache"], "rel_l1_thresh": 1e6},
    "magcache": {**NEVER["magcache"], "max_skip_steps": 100},
}
"""Flags with which each strategy reuses whatever there is to reuse."""

SKIPS = {"cache": "stepcache", "inner": "eager", "sim_thresholds": (-1.0,), "skip_countdowns": (9,)}
"""Flags with which the whole model is skipped, from its third call on."""


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def run(model: Callable[..., Any], case: ModelCase) -> list[Tensor]:
    # Gradients are off in fixtures of wider scope also. The place is named, because the cases make
    # their inputs anew for every step.
    with torch.no_grad(), omni_cache.generation(), omni_cache.branch("cond"):
        return [sample(model(**case.inputs(step))) for step in STEPS]


def relative_change(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


# --- a dozen classes, each in one trace ----------------------------------------------------------

CROSS_SECTION = ("flux", "sd3", "wan", "hunyuan_video", "z_image", "pixart")
"""Two streams that become one; two to the end, of which one is dropped; one with cross-attention,
of a video and of an image; refined text beside the image, and in one sequence with it."""


@dataclass(frozen=True)
class Runs:
    """Loops over one model: plain, with each strategy never and always reusing, and skipping."""

    case: ModelCase
    model: nn.Module
    plain: list[Tensor]
    never: dict[str, tuple[list[Tensor], tuple[StepRecord, ...]]]
    always: dict[str, tuple[list[Tensor], tuple[StepRecord, ...]]]
    skipping: tuple[list[Tensor], tuple[StepRecord, ...]]


@pytest.fixture(scope="module", params=cross_section(REPRESENTATIVES, CROSS_SECTION))
def runs(request: pytest.FixtureRequest) -> Runs:
    case: ModelCase = request.param
    model = case.build()
    flags = {"never": NEVER, "always": ALWAYS}
    backends = {
        f"{how} {strategy}": cached(strict=True, **options)
        for how, strategies in flags.items()
        for strategy, options in strategies.items()
    }
    others = {"skipping": cached(strict=True, **SKIPS), "plain": lookup_backend("eager")}
    trace = OneTrace({**backends, **others})
    compiled = torch.compile(model, backend=trace, fullgraph=True)

    def loop(name: str) -> tuple[list[Tensor], tuple[StepRecord, ...]]:
        trace.chosen = name
        omni_cache.refresh(model)
        outputs = run(compiled, case)
        (trajectory,) = omni_cache.summary(model).trajectories
        return outputs, trajectory.steps

    trace.chosen = "plain"
    plain = run(compiled, case)
    never, always = (
        {strategy: loop(f"{how} {strategy}") for strategy in flags[how]} for how in flags
    )
    return Runs(case, model, plain, never, always, loop("skipping"))


@pytest.mark.parametrize("strategy", NEVER)
def test_never_reusing_is_the_plain_graph_bit_for_bit(runs: Runs, strategy: str) -> None:
    outputs, steps = runs.never[strategy]
    assert [step.computed for step in steps] == [True] * len(STEPS)
    assert all(step.distance is not None for step in steps[1:])  # each was decided on
    assert all(map(torch.equal, outputs, runs.plain))


def test_a_model_compiled_by_itself_is_skipped_whole(runs: Runs) -> None:
    """Most have a decorator around their forward, whose code Dynamo traces first."""
    outputs, steps = runs.skipping
    assert [step.computed for step in steps] == [True, True, False, False]
    assert all(map(torch.equal, outputs, [*runs.plain[:2], runs.plain[1], runs.plain[1]]))


@pytest.mark.parametrize("strategy", ALWAYS)
def test_reuse_is_the_entry_plus_the_first_residual(runs: Runs, strategy: str) -> None:
    outputs, steps = runs.always[strategy]
    assert [step.computed for step in steps] == [True, False, False, False]
    assert torch.equal(outputs[0], runs.plain[0])
    model, case = runs.model, runs.case
    residual, other = (capture_residual(model, case, case.inputs(step)) for step in STEPS[:2])
    for index in (1, 2, 3):
        inputs = case.inputs(STEPS[index])
        # entry + (exit - entry) rounds twice, and the epilogue carries that on.
        expected = forced_reuse(model, case, inputs, residual)
        torch.testing.assert_close(outputs[index], expected, rtol=1e-4, atol=1e-5)
        # What it must not be lies far outside that tolerance.
        assert relative_change(outputs[index], runs.plain[index]) > 1e-3
        assert relative_change(outputs[index], forced_reuse(model, case, inputs, other)) > 1e-3


# --- flags that choose a compiler ----------------------------------------------------------------


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
