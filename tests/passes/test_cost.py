"""Arithmetic is counted from shapes, whatever form a contraction is written in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from omni_cache.passes.cost import arithmetic, is_fused_attention
from sketch import Sketch


@pytest.fixture
def sketch() -> Sketch:
    return Sketch()


def test_arithmetic_is_two_operations_for_each_product(sketch: Sketch) -> None:
    x, y = sketch.input("x", 2, 5, 8), sketch.input("y", 2, 8, 3)
    image = sketch.input("image", 1, 4, 6, 6)
    heads = sketch.input("heads", 2, 4, 5, 8)
    products = {
        sketch(F.linear, x, sketch.weight(16, 8)): 2 * 5 * 8 * 16,
        sketch(torch.matmul, x, y): 2 * 5 * 8 * 3,
        sketch("matmul", x, y): 2 * 5 * 8 * 3,
        sketch(torch.bmm, x, y): 2 * 5 * 8 * 3,
        sketch(torch.baddbmm, sketch.input("bias", 2, 5, 3), x, y): 2 * 5 * 8 * 3,
        sketch(torch.einsum, "bij,bjk->bik", x, y): 2 * 5 * 8 * 3,
        sketch(torch.einsum, "...ij, ...jk -> ...ik", x, y): 2 * 5 * 8 * 3,
        sketch(F.conv2d, image, sketch.weight(7, 4, 3, 3)): 7 * 4 * 4 * 4 * 9,
        # Queries with keys, and weights with values.
        sketch(F.scaled_dot_product_attention, heads, heads, heads): 2 * (2 * 4 * 5 * 5 * 8),
        sketch(torch.mul, x, x): 0,
    }
    assert {node: arithmetic(node) for node in products} == {
        node: 2 * count for node, count in products.items()
    }


def test_attention_is_known_by_its_three_operands_even_if_they_are_one(sketch: Sketch) -> None:
    x = sketch.input("x", 2, 4, 5, 8)
    assert is_fused_attention(sketch(F.scaled_dot_product_attention, x, x, x))
    assert is_fused_attention(sketch(F.scaled_dot_product_attention, query=x, key=x, value=x))
    assert not is_fused_attention(sketch(F.softmax, x, dim=-1))
