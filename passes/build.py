"""A part of a graph as a graph module of its own: nodes copied, modes kept, inputs made as needed.

Knows how to write FX; knows nothing of which nodes belong to which part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.node import map_arg

from .names import op_name
from .order import SCOPE_ENDS, Modes
from .residual import ResidualPair
from .values import is_shape, is_unknown, same_shape
from .views import Cat, Leaf, Permute, Slice, View

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


def is_guard(node: Node) -> bool:
    """Whether the split made a node, such as a residual, a partner or an addition."""
    return _GUARD in node.meta


def unused(name: str, taken: set[str]) -> str:
    """A name for a value that the captured graph does not have."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


class Partner:
    """The partner of an output: a region input as it is, or views for the prologue to compose."""

    def __init__(self, pair: ResidualPair, taken: set[str]) -> None:
        assert pair.partner is not None
        self.view = pair.partner
        self.cast = pair.cast
        self.composed = not isinstance(pair.partner, Leaf)
        self.name = unused(f"{pair.output.name}_partner", taken) if self.composed else ""


class Builder:
    """Copies nodes of one graph into a new one; what it lacks becomes a placeholder.

    Args:
        gm: the module of the old graph.
        held_modes: the modes that each of its nodes was traced in.
        numbers: what to take in for symbols that inputs are laid out by, see `numbers_of_data`.
    """

    def __init__(
        self,
        gm: GraphModule,
        held_modes: Mapping[Node, Modes],
        numbers: Mapping[Any, Node] = MappingProxyType({}),
    ) -> None:
        self.graph = Graph()
        self.values: dict[Node, Node] = {}
        self.source = gm
        self._inputs: dict[str, Node] = {}
        self._numbers = numbers
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
                # By the description of a graph input (parameter or not, source), those who compile
                # the part know its weights.
                meta = node.meta if node.op == "placeholder" else value_of(node)
                self.values[node] = self.placeholder(node.name, meta)
        return self.values[node]

    def partner(self, partner: Partner, made: Mapping[str, Node]) -> Node:
        """The new graph's node for the partner of an output, which the prologue makes or passes."""
        if isinstance(partner.view, Leaf):
            # As it enters, though the body may write into a copy of it.
            node = self._inputs.get(partner.view.node.name) or self.read(partner.view.node)
        else:
            if partner.name not in self._inputs:
                self.placeholder(partner.name, value_of(made[partner.name]))
            node = self._inputs[partner.name]
        return node if partner.cast is None else self.cast(node, partner.cast)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """A tensor in a dtype: itself where it has that dtype."""
        if node.meta["example_value"].dtype == dtype:
            return node
        return self.call(torch.ops.aten.to.dtype, node, dtype)

    def placeholder(self, name: str, meta: Mapping[str, Any]) -> Node:
        """A new input, after those that there are."""
        last = next(reversed(self._inputs.values()), self.graph._root)
        with self.graph.inserting_after(last):
            new = self.graph.placeholder(name)
        new.meta = dict(meta)
        self._inputs[name] = new
        return new

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Node:
        """A node of the split's own, with the value that it has for the traced inputs."""
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

    def laid_out_like(self, node: Node, other: Node) -> Node:
        """A tensor of another one's shape, in the strides that a compiler knows the other by."""
        mine, wanted = (each.meta["example_value"].stride() for each in (node, other))
        if same_shape(mine, wanted):
            return node
        shape = node.meta["example_value"].shape
        empty = self.call(torch.ops.aten.new_empty_strided.default, node, shape, wanted)
        return self.call(torch.ops.aten.copy_.default, empty, node)

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
            module = _make_graph_module(self.source, self.graph)
        module.meta = dict(self.source.meta)
        return Part(module, tuple(self._inputs), outputs)

    def _bind_sizes(self) -> None:
        """Take in the symbolic sizes that inputs are laid out by, as compilers want."""
        symbols = {symbol for node in self._inputs.values() for symbol in symbols_of(node)}
        if symbols:
            for node in self.source.graph.find_nodes(op="placeholder"):
                value = node.meta["example_value"]
                if isinstance(value, torch.SymInt) and value.node.expr in symbols:
                    self.read(node)
            for symbol, node in self._numbers.items():
                if symbol in symbols:
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


def numbers_of_data(nodes: Iterable[Node]) -> dict[Any, Node]:
    """The nodes that read a number off a tensor, by the symbol that stands for it in sizes."""
    values = ((node, node.meta.get("example_value")) for node in nodes)
    return {
        each.node.expr: node
        for node, each in values
        if isinstance(each, torch.SymInt) and is_unknown(each)
    }


def symbols_of(node: Node) -> set[Any]:
    """The symbols that a node's tensor is laid out by, or that its number of data is made of."""
    value = node.meta.get("example_value")
    sizes = (value,) if _is_of_data(value) else _layout(value)
    symbolic = [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]
    return {symbol for each in symbolic for symbol in each.free_symbols}


def _layout(value: Any) -> tuple[int | torch.SymInt, ...]:
    if not isinstance(value, torch.Tensor):
        return ()
    return (*value.shape, *value.stride(), value.storage_offset())


def _is_of_data(size: Any) -> bool:
    """Whether something is a size that is only known when the graph runs."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


def value_of(node: Node) -> dict[str, Any]:
    """The metadata of a placeholder for a node: its value alone."""
    return {"example_value": node.meta["example_value"]}
