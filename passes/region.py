r"""The region: the convex set of nodes from the first to the last block of the block loop.

    inputs -> prologue -> [ region ] -> epilogue -> outputs
                   \____________________/

Everything that does not depend on the region goes to the prologue, wherever the graph lists it
(rotary embeddings, masks); everything else that is not the region goes to the epilogue.
Linear in the size of the graph.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from .names import VIEW_OPS, op_name, source_line
from .order import Dependencies, computation, dependencies, memory_root, vmap_spans, written_nodes
from .values import is_shape, is_size, is_static_input, is_tuple, tensor_of


class RegionError(Exception):
    """Why a graph cannot be cached, in words that a user can act on.

    Args:
        reason: one sentence.
        node: the node of the graph that is in the way, if there is one; its source line is added.
    """

    def __init__(self, reason: str, node: Node | None = None) -> None:
        if node is not None:
            line = source_line(node)
            reason = f"{reason} (node {node.name!r}{f', {line}' if line else ''})"
        super().__init__(reason)
        self.node = node


class UnknownNameError(RegionError):
    """The graph does not run a module that the caller named.

    Args:
        flag: what the name was given for, and the name, as ``flag='name'``.
        name: the name.
        known: the names that there are.
    """

    def __init__(self, flag: str, name: str, known: Collection[str]) -> None:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        super().__init__(f"{flag}: no {name!r} runs in the graph{hint}; there are {sorted(known)}")
        self.known = known


class NoBlockLoopError(RegionError):
    """The graph has no block loop. It may be a piece of a model whose loop is in another piece."""


@dataclass(frozen=True)
class Region:
    """A three-way partition of a graph's computation. All tuples are in graph order.

    ``inputs`` are the values that cross into the body (parameters and buffers left out),
    ``outputs`` the values of the body that the epilogue or the caller reads.
    """

    prologue: tuple[Node, ...]
    body: tuple[Node, ...]
    epilogue: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


def close_region(
    graph: Graph, seeds: Collection[Node], before: Dependencies | None = None
) -> Region:
    """Close a set of nodes under convexity and sort every other node before or after it.

    Args:
        graph: a Dynamo graph.
        seeds: the nodes that the region must hold, usually those of the block loop.
        before: the graph's dependencies, where the caller has them.

    Returns:
        The region with its prologue and epilogue.
    """
    before = dependencies(graph) if before is None else before
    # A size that is computed in a block from sizes alone is known without the block.
    inside = {node for node in seeds if not is_size(node)}
    for span in vmap_spans(graph):
        if not inside.isdisjoint(span):
            inside.update(span)
    downstream: set[Node] = set()
    for node, earlier in before.items():
        if any(each in inside or each in downstream for each in earlier):
            downstream.add(node)
    upstream: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in inside or node in upstream:
            upstream.update(before[node])
    body = inside | (downstream & upstream)
    # What only follows from the region and is never read would make an output of what it reads.
    live = _live(graph)
    for node, earlier in before.items():
        if node in downstream and node not in live and downstream.intersection(earlier) <= body:
            body.add(node)
    # Only tensors cross a cut: the pieces of a tuple stay with the node that made it.
    for node in computation(graph):
        producer = _tuple_producer(node)
        if producer is None or (producer in body) == (node in body):
            continue
        if producer in body:
            body.add(node)
        elif producer not in downstream:
            body.discard(node)
            downstream.discard(node)
    return partition(graph, body, downstream)


def partition(graph: Graph, body: Collection[Node], downstream: Collection[Node]) -> Region:
    """The region whose body is exactly ``body``; nodes of ``downstream`` outside it follow it."""
    parts: tuple[list[Node], list[Node], list[Node]] = ([], [], [])
    outputs: list[Node] = []
    crossing: set[Node] = set()
    for node in computation(graph):
        if node not in body:
            parts[2 if node in downstream else 0].append(node)
            continue
        parts[1].append(node)
        if any(user not in body for user in node.users):
            outputs.append(node)
        for each in node.all_input_nodes:
            if each not in body and not is_static_input(each):
                crossing.add(each)
    inputs = tuple(node for node in graph.nodes if node in crossing)
    return Region(tuple(parts[0]), tuple(parts[1]), tuple(parts[2]), inputs, tuple(outputs))


def extend_body(graph: Graph, region: Region, nodes: Iterable[Node]) -> Region:
    """The same region with some of its epilogue's nodes moved into the body."""
    body = {*region.body, *nodes}
    return partition(graph, body, body.union(region.epilogue))


def shrink_body(graph: Graph, region: Region, nodes: Iterable[Node]) -> Region:
    """The same region with some of its body's nodes moved into the prologue."""
    body = set(region.body).difference(nodes)
    return partition(graph, body, body.union(region.epilogue))


