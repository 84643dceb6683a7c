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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from .block_loop import BlockLoop, find_block_loop
from .node import autocast_scopes, is_static_input, nbytes, tensor_of
from .region import Region, RegionError, check_cuts, close_region, shrink_body
from .residual import (
    Cat,
    Leaf,
    Permute,
    Reshape,
    ResidualPair,
    Slice,
    View,
    leaves,
    pair_outputs,
)
from .signal import Signal, find_signal, find_timestep

FINITE = "finite"
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
    """What the pass found in a graph, before anything is rewritten."""

    graph: Graph
    loop: BlockLoop
    region: Region
    pairs: tuple[ResidualPair, ...]
    signal: Signal | None
    timestep: Node | None

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
    graph: Graph, *, region: Sequence[str] | None = None, signal: str | None = "auto"
) -> Analysis:
    """Find block loop, region, residual pairs and signal. Changes nothing.

    Args:
        graph: a Dynamo graph.
        region: paths of the ``ModuleList``s that make up the block loop, or None to find them.
        signal: ``"auto"``, ``"timestep_embedding"``, a module's path, or None for no signal.

    Raises:
        RegionError: the graph has no region that can be skipped; the message says why.
    """
    loop = find_block_loop(graph, region)
    found = close_region(graph, loop.nodes)
    found, pairs = pair_outputs(graph, found)
    if not pairs:
        raise RegionError("nothing that the block loop computes is used afterwards")
    chosen = None if signal is None else find_signal(graph, loop, found, pairs, signal)
    if chosen is not None and chosen.moved:
        if {pair.output for pair in pairs} & set(chosen.moved):
            raise RegionError("the signal is an output of the block loop itself", chosen.node)
        found = shrink_body(graph, found, chosen.moved)
    check_cuts(graph, found)
    return Analysis(graph, loop, found, pairs, chosen, find_timestep(graph))


def split(gm: GraphModule, analysis: Analysis) -> GuardedGraph:
    """Cut a graph module into the parts of a guarded graph.

    Args:
        gm: the module that ``analysis`` was made from; it is left as it is.
        analysis: what to cut, from :func:`analyse`.
    """
    graph, region, pairs = gm.graph, analysis.region, analysis.pairs
    (result,) = (node for node in graph.nodes if node.op == "output")
    partners = {
        pair.output: _Partner(f"{pair.output.name}_partner", pair.partner)
        for pair in pairs
        if pair.partner is not None
    }
    outputs = [pair.output for pair in pairs]

    body_reads = [*_reads(region.body)]
    after = [*_reads(region.epilogue), *result.all_input_nodes]
    kept = {*body_reads, *after}
    for pair in pairs:
        if pair.partner is not None:
            kept.update(leaves(pair.partner))
    if analysis.signal is not None:
        kept.add(analysis.signal.node)

    prologue = _Builder(gm)
    prologue.copy(region.prologue)
    made = [node for node in region.prologue if node in kept]
    composed = [each for each in partners.values() if each.composed]
    for each in composed:
        prologue.compose(each)
    prologue_part = prologue.finish(
        [*((node.name, prologue.values[node]) for node in made)]
        + [(each.name, prologue.named[each.name]) for each in composed]
    )

    body = _Builder(gm)
    body.copy(region.body)
    residuals, finite = [], None
    for output in outputs:
        value = body.read(output)
        if output in partners:
            value = body.call(torch.sub, value, body.read_partner(partners[output], output))
        fine = body.call(torch.isfinite, value)
        residuals.append((f"{output.name}_residual", body.call(torch.where, fine, value, 0)))
        fine = body.call(torch.all, fine)
        finite = fine if finite is None else body.call(torch.logical_and, finite, fine)
    assert finite is not None  # there is at least one pair
    body_part = body.finish(
        [(output.name, body.read(output)) for output in outputs] + residuals + [(FINITE, finite)]
    )

    epilogue = _Builder(gm)
    epilogue.copy(region.epilogue)
    epilogue_part = epilogue.finish_with(result)

    reuse = _Builder(gm)
    for output in outputs:
        residual = reuse.placeholder(f"{output.name}_residual", output)
        if output in partners:
            partner = reuse.read_partner(partners[output], output)
            reuse.values[output] = reuse.call(torch.add, partner, residual)
        else:
            reuse.values[output] = residual
    reuse.copy(region.epilogue)
    reuse_part = reuse.finish_with(result)

    return GuardedGraph(
        analysis,
        prologue_part,
        body_part,
        epilogue_part,
        reuse_part,
        tuple(name for name, _ in residuals),
        None if analysis.signal is None else analysis.signal.node.name,
    )


