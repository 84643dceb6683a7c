"""The lowering in which the graph decides: a guarded graph as a program of one part.

    inputs, what is kept -> the model's flat outputs, what is to be kept

It knows no calls and holds no state: whose state goes in is for the runtime to say.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from omni_cache.dynamo import captures_conditionals
from omni_cache.kernels import number_dtype
from omni_cache.lowering.cond import decision, gate_of_all, initial_state
from omni_cache.lowering.dispatch import check_history_dtype
from omni_cache.lowering.inner import compile_part
from omni_cache.lowering.program import constant
from omni_cache.options import CompileOptions
from omni_cache.passes import (
    BEFORE,
    Analysis,
    GuardedGraph,
    RegionError,
    conditional,
    is_static_input,
    split,
)
from omni_cache.strategies import Gate, Policy, Strategy, Time

logger = logging.getLogger(__name__)

STEPS = 100
"""So many steps are looked at to see whether a gate weighs what it has measured by the step."""


class Within(NamedTuple):
    """What a trajectory keeps for a graph that decides, beside the signal and the history.

    Attributes:
        gate: (n,), the numbers of the gate's state.
        finite: (depth,) bool, for each entry of the history whether it is there, and finite.
        times: (depth, 2), the steps that it is of, and their timesteps.
    """

    gate: Tensor
    finite: Tensor
    times: Tensor


class Standing(NamedTuple):
    """What a call finds; without ``within``, ``signal`` or ``history`` there is nothing yet.

    Attributes:
        allowed: whether the call may be reused at all.
        at: where it lies.
        within: what the call before left.
        signal: of the call that this one's is compared with.
        history: the residuals of each entry of the history, newest first.
    """

    allowed: bool = False
    at: Time = Time(0)
    within: Within | None = None
    signal: Tensor | None = None
    history: Sequence[Tensor] = ()


class Decided(NamedTuple):
    """What a call leaves.

    Attributes:
        result: the model's flat outputs.
        signal: of this call.
        told: (n + 1,), the gate's state before, and how much the signal has changed.
        within: what the next call finds.
        residuals: of a computed call, nothing of another.
        finite: bool tensor, whether they are all finite; None of a call that was not computed.
    """

    result: Sequence[Any]
    signal: Tensor
    told: Tensor
    within: Within
    residuals: tuple[Tensor, ...]
    finite: Tensor | None


class DecidingProgram:
    """A guarded graph as one compiled part.

    Args:
        run: the part, compiled.
        guarded: what it was made of.
        static: which of the graph's inputs are parameters or buffers.
        gate: what decides in it.
        examples: what the part was compiled with, by the names of its inputs.

    Attributes:
        gate: the same.
        slots: places of the graph's inputs, by name.
        identity: the place of an input that only one model instance has, None where there is none.
    """

    per_sample = has_constants = has_modulations = False
    constant_inputs: Sequence[int] = ()
    modulation_inputs: Sequence[int] = ()

    def __init__(
        self,
        run: Callable[..., Any],
        guarded: GuardedGraph,
        static: Sequence[bool],
        gate: Gate,
        examples: Mapping[str, Any],
    ) -> None:
        self.gate = gate
        self._run = run
        self._results, self._depth = guarded.results, len(guarded.history)
        self.slots = {name: slot for slot, name in enumerate(guarded.inputs)}
        read = {*guarded.body.inputs, *guarded.reuse.inputs} & self.slots.keys()
        weights = [slot for name in read if static[slot := self.slots[name]]]
        self.identity = max(weights, default=None)
        self._shaped = [slot for slot, is_static in enumerate(static) if not is_static]
        self._begin = tuple(initial_state(gate))
        self._signal = _Blank.like(examples[BEFORE])
        self._entry = [_Blank.like(examples[name]) for name in guarded.residuals]
        # Dynamo hands over the sizes that may change.
        self._sizes = {
            each.node.expr: slot
            for name, slot in self.slots.items()
            if isinstance(each := examples[name], torch.SymInt)
        }

    def shaped(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors whose shapes decide the residuals'."""
        return [each for slot in self._shaped if isinstance(each := args[slot], Tensor)]

    def __call__(self, args: Sequence[Any], standing: Standing) -> Decided:
        """Run one forward on the graph's flat inputs."""
        device, depth = self._signal.device, self._depth
        number = number_dtype(device)
        within, (index, value, *_) = standing.within, standing.at
        if within is None:
            within = Within(
                constant(self._begin, number, device),
                constant((False,) * depth, torch.bool, device),
                constant(((0.0, 0.0),) * depth, number, device),
            )
        signal, history = standing.signal, standing.history
        if signal is None or not history:
            sizes = {symbol: args[slot] for symbol, slot in self._sizes.items()}
            signal = self._signal.made(sizes) if signal is None else signal
            history = history or [each.made(sizes) for each in self._entry] * depth
        made = self._run(
            *args,
            constant(standing.allowed, torch.bool, device),
            constant((index, math.nan if value is None else value), number, device),
            within.gate,
            signal,
            within.finite,
            within.times,
            *history,
        )
        result, (gate, now, distance, at, finite, *residuals) = (
            made[: self._results],
            made[self._results :],
        )
        told = torch.cat([within.gate, distance.view(1)])
        if residuals[0].shape[0] == 0:
            return Decided(result, now, told, within._replace(gate=gate), (), None)
        flags = torch.cat([finite, within.finite[:-1]])
        times = torch.cat([at, within.times[:-1]])
        kept = tuple([each[0] for each in residuals])
        return Decided(result, now, told, Within(gate, flags, times), kept, finite[0])


