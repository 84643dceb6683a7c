"""What a node costs: the floating-point operations of contractions and attention.

Knows shapes and operation names; knows nothing of where a node lies in its graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from .names import nodes_in, op_name
from .values import numel, size_hint, tensor_of


def arithmetic(node: Node) -> int:
    """Floating-point operations of a contraction (linear, attention, convolution, ...), else 0."""
    name = op_name(node)
    if name not in _CONTRACTIONS and not name.startswith("conv") and not _names_attention(name):
        return 0
    out, tensors = tensor_of(node), _operands(node)
    if out is None or not tensors:
        return 0
    if name == "einsum":
        return 2 * numel(out) * _contracted(str(node.args[0]), tensors) if len(tensors) > 1 else 0
    if name in _CONTRACTIONS:
        lhs = tensors[1] if name in ("addmm", "baddbmm") and len(tensors) > 2 else tensors[0]
        return 2 * numel(out) * (size_hint(lhs.shape[-1]) if lhs.dim() else 1)
    if is_fused_attention(node):
        query, key = tensors[0], tensors[1]
        return 4 * numel(query) * size_hint(key.shape[-2])
    if name.startswith("conv") and len(tensors) > 1:
        return 2 * numel(out) * math.prod(map(size_hint, tensors[1].shape[1:]))
    return 0


_CONTRACTIONS = frozenset({"linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum"})


def _contracted(equation: str, operands: Sequence[torch.Tensor]) -> int:
    """The number of products that each element of an einsum's result sums."""
    terms, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms.split(","), operands, strict=False):
        for place, index in enumerate(term):
            if index not in result:
                from_the_right = "." in term[:place]
                size = operand.shape[place - len(term) if from_the_right else place]
                sizes[index] = size_hint(size)
    return math.prod(sizes.values())


def is_fused_attention(node: Node) -> bool:
    """Whether a node is one call that does a whole attention (SDPA, flash and the like)."""
    return _names_attention(op_name(node)) and sum(x.dim() >= 3 for x in _operands(node)) >= 3


def _names_attention(name: str) -> bool:
    return "attention" in name or "attn" in name


def _operands(node: Node) -> list[torch.Tensor]:
    """The tensors that a node is called with; a tensor that is passed twice counts twice."""
    values = map(tensor_of, nodes_in((node.args, node.kwargs)))
    return [value for value in values if value is not None]
