r"""The region: the convex set of nodes from the first to the last block of the block loop.

    inputs -> prologue -> [ region ] -> epilogue -> outputs
                   \____________________/

Everything that does not depend on the region goes to the prologue, wherever the graph lists it
(rotary embeddings, masks); everything else that is not the region goes to the epilogue.
Linear in the size of the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch.fx import Graph, Node

from .node import (
    argument_name,
    computation,
    dependencies,
    describe_value,
    is_inplace,
    is_static_input,
    memory_root,
    op_name,
    source_line,
    tensor_of,
    written_node,
)


class RegionError(Exception):
    """Why a graph cannot be cached, in words that a user can act on.

    Args:
        reason: one sentence.
        node: the node of the graph that stands in the way, if it is one; its source line is added.
    """

    def __init__(self, reason: str, node: Node | None = None) -> None:
        if node is not None:
            line = source_line(node)
            reason = f"{reason} (node {node.name!r}{f', {line}' if line else ''})"
        super().__init__(reason)
        self.node = node


class NoBlockLoopError(RegionError):
    """The graph has no block loop at all; it may be a piece of a model that has it elsewhere."""


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


def close_region(graph: Graph, seeds: Collection[Node]) -> Region:
    """Close a set of nodes under convexity and sort every other node before or after it.

    Args:
        graph: a Dynamo graph.
        seeds: the nodes that the region must hold, usually those of the block loop.

    Returns:
        The region with its prologue and epilogue.
    """
    before = dependencies(graph)
    inside = set(seeds)
    downstream: set[Node] = set()
    for node in graph.nodes:
        if any(each in inside or each in downstream for each in before[node]):
            downstream.add(node)
    upstream: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in inside or node in upstream:
            upstream.update(before[node])
    body = inside | (downstream & upstream)
    for node in computation(graph):
        producer = _tuple_producer(node)
        if producer is None or (producer in body) == (node in body):
            continue
        # Only tensors cross a cut: the pieces of a tuple stay with the node that made it.
        if producer in body:
            body.add(node)
        elif producer not in downstream:
            body.discard(node)
            downstream.discard(node)
    return partition(graph, body, downstream)


def partition(graph: Graph, body: Collection[Node], downstream: Collection[Node]) -> Region:
    """The region whose body is exactly ``body``; nodes of ``downstream`` outside it follow it."""
    nodes = computation(graph)
    outputs = [
        node
        for node in nodes
        if node in body and any(user not in body for user in node.users) and not _is_tuple(node)
    ]
    crossing = dict.fromkeys(
        each
        for node in nodes
        if node in body
        for each in node.all_input_nodes
        if each not in body and not is_static_input(each)
    )
    return Region(
        prologue=tuple(n for n in nodes if n not in body and n not in downstream),
        body=tuple(n for n in nodes if n in body),
        epilogue=tuple(n for n in nodes if n not in body and n in downstream),
        inputs=tuple(node for node in graph.nodes if node in crossing),
        outputs=tuple(outputs),
    )


def extend_body(graph: Graph, region: Region, nodes: Iterable[Node]) -> Region:
    """The same region with some of its epilogue's nodes moved into the body."""
    body = set(region.body) | set(nodes)
    return partition(graph, body, body | set(region.epilogue))


def shrink_body(graph: Graph, region: Region, nodes: Iterable[Node]) -> Region:
    """The same region with some of its body's nodes moved into the prologue."""
    body = set(region.body) - set(nodes)
    return partition(graph, body, body | set(region.epilogue))


def check_cuts(graph: Graph, region: Region) -> None:
    """Raise RegionError where cutting the graph at the region would change what it computes.

    Refused are in-place writes of the body into memory from outside it (skipping the body would
    lose them), tuples and other non-tensors that cross a cut, and grad mode switched in one part
    and back in another. (An autocast scope may cross: each part gets its own copy of it.)
    """
    body = set(region.body)
    part = dict.fromkeys(region.prologue, "prologue")
    part |= dict.fromkeys(region.body, "body")
    part |= dict.fromkeys(region.epilogue, "epilogue")
    for node in region.body:
        if is_inplace(node) and memory_root(written_node(node)) not in body:
            raise RegionError(
                "a block writes in place into a tensor from outside the block loop, which a reused "
                "step would lose; write the result into a new tensor instead",
                node,
            )
    for node in (*region.inputs, *region.outputs):
        if tensor_of(node) is None and not _is_size(node):
            raise RegionError(
                f"a {type(node.meta.get('example_value')).__name__} crosses the edge of the block "
                "loop; only tensors and sizes can",
                node,
            )
    for opened, closed in _scopes(graph):
        crossed = {part[node] for node in _between(graph, opened, closed) if node in part}
        if len(crossed) > 1:
            raise RegionError(
                "the grad mode is switched inside the block loop and back outside it, or reversely",
                opened,
            )


def describe_input(node: Node) -> str:
    """``hidden_states: f32[1, 24, 64]``, by the argument's name where a graph input crosses in."""
    name = argument_name(node) if node.op == "placeholder" else node.name
    return f"{name}: {describe_value(node.meta.get('example_value'))}"


def _is_tuple(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), (tuple, list))


def _is_size(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, int) or type(value).__name__ in ("SymInt", "SymFloat", "SymBool")


def _tuple_producer(node: Node) -> Node | None:
    """The node whose tuple this node takes a piece of, or None."""
    if op_name(node) != "getitem" or not isinstance(node.args[0], Node):
        return None
    return node.args[0] if _is_tuple(node.args[0]) else None


_SCOPE_ENDS = {
    "_set_grad_enabled": "_set_grad_enabled",
    "_enter_inference_mode": "_exit_inference_mode",
}


def _scopes(graph: Graph) -> list[tuple[Node, Node]]:
    """Pairs of nodes that open and close a context manager, innermost closed first."""
    scopes: list[tuple[Node, Node]] = []
    opened: list[Node] = []
    for node in computation(graph):
        name = op_name(node)
        if opened and name == _SCOPE_ENDS[op_name(opened[-1])]:
            scopes.append((opened.pop(), node))
        elif name in _SCOPE_ENDS:
            opened.append(node)
    return scopes


def _between(graph: Graph, first: Node, last: Node) -> Iterable[Node]:
    node = first
    while True:
        yield node
        if node is last:
            return
        node = node.next
