r"""Residual pairs: a region output with the region input that it is a residual update of.

    x -> [norm -> attention -> mul] -> add -> [norm -> mlp -> mul] -> add -> out
     \________________________________/ \__________________________/
         the chain of residual additions that leads from ``out`` back to ``x``

Streams may be concatenated, sliced, reshaped or cast on the way; the chain is followed through such
views symbolically, so that ``slice(cat(text, image))`` is known to be ``image`` again. What a pair
says is never needed for exactness, since ``r = out - in`` holds for any ``in`` of the same shape: a
good pair makes ``r`` change slowly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node

from .node import CAST_OPS, op_name, tensor_of
from .region import Region, extend_body

Shape: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Leaf:
    """A region input as it is."""

    node: Node
    shape: Shape


@dataclass(frozen=True)
class Slice:
    """Elements ``start`` to ``stop`` of one dimension."""

    of: View
    dim: int
    start: int
    stop: int
    shape: Shape


@dataclass(frozen=True)
class Cat:
    """Several views along one dimension."""

    parts: tuple[View, ...]
    dim: int
    shape: Shape


@dataclass(frozen=True)
class Reshape:
    """The same elements in the same order in another shape."""

    of: View
    shape: Shape


@dataclass(frozen=True)
class Permute:
    """The same elements with their dimensions in another order."""

    of: View
    dims: tuple[int, ...]
    shape: Shape


View: TypeAlias = Leaf | Slice | Cat | Reshape | Permute
"""A tensor that is made of region inputs by views alone."""


@dataclass(frozen=True)
class Origin:
    """Where a stream comes from: a view of region inputs, and how many additions ago."""

    view: View
    additions: int


@dataclass(frozen=True)
class ResidualPair:
    """A region output with what it is a residual update of.

    ``partner`` is a view of region inputs with the output's shape and dtype, so that
    ``r = output - partner``; None where there is no such view, and the output is held as a value.
    ``additions`` counts the residual additions between the two.
    """

    output: Node
    partner: View | None
    additions: int

    @property
    def held(self) -> bool:
        """Whether the output itself, not a residual, is what a reused step takes over."""
        return self.partner is None


def leaves(view: View) -> list[Node]:
    """The region inputs that a view is made of, in order."""
    if isinstance(view, Leaf):
        return [view.node]
    if isinstance(view, Cat):
        return [node for part in view.parts for node in leaves(part)]
    return leaves(view.of)


def trace_origins(region: Region) -> dict[Node, Origin]:
    """The origin of every node of the body that continues a residual stream. One linear sweep."""
    origins: dict[Node, Origin] = {}
    for node in region.inputs:
        value = tensor_of(node)
        if value is not None and value.dtype.is_floating_point:
            origins[node] = Origin(Leaf(node, tuple(value.shape)), 0)
    for node in region.body:
        origin = _origin(node, origins)
        if origin is not None:
            origins[node] = origin
    return origins


def streams(origins: Mapping[Node, Origin], additions: int) -> set[Node]:
    """The region inputs that at least so many additions continue, i.e. that enter a stream."""
    return {
        leaf
        for origin in origins.values()
        if origin.additions >= additions
        for leaf in leaves(origin.view)
    }


def pair_outputs(graph: Graph, region: Region) -> tuple[Region, tuple[ResidualPair, ...]]:
    """Find the partner of every region output, and move the cut over views where that finds one.

    An output that is sliced or reshaped right after the region, and has no region input as its
    partner as it stands, is replaced by the results of those views when each of them has one.

    Returns:
        The region, possibly with a few views of the epilogue taken into its body, and a pair for
        each of its outputs.
    """
    region = _absorb_views(graph, region)
    origins = trace_origins(region)
    return region, tuple(_pair(output, origins) for output in region.outputs)


def _pair(output: Node, origins: Mapping[Node, Origin]) -> ResidualPair:
    origin = origins.get(output)
    value = tensor_of(output)
    if origin is None or origin.additions == 0 or value is None:
        return ResidualPair(output, None, 0)
    dtypes = {
        tensor.dtype for leaf in leaves(origin.view) if (tensor := tensor_of(leaf)) is not None
    }
    if dtypes != {value.dtype} or not _same_shape(origin.view.shape, value.shape):
        return ResidualPair(output, None, 0)
    if not isinstance(origin.view, Leaf) and not _is_concrete(origin.view):
        return ResidualPair(output, None, 0)
    return ResidualPair(output, origin.view, origin.additions)


def _absorb_views(graph: Graph, region: Region) -> Region:
    """Move the cut behind views of an output where that makes a pair with a bare region input."""
    origins = dict(trace_origins(region))
    body = set(region.body)
    taken: list[Node] = []
    for output in region.outputs:
        origin = origins.get(output)
        if origin is None or not origin.additions or isinstance(origin.view, Leaf):
            continue
        taken += _views_down_to_leaves(output, origins, body)
    return extend_body(graph, region, taken) if taken else region


def _views_down_to_leaves(
    output: Node, origins: dict[Node, Origin], body: Collection[Node]
) -> list[Node]:
    """The views behind an output, when every path through them ends at a bare region input."""
    additions = origins[output].additions
    views: list[Node] = []
    frontier = [output]
    while frontier:
        for user in frontier.pop().users:
            if user in body:
                continue
            if op_name(user) in _PIECES:
                views.append(user)
                frontier.append(user)
                continue
            origin = _origin(user, origins) if user.op != "output" else None
            if origin is None or origin.additions != additions:
                return []
            origins[user] = origin
            views.append(user)
            if not isinstance(origin.view, Leaf):
                frontier.append(user)
    return views


# --- one node ------------------------------------------------------------------------------------

_PIECES = frozenset({"chunk", "split", "split_with_sizes", "tensor_split"})
_IDENTITY = (
    frozenset({"contiguous", "clone", "dropout", "clamp", "clip", "detach", "alias"}) | CAST_OPS
)
_RESHAPES = frozenset({"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"})


def _origin(node: Node, origins: Mapping[Node, Origin]) -> Origin | None:
    """The origin of one node from those of its inputs, or None where no stream continues in it."""
    value = tensor_of(node)
    if value is None or not node.args:
        return None
    name = op_name(node)
    source = node.args[0] if isinstance(node.args[0], Node) else None
    if name in ("add", "iadd", "add_", "radd", "sub"):
        operands = [arg for arg in node.args[:2] if isinstance(arg, Node)]
        if len(operands) < 2:  # adding a constant, as in (1 + scale), continues no stream
            return None
        return _add(operands[:1] if name == "sub" else operands, value, origins)
    if name in ("cat", "concat", "concatenate"):
        return _cat(node, origins)
    if name == "getitem" and source is not None and op_name(source) in _PIECES:
        return _piece(node, source, origins)
    origin = origins.get(source) if source is not None else None
    if origin is None or source is None:
        return None
    if name in _IDENTITY:
        return origin
    view: View | None = None
    if name in _RESHAPES:
        view = _reshape(origin.view, tuple(value.shape))
    elif name == "getitem":
        view = _index(origin.view, node.args[1], tuple(value.shape))
    elif name in ("permute", "transpose", "movedim", "swapaxes"):
        view = _permute(origin.view, _permutation(node, name, value.dim()))
    elif name == "narrow":
        dim, start, length = (
            _argument(node, i, k) for i, k in ((1, "dim"), (2, "start"), (3, "length"))
        )
        if isinstance(start, int) and isinstance(length, int):
            view = _slice(origin.view, dim % value.dim(), start, start + length)
    return Origin(view, origin.additions) if view is not None else None


def _add(
    operands: Sequence[Node], value: torch.Tensor, origins: Mapping[Node, Origin]
) -> Origin | None:
    """The operand that has come the longest way is the stream, the others are updates of it."""
    candidates = [
        origins[operand]
        for operand in operands
        if operand in origins and _same_shape(origins[operand].view.shape, value.shape)
    ]
    if not candidates:
        return None
    oldest = max(candidates, key=lambda origin: origin.additions)
    return Origin(oldest.view, oldest.additions + 1)


def _cat(node: Node, origins: Mapping[Node, Origin]) -> Origin | None:
    tensors = node.args[0]
    value = tensor_of(node)
    if not isinstance(tensors, (list, tuple)) or value is None:
        return None
    parts = [origins.get(each) if isinstance(each, Node) else None for each in tensors]
    known = [part for part in parts if part is not None]
    dim = _argument(node, 1, "dim", "axis", default=0)
    if len(known) != len(parts) or not known or not isinstance(dim, int):
        return None
    dim %= value.dim()
    view = _join([part.view for part in known], dim, tuple(value.shape))
    return Origin(view, max(part.additions for part in known))


def _join(parts: Sequence[View], dim: int, shape: Shape) -> View:
    """Concatenate views; consecutive slices of one view that make it whole again are that view."""
    first = parts[0]
    if isinstance(first, Slice) and first.start == 0 and first.dim == dim:
        stop = 0
        for part in parts:
            if not (isinstance(part, Slice) and part.of == first.of and part.dim == dim):
                break
            if part.start != stop:
                break
            stop = part.stop
        else:
            if _same_size(stop, first.of.shape[dim]):
                return first.of
    flat: list[View] = []
    for part in parts:
        flat += part.parts if isinstance(part, Cat) and part.dim == dim else (part,)
    return Cat(tuple(flat), dim, shape)


def _piece(node: Node, source: Node, origins: Mapping[Node, Origin]) -> Origin | None:
    """One result of ``split`` or ``chunk``: a slice, placed by the sizes of its siblings."""
    whole = source.args[0]
    siblings = source.meta.get("example_value")
    index = node.args[1]
    if not isinstance(whole, Node) or whole not in origins or not isinstance(index, int):
        return None
    if not isinstance(siblings, (tuple, list)) or tensor_of(whole) is None:
        return None
    rank = len(origins[whole].view.shape)
    dim = _argument(source, 2, "dim", default=0)
    if not isinstance(dim, int):
        return None
    dim %= rank
    sizes = [each.shape[dim] for each in siblings]
    if not all(isinstance(size, int) for size in sizes):
        return None
    index %= len(sizes)
    view = _slice(origins[whole].view, dim, sum(sizes[:index]), sum(sizes[: index + 1]))
    return Origin(view, origins[whole].additions) if view is not None else None


def _slice(view: View, dim: int, start: int, stop: int) -> View | None:
    """``view[start:stop]`` along ``dim``, resolved through concatenations and earlier slices."""
    size = view.shape[dim]
    if start == 0 and _same_size(stop, size):
        return view
    if not isinstance(size, int):
        return None
    if isinstance(view, Slice) and view.dim == dim:
        return _slice(view.of, dim, view.start + start, view.start + stop)
    if isinstance(view, Cat) and view.dim == dim:
        offset = 0
        for part in view.parts:
            length = part.shape[dim]
            if not isinstance(length, int):
                return None
            if offset <= start and stop <= offset + length:
                return _slice(part, dim, start - offset, stop - offset)
            offset += length
    shape = (*view.shape[:dim], stop - start, *view.shape[dim + 1 :])
    return Slice(view, dim, start, stop, shape)


def _index(view: View, index: Any, shape: Shape) -> View | None:
    """Basic indexing with slices: ``x[:, 8:]``, ``x[..., :4]``. Anything else ends the stream."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if entries.count(Ellipsis) > 1 or not all(
        isinstance(e, slice) or e is Ellipsis for e in entries
    ):
        return None
    rank = len(view.shape)
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (rank - len(entries) + 1)
    result: View | None = view
    for dim, entry in enumerate(entries):
        if entry == slice(None):
            continue
        size = view.shape[dim]
        bounds = (entry.start, entry.stop, entry.step)
        if not isinstance(size, int) or not all(b is None or isinstance(b, int) for b in bounds):
            return None
        start, stop, step = entry.indices(size)
        if step != 1 or result is None:
            return None
        result = _slice(result, dim, start, stop)
    return result if result is not None and _same_shape(result.shape, shape) else None


