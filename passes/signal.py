"""The signal: the tensor whose change from step to step says whether the region must be computed.

    hidden states -> norm -> mul(1 + scale) -> add(shift) -> [linear ...]
    timestep -> embedding -> scale, shift         ^^^^^ the modulated input of the first block

``auto`` takes the first tensor of the first block that has the hidden states' shape, descends from
the hidden states and from the timestep, and is complete, i.e. read by something not elementwise.
Its nodes move to the prologue and the body receives the result: it is computed once, never twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from .block_loop import BlockLoop
from .names import ELEMENTWISE_OPS, argument_name, module_path, nodes_in, op_name, position
from .order import Dependencies, computation, dependencies
from .region import Region, RegionError, UnknownNameError, close_region, with_ancestors
from .residual import ResidualPair, pair_outputs
from .streams import Origin, streams, trace_origins
from .values import is_static_input, numel, same_shape, same_size, tensor_of
from .views import View, leaves

TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")
"""Names under which denoising networks take the point in time, in order of preference.

An argument with one of them as a word (``vision_timesteps``) comes after these; ``t`` alone is too
short to count as a word.
"""


LATENTS = "latents"
"""The signal that is the graph input which is denoised."""


FIRST_BLOCKS = "first_blocks"
"""The signal that is made of the first blocks, where some always run."""


@dataclass(frozen=True)
class Signal:
    """The tensor to compare between steps.

    ``kind`` is ``"modulated input"``, ``"timestep embedding"``, ``"module output"``, ``"latents"``,
    ``"hidden states"`` (where no timestep reaches the blocks) or ``"residual of the first
    blocks"``, which is ``node`` less the view ``minus``. ``moved`` are the nodes of the region that
    must move to the prologue for the signal to be known before the body.
    """

    node: Node
    kind: str
    moved: tuple[Node, ...]
    minus: View | None = None


def find_timestep(graph: Graph, parameters: Sequence[str] = ()) -> Node | None:
    """The graph input that carries the timestep, found by its argument's name, or None.

    Args:
        graph: a Dynamo graph.
        parameters: names of the model's positional parameters. They name inputs that the graph
            knows by position alone, where ``forward`` is wrapped in a function of ``*args``.
    """
    named: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and not is_static_input(node):
            named.setdefault(_parameter(node, parameters), node)
    name = timestep_name(named)
    return None if name is None else named[name]


def _parameter(node: Node, parameters: Sequence[str]) -> str:
    """The name that the model's ``forward`` has for a graph input."""
    place = position(node)
    if place is not None and place < len(parameters):
        return parameters[place]
    return argument_name(node)


def timestep_name(names: Iterable[str]) -> str | None:
    """The one of a network's argument names that names the timestep, or None."""
    names = list(names)
    exact = next((name for name in TIMESTEP_ARGUMENTS if name in names), None)
    if exact is not None:
        return exact
    words = set(TIMESTEP_ARGUMENTS) - {"t"}
    return next((name for name in names if not words.isdisjoint(name.split("_"))), None)


def find_latents(graph: Graph, timestep: Node | None) -> Node:
    """The graph input that is denoised: of the shape of a result, or with other channels.

    Args:
        graph: a Dynamo graph.
        timestep: the graph input that carries the timestep, if there is one.

    Raises:
        RegionError: no input is of such a shape.
    """
    (end,) = graph.find_nodes(op="output")
    results = [_shape(node) for node in nodes_in(end.args) if _is_floating(node)]
    inputs: list[Node] = [
        node
        for node in graph.find_nodes(op="placeholder")
        if node is not timestep and not is_static_input(node) and _is_floating(node)
    ]
    for alike in (same_shape, _same_but_channels):
        for result in results:
            for node in inputs:
                if alike(_shape(node), result):
                    return node
    raise RegionError(
        "signal='latents': no input has the shape of what the model returns, up to its channels; "
        "choose signal='auto' or a module's path"
    )


