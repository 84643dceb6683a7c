"""export: a module with its cache as a package that runs without omni_cache.

    capture -> analyse, split (passes) -> graphs that hold their weights -> AOTInductor -> .pt2

A strategy that measures becomes one graph that decides within (`lowering.cond`). One that goes by
steps becomes its parts, and what each step does is written into the package.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from omni_cache.backend import analyse_for_guard
from omni_cache.capture.extractor import find_extractor
from omni_cache.capture.frame import TracedFrame
from omni_cache.capture.ranks import groups_of_body
from omni_cache.deployment import loader
from omni_cache.deployment.captured import Captured, capture
from omni_cache.deployment.graphs import Guarded, deciding_graph, described, scheduled_parts
from omni_cache.dynamo import compile_ahead, write_package
from omni_cache.lowering.cond import ALLOWED
from omni_cache.options import CompileOptions
from omni_cache.passes import Analysis, GuardedGraph, RegionError, split
from omni_cache.pipelines.identity import owner_of
from omni_cache.strategies import Plan, Policy, Strategy

logger = logging.getLogger(__name__)

LOADER = "omni_cache_loader.py"
"""The name of the loader beside a package."""

BRANCHES = ("cond", "uncond")


@dataclass(frozen=True)
class Written:
    """A package before it is compiled.

    Attributes:
        manifest: its JSON.
        programs: its graphs by name.
        patches: options of Inductor to compile them with.
    """

    manifest: dict[str, Any]
    programs: dict[str, ExportedProgram]
    patches: dict[str, Any]


def export(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    path: str | os.PathLike[str],
    cache: Any = "teacache",
    *,
    branches: Sequence[str] | None = None,
    **flags: Any,
) -> Path:
    """Write a module and its cache as an AOTInductor package, which runs without omni_cache.

    The package is for inputs of the shapes, dtypes and devices of the example, and for one number
    of steps. Beside it lies the file that loads it, ``omni_cache_loader.py``, which imports PyTorch
    and nothing else. The module stays as it is; it is run once.

    Args:
        module: a transformer; of a pipeline its ``transformer``.
        example_inputs: what it is called with at a step: a tuple by position, or a dict by name.
            Tensors become inputs; numbers, strings and None become constants of the package.
        path: of the package, ending in ``.pt2``; what is there is replaced.
        cache: as in :func:`omni_cache.enable`: the name of a strategy, a strategy or a plan.
        branches: names of the guidance branches that are told apart; by default those of a plan,
            or "cond" and "uncond".
        flags: as in :func:`omni_cache.enable`: fields of the strategy, of which
            ``num_inference_steps`` is needed unless a plan says it, ``signal``, ``region``,
            ``history_dtype``, ``mode`` and ``inner_options``.

    Returns:
        The path of the package.

    Raises:
        TypeError: ``module`` is no module, or the example inputs do not fit it.
        ValueError: a flag or the path is not allowed, or the strategy cannot be exported.
        RegionError: the module cannot be guarded or is no single graph.
    """
    target = _checked_path(path)
    written = write(module, example_inputs, cache, branches=branches, **flags)
    files = {name: compile_ahead(each, written.patches) for name, each in written.programs.items()}
    write_package(target, files, {loader.MANIFEST: json.dumps(written.manifest)})
    shutil.copyfile(loader.__file__, target.with_name(LOADER))
    return target


def write(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    cache: Any,
    *,
    branches: Sequence[str] | None = None,
    **flags: Any,
) -> Written:
    """All of :func:`export` but the compilation and the file."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module={type(module).__name__} is not allowed; module must be a torch.nn.Module, "
            "such as a pipeline's transformer"
        )
    module = getattr(module, "_orig_mod", module)
    args, kwargs = _example(example_inputs)
    options = _options({"cache": cache, **flags})
    strategy, guard = options.strategy, options.guard
    assert strategy is not None
    assert guard is not None
    strategy = strategy.for_transformer(owner_of("", module))
    if find_extractor(module) is not None:
        raise RegionError(
            f"{type(module).__name__} cannot be exported: a registered extractor takes it apart in "
            "Python; omni_cache.enable caches it in this process"
        )

    def look(gm: GraphModule, frame: TracedFrame) -> tuple[Policy, Analysis, GuardedGraph]:
        name, analysis = analyse_for_guard(gm, options, frame)
        policy = strategy.policy(name)
        if policy.signal is not None and analysis.whole:
            raise ValueError(
                f"cache={strategy.name!r} is not allowed; it reuses the whole model, and decides "
                f"by earlier results. Choose {ALLOWED}"
            )
        if analysis.supposed:
            raise RegionError("sizes depend on data; an exported graph has fixed ones")
        if groups_of_body(analysis.region.body, options.process_group):
            raise RegionError("ranks compute a call together, and a package has one rank")
        depth, dtype = guard.depth, options.history_dtype
        in_parts = policy.signal is None
        graph = split(
            gm,
            analysis,
            depth,
            dtype,
            inputs=guard.inputs,
            merges=True,
            matches_strides=in_parts,
        )
        return policy, analysis, graph

    with torch.no_grad():
        captured = capture(module, args, kwargs, look)
        policy, analysis, graph = captured.found
        steps = policy.num_inference_steps
        if steps is None:
            raise ValueError(
                "num_inference_steps=None is not allowed; a package is for one number of steps"
            )
        guarded = Guarded(
            strategy.name,
            policy,
            graph,
            captured,
            None if analysis.timestep is None else analysis.timestep.name,
            guard.inputs,
            steps,
            _branches(branches, strategy),
        )
        lower = scheduled_parts if policy.signal is None else deciding_graph
        manifest, programs = lower(guarded)
    manifest |= _calling(module, captured, strategy)
    manifest |= {
        "steps": steps,
        "begins": policy.begins or 0,
        "branches": list(guarded.branches),
    }
    return Written(manifest, programs, options.inductor_patches)


