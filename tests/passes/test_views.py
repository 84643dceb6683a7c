"""Views are kept in simplest form, so that two of the same elements are known to be the same."""

from __future__ import annotations

import pytest
import torch
from omni_cache.passes.views import (
    Cat,
    Leaf,
    Slice,
    View,
    is_concrete,
    join,
    leaves,
    permute,
    reshape,
    same_view,
    slice_view,
)
from torch.fx import Graph

GRAPH = Graph()


def leaf(*shape: int) -> Leaf:
    node = GRAPH.placeholder("x")
    node.meta["example_value"] = torch.empty(shape, device="meta")
    return Leaf(node, shape)


def test_a_slice_of_a_concatenation_is_its_part() -> None:
    text, image = leaf(2, 4, 8), leaf(2, 6, 8)
    joint = join([text, image], 1)
    assert joint.shape == (2, 10, 8)
    assert slice_view(joint, 1, 0, 4) is text
    assert slice_view(joint, 1, 4, 10) is image
    across = slice_view(joint, 1, 3, 7)
    assert isinstance(across, Slice)
    assert across.shape == (2, 4, 8)
    assert leaves(across) == [text.node, image.node]


def test_a_slice_of_a_slice_is_one_slice() -> None:
    x = leaf(2, 10)
    inner = slice_view(slice_view(x, 1, 2, 9), 1, 1, 4)
    assert isinstance(inner, Slice)
    assert (inner.of, inner.start, inner.stop) == (x, 3, 6)


def test_pieces_in_order_are_the_whole_again_and_in_another_order_are_not() -> None:
    x = leaf(2, 6)
    pieces = [slice_view(x, 1, 0, 2), slice_view(x, 1, 2, 6)]
    assert join(pieces, 1) is x
    assert isinstance(join(pieces[::-1], 1), Cat)


def test_a_concatenation_of_concatenations_is_flat() -> None:
    x, y, z = leaf(1, 2), leaf(1, 3), leaf(1, 4)
    joined = join([join([x, y], 1), z], 1)
    assert isinstance(joined, Cat)
    assert joined.parts == (x, y, z)


def test_there_and_back_is_the_view_itself() -> None:
    x = leaf(2, 6, 8)
    assert reshape(reshape(x, (12, 8)), (2, 6, 8)) is x
    there = permute(x, (2, 0, 1))
    assert there is not None
    assert permute(there, (1, 2, 0)) is x


@pytest.mark.parametrize("other", ["another leaf", "another slice", "another order"])
def test_views_of_other_elements_are_told_apart(other: str) -> None:
    x, y = leaf(4, 4), leaf(4, 4)
    one: View | None
    two: View | None
    one, two = {
        "another leaf": (x, y),
        "another slice": (slice_view(x, 0, 0, 2), slice_view(x, 0, 2, 4)),
        "another order": (x, permute(x, (1, 0))),
    }[other]
    assert one is not None
    assert two is not None
    assert same_view(one, one)
    assert not same_view(one, two)


def test_a_view_of_plain_sizes_is_concrete() -> None:
    x = leaf(4, 4)
    assert is_concrete(slice_view(join([x, x], 0), 0, 2, 6))
