"""Streams are followed through additions and views, back to the region input they began with."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pairing import SHAPE, added, expression, joint, pair, sliced, update
from sketch import Sketch
from torch.fx import Node


@pytest.fixture
def sketch() -> Sketch:
    return Sketch()


@pytest.fixture
def x(sketch: Sketch) -> Node:
    return sketch("neg", sketch.input("x", *SHAPE))


# --- additions -----------------------------------------------------------------------------------

ADDITIONS: dict[str, Callable[[Sketch, Node, Node], Node]] = {
    "x + f": lambda s, x, f: s(operator.add, x, f),
    "f + x": lambda s, x, f: s(operator.add, f, x),
    "torch.add(x, f)": lambda s, x, f: s(torch.add, x, f),
    "torch.add(input=x, other=f)": lambda s, x, f: s(torch.add, input=x, other=f),
    "torch.add(x, f, alpha=2)": lambda s, x, f: s(torch.add, x, f, alpha=2),
    "x.add(f)": lambda s, x, f: s("add", x, f),
    "aten.add": lambda s, x, f: s(torch.ops.aten.add.Tensor, x, f),
    "x - f": lambda s, x, f: s(operator.sub, x, f),
    "x.sub(f)": lambda s, x, f: s("sub", x, f),
    "torch.addcmul(x, f, f)": lambda s, x, f: s(torch.addcmul, x, f, f),
    "torch.addcmul(x, f, g)": lambda s, x, f: s(torch.addcmul, x, s("exp", f), f),
    "torch.lerp(x, f, 0.5)": lambda s, x, f: s(torch.lerp, x, f, 0.5),
    "torch.baddbmm(x, f, w)": lambda s, x, f: s(torch.baddbmm, x, f, s.weight(2, 8, 8)),
}


@pytest.mark.parametrize("form", ADDITIONS)
def test_an_addition_continues_the_stream(sketch: Sketch, x: Node, form: str) -> None:
    found = pair(sketch, x, ADDITIONS[form](sketch, x, update(sketch, x)))
    assert (expression(found.partner), found.additions) == ("neg", 1)


def test_an_addition_in_place_continues_a_stream_within_the_region(sketch: Sketch, x: Node) -> None:
    last = added(sketch, x)
    for target in (operator.iadd, "add_", operator.isub, "addcmul_"):
        y = update(sketch, last)
        last = sketch(target, last, *([y, y] if target == "addcmul_" else [y]))
    found = pair(sketch, x, last)
    assert (expression(found.partner), found.additions) == ("neg", 5)


NO_ADDITIONS: dict[str, Callable[[Sketch, Node, Node], Node]] = {
    "f - x": lambda s, x, f: s(operator.sub, f, x),
    "torch.add(f, x, alpha=2)": lambda s, x, f: s(torch.add, f, x, alpha=2),
    "torch.lerp(f, x, 0.5)": lambda s, x, f: s(torch.lerp, f, x, 0.5),
    "torch.addcmul(f, x, x)": lambda s, x, f: s(torch.addcmul, f, x, x),
    "norm(x + f)": lambda s, x, f: s(F.layer_norm, s(operator.add, x, f), (8,)),
    "x * f": lambda s, x, f: s(operator.mul, x, f),
    "x.mean() + f": lambda s, x, f: s(operator.add, s("mean", x, 1, keepdim=True), f),
    "f + 1": lambda s, x, f: s(operator.add, f, 1),
}


@pytest.mark.parametrize("form", NO_ADDITIONS)
def test_what_is_no_addition_to_the_stream_ends_it(sketch: Sketch, x: Node, form: str) -> None:
    found = pair(sketch, x, NO_ADDITIONS[form](sketch, x, update(sketch, x)))
    assert found.held
    assert found.additions == 0


def test_the_operand_that_has_come_the_longer_way_is_the_stream(sketch: Sketch, x: Node) -> None:
    control = sketch.input("control", *SHAPE)
    found = pair(sketch, x, sketch(torch.add, control, added(sketch, x)))
    assert (expression(found.partner), found.additions) == ("neg", 1)


def test_what_is_added_behind_every_block_is_not_the_stream(sketch: Sketch, x: Node) -> None:
    """The second time, the stream depends on it."""
    control = sketch.input("control", *SHAPE)
    once = sketch(torch.add, added(sketch, x), control)
    found = pair(sketch, x, sketch(torch.add, added(sketch, once), control))
    assert (expression(found.partner), found.additions) == ("neg", 2)


def test_what_does_not_depend_on_the_stream_is_no_update_of_it(sketch: Sketch, x: Node) -> None:
    """A per-token shift has the stream's shape, and the modulated norm is added to it."""
    shift = sketch.input("shift", *SHAPE)
    assert pair(sketch, x, sketch(torch.add, shift, sketch(F.layer_norm, x, (8,)))).held


def test_the_operand_that_the_other_depends_on_is_the_stream(sketch: Sketch, x: Node) -> None:
    shift = sketch.input("shift", *SHAPE)
    found = pair(sketch, x, sketch(torch.add, shift, sketch("contiguous", x)))
    assert found.held
    sketch.graph.erase_node(sketch.graph.find_nodes(op="output")[0])
    mixed = sketch(torch.mul, x, shift)
    found = pair(sketch, x, sketch(torch.add, sketch("contiguous", x), mixed))
    assert expression(found.partner) == "neg"


def test_a_learned_position_is_not_taken_for_the_stream(sketch: Sketch) -> None:
    position = sketch("neg", sketch.weight(*SHAPE))
    x = sketch("neg", sketch.input("x", *SHAPE))
    found = pair(sketch, x, added(sketch, sketch(torch.add, position, x)))
    assert expression(found.partner) == x.name