def _calling(module: nn.Module, captured: Captured, strategy: Strategy) -> dict[str, Any]:
    """What a manifest says of how the module is called."""
    calling = captured.calling
    return {
        "format": loader.FORMAT,
        "torch": torch.__version__,
        "model_class": type(module).__name__,
        "strategy": repr(strategy),
        "parameters": list(calling.parameters),
        "inputs": dict(calling.inputs),
        "tensors": {path: described(each) for path, each in calling.tensors.items()},
        "constants": dict(calling.constants),
        "result": calling.result,
    }


def _options(flags: Mapping[str, Any]) -> CompileOptions:
    """The flags, checked.

    Raises:
        ValueError: one has a value that a package cannot have.
    """
    options = CompileOptions.parse(flags)
    if options.guard is None:
        raise ValueError(
            "cache='none' is not allowed; torch._inductor.aoti_compile_and_package exports a "
            "module without a cache"
        )
    given = {
        "inner": (options.inner != "inductor", "left out; AOTInductor compiles a package"),
        "history_device": (
            options.history_device is not None,
            "left out; a package keeps residuals where they are made",
        ),
        "hoist": (
            bool(options.hoist),
            "left out; a package keeps nothing that is computed once in a generation",
        ),
        "mode": (
            options.inner_reuses_memory,
            "one without CUDA graphs, which AOTInductor does not replay",
        ),
    }
    for flag, (is_wrong, allowed) in given.items():
        if is_wrong:
            raise ValueError(f"{flag}={flags.get(flag)!r} is not allowed; {flag} must be {allowed}")
    return options


def _branches(given: Sequence[str] | None, strategy: Strategy) -> tuple[str, ...]:
    if given is None:
        return _planned_branches(strategy) if isinstance(strategy, Plan) else BRANCHES
    is_listed = isinstance(given, (list, tuple)) and len(given) > 0
    if not is_listed or not all(isinstance(each, str) for each in given):
        raise ValueError(f"branches={given!r} is not allowed; branches must be a list of names")
    known = _planned_branches(strategy) if isinstance(strategy, Plan) else given
    for name in given:
        if name not in known:
            raise ValueError(
                f"branches={given!r} is not allowed; the plan has {', '.join(map(repr, known))}"
            )
    return tuple(given)


def _planned_branches(plan: Plan) -> tuple[str, ...]:
    grams = plan.content.grams
    return tuple(grams.get(plan.component or next(iter(grams)), {}))


def _example(given: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        return (), given
    if isinstance(given, (tuple, list)):
        return tuple(given), {}
    raise TypeError(
        f"example_inputs={type(given).__name__} is not allowed; example_inputs must be a tuple of "
        "the module's arguments, or a dict of them by name"
    )


def _checked_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).endswith(".pt2"):
        raise ValueError(f"path={path!r} is not allowed; path must end in .pt2")
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path={str(path)!r} is not allowed; there is no folder {target.parent}")
    return target
