"""Packages as they are written and shipped: compiled by AOTInductor, run where only PyTorch is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import CASES
from plans_by_hand import plan
from torch import nn
from torch._inductor import config
from torch.utils._pytree import tree_leaves
from toy_transformer import CHANNELS, TOKENS, Loop, ToyTransformer, gaussian

import omni_cache
from omni_cache.deployment import loader

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
EXPORT, RUN = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

ELSEWHERE = """
import sys
sys.path[:0] = {paths!r}
for name in ("omni_cache", "diffusers", "transformers"):
    sys.modules[name] = None  # whoever imports it fails
import torch
{page}
calls = torch.load("calls.pt")
records = []
results = []
for repetition in range(2):
    reset, branch.reset = branch.reset, lambda: records.append(branch.steps)
    results.append(denoise(calls))
    branch.reset = reset
    branch.reset()
torch.save((results, [step.action for step in records[-1]]), "results.pt")
"""
"""A process without site, so that no installation of ours is found, and with PyTorch's folder."""


def run_elsewhere(folder: Path, calls: list[dict[str, Any]]) -> tuple[list[list[Any]], list[str]]:
    """What a package returns in another process: the results of two loops, and the actions."""
    torch.save(calls, folder / "calls.pt")
    paths = [str(folder), str(Path(torch.__file__).parent.parent)]
    program = ELSEWHERE.format(paths=paths, page=RUN)
    run = subprocess.run(
        [sys.executable, "-S", "-I", "-c", program], cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    results: tuple[list[list[Any]], list[str]] = torch.load(folder / "results.pt")
    return results


def dispatched(
    module: nn.Module, calls: list[dict[str, Any]], flags: Mapping[str, Any]
) -> tuple[list[Any], list[str]]:
    """The results of the same loop under the runtime, and the actions."""
    omni_cache.enable(module, inner="eager", **flags)
    with omni_cache.generation(len(calls)), omni_cache.branch("cond"):
        results = [module(**call) for call in calls]
    (trajectory,) = omni_cache.summary(module).trajectories
    return results, [step.action for step in trajectory.steps]


def toy_calls() -> list[dict[str, Any]]:
    times = Loop().timesteps
    return [
        {
            "hidden_states": gaussian("noise", 1, TOKENS, CHANNELS) * (1 - step / 10),
            "timestep": torch.tensor([times[step]]),
            "prompt": gaussian("cond", 1, 5, CHANNELS),
        }
        for step in range(8)
    ]


def check(
    folder: Path, module: nn.Module, calls: list[dict[str, Any]], flags: Mapping[str, Any]
) -> None:
    """A package in a folder runs elsewhere as the module does under dispatch."""
    assert sorted(each.name for each in folder.iterdir()) == ["flux.pt2", "omni_cache_loader.py"]
    found, actions = run_elsewhere(folder, calls)
    expected, planned = dispatched(module, calls, flags)
    assert actions == planned
    assert {"computed", "reused"} <= set(actions)
    for results in found:
        for result, wanted in zip(tree_leaves(results), tree_leaves(expected), strict=True):
            assert float((result - wanted).abs().max()) < 1e-5


@pytest.fixture(autouse=True)
def _compiled_in_a_hurry() -> Iterator[None]:
    """The C++ around the kernels is large, and runs a few times here."""
    with config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        yield


def flux() -> tuple[nn.Module, list[dict[str, Any]]]:
    case = CASES["flux"]
    return case.build(), [case.inputs(3 * step) for step in range(8)]


def toy() -> tuple[nn.Module, list[dict[str, Any]]]:
    return ToyTransformer(), toy_calls()


@pytest.mark.slow
@pytest.mark.parametrize("made", [toy, pytest.param(flux, marks=pytest.mark.exhaustive)])
@torch.no_grad()
def test_the_page_s_package_runs_where_only_pytorch_is_and_decides_as_dispatch(
    made: Callable[[], tuple[nn.Module, list[dict[str, Any]]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    module, calls = made()
    exec(EXPORT, {"omni_cache": omni_cache, "transformer": module, "inputs": calls[0]})
    flags = {"cache": "teacache", "rel_l1_thresh": 0.3, "num_inference_steps": 8}
    check(tmp_path, module, calls, flags)


@pytest.mark.slow
@torch.no_grad()
def test_a_plan_s_package_runs_where_only_pytorch_is_and_skips_as_dispatch(tmp_path: Path) -> None:
    (module, calls), flags = toy(), {"cache": plan("ccrcscss")}
    path = tmp_path / "flux.pt2"
    assert omni_cache.export(module, calls[0], path, **flags) == path
    check(tmp_path, module, calls, flags)


def test_the_loader_imports_pytorch_and_the_standard_library() -> None:
    tree = ast.parse(Path(loader.__file__).read_text())
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            named.add(node.module or "")
    assert {each.partition(".")[0] for each in named} - sys.stdlib_module_names == {"torch"}


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        loader.load(tmp_path / "model.pt2")
    from torch.export.pt2_archive._package import package_pt2

    package_pt2(tmp_path / "other.pt2", extra_files={"words": "nothing"})
    with pytest.raises(ValueError, match=r"must be a package that omni_cache\.export wrote"):
        loader.load(tmp_path / "other.pt2")
