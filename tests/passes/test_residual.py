"""Outputs are paired with what they are an update of, and the cut moves where that pairs more."""

from __future__ import annotations

import operator

import pytest
import torch
from pairing import SHAPE, added, expression, joint, pair, pairs, sliced
from sketch import Sketch
from torch.fx import Node


@pytest.fixture
def sketch() -> Sketch:
    return Sketch()


@pytest.fixture
def x(sketch: Sketch) -> Node:
    return sketch("neg", sketch.input("x", *SHAPE))


def test_what_the_region_only_reads_is_held(sketch: Sketch, x: Node) -> None:
    assert pair(sketch, x, sketch(torch.gt, x, 0)).held


def test_a_partner_is_cast_to_the_dtype_of_its_output(sketch: Sketch) -> None:
    x = sketch("neg", sketch.input("x", *SHAPE, dtype=torch.bfloat16))
    found = pair(sketch, x, added(sketch, sketch("float", x)))
    assert (expression(found.partner), found.cast) == ("neg", torch.float32)


# --- the cut -------------------------------------------------------------------------------------


def test_the_cut_moves_behind_views_that_lead_to_bare_inputs(sketch: Sketch, x: Node) -> None:
    last = joint(sketch, x)
    pieces = sketch("split", last, [4, 6], dim=1)
    results = [sketch(operator.getitem, pieces, index) for index in (0, 1)]
    found = pairs(sketch, x, last, *(sketch("exp", each) for each in results))
    assert [each.output for each in found] == results
    assert [expression(each.partner) for each in found] == ["l_text_", "neg"]


def test_the_cut_stays_where_the_whole_is_read_too(sketch: Sketch, x: Node) -> None:
    last = joint(sketch, x)
    image = sliced(sketch, last, 4, None)
    (found,) = pairs(sketch, x, last, sketch("exp", image), sketch("exp", last))
    assert found.output is last
    assert expression(found.partner) == "cat(l_text_, neg; 1)"


def test_the_cut_stays_where_a_view_leads_to_no_bare_input(sketch: Sketch, x: Node) -> None:
    last = joint(sketch, x)
    (found,) = pairs(sketch, x, last, sketch("exp", sketch("flatten", last, 1)))
    assert found.output is last


@pytest.mark.parametrize("enters_as_one", [True, False])
def test_the_cut_moves_behind_a_slice_that_leaves_less_to_store(
    enters_as_one: bool, sketch: Sketch, x: Node
) -> None:
    last = added(sketch, x) if enters_as_one else joint(sketch, x)
    part = sliced(sketch, last, 3, 5)
    (found,) = pairs(sketch, x, last, sketch("exp", sketch("flatten", part, 1)))
    assert found.output is part
    whole = "neg" if enters_as_one else "cat(l_text_, neg; 1)"
    assert expression(found.partner) == f"{whole}[1: 3..5]"


def test_the_cut_moves_behind_slices_of_slices_and_pieces_of_a_split(
    sketch: Sketch, x: Node
) -> None:
    last = added(sketch, x)
    split = sketch("split", last, 2, dim=1)
    _, second, third = (sketch(operator.getitem, split, place) for place in range(3))
    part = sliced(sketch, second, 1, None)
    found = pairs(sketch, x, last, sketch("exp", part), sketch("exp", third))
    assert [each.output for each in found] == [third, part]
    assert [expression(each.partner) for each in found] == ["neg[1: 4..6]", "neg[1: 3..4]"]


def test_the_cut_stays_where_slices_leave_all_of_it(sketch: Sketch, x: Node) -> None:
    last = added(sketch, x)
    parts = [sliced(sketch, last, *ends) for ends in ((0, 4), (2, 6))]
    (found,) = pairs(sketch, x, last, *(sketch("exp", each) for each in parts))
    assert found.output is last
    assert expression(found.partner) == "neg"


def test_the_cut_stays_where_a_cast_would_part_an_output_from_its_input(
    sketch: Sketch, x: Node
) -> None:
    last = joint(sketch, x)
    image = sliced(sketch, sketch("double", last), 4, None)
    (found,) = pairs(sketch, x, last, sketch("exp", image))
    assert found.output is last
    assert expression(found.partner) == "cat(l_text_, neg; 1)"


def test_the_cut_stays_where_an_addition_follows(sketch: Sketch, x: Node) -> None:
    last = joint(sketch, x)
    control = sketch.input("control", 2, 10, 8)
    (found,) = pairs(sketch, x, last, sliced(sketch, sketch(torch.add, last, control), 4, None))
    assert found.output is last


def test_the_cut_stays_where_a_view_needs_a_size_from_after_it(sketch: Sketch, x: Node) -> None:
    last = joint(sketch, x)
    four = sketch(operator.mul, sketch("size", sketch("exp", last), 0), 2)
    image = sketch(operator.getitem, last, (slice(None), slice(four, None)))
    found = pairs(sketch, x, last, sketch("exp", image))
    assert [each.output for each in found] == [last]
