"""The split: a graph with a region becomes four callable parts and the guard between them.

    prologue: inputs               -> signal, region inputs, whatever else the epilogue reads
    body:     region inputs        -> outputs, residuals (= outputs - partners), finite
    epilogue: outputs, ...         -> the graph's outputs                       (after the body)
    reuse:    partners, residuals  -> outputs = partners + residuals -> the graph's outputs

The subtraction is the last node of the body and the addition the first of ``reuse``, which is the
epilogue a second time, so that a compiler fuses both with their neighbours.

A residual is cached with its non-finite elements replaced by zero, and the body says in ``finite``
if there were none: no NaN can be reused, even by a gate that reads nothing back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.node import map_arg

from .block_loop import BlockLoop, find_block_loop
from .node import (
    SCOPE_ENDS,
    Modes,
    dependencies,
    is_shape,
    is_static_input,
    memory_root,
    modes,
    nbytes,
    op_name,
    tensor_of,
    written_nodes,
)
from .region import (
    Region,
    RegionError,
    check_cuts,
    close_region,
    overwritten_inputs,
    shrink_body,
    take_in,
    take_in_sizes,
    with_ancestors,
)
from .residual import (
    Cat,
    Leaf,
    Permute,
    ResidualPair,
    Slice,
    View,
    leaves,
    pair_outputs,
    unreached_outputs,
)
from .signal import Signal, find_signal, find_timestep

FINITE = "omni_cache_finite"
"""The name of the body's last output: a bool tensor, whether every residual was finite."""

_GUARD = "omni_cache_guard"


@dataclass(frozen=True)
class Part:
    """A piece of the graph as a module of its own; values are known by the names of their nodes."""

    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def example_inputs(self) -> list[object]:
        """What the part was traced with: fake tensors, parameters and sizes."""
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        return [node.meta["example_value"] for node in placeholders]


@dataclass(frozen=True)
class Analysis:
    """What the pass found in a graph, before anything is rewritten.

    ``overwritten`` are the region inputs that the body writes into.
    """

    graph: Graph
    loop: BlockLoop
    region: Region
    pairs: tuple[ResidualPair, ...]
    signal: Signal | None
    timestep: Node | None
    overwritten: tuple[Node, ...]

    @property
    def residual_bytes(self) -> int:
        """Bytes that one set of cached residuals takes."""
        return sum(_bytes(pair.output) for pair in self.pairs)

    @property
    def signal_bytes(self) -> int:
        """Bytes of the signal that is kept from the step before."""
        return 0 if self.signal is None else _bytes(self.signal.node)


@dataclass(frozen=True)
class GuardedGraph:
    """A graph split at its region.

    ``residuals`` names the outputs of ``body`` that a computed step leaves to reused ones.
    """

    analysis: Analysis
    prologue: Part
    body: Part
    epilogue: Part
    reuse: Part
    residuals: tuple[str, ...]
    signal: str | None


def analyse(
    graph: Graph,
    *,
    region: Sequence[str] | None = None,
    signal: str | None = "auto",
    parameters: Sequence[str] = (),
) -> Analysis:
    """Find block loop, region, residual pairs and signal. Changes nothing.

    Args:
        graph: a Dynamo graph.
        region: paths of the ``ModuleList``s that make up the block loop, or None to find them.
        signal: ``"auto"``, ``"timestep_embedding"``, a module's path, or None for no signal.
        parameters: names of the model's positional parameters, by which to know the timestep where
            the model's ``forward`` is wrapped in one with ``*args``.

    Raises:
        RegionError: the graph has no region that can be skipped; the message says why.
    """
    before = dependencies(graph)
    loop = find_block_loop(graph, region, before)
    closed = take_in_sizes(graph, close_region(graph, loop.nodes, before))
    found, pairs = pair_outputs(graph, closed)
    unreached = unreached_outputs(found, pairs)
    if unreached:
        found, pairs = _without(graph, found, pairs, with_ancestors(found, unreached, before))
    timestep = find_timestep(graph, parameters)
    chosen = None
    if signal is not None and pairs:
        chosen = find_signal(graph, loop, found, pairs, timestep, signal, before)
        found, pairs = _without(graph, found, pairs, chosen.moved)
    if not pairs:
        raise RegionError(
            "nothing that only the block loop computes is used after it; say what the blocks are "
            "with omni_cache.register_extractor"
        )
    kept = {leaf for pair in pairs if pair.partner is not None for leaf in leaves(pair.partner)}
    if chosen is not None:
        kept.add(chosen.node)
    found = take_in(graph, found, kept, before)
    check_cuts(found)
    overwritten = overwritten_inputs(found)
    return Analysis(graph, loop, found, pairs, chosen, timestep, overwritten)