def _reshape(view: View, shape: Shape) -> View:
    while isinstance(view, Reshape):
        view = view.of
    return view if _same_shape(view.shape, shape) else Reshape(view, shape)


def _permutation(node: Node, name: str, rank: int) -> tuple[int, ...] | None:
    """The order of dimensions of a permute-like node, or None where it is not constant."""
    args = [_argument(node, 1, "dims", "dim0", "source"), _argument(node, 2, "dim1", "destination")]
    if name == "permute":
        dims: Sequence[Any] = args[0] if isinstance(args[0], (tuple, list)) else node.args[1:]
        if len(dims) != rank or not all(isinstance(dim, int) for dim in dims):
            return None
        return tuple(dim % rank for dim in dims)
    first, second = args
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    order = list(range(rank))
    if name == "movedim":
        order.insert(second % rank, order.pop(first % rank))
    else:
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return tuple(order)


def _permute(view: View, dims: tuple[int, ...] | None) -> View | None:
    if dims is None:
        return None
    if isinstance(view, Permute):
        dims = tuple(view.dims[dim] for dim in dims)
        view = view.of
    if dims == tuple(range(len(dims))):
        return view
    return Permute(view, dims, tuple(view.shape[dim] for dim in dims))


def _argument(node: Node, position: int, *names: str, default: Any = None) -> Any:
    """A node's argument by its position or by one of its names."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def _same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard on a symbolic one."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(one == other))


def _same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(_same_size, one, other))


def _is_concrete(view: View) -> bool:
    """Whether a view can be written into a graph without symbolic sizes."""
    if not all(isinstance(size, int) for size in view.shape):
        return False
    if isinstance(view, Leaf):
        return True
    return all(map(_is_concrete, view.parts if isinstance(view, Cat) else (view.of,)))
