"""What a call of a block is given, and gives back, as Dynamo knows it while it traces."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from omni_cache.repeats.likeness import kind_of_tensor
from omni_cache.repeats.state import UnlikeError


@dataclass(frozen=True)
class GivenTensor:
    """A tensor, by the node that makes it."""

    node: Node
    facts: tuple[Any, ...]
    variable: Any = field(compare=False)


@dataclass(frozen=True)
class GivenConstant:
    """A Python value."""

    value: Any

    def __eq__(self, other: object) -> bool:
        own, its = self.value, getattr(other, "value", None)
        return type(own) is type(its) and own == its and repr(own) == repr(its)


@dataclass(frozen=True)
class GivenItems:
    """A tuple, list or dictionary."""

    kind: type
    keys: tuple[Any, ...]
    items: tuple[Any, ...]


@dataclass(frozen=True)
class GivenSame:
    """Anything else that comes from outside, by where it comes from."""

    source: Any


class Unused:
    """What no code has looked at."""


def as_given(value: Any, like: Any = None) -> Any:
    """What a variable of Dynamo's stands for.

    Args:
        value: the variable.
        like: what stood in its place in another call. What that one has looked at is looked at.
    """
    from torch._dynamo.variables.constant import ConstantVariable
    from torch._dynamo.variables.dicts import ConstDictVariable
    from torch._dynamo.variables.lazy import LazyVariableTracker
    from torch._dynamo.variables.lists import ListVariable, TupleVariable
    from torch._dynamo.variables.tensor import TensorVariable

    if isinstance(like, Unused):
        return like
    if type.__instancecheck__(LazyVariableTracker, value):
        if like is None and not value.is_realized():
            return Unused()
        value = value.realize()
    kind = type(value)
    if kind is TensorVariable:
        node = value.as_proxy().node
        return GivenTensor(node, _facts(node), value)
    if kind is ConstantVariable:
        return GivenConstant(value.value)
    if kind in (TupleVariable, ListVariable, ConstDictVariable):
        is_dict = kind is ConstDictVariable
        keys = tuple(key.vt.as_python_constant() for key in value.items) if is_dict else ()
        items = list(value.items.values()) if is_dict else value.items
        likes = like.items if isinstance(like, GivenItems) and len(like.items) == len(items) else ()
        parts = (as_given(*each) for each in zip(items, likes or [None] * len(items), strict=True))
        return GivenItems(kind, keys, tuple(parts))
    if value.source is None:
        raise UnlikeError
    return GivenSame(value.source)


def _facts(node: Node) -> tuple[Any, ...]:
    """What tracing may depend on of the tensor that a node makes."""
    value = node.meta["example_value"]
    return (type(value), *_sizes(value), *kind_of_tensor(value))


def _sizes(value: torch.Tensor) -> tuple[Any, ...]:
    """The sizes and strides of a tensor; of one that may change, the expression that it is."""
    sizes = (*value.size(), *value.stride())
    # Comparing the sizes themselves would be a guard.
    return tuple(each.node.expr if isinstance(each, torch.SymInt) else each for each in sizes)


def parts_of(given: Any) -> Iterator[Any]:
    """What was given, and what lies in it."""
    yield given
    for each in given.items if isinstance(given, GivenItems) else ():
        yield from parts_of(each)


def tensors_in(given: Any) -> Iterator[GivenTensor]:
    """The tensors that were given, in a fixed order."""
    return (each for each in parts_of(given) if isinstance(each, GivenTensor))


def nodes_in_one_place(given: Any, other: Any) -> Iterator[tuple[Node, Node]]:
    """The nodes of two calls that stand in one place."""
    if isinstance(given, GivenTensor):
        if not isinstance(other, GivenTensor) or given.facts != other.facts:
            raise UnlikeError
        yield given.node, other.node
    elif isinstance(given, GivenItems):
        if not isinstance(other, GivenItems):
            raise UnlikeError
        if (given.kind, given.keys, len(given.items)) != (other.kind, other.keys, len(other.items)):
            raise UnlikeError
        for each, its in zip(given.items, other.items, strict=True):
            yield from nodes_in_one_place(each, its)
    elif not isinstance(given, Unused) and given != other:
        raise UnlikeError


def may_tell(part: Any, block: nn.Module, tx: Any) -> bool:
    """Whether a block could find itself in what it is given, and so learn its place."""
    if not isinstance(part, GivenSame):
        return False
    value = tx.output.resolve_source_value(part.source)
    return isinstance(value, nn.Module) and any(each is block for each in value.modules())


def containers_in(value: Any) -> dict[int, list[int]]:
    """What lies in a variable's lists, tuples and dictionaries, all by identity."""
    from torch._dynamo.variables.dicts import ConstDictVariable
    from torch._dynamo.variables.lazy import LazyVariableTracker
    from torch._dynamo.variables.lists import BaseListVariable

    found: dict[int, list[int]] = {}
    values: list[Any] = [value]
    for each in values:
        if type.__instancecheck__(LazyVariableTracker, each):
            continue  # it comes from outside, so that a change of it would be an effect
        if isinstance(each, ConstDictVariable | BaseListVariable):
            items = each.items
            items = [*items.values()] if isinstance(items, dict) else items
            found[id(each)] = [*map(id, items)]
            values += items
    return found


def given_back(result: Any, within: Container[Node], args: Sequence[Any]) -> Any:
    """What a call returns, of nodes of its own or of what it was given."""
    if not _has_own_lists(result):
        raise UnlikeError
    found = as_given(result)
    parts = [found]
    for part in parts:
        if isinstance(part, GivenItems):
            parts += part.items
        elif not isinstance(part, GivenConstant) and not (
            isinstance(part, GivenTensor) and part.node in within
        ):
            raise UnlikeError
    # A list that somebody else has too could be changed by either.
    own, its = set(containers_in(result)), {each for arg in args for each in containers_in(arg)}
    if own & its or any(isinstance(part, GivenItems) and part.keys for part in parts):
        raise UnlikeError
    return found


def _has_own_lists(result: Any) -> bool:
    """Whether each list in a result was made by the call, and is in one place of it."""
    from torch._dynamo.variables.lazy import LazyVariableTracker
    from torch._dynamo.variables.lists import ListVariable, TupleVariable

    lists: set[int] = set()
    values = [result]
    for each in values:
        if type.__instancecheck__(LazyVariableTracker, each):
            each = each.realize()
        if type(each) is ListVariable:
            if each.source is not None or id(each) in lists:
                return False
            lists.add(id(each))
        if type(each) in (ListVariable, TupleVariable):
            values += each.items
    return True
