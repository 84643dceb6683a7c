"""Facts about the value of a node: what it is, how large, and whether two are of one shape.

Knows fake tensors and symbolic sizes, and never adds a guard on one; knows no operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node


def tensor_of(node: Node) -> torch.Tensor | None:
    """The fake tensor that a node produces, or None where it produces something else."""
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def is_tuple(node: Node) -> bool:
    """Whether a node produces several values at once."""
    return isinstance(node.meta.get("example_value"), (tuple, list))


def is_size(node: Node) -> bool:
    """Whether a node produces a number, concrete or symbolic, and no tensor."""
    value = node.meta.get("example_value")
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_shape(node: Node) -> bool:
    """Whether a node produces the shape of a tensor, for which any part can ask the tensor."""
    return isinstance(node.meta.get("example_value"), torch.Size)


def is_distributed(node: Node) -> bool:
    """Whether a node produces a DTensor, of which every rank holds a part."""
    return hasattr(tensor_of(node), "device_mesh")


def is_static_input(node: Node) -> bool:
    """Whether a placeholder is a parameter or buffer of the model, the same on every call."""
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    described = node.meta.get("tensor_dict") or {}
    return "_dynamo_static_input_type" in described or isinstance(
        node.meta.get("example_value"), torch.nn.Parameter
    )


def numel(value: torch.Tensor) -> int:
    """Number of elements; a symbolic size counts with its hint, without adding a guard."""
    return math.prod(map(size_hint, value.shape))


UNKNOWN_SIZE = 128
"""What a size that depends on data, and so has no example, counts for in an estimate of work."""


def size_hint(size: int | torch.SymInt) -> int:
    """A concrete size, or the example that a symbolic one was traced with.

    In a size that depends on data, each unknown counts as `UNKNOWN_SIZE`.
    """
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, UNKNOWN_SIZE)))


def nbytes(value: torch.Tensor) -> int:
    """Bytes that a tensor's elements take."""
    return numel(value) * value.element_size()


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard on a symbolic one."""
    return is_known(one == other)


def is_known(fact: bool | torch.SymBool) -> bool:
    """Whether a fact about sizes holds for all sizes that the graph was traced for."""
    if isinstance(fact, bool):
        return fact
    # Brings in sympy, which takes longer to import than all of this package.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(fact))


def is_unknown(size: int | torch.SymInt) -> bool:
    """Whether a size is only known when the graph runs: a single number that depends on data."""
    if isinstance(size, int) or size.node.hint is not None:
        return False
    return bool(size.node.expr.is_Symbol)


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal, without adding a guard."""
    return len(one) == len(other) and all(map(same_size, one, other))


def describe_value(value: Any) -> str:
    """``f32[1, 24, 64]`` for a tensor, the value itself for anything else."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    dtype = str(value.dtype).removeprefix("torch.")
    short = dtype.replace("bfloat", "bf").replace("float", "f").replace("int", "i")
    return f"{short}[{', '.join(map(str, value.shape))}]"
