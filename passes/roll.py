"""Rolled blocks: every block of one structure becomes a call of one subgraph, compiled once.

    x -> blocks.0 -> blocks.1 -> ... -> blocks.N
    x -> invoke(block, w0) -> invoke(block, w1) -> ... -> invoke(block, wN)

What a compiler does for a part then no longer grows with its depth. A block that gets its streams
in another memory layout than all others, as the first one often does, and only joins them to one
tensor, is called on copies in the layout of the others. A subgraph returns memory of
its own; views of it, such as two streams that leave as one tensor, are taken outside. A block stays
as it is if it writes into what it is given or draws random numbers, or if something other than
plain tensors and sizes enters or leaves it.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from heapq import heappop, heappush
from itertools import groupby
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .block_loop import Block, find_block_lists, structure_of
from .build import Builder, Part
from .names import op_name
from .order import (
    Dependencies,
    dependencies,
    draws,
    is_mode_mark,
    memory_root,
    modes,
    shares_memory_with,
    written_nodes,
)

invoke_subgraph: Any
try:
    from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
except ImportError:  # a private name, which another version of PyTorch may have elsewhere
    invoke_subgraph = None

logger = logging.getLogger(__name__)


def roll(part: Part) -> Part:
    """Roll up the blocks of a part.

    Args:
        part: left as it is, but that its module takes in the subgraphs.

    Returns:
        A part with the same inputs and outputs that computes the same; ``part`` itself where no two
        of its blocks have one structure.
    """
    if invoke_subgraph is None:
        _say_that_nothing_rolls()
        return part
    gm = part.module
    before = dependencies(gm.graph)
    kinds = _kinds(gm.graph, before)
    order = _order(kinds, before)
    if not kinds or not order:
        return part
    subgraphs = {kind.name: _subgraph(gm, kind) for kind in kinds}
    for name, subgraph in subgraphs.items():
        gm.add_submodule(name, subgraph.module)
    outer = Builder(gm, modes(gm.graph))
    inputs = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    for node in inputs.values():
        outer.read(node)
    called = {block.nodes[0]: (kind, block) for kind in kinds for block in kind.blocks}
    # Nodes between two calls are copied together, so that scopes around them are opened once.
    for is_call, nodes in groupby(order, called.__contains__):
        if not is_call:
            outer.copy(nodes)
            continue
        for kind, block in map(called.__getitem__, nodes):
            _call(outer, subgraphs[kind.name], kind, block, inputs)
    rolled = outer.finish_with(gm.graph.find_nodes(op="output")[0])
    return Part(rolled.module, part.inputs, part.outputs)


def calls_of(part: Part) -> list[str]:
    """The names of the subgraphs that a part calls, one for each call."""
    calls = part.module.graph.find_nodes(op="call_function", target=invoke_subgraph)
    return [str(call.args[1]) for call in calls]


@cache
def _say_that_nothing_rolls() -> None:
    logger.info("torch %s compiles every block on its own", torch.__version__)


@dataclass(frozen=True)
class _Kind:
    """The blocks of one structure. Places are those of nodes in a block."""

    blocks: tuple[Block, ...]

    @cached_property
    def returned(self) -> tuple[int, ...]:
        """The places of what leaves any of the blocks, in memory of its own."""
        places: set[int] = set()
        for block in self.blocks:
            stored = {path[0] for path in _leaving(block)}
            places.update(at for at, node in enumerate(block.nodes) if node in stored)
        return tuple(sorted(places))

    @property
    def name(self) -> str:
        """What compilers know the subgraph by: equal for equal subgraphs alone."""
        return "_".join(map(str, ("omni_cache_block", self.blocks[0].structure, *self.returned)))


def _kinds(graph: Graph, before: Dependencies) -> list[_Kind]:
    """The blocks that can be called and share their structure with another one."""
    place = {node: at for at, node in enumerate(before)}
    nodes = list(before)
    kinds: dict[str, list[Block]] = {}
    for blocks in find_block_lists(graph):
        for block in map(_without_last_views, blocks.blocks):
            if len(block.nodes) < 2 or not _can_be_called(block):
                continue
            around = nodes[place[block.nodes[0]] : place[block.nodes[-1]]]
            if _is_in_one_piece(block, around, before):
                kinds.setdefault(block.structure, []).append(block)
    repeated = [blocks for blocks in kinds.values() if len(blocks) > 1]
    up_to_layout = {_structure_up_to_layout(blocks[0]): blocks for blocks in repeated}
    for block, *others in list(kinds.values()):
        if not others and (alike := up_to_layout.get(_structure_up_to_layout(block))):
            alike.append(block)
    return [_Kind(tuple(blocks)) for blocks in repeated]


def _without_last_views(block: Block) -> Block:
    """A block without the views that it ends with, of which its last neighbour may lack some."""
    nodes = list(block.nodes)
    for node in block.nodes[::-1]:
        is_view = shares_memory_with(node) is not None and not written_nodes(node)
        if is_view and not any(each in nodes for each in node.users):
            nodes.remove(node)
    return replace(block, nodes=tuple(nodes))


def _can_be_called(block: Block) -> bool:
    """Whether a call can stand for a block."""
    inside = set(block.nodes)
    for node in block.nodes:
        if draws(node) or any(memory_root(each) not in inside for each in written_nodes(node)):
            return False
    if not all(each.op == "get_attr" or _is_value(each) for each in _operands(block)):
        return False
    views = [view for path in _leaving(block) for view in path[1:]]
    return all(path and _is_value(path[0]) for path in _leaving(block)) and not any(
        written_nodes(view) or len(inside.intersection(view.all_input_nodes)) > 1 for view in views
    )


def _is_in_one_piece(block: Block, around: Sequence[Node], before: Dependencies) -> bool:
    """Whether none of the nodes around a block comes after one of its nodes and before another."""
    inside, after = set(block.nodes), set[Node]()
    for node in around:
        if node not in inside and any(each in inside or each in after for each in before[node]):
            after.add(node)
    return not any(each in after for node in block.nodes for each in before[node])


def _is_value(node: Node) -> bool:
    """Whether a value may enter and leave a subgraph: a plain tensor or an integer.

    Tensors made of tensors (quantised weights, DTensors) have no rule for subgraphs in PyTorch.
    """
    value = node.meta.get("example_value")
    is_plain = isinstance(value, torch.Tensor | int | torch.SymInt)
    return is_plain and not is_traceable_wrapper_subclass(value)


def _operands(block: Block) -> list[Node]:
    """What a block reads from outside, in the order in which blocks of its structure read it."""
    inside = set(block.nodes)
    read = (each for node in block.nodes for each in node.all_input_nodes)
    return list(dict.fromkeys(each for each in read if each not in inside))


def _structure_up_to_layout(block: Block) -> str:
    """What blocks share that differ in nothing but the layout of what they join."""
    return structure_of(block.nodes, block.modes, _joined(block))


def _joined(block: Block) -> frozenset[Node]:
    """The operands of fixed sizes that a block only concatenates, to which layout is nothing."""
    others = (node for node in block.nodes if op_name(node) != "cat")
    read_by_others = {each for node in others for each in node.all_input_nodes}
    return frozenset(
        node
        for node in _operands(block)
        if node not in read_by_others
        and isinstance(value := node.meta.get("example_value"), torch.Tensor)
        and all(isinstance(size, int) for size in (*value.shape, *value.stride()))
    )


def _leaving(block: Block) -> list[list[Node]]:
    """The paths on which values leave a block: a tensor with memory of its own, the views of it.

    A path that begins outside of the block is of views of an operand.
    """
    inside, paths = set(block.nodes), []
    for node in block.nodes:
        if all(user in inside for user in node.users):
            continue
        path = [node]
        while path[0] in inside and (owner := shares_memory_with(path[0])) is not None:
            path.insert(0, owner)
        # Of several tensors that one operation makes, each has memory of its own.
        paths.append(path if _is_value(path[0]) else path[1:])
    return paths


def _order(kinds: list[_Kind], before: Dependencies) -> list[Node]:
    """The nodes that a rolled graph computes, in order, the first one of a block for all of them.

    Nothing where two blocks take turns, so that no order has both in one piece.
    """
    first = {node: b.nodes[0] for kind in kinds for b in kind.blocks for node in b.nodes}
    waits: dict[Node, set[Node]] = {}
    for node, earlier in before.items():
        if node.op not in ("placeholder", "get_attr", "output") and not is_mode_mark(node):
            unit = first.get(node, node)
            waits.setdefault(unit, set()).update(first.get(each, each) for each in earlier)
    followers: dict[Node, list[Node]] = {}
    for unit, others in waits.items():
        others.intersection_update(waits)
        others.discard(unit)
        for each in others:
            followers.setdefault(each, []).append(unit)
    place = {node: at for at, node in enumerate(waits)}
    units = list(waits)
    ready = [place[unit] for unit in units if not waits[unit]]
    order: list[Node] = []
    while ready:
        unit = units[heappop(ready)]
        order.append(unit)
        for each in followers.get(unit, ()):
            waits[each].discard(unit)
            if not waits[each]:
                heappush(ready, place[each])
    return order if len(order) == len(units) else []


def _subgraph(gm: GraphModule, kind: _Kind) -> Part:
    """A block as a part, from its operands and the sizes they have to what it returns."""
    block = kind.blocks[0]
    inner = Builder(gm, modes(gm.graph))
    for node in _operands(block):
        if not _is_graph(gm, node):
            inner.values[node] = inner.placeholder(node.name, {"example_value": _value(gm, node)})
    inner.copy(block.nodes)
    part = inner.finish({str(at): inner.values[block.nodes[at]] for at in kind.returned})
    # It names this process's compilation, which AOTAutograd leaves out of its cache's key for the
    # outer module alone: no other process would find what is compiled.
    part.module.meta = {}
    return part


def _call(
    outer: Builder, part: Part, kind: _Kind, block: Block, inputs: Mapping[str, Node]
) -> None:
    """Call the subgraph for a block; sizes that it takes besides are ``inputs`` of the graph."""
    pairs = zip(_operands(kind.blocks[0]), _operands(block), strict=True)
    own = {first.name: (node, first) for first, node in pairs}
    joined = _joined(block)

    def given(name: str) -> Node:
        node, first = own.get(name) or (inputs[name],) * 2
        value = outer.read(node)
        return outer.laid_out_like(value, first) if node in joined else value

    operands = [given(name) for name in part.inputs]
    subgraph = outer.graph.get_attr(kind.name)
    returned = outer.graph.call_function(invoke_subgraph, (subgraph, kind.name, *operands))
    values = [block.nodes[at].meta["example_value"] for at in kind.returned]
    returned.meta = {"example_value": tuple(values)}
    for place, (at, value) in enumerate(zip(kind.returned, values, strict=True)):
        one = outer.graph.call_function(operator.getitem, (returned, place))
        one.meta = {"example_value": value}
        outer.values[block.nodes[at]] = one
    views = dict.fromkeys(view for path in _leaving(block) for view in path[1:])
    outer.copy(view for view in views if view not in outer.values)


def _is_graph(gm: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(_value(gm, node), GraphModule)


def _value(gm: GraphModule, node: Node) -> Any:
    """The value of a node for the traced inputs; of an attribute itself."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(gm)
    return node.meta["example_value"]