def is_guard(node: Node) -> bool:
    """Whether a node of a part is no copy of a traced one: a residual, a partner, an addition."""
    return _GUARD in node.meta


class _Partner:
    """The partner of an output: a region input as it is, or views for the prologue to compose."""

    def __init__(self, name: str, view: View) -> None:
        self.view = view
        self.composed = not isinstance(view, Leaf)
        self.name = view.node.name if isinstance(view, Leaf) else name


class _Builder:
    """Copies nodes of one graph into a new one; what it lacks becomes a placeholder."""

    def __init__(self, gm: GraphModule) -> None:
        self.source = gm
        self.graph = Graph()
        self.values: dict[Node, Node] = {}
        self.named: dict[str, Node] = {}
        self.inputs: list[str] = []
        self._last_placeholder: Node | None = None
        self._scopes = autocast_scopes(gm.graph)

    def copy(self, nodes: Iterable[Node]) -> None:
        """Copy nodes in order, each inside copies of the autocast scopes that it lies in."""
        entered: list[tuple[Node, Node]] = []
        for node in nodes:
            self._switch_scopes(entered, self._scopes[node])
            self.values[node] = self.graph.node_copy(node, self.read)
        self._switch_scopes(entered, ())

    def _switch_scopes(self, entered: list[tuple[Node, Node]], wanted: tuple[Node, ...]) -> None:
        same = 0
        while same < min(len(entered), len(wanted)) and entered[same][0] is wanted[same]:
            same += 1
        while len(entered) > same:
            self.call(torch.amp.autocast_mode._exit_autocast, entered.pop()[1])
        entered += [(scope, self.graph.node_copy(scope)) for scope in wanted[same:]]

    def read(self, node: Node) -> Node:
        """The new graph's node for a node of the old one."""
        if node not in self.values:
            if node.op == "get_attr":
                self.values[node] = self.graph.node_copy(node)
            else:
                self.values[node] = self.placeholder(node.name, node)
        return self.values[node]

    def read_partner(self, partner: _Partner, output: Node) -> Node:
        if not partner.composed:
            return self.read(leaves(partner.view)[0])
        if partner.name not in self.named:
            self.named[partner.name] = self.placeholder(partner.name, output)
        return self.named[partner.name]

    def placeholder(self, name: str, like: Node) -> Node:
        """A new input that carries a value like that of a node of the old graph."""
        with self.graph.inserting_before(self._first_computation()):
            new = self.graph.placeholder(name)
        # The description of a graph input (parameter or not, source) must reach the inner compiler.
        whole = like.op == "placeholder"
        new.meta = dict(like.meta) if whole else {"example_value": like.meta["example_value"]}
        self.inputs.append(name)
        self._last_placeholder = new
        return new

    def call(self, function: object, *args: object) -> Node:
        new = self.graph.call_function(function, args)  # type: ignore[arg-type]
        new.meta[_GUARD] = True
        return new

    def compose(self, partner: _Partner) -> None:
        self.named[partner.name] = self._compose(partner.view)

    def _compose(self, view: View) -> Node:
        if isinstance(view, Leaf):
            return self.read(view.node)
        if isinstance(view, Cat):
            return self.call(torch.cat, [self._compose(part) for part in view.parts], view.dim)
        inner = self._compose(view.of)
        if isinstance(view, Slice):
            return self.call(torch.narrow, inner, view.dim, view.start, view.stop - view.start)
        if isinstance(view, Permute):
            return self.call(torch.permute, inner, view.dims)
        assert isinstance(view, Reshape)
        return self.call(torch.reshape, inner, view.shape)

    def finish(self, outputs: Sequence[tuple[str, Node]]) -> Part:
        self.graph.output(tuple(node for _, node in outputs))
        return self._part(tuple(name for name, _ in outputs))

    def finish_with(self, result: Node) -> Part:
        """Close the graph with the old graph's output node; its values have no names."""
        self.graph.node_copy(result, self.read)
        return self._part(())

    def _part(self, outputs: tuple[str, ...]) -> Part:
        self.graph.lint()
        module = GraphModule(self.source, self.graph)
        module.meta = dict(self.source.meta)
        return Part(module, tuple(self.inputs), outputs)

    def _first_computation(self) -> Node:
        after = self._last_placeholder
        return after.next if after is not None else next(iter(self.graph.nodes), self.graph._root)


def _reads(nodes: Sequence[Node]) -> list[Node]:
    """What a set of nodes reads from outside itself, weights left out."""
    inside = set(nodes)
    read = dict.fromkeys(each for node in nodes for each in node.all_input_nodes)
    return [each for each in read if each not in inside and not is_static_input(each)]


def _bytes(node: Node) -> int:
    value = tensor_of(node)
    return 0 if value is None else nbytes(value)
