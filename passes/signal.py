"""The signal: the tensor whose change from step to step says whether the region must be computed.

    hidden states -> norm -> mul(1 + scale) -> add(shift) -> [linear ...]
    timestep -> embedding -> scale, shift         ^^^^^ the modulated input of the first block

``auto`` takes the first tensor of the first block that has the hidden states' shape, descends from
the hidden states and from the timestep, and is complete, i.e. read by something not elementwise.
Its nodes move to the prologue and the body receives the result: it is computed once, never twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from .block_loop import BlockLoop
from .node import (
    ELEMENTWISE_OPS,
    argument_name,
    computation,
    is_static_input,
    module_path,
    numel,
    op_name,
    tensor_of,
)
from .region import Region, RegionError
from .residual import ResidualPair, leaves

TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")
"""Names under which denoising networks take the point in time, in order of preference."""


@dataclass(frozen=True)
class Signal:
    """The tensor to compare between steps.

    ``kind`` is ``"modulated input"``, ``"timestep embedding"``, ``"module output"`` or
    ``"hidden states"`` (where the graph has no timestep). ``moved`` are the nodes of the region
    that must move to the prologue for the signal to be known before the body.
    """

    node: Node
    kind: str
    moved: tuple[Node, ...]


def find_timestep(graph: Graph) -> Node | None:
    """The graph input that carries the timestep, by its argument's name; None if there is none."""
    inputs = {
        argument_name(node): node
        for node in reversed(graph.nodes)
        if node.op == "placeholder" and not is_static_input(node)
    }
    return next((inputs[name] for name in TIMESTEP_ARGUMENTS if name in inputs), None)


def find_signal(
    graph: Graph,
    loop: BlockLoop,
    region: Region,
    pairs: Sequence[ResidualPair],
    which: str = "auto",
) -> Signal:
    """Find the signal.

    Args:
        graph: a Dynamo graph.
        loop: its block loop.
        region: the region around the loop.
        pairs: the region's residual pairs.
        which: ``"auto"``, ``"timestep_embedding"`` or the path of a module, such as
            ``"transformer_blocks.0.norm1"``, whose largest output is then the signal.

    Raises:
        RegionError: there is no such tensor, or it depends on a whole block having run.
    """
    timestep = find_timestep(graph)
    hidden = _hidden_states(region, pairs)
    if which == "timestep_embedding":
        return Signal(
            _timestep_embedding(graph, region, timestep, hidden), "timestep embedding", ()
        )
    if which != "auto":
        return _module_output(graph, region, which)
    if timestep is None:
        return Signal(hidden, "hidden states", ())
    streams = {leaf for pair in pairs if pair.partner is not None for leaf in leaves(pair.partner)}
    timed = _descendants(graph, [timestep])
    conditioning = [node for node in region.inputs if node in timed and node not in streams]
    node = _modulated_input(loop, conditioning, hidden)
    if node is None:
        return Signal(hidden, "hidden states", ())
    return Signal(node, "modulated input", _ancestors(node, region))


def _hidden_states(region: Region, pairs: Sequence[ResidualPair]) -> Node:
    """The largest stream that enters the region."""
    entering = [leaf for pair in pairs if pair.partner is not None for leaf in leaves(pair.partner)]
    candidates = entering or [node for node in region.inputs if tensor_of(node) is not None]
    if not candidates:
        raise RegionError("nothing but weights enters the block loop")
    return max(candidates, key=_size)


def _modulated_input(loop: BlockLoop, conditioning: Sequence[Node], hidden: Node) -> Node | None:
    """The first complete tensor of block 0 that hidden states and conditioning both reach."""
    nodes = loop.blocks[0].nodes
    inner = set(nodes)
    timed, streamed = set(conditioning), {hidden}
    for node in nodes:
        for reached in (timed, streamed):
            if any(each in reached for each in node.all_input_nodes):
                reached.add(node)
        complete = any(
            op_name(user) not in ELEMENTWISE_OPS or user not in inner for user in node.users
        )
        if node in timed and node in streamed and _shape(node) == _shape(hidden) and complete:
            return node
    return None


def _timestep_embedding(graph: Graph, region: Region, timestep: Node | None, hidden: Node) -> Node:
    """The largest input of the region that descends from the timestep and not from the latents."""
    if timestep is None:
        raise RegionError(
            "signal='timestep_embedding': no graph input is a timestep "
            f"(looked for an argument named {', '.join(TIMESTEP_ARGUMENTS)})"
        )
    timed = _descendants(graph, [timestep])
    behind_hidden = {hidden}
    for node in reversed(graph.nodes):
        if node in behind_hidden:
            behind_hidden.update(node.all_input_nodes)
    latents = [
        node
        for node in behind_hidden
        if node.op == "placeholder" and node is not timestep and not is_static_input(node)
    ]
    streamed = _descendants(graph, [hidden, *latents])
    candidates = [
        node
        for node in region.inputs
        if node in timed and node not in streamed and tensor_of(node) is not None
    ]
    if not candidates:
        raise RegionError(
            "signal='timestep_embedding': no timestep embedding enters the block loop"
        )
    return max(candidates, key=_size)


def _module_output(graph: Graph, region: Region, path: str) -> Signal:
    wanted = tuple(path.split("."))
    inside = {node for node in computation(graph) if module_path(node)[: len(wanted)] == wanted}
    outputs = [
        node
        for node in computation(graph)
        if node in inside
        and tensor_of(node) is not None
        and any(user not in inside for user in node.users)
    ]
    if not outputs:
        raise RegionError(f"signal={path!r}: no module of that path returns a tensor in the graph")
    node = max(outputs, key=_size)
    if node in set(region.epilogue):
        raise RegionError(f"signal={path!r}: that module runs after the block loop")
    return Signal(node, "module output", _ancestors(node, region))


def _ancestors(node: Node, region: Region) -> tuple[Node, ...]:
    """A node of the region with all of the region that it depends on, in graph order."""
    body = set(region.body)
    found: set[Node] = set()
    frontier = [node]
    while frontier:
        each = frontier.pop()
        if each in body and each not in found:
            found.add(each)
            frontier += each.all_input_nodes
    # The pieces of a tuple go where the tuple goes.
    pieces = {
        user
        for each in found
        if isinstance(each.meta.get("example_value"), (tuple, list))
        for user in each.users
    }
    return tuple(each for each in region.body if each in found or each in pieces)


def _descendants(graph: Graph, sources: Iterable[Node]) -> set[Node]:
    found = set(sources)
    for node in graph.nodes:
        if any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def _shape(node: Node) -> tuple[object, ...] | None:
    value = tensor_of(node)
    return None if value is None else tuple(value.shape)


def _size(node: Node) -> int:
    value = tensor_of(node)
    return -1 if value is None else numel(value)
