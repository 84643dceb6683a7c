"""A second process finds every part that the first one compiled, in both of PyTorch's caches.

They are Inductor's and AOTAutograd's. What differs from process to process in a part that we hand
over, such as a name that is counted up or the order of a set, is a part that is compiled again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cross_section import cross_section
from diffusers_models import CASES as CASES_OF_DIFFUSERS
from diffusers_models import ModelCase
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import (
    BypassAOTAutogradCache,
    check_node_safe,
)
from toy_transformer import ALWAYS_REUSE, CHANNELS, TOKENS, ToyTransformer, gaussian

import omni_cache
from omni_cache import dynamo
from omni_cache.backend import omni_cache_backend

STEPS = 4
PARTS = ("body", "prologue", "epilogue", "reuse")

MAGCACHE: dict[str, Any] = {
    "cache": "magcache",
    "num_inference_steps": STEPS,
    "mag_ratios": [1.0] * STEPS,
    "retention_ratio": 0.0,
    "max_skip_steps": 1,
}
DBCACHE: dict[str, Any] = {
    "cache": "dbcache",
    "fn_compute_blocks": 1,
    "bn_compute_blocks": 0,
    "max_warmup_steps": 1,
    "residual_diff_threshold": ALWAYS_REUSE["rel_l1_thresh"],
}
STRATEGIES = {
    "magcache": MAGCACHE,
    "magcache-newton-2": {**MAGCACHE, "forecast": "newton", "forecast_order": 2},
    "dbcache": DBCACHE,
}
CASES = {
    # Inductor that calls PyTorch's own kernels: the caches are the same, and no C++ is compiled.
    f"{name}-{blocks}": {**flags, "blocks": blocks, "inner_options": {"fallback_by_default": True}}
    for name, flags in STRATEGIES.items()
    for blocks in ("rolled", "unrolled")
}

CROSS_SECTION = ("magcache-rolled", "magcache-newton-2-unrolled", "dbcache-unrolled")
"""Each strategy, and blocks both ways."""

Found = dict[str, dict[str, int]]
"""For each case, how many parts each cache had (`_hit`), lacked, or would not take (`_bypass`)."""


@torch.no_grad()
def start(names: Sequence[str]) -> Found:
    """Compile the toy for each of the cases, in this process."""
    found = {}
    for name in names:
        torch._dynamo.reset()
        counters.clear()
        model = ToyTransformer(blocks=3)
        omni_cache.enable(model, **CASES[name])
        for step in range(STEPS):
            latents = gaussian(step, 1, TOKENS, CHANNELS)
            model(latents, torch.tensor([900.0 - step]), gaussian("prompt", 1, 5, CHANNELS))
        (trajectory,) = omni_cache.summary(model).trajectories
        assert {step.computed for step in trajectory.steps} == {True, False}  # all parts have run
        found[name] = {
            f"{cache}_{outcome}": counters[group][f"{cache}_{outcome}"]
            for group, cache in (("inductor", "fxgraph_cache"), ("aot_autograd", "autograd_cache"))
            for outcome in ("hit", "miss", "bypass")
        }
    return found


def start_elsewhere(folder: Path, names: Sequence[str]) -> Found:
    """`start` in a process of its own, whose caches lie in a folder."""
    command = f"import json, test_warm_start as it; print(json.dumps(it.start({names!r})))"
    process = subprocess.run(
        [sys.executable, "-c", command],
        cwd=Path(__file__).parent,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: Found = json.loads(process.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def starts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Found, Found]:
    """What the first process finds in a folder that is empty, and the second after it."""
    folder = tmp_path_factory.mktemp("caches")
    names = [*CASES] if request.config.getoption("--exhaustive") else CROSS_SECTION
    return start_elsewhere(folder, names), start_elsewhere(folder, names)


@pytest.mark.slow
def test_the_first_process_begins_with_nothing(starts: tuple[Found, Found]) -> None:
    first, _ = starts
    assert first["magcache-rolled"] == expected(miss=len(PARTS))


@pytest.mark.slow
@pytest.mark.parametrize("case", cross_section({name: name for name in CASES}, CROSS_SECTION))
def test_the_second_process_compiles_nothing(starts: tuple[Found, Found], case: str) -> None:
    _, second = starts
    assert second[case] == expected(hit=len(PARTS))


def expected(hit: int = 0, miss: int = 0) -> dict[str, int]:
    """Both caches alike."""
    outcomes = {"hit": hit, "miss": miss, "bypass": 0}
    return {
        f"{cache}_{outcome}": number
        for cache in ("fxgraph_cache", "autograd_cache")
        for outcome, number in outcomes.items()
    }


@pytest.mark.parametrize("case", cross_section(CASES_OF_DIFFUSERS, ("flux", "wan", "cogvideox")))
@torch.no_grad()
def test_parts_have_nothing_beside_the_models_own_that_a_cache_refuses(case: ModelCase) -> None:
    """AOTAutograd's cache takes functions by the name of their module, and few others."""
    of_parts: set[str] = set()

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        of_parts.update(refused(gm))
        return gm.forward

    flags = {**STRATEGIES["magcache-newton-2"], "inner": inner, "blocks": "rolled"}
    of_model: set[str] = set()

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        of_model.update(refused(gm))
        return omni_cache_backend(gm, example_inputs, options=flags)

    dynamo.compiled(case.build(), backend)(**case.inputs(0))
    assert of_parts <= of_model


def refused(gm: torch.fx.GraphModule) -> set[str]:
    """What AOTAutograd's cache would not take of a graph and those within."""
    graphs = (each.graph for each in gm.modules() if isinstance(each, torch.fx.GraphModule))
    return {str(node.target) for graph in graphs for node in graph.nodes if not is_taken(node)}


def is_taken(node: torch.fx.Node) -> bool:
    try:
        check_node_safe(node)
    except (BypassAOTAutogradCache, AttributeError):
        return False
    return True