def _without(
    graph: Graph, region: Region, pairs: tuple[ResidualPair, ...], nodes: Collection[Node]
) -> tuple[Region, tuple[ResidualPair, ...]]:
    """The region with some nodes of its body, and all that they need, in the prologue."""
    if not nodes:
        return region, pairs
    region = shrink_body(graph, region, nodes)
    # What the prologue computes on every step needs no residual.
    outputs = set(region.outputs)
    return region, tuple(pair for pair in pairs if pair.output in outputs)


def split(gm: GraphModule, analysis: Analysis) -> GuardedGraph:
    """Cut a graph module into the parts of a guarded graph.

    Args:
        gm: the module that ``analysis`` was made from; it is left as it is.
        analysis: what to cut, from :func:`analyse`.
    """
    region, pairs = analysis.region, analysis.pairs
    result: Node = gm.graph.find_nodes(op="output")[0]
    held_modes = modes(gm.graph)
    taken = {node.name for node in gm.graph.nodes}
    partners = {pair.output: _Partner(pair, taken) for pair in pairs if pair.partner is not None}
    kept = {*_reads(region.body), *_reads(region.epilogue), *result.all_input_nodes}
    for pair in pairs:
        kept.update(leaves(pair.partner) if pair.partner is not None else ())
    if analysis.signal is not None:
        kept.add(analysis.signal.node)

    prologue = _Builder(gm, held_modes)
    prologue.copy(region.prologue)
    made = {node.name: prologue.values[node] for node in region.prologue if node in kept}
    for partner in partners.values():
        if partner.composed:
            made[partner.name] = prologue.laid_out(prologue.compose(partner.view))

    body = _Builder(gm, held_modes)
    for node in analysis.overwritten:
        body.values[node] = body.call(torch.clone, body.read(node))
    body.copy(region.body)
    outputs = {pair.output.name: body.values[pair.output] for pair in pairs}
    residuals: dict[str, Node] = {}
    for pair in pairs:
        value = body.values[pair.output]
        if pair.output in partners:
            residual = body.call(torch.sub, value, body.partner(partners[pair.output], made))
            # After the subtraction the output is known to have the partner's shape.
            outputs[pair.output.name] = body.laid_out(value)
            value = residual
        residuals[_unused(f"{pair.output.name}_residual", taken)] = value
    finite = None
    for name, value in residuals.items():
        fine = body.call(torch.all, body.call(torch.isfinite, value))
        residuals[name] = body.call(torch.nan_to_num, value, 0.0, 0.0, 0.0)
        finite = fine if finite is None else body.call(torch.logical_and, finite, fine)
    assert finite is not None  # there is at least one pair

    epilogue = _Builder(gm, held_modes)
    for pair in pairs:
        made_anew = outputs[pair.output.name]
        if made_anew is not body.values[pair.output]:
            epilogue.values[pair.output] = epilogue.placeholder(pair.output.name, _value(made_anew))
    epilogue.copy(region.epilogue)

    reuse = _Builder(gm, held_modes)
    overwrites = _overwrites(region)
    returned = {memory_root(each) for each in result.all_input_nodes}
    for pair, (name, residual) in zip(pairs, residuals.items(), strict=True):
        value = reuse.placeholder(name, {"example_value": residual.meta["example_value"]})
        if pair.output in partners:
            value = reuse.call(torch.add, reuse.partner(partners[pair.output], made), value)
        elif overwrites or memory_root(pair.output) in returned:
            # Whoever writes into it must not write into what the next reused step takes over.
            value = reuse.call(torch.clone, value)
        reuse.values[pair.output] = value
    reuse.copy(region.epilogue)

    return GuardedGraph(
        analysis,
        prologue=prologue.finish(made),
        body=body.finish({**outputs, **residuals, FINITE: finite}),
        epilogue=epilogue.finish_with(result),
        reuse=reuse.finish_with(result),
        residuals=tuple(residuals),
        signal=None if analysis.signal is None else analysis.signal.node.name,
    )