def moving_inputs(
    graph: Graph, hidden: Node | None, timestep: Node | None, parameters: Sequence[str] = ()
) -> set[Node]:
    """The graph inputs that differ from step to step: latents, and whatever is named as a time is.

    For each result the input that it is a prediction of counts as latents: one of its shape, else
    one with other channels. Where the hidden states come from none of these, the largest input that
    they do come from counts.

    Args:
        graph: a Dynamo graph.
        hidden: the largest stream that enters the region, if one is known.
        timestep: the graph input that carries the timestep, if there is one.
        parameters: names of the model's positional parameters, see `find_timestep`.
    """
    inputs = [node for node in graph.find_nodes(op="placeholder") if not is_static_input(node)]
    times = {
        node
        for node in inputs
        if node is timestep or timestep_name([_parameter(node, parameters)]) is not None
    }
    others = [node for node in inputs if node not in times and _is_floating(node)]
    (end,) = graph.find_nodes(op="output")
    latents: set[Node] = set()
    for result in filter(_is_floating, dict.fromkeys(nodes_in(end.args))):
        for alike in (same_shape, _same_but_channels):
            found = [node for node in others if alike(_shape(node), _shape(result))]
            # Several results of one shape are predictions of as many inputs.
            new = next((node for node in found if node not in latents), None)
            if new is not None:
                latents.add(new)
            if found:
                break
    behind = _ancestors(graph, hidden)
    if latents.isdisjoint(behind):
        sources = [node for node in others if node in behind]
        latents.update(sorted(sources, key=_numel)[-1:])
    return times | latents


def find_signal(
    graph: Graph,
    loop: BlockLoop,
    region: Region,
    pairs: Sequence[ResidualPair],
    timestep: Node | None,
    which: str = "auto",
    before: Dependencies | None = None,
) -> Signal:
    """Find the signal.

    Args:
        graph: a Dynamo graph.
        loop: its block loop.
        region: the region around the loop.
        pairs: the region's residual pairs; at least one has a partner.
        timestep: the graph input that carries the timestep, if there is one.
        which: ``"auto"``, ``"timestep_embedding"``, ``"latents"`` or the path of a module, such as
            ``"blocks.0.norm1"``, whose largest output is then the signal. All of the region that
            the signal depends on moves to the prologue and runs on every step.
        before: the graph's dependencies, where the caller has them.

    Raises:
        UnknownNameError: the graph does not run a module of the path ``which``.
        RegionError: the graph has no such tensor, or the tensor depends on the whole block loop.
    """
    before = dependencies(graph) if before is None else before
    first, origins = loop.lists[0], trace_origins(region)
    hidden = hidden_states(pairs)
    if which == LATENTS:
        return Signal(find_latents(graph, timestep), LATENTS, ())
    if which not in ("auto", "timestep_embedding"):
        node = _module_output(graph, region, which)
        return Signal(node, "module output", with_ancestors(region, [node], before))
    timed = _descendants(graph, [] if timestep is None else [timestep])
    alone = origins
    if len(loop.lists) > 1:
        alone = trace_origins(close_region(graph, first.nodes, before))
    carried = streams(alone, len(first.blocks)) | {hidden}
    conditioning = [node for node in region.inputs if node in timed and node not in carried]
    if which == "timestep_embedding":
        if timestep is None:
            raise RegionError(
                "signal='timestep_embedding': no graph input is a timestep "
                f"(looked for an argument named {', '.join(TIMESTEP_ARGUMENTS)})"
            )
        return Signal(
            _timestep_embedding(graph, conditioning, hidden, timestep), "timestep embedding", ()
        )
    modulated = _modulated_input(loop, conditioning, hidden, origins)
    if modulated is None:
        return Signal(hidden, "hidden states", ())
    return Signal(modulated, "modulated input", with_ancestors(region, [modulated], before))


def first_residual(
    graph: Graph, head: Collection[Node], pairs: Sequence[ResidualPair], before: Dependencies
) -> Signal:
    """What the first blocks add to the hidden states.

    Args:
        graph: a Dynamo graph.
        head: the nodes of those blocks.
        pairs: the residual pairs of the region that follows them.
        before: the graph's dependencies.

    Raises:
        RegionError: the hidden states behind the blocks are no update of what entered them.
    """
    hidden = hidden_states(pairs)
    _, found = pair_outputs(graph, close_region(graph, head, before))
    minus = next((pair.partner for pair in found if pair.output is hidden), None)
    if minus is None:
        raise RegionError(
            "the hidden states behind the first blocks are not what entered them plus what the "
            "blocks add; let another number of first blocks always run",
            hidden,
        )
    return Signal(hidden, "residual of the first blocks", (), minus)


