"""A guarded graph as one part that decides by itself, and parts as modules that hold their weights.

    conditional    inputs, what is kept -> outputs, what is to be kept;  torch.cond in its middle
    Holding        a part, over those of its inputs that are not weights

Knows graphs; what decides is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.multiprocessing.reductions import StorageWeakRef

from .build import Part
from .order import is_written
from .split import FINITE, WEIGHTS, GuardedGraph

BEFORE = "omni_cache_before"
"""The name of the signal that a deciding part compares with, of the call before."""

Decide = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
"""``(allowed, at, gate, now, before, finite, times) -> reuse, gate, distance, row``.

See `conditional` for what they are; ``at`` is (1, 2), the step and its timestep, and ``row`` are
the weights of the history, (1, depth).
"""


class Holding(nn.Module):
    """A part of a graph as a module that holds its weights.

    Args:
        part: the part.
        weights: parameters and buffers, by the names of the part's inputs; without them, it takes
            all of its inputs.

    Attributes:
        inputs: names of what it takes, in order.
        outputs: names of what it returns; none for the outputs of the whole graph.
        computes: whether it has any operation. One that has none returns what it is given.
    """

    def __init__(self, part: Part, weights: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        super().__init__()
        self.inputs = tuple(name for name in part.inputs if name not in weights)
        self.outputs = part.outputs
        self.computes = any(node.op.startswith("call_") for node in part.module.graph.nodes)
        self.examples = dict(zip(part.inputs, part.example_inputs, strict=True))
        # The part's own module compiles its code when it is first run, which tracers refuse.
        self._part, self._names = GraphModule(part.module, part.module.graph), part.inputs
        self._held = frozenset(part.inputs) & weights.keys()
        for name in sorted(self._held):
            self.register_buffer(name, weights[name].detach())

    @property
    def returns(self) -> tuple[str, ...]:
        """Names of the inputs that a part without operations returns."""
        (result,) = self._part.graph.find_nodes(op="output")
        return tuple(node.name for node in result.args[0])

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """What the part returns."""
        given = iter(inputs)
        values = [
            getattr(self, name) if name in self._held else next(given) for name in self._names
        ]
        return tuple(self._part(*values))

    def on(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the part returns for values by name."""
        made: tuple[Any, ...] = self(*[values[name] for name in self.inputs])
        return made


def conditional(
    guarded: GuardedGraph,
    decide: Decide,
    state: int,
    number: torch.dtype,
    timestep: str | None = None,
) -> Part:
    """A guarded graph as one part that decides by itself, without state of its own.

    It takes, after the graph's inputs:

    - ``allowed`` (bool, 0-dim), whether the step may be reused at all;
    - ``at`` (2,), the step and its timestep;
    - ``gate`` (n,), the gate's state;
    - ``before``, the signal that this step's is compared with;
    - ``finite`` (depth,), for each entry of the history whether it is there, and finite;
    - ``times`` (depth, 2), the steps that it is of, and their timesteps;
    - the residuals of each entry, newest first.

    All are contiguous. It returns the graph's outputs, then ``gate``, the signal, the distance of
    the signals, and of this step ``times`` (1, 2), ``finite`` (1,) and the residuals. These have a
    leading dimension, which is 1 for a computed step and 0 for a reused one: what stays as it was
    is not copied.

    Args:
        guarded: split with ``merges``, so that the epilogue is there once, and without
            ``matches_strides``.
        decide: the decision.
        state: how many numbers the gate's state has.
        number: the dtype of ``at``, ``gate`` and ``times``.
        timestep: name of the input that tells the timestep in place of ``at``; None for ``at``.
    """
    assert guarded.signal is not None
    prologue, reuse = guarded.prologue, guarded.reuse
    step = _Conditional(guarded, timestep, decide)
    (result,) = prologue.module.graph.find_nodes(op="output")
    made = {name: node.meta for name, node in zip(prologue.outputs, result.args[0], strict=True)}
    signal: Any = {**guarded.inputs, **made}[guarded.signal]["example_value"]
    examples = dict(zip(reuse.inputs, reuse.example_inputs, strict=True))
    depth = len(guarded.history)
    kept = {
        "omni_cache_allowed": signal.new_empty((), dtype=torch.bool),
        "omni_cache_at": signal.new_empty(2, dtype=number),
        "omni_cache_gate": signal.new_empty(state, dtype=number),
        BEFORE: signal.new_empty(signal.shape),
        "omni_cache_finite": signal.new_empty(depth, dtype=torch.bool),
        "omni_cache_times": signal.new_empty((depth, 2), dtype=number),
    }
    for entry in guarded.history:
        # What reuse never reads, such as an older entry of an integer, is like the newest one.
        for name, newest in zip(entry, guarded.residuals, strict=True):
            like: Any = examples[newest]
            kept[name] = like.new_empty(like.shape)
    graph = Graph()
    metas = {**guarded.inputs, **{name: {"example_value": each} for name, each in kept.items()}}
    inputs = [graph.placeholder(name) for name in metas]
    for node, meta in zip(inputs, metas.values(), strict=True):
        node.meta = dict(meta)
    all_made = graph.call_module("step", tuple(inputs))
    count = guarded.results + 5 + len(guarded.residuals)
    graph.output(tuple(graph.call_function(getitem, (all_made, i)) for i in range(count)))
    module = GraphModule({"step": step}, graph)
    module.meta = dict(guarded.body.module.meta)
    return Part(module, tuple(metas), ())