def test_a_broadcast_operand_is_not_the_stream(sketch: Sketch, x: Node) -> None:
    bias = sketch.input("bias", 1, 1, 8)
    found = pair(sketch, x, added(sketch, sketch(torch.add, bias, x)))
    assert expression(found.partner) == "neg"


def test_casts_between_additions_keep_the_stream(sketch: Sketch) -> None:
    x = sketch("neg", sketch.input("x", *SHAPE, dtype=torch.bfloat16))
    last = sketch("to", added(sketch, sketch("float", x)), torch.bfloat16)
    found = pair(sketch, x, last)
    assert (expression(found.partner), found.cast) == ("neg", None)


# --- views ---------------------------------------------------------------------------------------

ROUND_TRIPS: dict[str, Callable[[Sketch, Node], Node]] = {
    "transpose": lambda s, x: s("transpose", s("transpose", x, 1, 2), -1, 1),
    "swapaxes": lambda s, x: s(torch.swapaxes, s(torch.swapaxes, x, axis0=0, axis1=1), 0, 1),
    "permute": lambda s, x: s("permute", s(torch.permute, x, (2, 0, 1)), 1, 2, 0),
    "movedim": lambda s, x: s(torch.movedim, s("movedim", x, 0, 2), 2, 0),
    "reshape": lambda s, x: s("reshape", s("view", s("flatten", x, 1), 2, 2, 3, 8), 2, 6, 8),
    "unflatten": lambda s, x: s("flatten", s("unflatten", x, 1, (2, 3)), 1, 2),
    "squeeze": lambda s, x: s("squeeze", s("unsqueeze", x, 1), 1),
    "image and back": lambda s, x: s(
        "transpose", s("flatten", s("unflatten", s("transpose", x, 1, 2), 2, (2, 3)), 2), 1, 2
    ),
    "identities": lambda s, x: s("clone", s("contiguous", s(F.dropout, x, 0.1, False))),
    "clip": lambda s, x: s("clamp", s("clip", x, -9, 9), min=-8),
    "expand": lambda s, x: s("expand_as", s("expand", x, *SHAPE), x),
    "split and cat": lambda s, x: s(
        torch.cat, [s(operator.getitem, s("split", x, [2, 4], 1), i) for i in (0, 1)], dim=1
    ),
    "chunk and cat": lambda s, x: s(
        torch.cat, [s(operator.getitem, s(torch.chunk, x, 2, dim=-1), i) for i in (0, 1)], -1
    ),
    "slices and cat": lambda s, x: s(
        torch.cat,
        tensors=[
            s(operator.getitem, x, (slice(None), slice(None, 2))),
            s(operator.getitem, x, (slice(None), slice(2, None), slice(None))),
        ],
        dim=1,
    ),
    "slices from the end": lambda s, x: s(
        torch.cat,
        [
            s(operator.getitem, x, (Ellipsis, slice(0, -3))),
            s("narrow", x, -1, 5, 3),
        ],
        dim=2,
    ),
}


@pytest.mark.parametrize("form", ROUND_TRIPS)
def test_views_there_and_back_leave_the_stream_as_it_was(
    sketch: Sketch, x: Node, form: str
) -> None:
    found = pair(sketch, x, added(sketch, ROUND_TRIPS[form](sketch, added(sketch, x))))
    assert (expression(found.partner), found.additions) == ("neg", 2)


NO_VIEWS: dict[str, Callable[[Sketch, Node], Node]] = {
    "index": lambda s, x: s(operator.getitem, x, (slice(None), 0)),
    "steps": lambda s, x: s(operator.getitem, x, (slice(None), slice(None, None, 2))),
    "view as another dtype": lambda s, x: s("view", s("view", x, torch.int32), torch.float32),
    "softmax": lambda s, x: s(F.softmax, x, dim=-1),
    "roll": lambda s, x: s(torch.roll, x, 1, 1),
}


@pytest.mark.parametrize("form", NO_VIEWS)
def test_what_is_no_view_ends_the_stream(sketch: Sketch, x: Node, form: str) -> None:
    assert pair(sketch, x, NO_VIEWS[form](sketch, added(sketch, x))).held


def test_a_slice_of_a_concatenation_is_its_part(sketch: Sketch, x: Node) -> None:
    found = pair(sketch, x, sliced(sketch, joint(sketch, x), 4, None))
    assert expression(found.partner) == "neg"


def test_a_slice_within_a_part_is_a_slice_of_that_part(sketch: Sketch, x: Node) -> None:
    found = pair(sketch, x, added(sketch, sliced(sketch, joint(sketch, x), 5, 7)))
    assert expression(found.partner) == "neg[1: 1..3]"


def test_a_slice_across_parts_is_a_slice_of_the_whole(sketch: Sketch, x: Node) -> None:
    found = pair(sketch, x, added(sketch, sliced(sketch, joint(sketch, x), 3, 7)))
    assert expression(found.partner) == "cat(l_text_, neg; 1)[1: 3..7]"


def test_a_concatenation_with_something_new_ends_the_stream(sketch: Sketch, x: Node) -> None:
    parts = [added(sketch, x), update(sketch, x)]
    assert pair(sketch, x, sketch(torch.cat, parts, dim=1)).held


def test_a_concatenation_in_another_order_is_another_view(sketch: Sketch, x: Node) -> None:
    pieces = sketch("split", added(sketch, x), 3, dim=1)
    swapped = [sketch(operator.getitem, pieces, index) for index in (1, 0)]
    found = pair(sketch, x, sketch(torch.cat, swapped, dim=1))
    assert expression(found.partner) == "cat(neg[1: 3..6], neg[1: 0..3]; 1)"
