"""What a package holds of a guarded module: one graph that decides, or parts and their schedule.

Each comes with its half of the manifest, which the loader reads.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from omni_cache.deployment.captured import Captured
from omni_cache.deployment.schedules import check_forecast, schedules
from omni_cache.dynamo import captures_conditionals
from omni_cache.kernels import number_dtype
from omni_cache.lowering.cond import allowed_steps, decision, gate_of_all, initial_state
from omni_cache.passes import BEFORE, WEIGHTS, GuardedGraph, Holding, RegionError, conditional
from omni_cache.strategies import Policy, Time
from omni_cache.strategies.strategy import Found

logger = logging.getLogger(__name__)

Lowered = tuple[dict[str, Any], dict[str, ExportedProgram]]
"""A half of the manifest, and the graphs by name."""


@dataclass(frozen=True)
class Guarded:
    """A captured module, split at its region.

    Attributes:
        strategy: its name, for messages.
        policy: what calls follow.
        graph: split with ``merges``.
        captured: what it was captured from.
        timestep: name of the input with the timestep, None where there is none.
        weighs_inputs: whether reused steps weigh what enters, too.
        steps: the number of steps.
        branches: names of the guidance branches.
    """

    strategy: str
    policy: Policy
    graph: GuardedGraph
    captured: Captured
    timestep: str | None
    weighs_inputs: bool
    steps: int
    branches: Sequence[str]

    def example(self, name: str) -> Any:
        """What the reuse part was traced with; None for what it does not take."""
        reuse = self.graph.reuse
        return dict(zip(reuse.inputs, reuse.example_inputs, strict=True)).get(name)


def deciding_graph(guarded: Guarded) -> Lowered:
    """One graph that decides within, for a strategy that measures.

    Raises:
        ValueError: the strategy does not decide on tensors, or not alike for all branches.
    """
    policy, graph, captured = guarded.policy, guarded.graph, guarded.captured
    steps, depth = guarded.steps, len(graph.history)
    advice = ". Export a package for each, with branches=['cond'] say"
    gate = gate_of_all(guarded.strategy, policy, guarded.branches, advice)
    if any(gate.begins_anew(Time(index)) for index in range(steps)):
        raise ValueError(
            f"cache={guarded.strategy!r} is not allowed with steps at which it begins anew "
            "(force_refresh_step_hint); leave them out, and reset the branch instead"
        )
    assert policy.signal is not None
    decide = decision(guarded.strategy, policy, gate, steps, depth, graph.weights_dtype)
    state = initial_state(gate)
    number = number_dtype(captured.flat[0].device)
    part = conditional(graph, decide, len(state), number, guarded.timestep)
    step = Holding(part, captured.weights)
    kept = [_like(step.examples[each]) for each in step.inputs[len(captured.values) :]]
    signal, residuals = _tensor(step.examples[BEFORE]), map(guarded.example, graph.residuals)
    device = signal.device
    if device.type == "cuda":
        logger.info(_READS_A_FLAG, _IN_A_CUDA_GRAPH[captures_conditionals()])
    manifest = {
        "kind": "cond",
        "device": str(device),
        "depth": depth,
        "number": str(number),
        "gate": state,
        "allowed": allowed_steps(gate, steps),
        "against": policy.signal.against,
        "signal": described(signal),
        "residuals": [described(each) for each in residuals],
        "results": len(captured.flat),
    }
    return manifest, {"step": _exported(step, [*captured.values.values(), *kept])}


def scheduled_parts(guarded: Guarded) -> Lowered:
    """The parts and what each step does, for a strategy that measures nothing.

    Raises:
        ValueError: the forecast needs more than steps, or the plan is for another run.
    """
    policy, graph, captured = guarded.policy, guarded.graph, guarded.captured
    check_forecast(policy.forecast)
    if policy.refuses is not None:
        dropped = "sigmas, guidance and guardrail" if policy.forecast.checks else "sigmas, guidance"
        warnings.warn(
            f"the package follows the plan whatever it is run with: {dropped} are checked by "
            "omni_cache.enable alone. Run it with those that the plan was tuned for.",
            stacklevel=2,
        )
        first = captured.flat[0]
        size, dtype = tuple(first.shape[1:]), str(first.dtype)
        at, branch = Time(policy.begins or 0), guarded.branches[0]
        why = policy.refuses(Found(at, guarded.steps, branch, None, size, dtype))
        if why is not None:
            raise ValueError(f"the plan is for another run: {why}")
    loops = {
        name: schedules(
            policy.gate(name, place),
            policy.forecast.of_branch(name),
            guarded.steps,
            len(graph.history),
            guarded.weighs_inputs,
        )
        for place, name in enumerate(guarded.branches)
    }
    parts = {
        name: Holding(part, captured.weights)
        for name, part in (
            ("prologue", graph.prologue),
            ("body", graph.body),
            ("reuse", graph.reuse),
            ("epilogue", graph.epilogue),
        )
    }
    values: dict[str, Any] = dict(captured.values)
    programs = {}
    for name, part in parts.items():
        examples = [
            values[each] if each in values else _like(part.examples[each]) for each in part.inputs
        ]
        if part.computes:
            programs[name] = _exported(part, examples)
        if name in ("prologue", "body"):
            values.update(zip(part.outputs, part(*examples), strict=True))
    manifest = {
        "kind": "parts",
        "device": str(captured.flat[0].device),
        "depth": policy.depth,
        "weights": [WEIGHTS, str(graph.weights_dtype)],
        "history": [list(entry) for entry in graph.history],
        "entered": [
            {
                "name": each.name,
                "kept": each.kept,
                "copies": each.copies,
                "dtype": None if each.dtype is None else str(each.dtype),
            }
            for each in graph.entered
        ],
        "schedules": loops,
        "skips": any(
            step["action"] == "skipped"
            for loop in loops.values()
            for steps in loop
            for step in steps
        ),
        "parts": {
            name: {
                "inputs": list(part.inputs),
                "outputs": list(part.outputs),
                "computes": part.computes,
                "returns": [] if part.computes else list(part.returns),
            }
            for name, part in parts.items()
        },
    }
    return manifest, programs


_READS_A_FLAG = "to decide, the package's host reads one flag at each step; %s"
_IN_A_CUDA_GRAPH = {
    True: "this PyTorch captures torch.cond in a CUDA graph, but not within AOTInductor",
    False: "this PyTorch cannot capture torch.cond in a CUDA graph",
}


def described(tensor: Tensor) -> dict[str, Any]:
    """Shape and dtype of a tensor, for the manifest."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}


def _like(example: Any) -> Tensor:
    """Zeros of the shape, dtype, strides and device of what a graph was traced with."""
    example = _tensor(example)
    shape, stride = tuple(example.shape), tuple(example.stride())
    made = torch.empty_strided(shape, stride, dtype=example.dtype, device=example.device)
    return made.zero_()


def _exported(graph: nn.Module, examples: Sequence[Any]) -> ExportedProgram:
    inputs = tuple(map(_tensor, examples))
    try:
        return torch.export.export(graph, inputs, strict=False)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RegionError(f"torch.export does not take the guarded graph: {lines[0]}") from error


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise RegionError(
            f"a part of the graph takes a {type(value).__name__} from another one; an exported "
            "graph takes tensors"
        )
    return value
