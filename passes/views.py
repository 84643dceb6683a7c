"""Views of tensors, symbolically: what slices, concatenations, reshapes and permutations make.

    slice(cat(text, image), from the end of text)  ->  image

Functions build views in simplest form, so that two views of the same elements are equal. Knows
sizes; knows nothing of operations.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from .values import is_known, is_unknown, same_shape, same_size, tensor_of

Size: TypeAlias = int | torch.SymInt


Shape: TypeAlias = tuple[Size, ...]


class Sizes:
    """What sizes that depend on data turn out to be, once the views they belong to are followed.

    ``x[:, :-n]`` has a length of its own in the graph where ``n`` depends on data; as a view of
    ``cat([a, b])`` it is the length of ``a``. Unless ``n`` is 0: then it is 0, as ``-0`` does not
    count from the end.

    Args:
        numbers: nodes that compute a number before any view is made, by what they compute.

    Attributes:
        supposed: those of them that views were followed by on condition that they are below 0.
    """

    def __init__(self, numbers: Mapping[Any, Node] = MappingProxyType({})) -> None:
        self.supposed: dict[Node, None] = {}
        self._numbers = numbers
        self._known: dict[Any, Any] = {}

    def learn(self, shape: Sequence[Size], true_shape: Sequence[Size]) -> None:
        """Remember what the unknown sizes of a shape are."""
        for size, true_size in zip(shape, true_shape, strict=True):
            if is_unknown(size) and not same_size(size, true_size):
                assert isinstance(size, torch.SymInt)
                known = true_size if isinstance(true_size, int) else true_size.node.expr
                self._known[size.node.expr] = known

    def suppose_negative(self, number: torch.SymInt) -> bool:
        """Go on as if a number were below 0; False where that cannot be checked in time."""
        node = self._numbers.get(number.node.expr)
        if node is not None:
            self.supposed[node] = None
        return node is not None

    def resolve(self, size: Size) -> Size:
        """A size in terms of those that are known."""
        if isinstance(size, int) or self._known.keys().isdisjoint(size.node.expr.free_symbols):
            return size
        known = size.node.expr.xreplace(self._known)
        if isinstance(known, int):
            return known
        return plain(size.node.shape_env.create_symintnode(known, hint=None))

    def shape_of(self, value: torch.Tensor) -> Shape:
        """A tensor's shape in terms of sizes that are known."""
        return tuple(self.resolve(size) for size in value.shape)


@dataclass(frozen=True, eq=False)
class Leaf:
    """A region input as it is."""

    node: Node
    shape: Shape


@dataclass(frozen=True, eq=False)
class Slice:
    """Elements ``start`` to ``stop`` of one dimension."""

    of: View
    dim: int
    start: Size
    stop: Size
    shape: Shape


@dataclass(frozen=True, eq=False)
class Cat:
    """Several views along one dimension."""

    parts: tuple[View, ...]
    dim: int
    shape: Shape


@dataclass(frozen=True, eq=False)
class Reshape:
    """The same elements in the same order in another shape."""

    of: View
    shape: Shape


@dataclass(frozen=True, eq=False)
class Permute:
    """The same elements with their dimensions in another order."""

    of: View
    dims: tuple[int, ...]
    shape: Shape


View: TypeAlias = Leaf | Slice | Cat | Reshape | Permute
"""A tensor that is made of region inputs by views alone."""


def leaves(view: View) -> list[Node]:
    """The region inputs that a view is made of, in order."""
    if isinstance(view, Leaf):
        return [view.node]
    if isinstance(view, Cat):
        return [node for part in view.parts for node in leaves(part)]
    return leaves(view.of)


def dtype_of(view: View) -> torch.dtype:
    """The dtype of a view of tensors that may be of several."""
    values = map(tensor_of, leaves(view))
    dtypes = (value.dtype for value in values if value is not None)
    return functools.reduce(torch.promote_types, dtypes)


def is_concrete(view: View) -> bool:
    """Whether a view can be written into a graph without symbolic sizes."""
    match view:
        case Leaf():
            return True
        case Cat():
            return all(map(is_concrete, view.parts))
        case Slice():
            written: Shape = (view.start, view.stop)
        case Reshape():
            written = view.shape
        case Permute():
            written = ()
    return all(isinstance(size, int) for size in written) and is_concrete(view.of)


def same_view(one: View, other: View) -> bool:
    """Whether two views are of the same elements."""
    if not same_shape(one.shape, other.shape):
        return False
    match one, other:
        case Leaf(), Leaf():
            return one.node is other.node
        case Cat(), Cat():
            matching = one.dim == other.dim and len(one.parts) == len(other.parts)
            return matching and all(map(same_view, one.parts, other.parts))
        case Slice(), Slice():
            placed = one.dim == other.dim and same_size(one.start, other.start)
            return placed and same_view(one.of, other.of)
        case Permute(), Permute():
            return one.dims == other.dims and same_view(one.of, other.of)
        case Reshape(), Reshape():
            return same_view(one.of, other.of)
    return False


def join(parts: Sequence[View], dim: int) -> View:
    """Concatenate views; consecutive slices of one view that make it whole again are that view."""
    first = parts[0]
    if isinstance(first, Slice) and first.dim == dim:
        stop: Size = 0
        for part in parts:
            if not (isinstance(part, Slice) and part.of is first.of and part.dim == dim):
                break
            if not same_size(part.start, stop):
                break
            stop = part.stop
        else:
            if same_size(stop, first.of.shape[dim]):
                return first.of
    flat: list[View] = []
    for part in parts:
        flat += part.parts if isinstance(part, Cat) and part.dim == dim else (part,)
    length = plain(sum(part.shape[dim] for part in flat))
    return Cat(tuple(flat), dim, (*first.shape[:dim], length, *first.shape[dim + 1 :]))


def slice_view(view: View, dim: int, start: Size, stop: Size) -> View:
    """``view[start:stop]`` along ``dim``, resolved through concatenations and earlier slices."""
    start, stop = plain(start), plain(stop)
    if same_size(start, 0) and same_size(stop, view.shape[dim]):
        return view
    if isinstance(view, Slice) and view.dim == dim:
        return slice_view(view.of, dim, view.start + start, view.start + stop)
    if isinstance(view, Cat) and view.dim == dim:
        offset: Size = 0
        for part in view.parts:
            end = offset + part.shape[dim]
            if is_known(start >= offset) and is_known(stop <= end):
                return slice_view(part, dim, start - offset, stop - offset)
            offset = end
    shape = (*view.shape[:dim], plain(stop - start), *view.shape[dim + 1 :])
    return Slice(view, dim, start, stop, shape)


def reshape(view: View, shape: Shape) -> View:
    """The elements of a view in another shape."""
    while isinstance(view, Reshape):
        view = view.of
    return view if same_shape(view.shape, shape) else Reshape(view, shape)


def permute(view: View, dims: tuple[int, ...] | None) -> View | None:
    """A view with its dimensions in another order; None where the order is unknown."""
    if dims is None:
        return None
    if isinstance(view, Permute):
        dims = tuple(view.dims[dim] for dim in dims)
        view = view.of
    if dims == tuple(range(len(dims))):
        return view
    return Permute(view, dims, tuple(view.shape[dim] for dim in dims))


def plain(size: Size) -> Size:
    """A size as a number, where it is one."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size