class _Conditional(nn.Module):
    """What `conditional` runs, over all inputs of its part."""

    def __init__(
        self,
        guarded: GuardedGraph,
        timestep: str | None,
        decide: Decide,
    ) -> None:
        super().__init__()
        assert guarded.merges
        assert guarded.signal is not None
        self.prologue = Holding(guarded.prologue)
        self.body = Holding(guarded.body)
        self.reuse = Holding(guarded.reuse)
        self.epilogue = Holding(guarded.epilogue)
        self._inputs, self._timestep, self._decide = tuple(guarded.inputs), timestep, decide
        self._signal, self._residuals = guarded.signal, guarded.residuals
        self._history = [name for entry in guarded.history for name in entry]
        self._merged = guarded.reuse.outputs
        examples = {**self.reuse.examples, **self.body.examples}
        self._views = _views(examples, self._history)
        # A branch takes no float: one that may change is fixed, which whoever traces has to guard.
        self._fixed = {
            name: float(each) for name, each in examples.items() if isinstance(each, torch.SymFloat)
        }
        source = guarded.analysis.signal
        # The caller may write into it, or the model itself.
        self._copies_signal = self._signal in self._inputs or (
            source is not None and is_written(source.node)
        )
        # Both branches have to lay their outputs out alike, which one cannot in a part of more.
        (result,) = guarded.body.module.graph.find_nodes(op="output")
        made = zip(guarded.body.outputs, result.args[0], strict=True)
        self._parts_of_more = {
            name for name, node in made if node.meta["example_value"].storage_offset() != 0
        }

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """One step."""
        given = iter(flat)
        values: dict[str, Any] = {name: next(given) for name in self._inputs}
        allowed, at, gate, before, finite, times = (next(given) for _ in range(6))
        history = dict(zip(self._history, given, strict=True))
        values.update(zip(self.prologue.outputs, self.prologue.on(values), strict=True))
        now = values[self._signal].contiguous()
        if self._copies_signal:
            now = now.clone()
        if self._timestep is not None:
            at = torch.stack([at[0], values[self._timestep].to(at).mean()])
        at = at[None]
        reuse, gate, distance, row = self._decide(allowed, at, gate, now, before, finite, times)
        operands = {**values, **history, WEIGHTS: row}
        read = {*self.body.inputs, *self.reuse.inputs}
        names = [name for name in operands if name in read and name not in self._fixed]
        given_over = [
            operands[name].clone() if name in self._views else operands[name] for name in names
        ]
        # By the operator: `torch.cond` would have Dynamo trace what is traced already.
        made = torch.ops.higher_order.cond(
            reuse,
            lambda *given: self._reused({**self._fixed, **dict(zip(names, given, strict=True))}),
            lambda *given: self._computed({**self._fixed, **dict(zip(names, given, strict=True))}),
            tuple(given_over),
        )
        count = len(self._merged)
        values.update(zip(self._merged, made[:count], strict=True))
        kept = (gate, now, distance, at, *made[count:])
        return (*self.epilogue.on(values), *kept)

    def _computed(self, values: Mapping[str, Any]) -> tuple[Tensor, ...]:
        made = dict(zip(self.body.outputs, self.body.on(values), strict=True))
        outputs = [
            made[name].clone(memory_format=torch.contiguous_format)
            if name in self._parts_of_more
            else _laid_out(made[name])
            for name in self._merged
        ]
        residuals = [_laid_out(made[name])[None] for name in self._residuals]
        return (*outputs, made[FINITE][None], *residuals)

    def _reused(self, values: Mapping[str, Any]) -> tuple[Tensor, ...]:
        # A branch may return neither an entry of the history nor a part of another tensor.
        outputs = [
            each.clone(memory_format=torch.contiguous_format) for each in self.reuse.on(values)
        ]
        kept = [values[name] for name in self._residuals]
        empty = [each.new_empty((0, *each.shape)) for each in kept]
        finite = torch.ones(1, dtype=torch.bool, device=kept[0].device)
        return (*outputs, finite, *empty)


def _views(examples: Mapping[str, Any], apart: Sequence[str]) -> set[str]:
    """Names of tensors that lie in the memory of an earlier one, which operands may not.

    Args:
        examples: what the parts were traced with.
        apart: names of tensors that lie apart whatever they were traced with.
    """
    seen, found = set(), set()
    for name, example in examples.items():
        if isinstance(example, Tensor) and name not in apart:
            memory = StorageWeakRef(example.untyped_storage())  # type: ignore[no-untyped-call]
            if memory in seen:
                found.add(name)
            seen.add(memory)
    return found


def _laid_out(tensor: Tensor) -> Tensor:
    """A contiguous tensor, whose strides follow from its shape in dimensions of size 1 too."""
    return tensor.contiguous().flatten().view(tensor.shape)
