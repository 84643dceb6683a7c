r"""Residual streams: where each tensor of a region comes from, by views and additions alone.

    x -> [norm -> attention -> mul] -> add -> [norm -> mlp -> mul] -> add -> out
     \________________________________/ \__________________________/
         the chain of residual additions that leads from ``out`` back to ``x``

Streams may be concatenated, sliced, reshaped or cast on the way, multiplied by a mask, or mixed
with an earlier state of themselves. Knows operations; knows nothing of what is cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .names import CAST_OPS, argument, op_name
from .region import Region
from .values import is_known, is_static_input, is_unknown, same_shape, same_size, tensor_of
from .views import (
    Cat,
    Leaf,
    Permute,
    Reshape,
    Shape,
    Size,
    Sizes,
    Slice,
    View,
    join,
    leaves,
    permute,
    reshape,
    same_view,
    slice_view,
)


@dataclass(frozen=True)
class Origin:
    """Where a stream comes from: a view of region inputs, and how many additions ago for each."""

    view: View
    counts: Mapping[Node, int]

    @property
    def additions(self) -> int:
        """The additions since the region input with the most of them."""
        return max(self.counts.values())

    def seen_as(self, view: View) -> Origin:
        """The same stream as a view of this one, which may leave some region inputs out."""
        return Origin(view, {leaf: self.counts[leaf] for leaf in leaves(view)})

    def updated(self) -> Origin:
        """The stream after one more addition."""
        return Origin(self.view, {leaf: count + 1 for leaf, count in self.counts.items()})


class Origins(dict[Node, Origin]):
    """The origin of each node that continues a residual stream, and what sizes turn out to be."""

    def __init__(self, origins: Mapping[Node, Origin], sizes: Sizes) -> None:
        super().__init__(origins)
        self.sizes = sizes

    def add(self, node: Node, origin: Origin) -> None:
        """Enter a node's origin, and learn from it what the node's unknown sizes are."""
        self[node] = origin
        value = tensor_of(node)
        assert value is not None  # only tensors have an origin
        self.sizes.learn(value.shape, origin.view.shape)


def trace_origins(region: Region) -> Origins:
    """The origin of every node of the body that continues a residual stream. One linear sweep."""
    origins = Origins({}, Sizes(_numbers(region)))
    flow = _Flow(region)
    for node in region.inputs:
        value = tensor_of(node)
        if value is not None and value.dtype.is_floating_point:
            origins[node] = Origin(Leaf(node, tuple(value.shape)), {node: 0})
    for node in region.body:
        origin = _origin(node, origins, flow)
        if origin is not None:
            origins.add(node, origin)
    return origins


def _numbers(region: Region) -> dict[Any, Node]:
    """The nodes before a region that compute a number, by what they compute."""
    values = ((node, node.meta.get("example_value")) for node in region.prologue)
    return {each.node.expr: node for node, each in values if isinstance(each, torch.SymInt)}


class _Flow:
    """What depends on what in a region."""

    def __init__(self, region: Region) -> None:
        varying: set[Node] = set()
        for node in region.prologue:
            if any(_is_argument(each) or each in varying for each in node.all_input_nodes):
                varying.add(node)
        self._varying = varying
        # Which region inputs a node depends on, one bit for each.
        self._reads = {node: 1 << place for place, node in enumerate(region.inputs)}
        for node in region.body:
            read = 0
            for each in node.all_input_nodes:
                read |= self._reads.get(each, 0)
            self._reads[node] = read

    def updates(self, term: Node, view: View, node: Node) -> bool:
        """Whether what ``node`` adds to ``term`` depends on what ``term`` is a view of."""
        stream = 0
        for leaf in leaves(view):
            stream |= self._reads[leaf]
        others = (each for each in node.all_input_nodes if each is not term)
        return any(self._reads.get(each, 0) & stream for each in others)

    def varies(self, view: View) -> bool:
        """Whether a view changes from call to call, as a learned position does not."""
        return any(_is_argument(leaf) or leaf in self._varying for leaf in leaves(view))


def _is_argument(node: Node) -> bool:
    return node.op == "placeholder" and not is_static_input(node)


def streams(origins: Mapping[Node, Origin], blocks: int) -> set[Node]:
    """The region inputs that enter a stream which runs through so many blocks.

    The last block may leave out a stream that nobody reads after it. A tensor that joins a stream
    for one block, or is added once, does not count as a stream.
    """
    longest: dict[Node, int] = {}
    for origin in origins.values():
        for leaf, count in origin.counts.items():
            longest[leaf] = max(longest.get(leaf, 0), count)
    most = max(longest.values(), default=0)
    return {
        leaf for leaf, count in longest.items() if count and count * blocks >= most * (blocks - 1)
    }


# --- one node ------------------------------------------------------------------------------------


PIECES = frozenset({"chunk", "split", "split_with_sizes", "tensor_split"})


_IDENTITY = (
    frozenset({"contiguous", "clone", "dropout", "clamp", "clip", "detach", "alias", "nan_to_num"})
    | CAST_OPS
)


_EXPANSIONS = frozenset({"expand", "expand_as", "broadcast_to", "repeat", "tile"})


_RESHAPES = frozenset({"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"})


_PERMUTES = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"})


_PRODUCTS = frozenset({"mul", "imul", "mul_", "rmul"})


_NORMS = frozenset({"layer_norm", "rms_norm", "group_norm"})


_MIXES = frozenset({"linear"})


_SUMS = frozenset({"add", "iadd", "add_", "radd"})


_UPDATES_OF_THE_FIRST = frozenset(
    {
        *("sub", "isub", "sub_", "lerp", "lerp_"),
        *("addcmul", "addcmul_", "addcdiv", "addcdiv_", "addmm", "baddbmm"),
    }
)


def _origin(node: Node, origins: Origins, flow: _Flow) -> Origin | None:
    """The origin of one node from those of its inputs, or None if no stream continues in it."""
    name = op_name(node)
    if name in _SUMS or name in _UPDATES_OF_THE_FIRST:
        return _add(node, origins, flow)
    if name in _PRODUCTS:
        return _masked(node, origins, flow)
    return view_origin(node, origins)


def _add(node: Node, origins: Origins, flow: _Flow) -> Origin | None:
    """The operand with the most additions behind it is the stream; the others are updates of it.

    An operand that does not depend on the stream (a position embedding, the residual of a control
    network, a shift) joins it without counting as an addition.
    """
    value = tensor_of(node)
    terms = [argument(node, 0, "input", "self"), argument(node, 1, "other")]
    if op_name(node) in _UPDATES_OF_THE_FIRST or argument(node, 2, "alpha", default=1) != 1:
        terms.pop()
    if value is None or len(node.all_input_nodes) < 2:  # 1 + scale continues no stream
        return None
    streams = [
        (origins[term], flow.updates(term, origins[term].view, node))
        for term in terms
        if isinstance(term, Node) and term in origins and _same_shape(term, node)
    ]
    if not streams:
        return None
    oldest, updated = max(
        streams, key=lambda each: (each[0].additions, each[1], flow.varies(each[0].view))
    )
    return oldest.updated() if updated else oldest


def _same_shape(one: Node, other: Node) -> bool:
    first, second = tensor_of(one), tensor_of(other)
    return first is not None and second is not None and same_shape(first.shape, second.shape)


def _masked(node: Node, origins: Origins, flow: _Flow) -> Origin | None:
    """The stream of a product with a mask, which has one element per token."""
    value = tensor_of(node)
    terms = [argument(node, 0, "input", "self"), argument(node, 1, "other")]
    for term, factor in (terms, terms[::-1]):
        if not isinstance(term, Node) or not isinstance(factor, Node) or term not in origins:
            continue
        origin, mask = origins[term], tensor_of(factor)
        if value is None or mask is None or not _same_shape(term, node):
            continue
        one_per_token = mask.dim() == value.dim() and same_size(mask.shape[-1], 1)
        if one_per_token and not flow.updates(term, origin.view, node):
            return origin
    return None


def view_origin(node: Node, origins: Origins) -> Origin | None:
    """The origin of a node that computes nothing: a view, a cast, a concatenation."""
    value = tensor_of(node)
    if value is None:
        return None
    name = op_name(node)
    if name in ("cat", "concat", "concatenate"):
        return _cat(node, value, origins)
    source = argument(node, 0, "input", "self")
    if not isinstance(source, Node):
        return None
    if name == "getitem" and op_name(source) in PIECES:
        return _piece(node, source, origins)
    if source not in origins:
        return None
    repeated = _repeated(origins[source].view, origins.sizes)
    if repeated is not None and (name in _NORMS or name in _MIXES):
        # A long skip: a stream beside an earlier state of itself, mixed into one again.
        mixed = same_shape(repeated.shape, value.shape)
        return origins[source].seen_as(repeated) if mixed else origins[source]
    view = _view(node, name, origins[source].view, origins.sizes)
    return None if view is None else origins[source].seen_as(view)


def _view(node: Node, name: str, view: View, sizes: Sizes) -> View | None:
    """What a node makes of a view, or None if its result is not a view of it."""
    value = tensor_of(node)
    assert value is not None  # a view is a tensor
    shape = sizes.shape_of(value)
    if name in _IDENTITY:
        return view
    if name in _EXPANSIONS:
        return view if same_shape(view.shape, shape) else None
    if name in _RESHAPES and not isinstance(argument(node, 1, "dtype"), torch.dtype):
        return reshape(view, shape)
    if name in _PERMUTES:
        return permute(view, _permutation(node, name, len(shape)))
    if name == "getitem":
        return _index(view, node.args[1], shape, sizes)
    if name == "narrow":
        dim = argument(node, 1, "dim")
        start = _size(argument(node, 2, "start"), sizes)
        length = _size(argument(node, 3, "length"), sizes)
        if isinstance(dim, int) and start is not None and length is not None:
            return slice_view(view, dim % len(shape), start, start + length)
    return None


def _cat(node: Node, value: torch.Tensor, origins: Origins) -> Origin | None:
    tensors = argument(node, 0, "tensors")
    if not isinstance(tensors, (list, tuple)):
        return None
    parts = [origins[each] for each in tensors if isinstance(each, Node) and each in origins]
    dim = argument(node, 1, "dim", "axis", default=0)
    if not parts or len(parts) != len(tensors) or not isinstance(dim, int):
        return None
    view = join([part.view for part in parts], dim % value.dim())
    counts: dict[Node, int] = {}
    for part in parts:
        for leaf, count in part.counts.items():
            counts[leaf] = max(counts.get(leaf, 0), count)
    return Origin(view, counts)


def _repeated(view: View, sizes: Sizes) -> View | None:
    """What the channels of a view repeat: ``x`` of ``cat([x, x], dim=-1)``, else None."""
    if not isinstance(view, Cat) or view.dim != len(view.shape) - 1:
        return None
    first, *others = (_at_its_source(part, sizes) for part in view.parts)
    return view.parts[0] if all(same_view(first, other) for other in others) else None


def _at_its_source(view: View, sizes: Sizes) -> View:
    """A view with those region inputs that are views themselves traced back before the region."""
    match view:
        case Leaf():
            source = argument(view.node, 0, "input", "self")
            value = tensor_of(source) if isinstance(source, Node) else None
            if value is None:
                return view
            before = _at_its_source(Leaf(source, sizes.shape_of(value)), sizes)
            return _view(view.node, op_name(view.node), before, sizes) or view
        case Cat():
            return join([_at_its_source(part, sizes) for part in view.parts], view.dim)
        case Slice():
            return slice_view(_at_its_source(view.of, sizes), view.dim, view.start, view.stop)
        case Permute():
            return permute(_at_its_source(view.of, sizes), view.dims) or view
        case Reshape():
            return reshape(_at_its_source(view.of, sizes), view.shape)


def _piece(node: Node, source: Node, origins: Origins) -> Origin | None:
    """One result of ``split`` or ``chunk``: a slice, placed by the sizes of its siblings."""
    whole = argument(source, 0, "input", "tensor", "self")
    siblings = source.meta.get("example_value")
    index = node.args[1]
    if not isinstance(whole, Node) or whole not in origins or not isinstance(index, int):
        return None
    origin = origins[whole]
    dim = argument(source, 2, "dim", default=0)
    if not isinstance(siblings, (tuple, list)) or not isinstance(dim, int):
        return None
    dim %= len(origin.view.shape)
    index %= len(siblings)
    lengths = [origins.sizes.resolve(each.shape[dim]) for each in siblings]
    view = slice_view(origin.view, dim, sum(lengths[:index]), sum(lengths[: index + 1]))
    return origin.seen_as(view)


def _index(view: View, index: Any, shape: Shape, sizes: Sizes) -> View | None:
    """Basic indexing with slices: ``x[:, 8:]``, ``x[..., :4]``. Anything else ends the stream."""
    entries = list(index) if isinstance(index, tuple) else [index]
    dots = [place for place, entry in enumerate(entries) if entry is Ellipsis]
    if len(dots) > 1 or not all(isinstance(e, slice) or e is Ellipsis for e in entries):
        return None
    for place in dots:
        entries[place : place + 1] = [slice(None)] * (len(view.shape) - len(entries) + 1)
    for dim, entry in enumerate(entries):
        size = view.shape[dim]
        bounds = _bounds(entry, size, sizes)
        if bounds is None:
            return None
        view = slice_view(view, dim, *bounds)
        # Where a bound lies beyond the end, the result is shorter than the bounds say.
        inside = is_known(bounds[0] <= bounds[1]) and is_known(bounds[1] <= size)
        if not same_size(view.shape[dim], shape[dim]) and not (inside and is_unknown(shape[dim])):
            return None
    return view


def _bounds(entry: slice, size: Size, sizes: Sizes) -> tuple[Size, Size] | None:
    """Start and stop of a slice of a dimension, or None where it has steps or unknown ends."""
    start = 0 if entry.start is None else _size(entry.start, sizes)
    stop = size if entry.stop is None else _size(entry.stop, sizes)
    if entry.step not in (None, 1) or start is None or stop is None:
        return None
    if isinstance(start, int) and isinstance(stop, int) and isinstance(size, int):
        return slice(start, stop).indices(size)[:2]
    placed = [_place(bound, size, sizes) for bound in (start, stop)]
    return None if placed[0] is None or placed[1] is None else (placed[0], placed[1])


def _place(bound: Size, size: Size, sizes: Sizes) -> Size | None:
    """A bound counted from the front, or None where nothing tells from which end it counts."""
    if not is_known(bound <= 0) or same_size(bound, 0):
        return bound
    if isinstance(bound, int) or is_known(bound < 0) or sizes.suppose_negative(bound):
        return bound + size
    return None


def _size(value: Any, sizes: Sizes) -> Size | None:
    """A size that is written into a graph, as a number or as a node, or None if it is neither."""
    known = value.meta.get("example_value") if isinstance(value, Node) else value
    return sizes.resolve(known) if isinstance(known, (int, torch.SymInt)) else None


def _permutation(node: Node, name: str, rank: int) -> tuple[int, ...] | None:
    """The order of dimensions of a permute-like node, or None where it is not constant."""
    first = argument(node, 1, "dims", "dim0", "axis0", "source")
    second = argument(node, 2, "dim1", "axis1", "destination")
    if name == "permute":
        dims: Sequence[Any] = first if isinstance(first, (tuple, list)) else node.args[1:]
        if len(dims) != rank or not all(isinstance(dim, int) for dim in dims):
            return None
        return tuple(dim % rank for dim in dims)
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    order = list(range(rank))
    if name in ("movedim", "moveaxis"):
        order.insert(second % rank, order.pop(first % rank))
    else:
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return tuple(order)
