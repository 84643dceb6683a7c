"""Whether two modules are alike in everything that their code could tell them apart by.

Knows nothing of compilers or caches.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_IGNORED = "_compiled_call_impl"
"""What runs in place of a module's ``__call__``; none of the module's own code reads it."""


def twins(
    one: nn.Module, other: nn.Module, read: Container[str] | None = None
) -> dict[int, Any] | None:
    """The parts of another module, by the identity of the part of this one that each is like.

    Alike are values of one class that are equal, tensors of equal size, layout, dtype, device and
    flags, whatever they hold, and objects with alike attributes in one order. What is one object in
    the first module is one object in the second, and what both share is in neither's place twice.

    Args:
        one: a module.
        other: another one.
        read: the names of attributes and items that code has read; numbers and texts under other
            names, such as a block's place among the others, need not be equal. None for all names.

    Returns:
        None where anything differs, or is of a kind that cannot be compared, such as a method that
        somebody has put on one of them.
    """
    found = _Pairs(read)
    return found.others if found.are_alike(one, other) else None


def kind_of_tensor(value: Tensor) -> tuple[Any, ...]:
    """What is known of a tensor without its size and its content."""
    return (
        *(value.dtype, value.device, value.layout, value.requires_grad),
        *(value.is_inference(), torch._C._dispatch_keys(value)),
    )


class _Plain:
    """An object that has attributes and nothing else."""


class _Pairs:
    """What has been compared so far."""

    def __init__(self, read: Container[str] | None) -> None:
        self._read = read
        self.others: dict[int, Any] = {}
        self._ones: dict[int, Any] = {}

    def are_alike(self, one: Any, other: Any) -> bool:
        if type(one) is not type(other):
            return False
        if isinstance(one, _VALUES) and (isinstance(one, _NAMED) or not hasattr(one, "__dict__")):
            return bool(one == other) and repr(one) == repr(other)  # 0.0 is not like -0.0
        if id(one) in self.others or id(other) in self._ones:
            return self.others.get(id(one)) is other and self._ones.get(id(other)) is one
        self.others[id(one)] = other
        self._ones[id(other)] = one
        if isinstance(one, Tensor):
            return self._tensors(one, other)
        if isinstance(one, nn.Module):
            return self._mappings(_attributes(one), _attributes(other))
        if one is other:
            return True
        if isinstance(one, Mapping | list | tuple | set | frozenset):
            return self._containers(one, other)
        has_attributes_only = type(one).__basicsize__ == _Plain.__basicsize__
        if not has_attributes_only or not hasattr(one, "__dict__"):
            return False
        return self._mappings(_attributes(one), _attributes(other))

    def _containers(self, one: Any, other: Any) -> bool:
        if not self._mappings(getattr(one, "__dict__", {}), getattr(other, "__dict__", {})):
            return False
        if isinstance(one, Mapping):
            return type(one).__module__ in _STANDARD and self._mappings(one, other)
        # Equal sets may hold 1 and True, and go through what they hold in another order.
        return self._sequences(list(one), list(other))

    def _tensors(self, one: Tensor, other: Tensor) -> bool:
        if type(one) not in (Tensor, nn.Parameter, nn.Buffer) or one.layout is not torch.strided:
            return one is other
        same_sizes = (one.size(), one.stride()) == (other.size(), other.stride())
        same = same_sizes and kind_of_tensor(one) == kind_of_tensor(other)
        # Only a leaf's gradient can be asked for without a warning.
        same = same and one.is_leaf == other.is_leaf
        if same and one.is_leaf and not self.are_alike(one.grad, other.grad):
            return False
        return same and self._mappings(vars(one), vars(other))

    def _mappings(self, one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
        return self._sequences(list(one), list(other)) and all(
            self.are_alike(each, its) or self._may_differ(name, each, its)
            for name, each, its in zip(one, one.values(), other.values(), strict=True)
        )

    def _may_differ(self, name: Any, one: Any, other: Any) -> bool:
        is_unread = self._read is not None and isinstance(name, str) and name not in self._read
        return is_unread and type(one) is type(other) and type(one) in (bool, int, float, str)

    def _sequences(self, one: Sequence[Any], other: Sequence[Any]) -> bool:
        return len(one) == len(other) and all(map(self.are_alike, one, other))


def _attributes(value: Any) -> dict[str, Any]:
    return {name: each for name, each in vars(value).items() if name != _IGNORED}


_VALUES = (
    *(type(None), bool, int, float, complex, str, bytes, slice),
    *(torch.Size, torch.dtype, torch.device),
    *(type, FunctionType, BuiltinFunctionType, ModuleType),
)
_NAMED = (type, FunctionType, BuiltinFunctionType, ModuleType)
"""Those of them that are what they are, whatever attributes they have."""
_STANDARD = ("builtins", "collections")