def with_ancestors(region: Region, nodes: Iterable[Node], before: Dependencies) -> tuple[Node, ...]:
    """Nodes of a region with all of the region that must run before them, in graph order."""
    body = set(region.body)
    found: set[Node] = set()
    frontier = list(nodes)
    while frontier:
        each = frontier.pop()
        if each in body and each not in found:
            found.add(each)
            frontier += before[each]
    # The pieces of a tuple go where the tuple goes.
    pieces = {user for each in found if is_tuple(each) for user in each.users}
    return tuple(each for each in region.body if each in found or each in pieces)


def take_in(graph: Graph, region: Region, kept: Collection[Node], before: Dependencies) -> Region:
    """The same region, with all that only the body reads in its body, except the nodes ``kept``.

    The conditioning of the blocks (projections of the text, control branches, rotary tables) is
    then skipped with them.
    """
    after: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
    for node, earlier in before.items():
        for each in earlier:
            after[each].append(node)
    body = set(region.body)
    for node in reversed(region.prologue):
        if node in kept or is_size(node) or is_shape(node) or written_nodes(node):
            continue
        if after[node] and body.issuperset(after[node]):
            body.add(node)
    # Only tensors can cross a cut, so the pieces of a tuple stay with the tuple.
    body.difference_update(
        node for node in region.prologue if (_tuple_producer(node) or node) not in body
    )
    return partition(graph, body, body.union(region.epilogue))


def take_in_sizes(graph: Graph, region: Region) -> Region:
    """The same region with what measures its results in its body, and cuts them by what it finds.

    Sizes that depend on data are numbers that the graph reads off tensors and asserts things about.
    A number that the body computes must not cross into the epilogue. A tensor cut by it may.
    """
    epilogue = set(region.epilogue)
    taken: set[Node] = set()
    for node in region.epilogue:
        if any(each in epilogue and each not in taken for each in node.all_input_nodes):
            continue
        measured = any(map(_is_of_data, (node, *node.all_input_nodes)))
        if measured and (op_name(node) in VIEW_OPS or tensor_of(node) is None):
            taken.add(node)
    # A number that something else reads stays in the epilogue, with all its readers.
    staying: set[Node] = set()
    for node in reversed(region.epilogue):
        if node in taken and tensor_of(node) is None and not taken.issuperset(node.users):
            staying.add(node)
    for node in region.epilogue:
        if not staying.isdisjoint(node.all_input_nodes):
            staying.add(node)
    return extend_body(graph, region, taken - staying) if taken - staying else region


def _is_of_data(node: Node) -> bool:
    """Whether a node produces a number that depends on data."""
    value = node.meta.get("example_value")
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return False
    return value.node.hint is None


def check_cuts(region: Region) -> None:
    """Raise RegionError where cutting the graph at the region would change what it computes.

    Only tensors may cross a cut. Sizes may enter the body, and so may
    what the caller passes, such as a mesh of devices. A size that the body computes and the
    epilogue reads would be unknown on a reused step.
    """
    entering = {
        node
        for node in region.inputs
        if is_size(node) or is_shape(node) or node.op == "placeholder"
    }
    for node in (*region.inputs, *region.outputs):
        if tensor_of(node) is None and node not in entering:
            kind = type(node.meta.get("example_value")).__name__
            raise RegionError(
                f"a {kind} crosses the edge of the block loop; only tensors can, and sizes into it",
                node,
            )


def check_writes(graph: Graph) -> None:
    """Raise RegionError where a graph that may be skipped writes into what outlives it."""
    for node in graph.nodes:
        for root in map(memory_root, written_nodes(node)):
            if root.op in ("placeholder", "get_attr"):
                raise RegionError(
                    "the model writes in place into an input or a buffer, which a skipped forward "
                    "would lose; write the result into a new tensor instead",
                    node,
                )


def overwritten_inputs(region: Region) -> tuple[Node, ...]:
    """The region inputs that the body writes into, so that it needs copies of its own.

    Raises:
        RegionError: the caller, a buffer, another region input in the same memory or the epilogue
            sees the write. A copy would hide it from them, and a reused step would lose it.
    """
    body, epilogue = set(region.body), set(region.epilogue)
    found: dict[Node, Node] = {}
    for node in region.body:
        for root in map(memory_root, written_nodes(node)):
            if root in body or root in found:
                continue
            shared = [each for each in (root, *region.prologue) if memory_root(each) is root]
            entering = [each for each in region.inputs if each in shared]
            read_after = any(
                user in epilogue or user.op == "output" for each in shared for user in each.users
            )
            if root.op != "placeholder" and len(entering) == 1 and not read_after:
                found[root] = entering[0]
                continue
            raise RegionError(
                "a block writes in place into a tensor from outside the block loop that is read "
                "elsewhere, which a reused step would lose; write the result into a new tensor "
                "instead",
                node,
            )
    return tuple(found.values())


def _live(graph: Graph) -> set[Node]:
    """The nodes that the graph's result, or a tensor that is written in place, is made of."""
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in live or node.op == "output" or written_nodes(node):
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _tuple_producer(node: Node) -> Node | None:
    """The node whose tuple this node takes a piece of, or None."""
    if op_name(node) != "getitem" or not isinstance(node.args[0], Node):
        return None
    return node.args[0] if is_tuple(node.args[0]) else None