def hidden_states(pairs: Sequence[ResidualPair]) -> Node:
    """The largest stream that enters the region and comes out of it again."""
    paired = (leaf for pair in pairs if pair.partner is not None for leaf in leaves(pair.partner))
    return max(paired, key=_numel)


def _modulated_input(
    loop: BlockLoop, conditioning: Collection[Node], hidden: Node, origins: Mapping[Node, Origin]
) -> Node | None:
    """The first complete tensor of block 0 that hidden states and conditioning both reach."""
    block = loop.blocks[0].nodes
    inner = set(block)
    timed, streamed = set(conditioning), {hidden}
    # A block may lay the hidden states out anew, or join another stream to them, before it works.
    shapes = [_shape(hidden)]
    for node in block:
        origin = origins.get(node)
        if origin is not None and origin.additions == 0 and hidden in leaves(origin.view):
            shapes.append(_shape(node))
        for reached in (timed, streamed):
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        if (
            node in timed
            and node in streamed
            and any(same_shape(_shape(node), shape) for shape in shapes)
        ):
            complete = any(
                user not in inner or op_name(user) not in ELEMENTWISE_OPS for user in node.users
            )
            if complete:
                return node
    return None


def _timestep_embedding(
    graph: Graph, conditioning: Collection[Node], hidden: Node, timestep: Node
) -> Node:
    """The largest input of the region that descends from the timestep and not from the latents."""
    behind = _ancestors(graph, hidden)
    sources = [
        node
        for node in graph.nodes
        if node.op == "placeholder" and node in behind and not is_static_input(node)
    ]
    latents = max((node for node in sources if node is not timestep), key=_numel, default=hidden)
    streamed = _descendants(graph, [latents])
    candidates = [node for node in conditioning if node not in streamed]
    if not candidates:
        raise RegionError(
            "signal='timestep_embedding': no timestep embedding enters the block loop"
        )
    return max(candidates, key=_numel)


def _module_output(graph: Graph, region: Region, path: str) -> Node:
    """The largest tensor that a module returns."""
    wanted = tuple(path.split("."))
    nodes = computation(graph)
    inside = {node for node in nodes if module_path(node)[: len(wanted)] == wanted}
    outputs = [
        node
        for node in nodes
        if node in inside
        and tensor_of(node) is not None
        and any(user not in inside for user in node.users)
    ]
    if not outputs:
        paths = {module_path(node)[: len(wanted)] for node in nodes if tensor_of(node) is not None}
        known = [".".join(each) for each in paths if len(each) == len(wanted)]
        raise UnknownNameError(f"signal={path!r}", path, known)
    node = max(outputs, key=_numel)
    if node in region.epilogue:
        raise RegionError(f"signal={path!r}: that module runs after the block loop")
    return node


def _is_floating(node: Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.is_floating_point()


def _same_but_channels(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two shapes differ in one size, which is the last, or the second of (B, C, ...)."""
    if len(one) != len(other) or len(one) < 3:
        return False
    differing = [place for place in range(len(one)) if not same_size(one[place], other[place])]
    return differing in ([len(one) - 1], [1]) and (len(one) > 3 or differing != [1])


def _descendants(graph: Graph, sources: Iterable[Node]) -> set[Node]:
    found = set(sources)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _ancestors(graph: Graph, node: Node | None) -> set[Node]:
    """A node and all that it is made of."""
    behind = set() if node is None else {node}
    for each in reversed(graph.nodes):
        if each in behind:
            behind.update(each.all_input_nodes)
    return behind


def _shape(node: Node) -> Sequence[object]:
    value = tensor_of(node)
    return () if value is None else tuple(value.shape)


def _numel(node: Node) -> int:
    value = tensor_of(node)
    return -1 if value is None else numel(value)
