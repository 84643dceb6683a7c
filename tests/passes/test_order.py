"""What no edge shows still orders nodes: writes in place and modes."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from omni_cache.passes.order import dependencies, memory_root, modes, written_nodes
from sketch import Sketch


@pytest.fixture
def sketch() -> Sketch:
    return Sketch()


def setitem(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    x[0] = value
    return x


def test_writes_are_seen_in_whatever_form(sketch: Sketch) -> None:
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    writing = [
        sketch("add_", x, y),
        sketch(operator.iadd, x, y),
        sketch(torch.add, y, y, out=x),
        sketch(F.relu, x, inplace=True),
        sketch(F.dropout, x, 0.5, False, True),
        sketch(torch.ops.aten.add_.Tensor, x, y),
        sketch(torch.ops.aten.add_, x, y),
        sketch(operator.setitem, x, 0, 1.0),
        sketch(F.relu_, x),
    ]
    assert [written_nodes(node) for node in writing] == [[x]] * len(writing)


def test_what_only_reads_does_not_write(sketch: Sketch) -> None:
    x, y = sketch.input("x", 4), sketch.input("y", 4)
    reading = [
        sketch("add", x, y),
        sketch(torch.add, x, y),
        sketch(F.relu, x),
        sketch(F.relu, x, inplace=False),
        sketch(F.dropout, x, 0.5, False),
        sketch(torch.ops.aten.add.Tensor, x, y),
        sketch(operator.getitem, x, 0),
    ]
    assert [written_nodes(node) for node in reading] == [[]] * len(reading)


def test_adding_to_a_size_writes_into_nothing(sketch: Sketch) -> None:
    size = sketch("size", sketch.input("x", 4), 0)
    assert written_nodes(sketch(operator.iadd, size, 1)) == []


def test_memory_is_followed_through_views_casts_and_writes(sketch: Sketch) -> None:
    x = sketch.input("x", 4, 2)
    y = sketch(torch.mul, x, 2)
    piece = sketch(operator.getitem, sketch("chunk", sketch("view", y, 2, 4), 2), 0)
    assert memory_root(sketch("add_", sketch("to", piece, torch.float32), 1)) is y
    # Dropout returns its input when it drops nothing.
    assert memory_root(sketch(F.dropout, x, 0.5, False)) is x
    assert memory_root(sketch("clone", x)) is not x


def test_a_read_depends_on_the_write_before_it_and_a_write_on_the_reads(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    y = sketch("clone", x)
    early = sketch("neg", y)
    view = sketch("view", y, 2, 2)
    write = sketch("mul_", view, 2)
    late = sketch("neg", y)
    other = sketch("neg", x)
    before = dependencies(sketch.graph)
    assert early in before[write]
    assert write in before[late]
    assert write not in before[early]
    assert before[other] == [x]


# --- modes ---------------------------------------------------------------------------------------


def test_modes_are_the_marks_that_hold(sketch: Sketch) -> None:
    graph, x = sketch.graph, sketch.input("x", 4)
    outside = graph.call_function(torch.neg, (x,))
    autocast = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu",))
    grad = graph.call_function(torch._C._set_grad_enabled, (True,))
    inside = graph.call_function(torch.neg, (x,))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (autocast,))
    after = graph.call_function(torch.neg, (x,))
    held = modes(graph)
    assert (held[outside].scopes, held[outside].switches) == ((), {})
    assert (held[inside].scopes, held[inside].switches) == (
        (autocast,),
        {"_set_grad_enabled": grad},
    )
    assert (held[after].scopes, held[after].switches) == ((), {"_set_grad_enabled": grad})
