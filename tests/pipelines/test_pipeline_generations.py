"""Generations of enabled pipelines, as they are, one after another, and after one that failed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, STEPS, TinyPipeline
from torch import Tensor
from torch._dynamo.utils import counters

import omni_cache
from omni_cache.calibration import estimate_mag_ratios

RATIOS = (1.0, 0.9, 1.1, 0.95, 1.05, 0.9, 1.08, 0.97)
MAGCACHE: dict[str, Any] = {
    "cache": "magcache",
    "mag_ratios": RATIOS,
    "threshold": 0.21,
    "max_skip_steps": 2,
    "retention_ratio": 0.25,
}
TEACACHE: dict[str, Any] = {"cache": "teacache", "coefficients": [1.0, 0.0], "rel_l1_thresh": 0.3}
STRATEGIES = {"teacache": TEACACHE, "magcache": MAGCACHE}


class StopError(Exception):
    """Ends a generation half-way."""


class Stopper:
    """An inner compiler whose parts raise `StopError` once, when so many more of them have run."""

    def __init__(self) -> None:
        self.remaining: int | None = None

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        def run(*args: Any) -> Any:
            if self.remaining is not None:
                self.remaining -= 1
                if self.remaining < 0:
                    self.remaining = None
                    raise StopError
            return gm.forward(*args)

        return run


def enabled(kind: TinyPipeline, **flags: Any) -> Any:
    return omni_cache.enable(kind.build(), **{"inner": "eager", **flags})


def trajectories(pipe: Any) -> list[tuple[str, str, int]]:
    """Model, branch and number of steps of each trajectory of the latest generation."""
    return [
        (each.model, each.branch, len(each.steps)) for each in omni_cache.summary(pipe).trajectories
    ]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("flux", "magcache"),
        pytest.param("sd3", "magcache", marks=pytest.mark.exhaustive),
        pytest.param("wan", "magcache", marks=pytest.mark.exhaustive),
        ("wan with experts", "teacache"),  # guided by branches, one model after the other
    ],
)
def test_a_generation_sees_nothing_of_those_before(name: str, strategy: str) -> None:
    kind, inner = PIPELINES[name], Stopper()
    flags = {**STRATEGIES[strategy], "inner": inner}
    expected = kind.generate(enabled(kind, **flags))
    pipe = enabled(kind, **flags)

    def stop_after(last: int) -> Callable[[int], None]:
        def after_step(step: int) -> None:
            if step == last:
                raise StopError

        return after_step

    kind.generate(pipe, "an owl", seed=1)
    assert torch.equal(kind.generate(pipe), expected)
    assert torch.equal(kind.generate(pipe), expected)
    assert omni_cache.summary(pipe).reused_steps > 0
    for last in (0, 1, 5):
        with pytest.raises(StopError):
            kind.generate(pipe, "an owl", seed=1, after_step=stop_after(last))
        assert torch.equal(kind.generate(pipe), expected), f"stopped after step {last}"
    for parts in (1, 2, 4, 13):
        inner.remaining = parts
        with pytest.raises(StopError):
            kind.generate(pipe, "an owl", seed=1)
        assert torch.equal(kind.generate(pipe), expected), f"stopped after {parts} parts"


@pytest.mark.parametrize("name", PIPELINES)
def test_every_branch_of_every_model_has_a_trajectory(name: str) -> None:
    kind = PIPELINES[name]
    pipe = enabled(kind, **TEACACHE)
    kind.generate(pipe)

    first = 4 if name == "wan with experts" else STEPS
    expected = [("transformer", branch, first) for branch in kind.branches]
    if name == "wan with experts":
        expected += [("transformer_2", branch, STEPS - first) for branch in kind.branches]
    assert trajectories(pipe) == expected
    for model in filter(None, (pipe.transformer, getattr(pipe, "transformer_2", None))):
        for trajectory in model._compiled_call_impl.state.latest.trajectories.values():
            # All is freed with the last step, for experts that had theirs before, too.
            assert trajectory.memory_bytes > 0
            assert (trajectory.history.kept, trajectory.signal) == ([], None)

    counters.clear()
    kind.generate(pipe, steps=5)
    assert counters["stats"]["unique_graphs"] == 0
    assert sum(steps for _, _, steps in trajectories(pipe)) == 5 * len(kind.branches)


def test_experts_keep_their_own_residuals_and_count_their_steps_together() -> None:
    kind = PIPELINES["wan with experts"]
    pipe = enabled(kind, **MAGCACHE)
    kind.generate(pipe)

    for high, low in zip(*[iter(split_by_model(pipe))] * 2, strict=True):
        reasons = [[step.reason for step in each.steps] for each in (high, low)]
        assert reasons == [
            ["first step", "retention", "below threshold", "below threshold"],
            # It has nothing to reuse at first, but it is past the first quarter.
            ["first step", "below threshold", "below threshold", "max_skip_steps"],
        ]
        # The step after a computed one is as far off as the ratio of just that step says.
        assert high.steps[2].distance == pytest.approx(abs(1 - RATIOS[2]))
        assert low.steps[1].distance == pytest.approx(abs(1 - RATIOS[5]))


def split_by_model(pipe: Any) -> list[Any]:
    """The trajectories of a pipeline with experts: high noise, low noise, branch by branch."""
    found = omni_cache.summary(pipe).trajectories
    branches = dict.fromkeys(each.branch for each in found)
    return [each for branch in branches for each in found if each.branch == branch]


def test_experts_are_calibrated_as_one_loop() -> None:
    kind = PIPELINES["wan with experts"]
    pipe = kind.build()
    ratios = estimate_mag_ratios(pipe, lambda: kind.generate(pipe), STEPS, inner="eager")

    assert list(ratios) == ["cond", "uncond"]
    for each in ratios.values():
        assert len(each) == STEPS
        # Each expert begins with nothing to compare with; the second takes over at the half.
        assert [index for index, ratio in enumerate(each) if ratio == 1.0] == [0, STEPS // 2]


def test_a_generation_may_be_put_around_calls_of_a_pipeline() -> None:
    """The pipeline tells when its loop begins, and how long it is, within the generation, too."""
    kind = PIPELINES["flux"]
    alone = enabled(kind, **MAGCACHE)
    expected = [kind.generate(alone, steps=steps) for steps in (6, 8)]
    pipe = enabled(kind, **MAGCACHE)

    with omni_cache.generation():
        kind.generate(pipe, "an owl", seed=1, steps=8)
        found = [kind.generate(pipe, steps=steps) for steps in (6, 8)]

    assert all(map(torch.equal, found, expected))


def test_what_a_generation_is_told_counts_more_than_what_the_pipeline_says() -> None:
    kind = PIPELINES["flux"]
    pipe = enabled(kind, **MAGCACHE)
    with omni_cache.generation(num_inference_steps=16):
        kind.generate(pipe)
    steps = omni_cache.summary(pipe).trajectories[0].steps

    # A quarter of 16 steps is always computed.
    assert [step.reason for step in steps[:5]] == [
        "first step",
        *["retention"] * 3,
        "below threshold",
    ]


def test_two_pipelines_of_one_class_take_turns() -> None:
    """Their models share one compiled graph."""
    kind = PIPELINES["flux"]
    counters.clear()
    expected = [
        kind.generate(enabled(kind, **TEACACHE), prompt, seed)
        for prompt, seed in (("a fox", 0), ("an owl", 1))
    ]
    outer, inner = enabled(kind, **TEACACHE), enabled(kind, **TEACACHE)
    found: dict[int, Tensor] = {}

    def generate_the_other(step: int) -> None:
        found[step] = kind.generate(inner, "an owl", 1)

    assert torch.equal(kind.generate(outer, after_step=generate_the_other), expected[0])
    assert len(found) == STEPS
    assert all(torch.equal(each, expected[1]) for each in found.values())
    assert counters["stats"]["unique_graphs"] == 1


NEW_PROCESS = """
import json, sys
import torch
from test_pipeline_generations import STRATEGIES, digest, enabled
from tiny_pipelines import PIPELINES

torch.set_num_threads(int(sys.argv[1]))
kind = PIPELINES["flux"]
found = {name: digest(kind.generate(enabled(kind, **flags))) for name, flags in STRATEGIES.items()}
print(json.dumps(found))
"""


def digest(latents: Tensor) -> str:
    return hashlib.sha256(latents.numpy().tobytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/runtime/test_second_generation.py says the same of a loop
def test_a_second_generation_is_the_first_of_a_new_process() -> None:
    here = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(torch.get_num_threads())],
        cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = json.loads(child.stdout.splitlines()[-1])
    kind, found = PIPELINES["flux"], {}

    for name, flags in STRATEGIES.items():
        pipe = enabled(kind, **flags)
        kind.generate(pipe, "an owl", seed=1)
        found[name] = digest(kind.generate(pipe))

    assert found == expected
    assert len(set(found.values())) == 2