def is_guard(node: Node) -> bool:
    """Whether a node of a part is no copy of a traced one: a residual, a partner, an addition."""
    return _GUARD in node.meta


def _overwrites(region: Region) -> bool:
    """Whether the epilogue writes in place into what the body made."""
    body = set(region.body)
    return any(
        memory_root(each) in body for node in region.epilogue for each in written_nodes(node)
    )


def _unused(name: str, taken: set[str]) -> str:
    """A name for a value that is no node of the graph."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


class _Partner:
    """The partner of an output: a region input as it is, or views for the prologue to compose."""

    def __init__(self, pair: ResidualPair, taken: set[str]) -> None:
        assert pair.partner is not None
        self.view = pair.partner
        self.cast = pair.cast
        self.composed = not isinstance(pair.partner, Leaf)
        self.name = _unused(f"{pair.output.name}_partner", taken) if self.composed else ""


class _Builder:
    """Copies nodes of one graph into a new one; what it lacks becomes a placeholder."""

    def __init__(self, gm: GraphModule, held_modes: Mapping[Node, Modes]) -> None:
        self.graph = Graph()
        self.values: dict[Node, Node] = {}
        self._source = gm
        self._inputs: dict[str, Node] = {}
        self._held_modes = held_modes
        # Outside of all scopes, the switches are as the graph leaves them when it is done.
        self._ambient = held_modes[gm.graph.find_nodes(op="output")[0]]
        self._modes = self._ambient
        self._scopes: list[Node] = []

    def copy(self, nodes: Iterable[Node]) -> None:
        """Copy nodes in order, each in the modes that it was traced in."""
        for node in nodes:
            self._switch(self._held_modes[node])
            self.values[node] = self._copied(node)
        self._switch(self._ambient)

    def _copied(self, node: Node) -> Node:
        # What ``node_copy`` does, which spends most of its time on looking through the arguments
        # for values that no captured graph has.
        args, kwargs = map_arg((node.args, node.kwargs), self.read)
        new = self.graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        new.args = args
        if kwargs:
            new.kwargs = kwargs
        new.meta.update(node.meta)
        return new

    def read(self, node: Node) -> Node:
        """The new graph's node for a node of the old one."""
        if node not in self.values:
            if node.op == "get_attr":
                self.values[node] = self.graph.node_copy(node)
            elif is_shape(node):
                self.values[node] = self.graph.node_copy(node, self.read)
            else:
                # The description of a graph input (parameter or not, source) must reach the inner
                # compiler.
                meta = node.meta if node.op == "placeholder" else _value(node)
                self.values[node] = self.placeholder(node.name, meta)
        return self.values[node]

    def partner(self, partner: _Partner, made: Mapping[str, Node]) -> Node:
        """The new graph's node for the partner of an output, which the prologue makes or passes."""
        if isinstance(partner.view, Leaf):
            # As it enters, though the body may write into a copy of it.
            node = self._inputs.get(partner.view.node.name) or self.read(partner.view.node)
        else:
            if partner.name not in self._inputs:
                self.placeholder(partner.name, _value(made[partner.name]))
            node = self._inputs[partner.name]
        if partner.cast is None:
            return node
        return self.call(torch.ops.aten.to.dtype, node, partner.cast)

    def placeholder(self, name: str, meta: Mapping[str, Any]) -> Node:
        """A new input, after those that there are."""
        last = next(reversed(self._inputs.values()), self.graph._root)
        with self.graph.inserting_after(last):
            new = self.graph.placeholder(name)
        new.meta = dict(meta)
        self._inputs[name] = new
        return new

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Node:
        """A new node that is no copy, with the value that it has for the traced inputs."""
        new = self.graph.call_function(function, args, options)
        with torch.no_grad():
            value = function(*map_arg(args, lambda node: node.meta["example_value"]), **options)
        new.meta = {_GUARD: True, "example_value": value}
        return new

    def compose(self, view: View) -> Node:
        """The nodes of a view."""
        if isinstance(view, Leaf):
            return self.read(view.node)
        if isinstance(view, Cat):
            return self.call(torch.cat, [self.compose(part) for part in view.parts], view.dim)
        inner = self.compose(view.of)
        if isinstance(view, Slice):
            return self.call(torch.narrow, inner, view.dim, view.start, view.stop - view.start)
        if isinstance(view, Permute):
            return self.call(torch.permute, inner, view.dims)
        return self.call(torch.reshape, inner, view.shape)

    def laid_out(self, node: Node) -> Node:
        """A tensor that other parts may be given: laid out by no size that depends on data."""
        if not any(map(_is_of_data, _layout(node.meta["example_value"]))):
            return node
        return self.call(torch.clone, node, memory_format=torch.contiguous_format)

    def finish(self, outputs: Mapping[str, Node]) -> Part:
        """Close the graph with named outputs."""
        self.graph.output(tuple(outputs.values()))
        return self._part(tuple(outputs))

    def finish_with(self, result: Node) -> Part:
        """Close the graph with the old graph's output node; its values have no names."""
        self.graph.node_copy(result, self.read)
        return self._part(())

    def _part(self, outputs: tuple[str, ...]) -> Part:
        self._bind_sizes()
        self.graph.lint()
        with _use_lazy_graph_module(True):  # an inner compiler hardly ever runs the part's own code
            module = _make_graph_module(self._source, self.graph)
        module.meta = dict(self._source.meta)
        return Part(module, tuple(self._inputs), outputs)

    def _bind_sizes(self) -> None:
        """Take in the symbolic sizes that inputs are laid out by, as compilers want."""
        symbols = {
            symbol
            for node in self._inputs.values()
            for size in _layout(node.meta["example_value"])
            if isinstance(size, torch.SymInt)
            for symbol in size.node.expr.free_symbols
        }
        if symbols:
            for node in self._source.graph.find_nodes(op="placeholder"):
                value = node.meta["example_value"]
                if isinstance(value, torch.SymInt) and value.node.expr in symbols:
                    self.read(node)

    def _switch(self, wanted: Modes) -> None:
        """Leave and enter modes until those hold that are wanted."""
        if wanted is self._modes:
            return
        now = self._modes
        same = 0
        while same < min(len(now.scopes), len(wanted.scopes)) and (
            now.scopes[same] is wanted.scopes[same]
        ):
            same += 1
        for mark in reversed(now.scopes[same:]):
            self.graph.call_function(SCOPE_ENDS[op_name(mark)], (self._scopes.pop(),))
        self._scopes += [self._mark(mark) for mark in wanted.scopes[same:]]
        for name, ambient in self._ambient.switches.items():
            mark = wanted.switches.get(name, ambient)
            if mark is not now.switches.get(name, ambient):
                self._mark(mark)
        self._modes = wanted

    def _mark(self, mark: Node) -> Node:
        return self.graph.node_copy(mark, self._mark)


def _layout(value: Any) -> tuple[int | torch.SymInt, ...]:
    if not isinstance(value, torch.Tensor):
        return ()
    return (*value.shape, *value.stride(), value.storage_offset())


def _is_of_data(size: int | torch.SymInt) -> bool:
    """Whether a size is only known when the graph runs."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


def _value(node: Node) -> dict[str, Any]:
    return {"example_value": node.meta["example_value"]}


def _reads(nodes: Sequence[Node]) -> set[Node]:
    """What a set of nodes reads from outside itself, weights left out; for a shape, its tensor."""
    inside = set(nodes)
    read = {each for node in nodes for each in node.all_input_nodes if each not in inside}
    shapes = {each for each in read if is_shape(each)}
    read = read - shapes | {each for shape in shapes for each in shape.all_input_nodes}
    return {each for each in read if not is_static_input(each)}


def _bytes(node: Node) -> int:
    value = tensor_of(node)
    return 0 if value is None else nbytes(value)
