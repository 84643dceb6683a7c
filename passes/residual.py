"""Residual pairs: a region output with the region input that it is a residual update of.

Exactness never depends on the pair: ``r = out - in`` holds for any ``in`` of the same shape. A good
pair makes ``r`` change slowly.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from .names import module_path, nodes_in, op_name
from .region import Region, RegionError, extend_body
from .streams import PIECES, Origins, trace_origins, view_origin
from .values import nbytes, same_shape, tensor_of
from .views import Leaf, View, dtype_of, is_concrete, leaves


@dataclass(frozen=True)
class ResidualPair:
    """A region output, and the partner that it is a residual update of.

    ``partner`` is a view of region inputs with the output's shape, so that ``r = output - partner``
    in the output's dtype. It is None if no view fits; the output is then kept as a value.
    ``additions`` counts the residual additions between the two. ``supposed`` are nodes before the
    region whose numbers must be below 0 at run time, or the partner does not fit.
    """

    output: Node
    partner: View | None
    additions: int
    supposed: tuple[Node, ...] = ()

    @property
    def held(self) -> bool:
        """Whether the output itself is kept, in place of a residual."""
        return self.partner is None

    @property
    def cast(self) -> torch.dtype | None:
        """The output's dtype, if the partner has another dtype and must be cast; else None."""
        value = tensor_of(self.output)
        if self.partner is None or value is None or value.dtype == dtype_of(self.partner):
            return None
        return value.dtype


def pair_outputs(graph: Graph, region: Region) -> tuple[Region, tuple[ResidualPair, ...]]:
    """Find the partner of every region output, and move the cut over views where that finds one.

    An output that is sliced or reshaped right after the region, and has no region input as its
    partner as it stands, is replaced by the results of those views when each of them has one. So is
    one of which slices leave only a part, since the rest would be stored for nobody.

    Returns:
        The region, possibly with a few views of the epilogue taken into its body, and a pair for
        each of its outputs.
    """
    origins = trace_origins(region)
    views = _views_to_take(region, origins)
    if views:
        region = extend_body(graph, region, views)
        origins = trace_origins(region)
    return region, tuple(_pair(output, origins) for output in region.outputs)


def unreached_outputs(region: Region, pairs: Sequence[ResidualPair]) -> list[Node]:
    """The held outputs that no residual stream reaches: conditioning that a block computes."""
    reached = {leaf for pair in pairs if pair.partner is not None for leaf in leaves(pair.partner)}
    if not reached:
        return []
    for node in region.body:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return [pair.output for pair in pairs if pair.held and pair.output not in reached]


def check_results(graph: Graph, region: Region, pairs: Sequence[ResidualPair]) -> None:
    """Raise RegionError where a reused step would hand out a value of an earlier step.

    Keys, values and statistics that blocks return beside their stream, or leave in an attribute,
    are results of the graph too. A result that is made of held outputs and of no stream would be
    the earlier step's, whatever its dtype.
    """
    followed = {pair.output for pair in pairs if not pair.held}
    stale = {pair.output: pair.output for pair in pairs if pair.held}
    for node in region.epilogue:
        if not followed.isdisjoint(node.all_input_nodes):
            followed.add(node)
        source = next((stale[each] for each in node.all_input_nodes if each in stale), None)
        if source is not None:
            stale[node] = source
    (result,) = graph.find_nodes(op="output")
    for position, node in enumerate(nodes_in(result.args)):
        if node in stale and node not in followed:
            path = ".".join(module_path(stale[node])) or "the model"
            raise RegionError(
                f"output {position} of the graph is what {path} computes beside the stream; a "
                "reused step would hand out an earlier step's. Leave it out of what the model "
                "returns and of its attributes, or leave this call uncached",
                stale[node],
            )


def _pair(output: Node, origins: Origins) -> ResidualPair:
    origin = origins.get(output)
    value = tensor_of(output)
    if origin is None or origin.additions == 0 or value is None:
        return ResidualPair(output, None, 0)
    fits = same_shape(origin.view.shape, origins.sizes.shape_of(value))
    if not fits or not (isinstance(origin.view, Leaf) or is_concrete(origin.view)):
        return ResidualPair(output, None, 0)
    return ResidualPair(output, origin.view, origin.additions, tuple(origins.sizes.supposed))


def _views_to_take(region: Region, origins: Origins) -> list[Node]:
    """The views behind outputs that lead to bare region inputs, or leave less to store."""
    known = Origins(origins, origins.sizes)
    epilogue = set(region.epilogue)
    taken: list[Node] = []
    for output in region.outputs:
        origin = known.get(output)
        if origin is None or not origin.additions:
            continue
        views: list[Node] = []
        if not isinstance(origin.view, Leaf):
            views = _views_down_to_leaves(output, known, epilogue)
        taken += views or _narrowed(output, known, epilogue)[1]
    return taken


def _narrowed(output: Node, origins: Origins, epilogue: Collection[Node]) -> tuple[int, list[Node]]:
    """The fewest bytes that views leave of an output for all who read it, and those views."""
    value = tensor_of(output)
    whole = 0 if value is None else nbytes(value)  # what is a tuple is taken apart
    left, taken = 0, []
    for user in output.users:
        if user not in epilogue or any(
            each in epilogue and each is not output for each in user.all_input_nodes
        ):
            return whole, []
        if op_name(user) not in PIECES:
            origin, viewed = view_origin(user, origins), tensor_of(user)
            # A cast is not followed: in fewer bits a residual is worth less to a forecast.
            keeps_bits = viewed is None or value is None or viewed.dtype == value.dtype
            if origin is None or not keeps_bits or not _has_partner(user, origin.view):
                return whole, []
            origins.add(user, origin)
        below, views = _narrowed(user, origins, epilogue)
        left += below
        taken += [user, *views]
    return (left, taken) if value is None or left < whole else (whole, [])


def _views_down_to_leaves(output: Node, origins: Origins, epilogue: Collection[Node]) -> list[Node]:
    """The views behind an output, when every path through them ends at a bare region input."""
    views: list[Node] = []
    frontier = [output]
    while frontier:
        node = frontier.pop()
        for user in node.users:
            if user not in epilogue and user.op != "output":
                continue
            # What else a view reads, such as the size of another tensor, must be known by then.
            if any(each in epilogue and each not in views for each in user.all_input_nodes):
                return []
            if op_name(user) not in PIECES:
                origin = view_origin(user, origins)
                if origin is None or not _keeps_dtype(user, origin.view):
                    return []
                origins.add(user, origin)
            views.append(user)
            if op_name(user) in PIECES or not isinstance(origins[user].view, Leaf):
                frontier.append(user)
    return views


def _has_partner(node: Node, view: View) -> bool:
    """Whether a view of region inputs can be written down as the partner of a node."""
    return is_concrete(view) and _keeps_dtype(node, view)


def _keeps_dtype(node: Node, view: View) -> bool:
    """Whether a tensor still has the dtype of the region input that it is a view of."""
    value = tensor_of(node)
    return not isinstance(view, Leaf) or (value is not None and value.dtype == dtype_of(view))
