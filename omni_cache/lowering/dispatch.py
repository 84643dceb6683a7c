"""The lowering in which the host decides: every part of a guarded graph is compiled on its own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from omni_cache.dynamo import kernels_together
from omni_cache.lowering.inner import compile_part
from omni_cache.lowering.program import CompiledPart, GuardedParts, PartFunction, Program
from omni_cache.options import CompileOptions
from omni_cache.passes import (
    WEIGHTS,
    Analysis,
    GuardedGraph,
    Part,
    RegionError,
    is_static_input,
    roll,
    split,
    without_residuals,
)
from omni_cache.passes.order import is_written
from omni_cache.passes.storage import FLOAT8
from omni_cache.strategies import Guard

logger = logging.getLogger(__name__)


@kernels_together()
def compile_program(
    gm: GraphModule, analysis: Analysis, example_inputs: Sequence[Any], flags: CompileOptions
) -> Program:
    """Split a graph at its region, and compile the parts.

    Args:
        gm: the graph.
        analysis: of it.
        example_inputs: its inputs, as Dynamo passes them.
        flags: with a guard.
    """
    assert flags.guard is not None
    check_history_dtype(flags, {x.device for x in example_inputs if isinstance(x, torch.Tensor)})
    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = dict(zip((node.name for node in placeholders), example_inputs, strict=True))
    rest = None
    if analysis.supposed:
        rest = _compile_named(without_residuals(gm, analysis), examples, flags)
    guarded, per_sample = _split(gm, analysis, flags.guard, flags.history_dtype)
    constants, modulations = guarded.constants, guarded.modulations
    timestep = None if analysis.timestep is None else analysis.timestep.name
    # First, since most kernels are the body's: they are compiled while other parts are lowered.
    body = _compile_named(guarded.body, examples, flags)
    parts = GuardedParts(
        prologue=_compile_named(guarded.prologue, examples, flags),
        body=body,
        epilogue=_compile_named(guarded.epilogue, examples, flags),
        reuse=_compile_named(guarded.reuse, examples, flags),
        merges=guarded.merges,
        rest=rest,
        supposed=guarded.supposed,
        residuals=guarded.residuals,
        history=guarded.history,
        entered=guarded.entered,
        weights=WEIGHTS,
        signal=guarded.signal,
        weights_dtype=guarded.weights_dtype,
        per_sample=per_sample,
        constants=None if constants is None else _compile_named(constants, examples, flags),
        modulations=None if modulations is None else _compile_named(modulations, examples, flags),
        rows=None if modulations is None else _over_timesteps(modulations, timestep),
        timestep=timestep,
    )
    return Program(
        parts,
        list(examples),
        [is_static_input(node) for node in placeholders],
        reuses_memory=flags.inner_reuses_memory,
        copies_signal=analysis.signal is not None and is_written(analysis.signal.node),
    )


def check_history_dtype(flags: CompileOptions, devices: Iterable[torch.device]) -> None:
    """Raise RegionError where Inductor would fail on residuals of 8 bits."""
    if flags.history_dtype is not FLOAT8 or flags.inner != "inductor":
        return
    for each in devices:
        if each.type == "cuda" and torch.cuda.get_device_capability(each) < (8, 9):
            raise RegionError(
                f"history_dtype={FLOAT8} is compiled by Inductor for GPUs of compute capability "
                f"8.9 and newer, and {each} is older; use history_dtype='bfloat16'"
            )


def _split(
    gm: GraphModule, analysis: Analysis, guard: Guard, history_dtype: torch.dtype | None
) -> tuple[GuardedGraph, bool]:
    """Split a graph, and say whether its weights are of each sample.

    They are wherever there is something to weigh and a batch to tell apart, so that forecasts with
    as many residuals share what is compiled.
    """
    flags, inputs = (guard.depth, history_dtype), guard.inputs
    if guard.depth > 1:
        with contextlib.suppress(RegionError):
            return split(gm, analysis, *flags, per_sample=True, inputs=inputs), True
    return split(gm, analysis, *flags, inputs=inputs), False


def _compile_named(part: Part, examples: Mapping[str, Any], flags: CompileOptions) -> CompiledPart:
    """Compile a part with the whole graph's own inputs where it has them, fake values elsewhere.

    One that computes nothing, such as what comes before a whole model, is run as it is.
    """
    if not any(node.op.startswith("call_") for node in part.module.graph.nodes):
        return CompiledPart(part.module.forward, part.inputs, part.outputs)
    if flags.blocks == "rolled":
        part = roll(part)
    inputs = [
        examples.get(name, traced)
        for name, traced in zip(part.inputs, part.example_inputs, strict=True)
    ]
    return CompiledPart(compile_part(part.module, inputs, flags), part.inputs, part.outputs)


def _over_timesteps(part: Part, timestep: str | None) -> PartFunction:
    """A part over many timesteps at once, stacked before its own dimensions.

    It runs once in a generation, so that compiling it would take longer than it does. What an
    operation allows of no batch is computed for one timestep after the other.
    """
    place = part.inputs.index(timestep)
    dims = tuple(0 if slot == place else None for slot in range(len(part.inputs)))

    def run(*inputs: Any) -> Sequence[torch.Tensor]:
        try:
            return tuple(torch.vmap(part.module.forward, in_dims=dims)(*inputs))
        except (RuntimeError, NotImplementedError) as error:
            logger.info("modulations are computed for one timestep after the other: %s", error)
        before, after = inputs[:place], inputs[place + 1 :]
        rows = [part.module.forward(*before, each, *after) for each in inputs[place]]
        return [torch.stack(each) for each in zip(*rows, strict=True)]

    return run