class _Blank(NamedTuple):
    """What a graph takes in place of a tensor that is not there yet, and does not look at.

    Its shape may have symbols, of sizes that may change. What a graph was traced with is not held.
    """

    shape: Sequence[Any]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, example: Tensor) -> _Blank:
        """In place of tensors like one that a graph was traced with."""
        sizes: Sequence[Any] = example.shape
        shape = [each.node.expr if isinstance(each, torch.SymInt) else each for each in sizes]
        return cls(shape, example.dtype, example.device)

    def made(self, sizes: Mapping[Any, int]) -> Tensor:
        """Zeros, contiguous, for the sizes of a call by symbol."""
        shape = [each if isinstance(each, int) else int(each.subs(sizes)) for each in self.shape]
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def compile_deciding(
    gm: GraphModule,
    analysis: Analysis,
    example_inputs: Sequence[Any],
    flags: CompileOptions,
    policy: Policy,
) -> DecidingProgram:
    """Split a graph at its region, and compile it with the decision in its middle.

    Args:
        gm: the graph.
        analysis: of it.
        example_inputs: its inputs, as Dynamo passes them.
        flags: with a guard that names the strategy within.
        policy: of that strategy, for the model's class.

    Raises:
        ValueError: the strategy does not decide on tensors, or not alike for all branches.
        RegionError: sizes depend on data.
    """
    guard = flags.guard
    assert guard is not None
    assert guard.within is not None
    name = guard.within.name
    check_history_dtype(flags, {x.device for x in example_inputs if isinstance(x, Tensor)})
    if analysis.supposed:
        raise RegionError(
            "sizes depend on data, which lowering='cond' does not take; lowering='dispatch' does"
        )
    gate = gate_of_all(name, policy, ("cond", "uncond"))
    guarded = split(
        gm, analysis, guard.depth, flags.history_dtype, merges=True, matches_strides=False
    )
    decide = decision(name, policy, gate, STEPS, guard.depth, guarded.weights_dtype)
    device = next(x.device for x in example_inputs if isinstance(x, Tensor))
    if device.type == "cuda":
        logger.info(within_text(guard.within))
    part = conditional(guarded, decide, len(initial_state(gate)), number_dtype(device))
    inputs = [*example_inputs, *part.example_inputs[len(example_inputs) :]]
    static = [is_static_input(node) for node in gm.graph.find_nodes(op="placeholder")]
    run = compile_part(part.module, inputs, flags)
    return DecidingProgram(run, guarded, static, gate, dict(zip(part.inputs, inputs, strict=True)))


def within_text(strategy: Strategy) -> str:
    """What there is to say of a graph that decides by itself."""
    captured = (
        "this PyTorch can capture as a node of a CUDA graph, and mode='reduce-overhead' is refused"
        if captures_conditionals()
        else "this PyTorch cannot capture in a CUDA graph"
    )
    return (
        f"decided in the graph by {strategy.name}; on a GPU the host reads one flag at each step "
        f"to run torch.cond, which {captured}"
    )
