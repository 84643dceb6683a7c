"""A region is convex, and everything else lies before it or after it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from omni_cache.passes import (
    Region,
    RegionError,
    check_cuts,
    close_region,
    overwritten_inputs,
)
from sketch import Sketch
from torch.fx import Node


@pytest.fixture
def sketch() -> Sketch:
    return Sketch()


def close(sketch: Sketch, seeds: Iterable[Node], *results: Node) -> Region:
    sketch.returns(*results)
    return close_region(sketch.graph, set(seeds))


def test_what_lies_between_two_seeds_belongs_to_the_region(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    first = sketch("neg", x)
    between = sketch("exp", first)
    last = sketch("neg", between)
    after = sketch("exp", last)
    region = close(sketch, [first, last], after)
    assert region.body == (first, between, last)
    assert (region.prologue, region.epilogue) == ((), (after,))
    assert (region.inputs, region.outputs) == ((x,), (last,))


def test_what_does_not_depend_on_the_region_comes_before_it_wherever_it_is_listed(
    sketch: Sketch,
) -> None:
    x, t = sketch.input("x", 4), sketch.input("t", 4)
    block = sketch("neg", x)
    mask = sketch("exp", t)
    last = sketch(torch.add, block, mask)
    late = sketch("neg", mask)
    after = sketch(torch.mul, last, late)
    region = close(sketch, [block, last], after)
    assert region.prologue == (mask, late)
    assert region.inputs == (x, mask)
    assert region.epilogue == (after,)


def test_an_output_that_nobody_reads_is_none(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    block = sketch("neg", x)
    unread = sketch("exp", block)
    after = sketch("exp", block)
    region = close(sketch, [block, unread], after)
    assert region.outputs == (block,)


def test_what_follows_the_region_and_is_read_by_nobody_makes_no_output(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    block, dropped = sketch("neg", x), sketch("exp", x)
    cast = sketch("double", dropped)
    unread = sketch("neg", cast)
    after = sketch("exp", block)
    region = close(sketch, [block, dropped], after)
    assert region.outputs == (block,)
    assert region.epilogue == (after,)
    assert {cast, unread} <= set(region.body)


def test_what_nobody_reads_stays_behind_what_it_follows_from(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    block = sketch("neg", x)
    after = sketch("exp", block)
    unread = sketch("neg", after)
    region = close(sketch, [block], after)
    assert region.epilogue == (after, unread)


def test_a_write_after_the_region_stays_there_though_nobody_reads_its_result(
    sketch: Sketch,
) -> None:
    x = sketch.input("x", 4)
    block = sketch("neg", x)
    write = sketch("add_", block, 1)
    region = close(sketch, [block], block)
    assert region.epilogue == (write,)


def test_a_result_of_the_graph_is_an_output(sketch: Sketch) -> None:
    block = sketch("neg", sketch.input("x", 4))
    assert close(sketch, [block], block).outputs == (block,)


def test_weights_are_no_inputs(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    block = sketch.linear(x, 4)
    assert close(sketch, [block], block).inputs == (x,)


def test_a_piece_taken_in_the_region_stays_with_a_tuple_from_before(sketch: Sketch) -> None:
    x, t = sketch.input("x", 4), sketch.input("t", 4)
    chunk = sketch("chunk", t, 2)
    piece = sketch(operator.getitem, chunk, 0)
    block = sketch("neg", x)
    last = sketch(torch.add, block, sketch("repeat", piece, 2))
    region = close(sketch, [piece, block, last], last)
    assert region.prologue[:2] == (chunk, piece)
    assert chunk not in region.inputs


def test_a_piece_taken_after_the_region_stays_with_a_tuple_from_within(sketch: Sketch) -> None:
    chunk = sketch("chunk", sketch("neg", sketch.input("x", 4)), 2)
    block = chunk.args[0]
    assert isinstance(block, Node)
    piece = sketch(operator.getitem, chunk, 0)
    after = sketch("exp", piece)
    region = close(sketch, [block, chunk], after)
    assert region.body == (block, chunk, piece)
    assert region.outputs == (piece,)


def test_a_size_that_is_known_without_the_block_is_computed_before_it(sketch: Sketch) -> None:
    x = sketch.input("x", 4, 2)
    size = sketch("size", x, 0)
    block = sketch("neg", x)
    double = sketch(operator.mul, size, 2)
    after = sketch("reshape", block, double)
    region = close(sketch, [double, block], after)
    assert double in region.prologue
    assert region.outputs == (block,)


def test_a_write_that_must_follow_the_region_does(sketch: Sketch) -> None:
    """No edge of the graph says so: the write reads nothing of the block."""
    x = sketch("neg", sketch.input("x", 4))
    block = sketch("exp", x)
    write = sketch("add_", x, 1)
    after = sketch(torch.add, block, x)
    region = close(sketch, [block], after)
    assert region.epilogue == (write, after)
    assert overwritten_inputs(region) == ()


def test_a_write_within_the_region_is_fine(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    block = sketch("exp", x)
    write = sketch("add_", sketch("view", block, 2, 2), 1)
    last = sketch("neg", block)
    assert overwritten_inputs(close(sketch, [block, write, last], last)) == ()


ALIASES: dict[str, Callable[[Sketch, Node], Node]] = {
    "view": lambda sketch, x: sketch("view", x, 2, 2),
    "to": lambda sketch, x: sketch("to", x, torch.float32),
    "dropout": lambda sketch, x: sketch(F.dropout, x, 0.5, False),
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_what_came_in_and_is_written_into_is_found(
    sketch: Sketch, alias: Callable[[Sketch, Node], Node]
) -> None:
    x = sketch("neg", sketch.input("x", 4))
    inside = alias(sketch, x)
    last = sketch("exp", write := sketch("add_", inside, 1))
    assert overwritten_inputs(close(sketch, [inside, write, last], last)) == (x,)


@pytest.mark.parametrize(
    "seen", ["by the caller", "behind the region", "in the result", "through another input"]
)
def test_a_write_that_is_seen_outside_is_refused_with_its_node(sketch: Sketch, seen: str) -> None:
    x = sketch.input("x", 4)
    if seen != "by the caller":
        x = sketch("neg", x)
    other = sketch("view", x, 2, 2)
    write = sketch("add_", sketch("view", x, 4, 1), 1)
    write.meta["stack_trace"] = '  File "model.py", line 7, in forward\n    x += 1\n'
    last = sketch("exp", write)
    body = [write.args[0], write, last]
    results = [last]
    if seen == "behind the region":
        results.append(sketch("neg", x))
    elif seen == "in the result":
        results.append(x)
    elif seen == "through another input":
        body.append(sketch("sin", other))
        results.append(body[-1])
    region = close(sketch, body, *results)
    with pytest.raises(RegionError, match=r"writes in place .*node 'add_', model.py:7") as caught:
        overwritten_inputs(region)
    assert caught.value.node is write


def test_a_tuple_that_is_read_whole_after_the_region_is_refused(sketch: Sketch) -> None:
    block = sketch("chunk", sketch.input("x", 4), 2)
    region = close(sketch, [block], sketch(torch.cat, block))
    with pytest.raises(RegionError, match=r"a tuple crosses .*node 'chunk'"):
        check_cuts(region)


def test_a_number_that_the_block_computes_is_refused_after_it(sketch: Sketch) -> None:
    x = sketch.input("x", 4)
    block = sketch("exp", x)
    number = sketch.graph.call_method("item", (block,))
    number.meta["example_value"] = 2.5
    last = sketch("mul", block, number)
    region = close(sketch, [block, number, last], sketch("mul", last, number))
    with pytest.raises(RegionError, match=r"a float crosses .*node 'item'"):
        check_cuts(region)


def test_sizes_and_shapes_may_enter(sketch: Sketch) -> None:
    x = sketch.input("x", 4, 2)
    shape, size = sketch("size", x), sketch("size", x, 0)
    block = sketch("view", sketch("reshape", x, -1, size), shape)
    region = close(
        sketch, [block, *(each for each in block.all_input_nodes if each != shape)], block
    )
    assert {shape, size} <= set(region.inputs)
    check_cuts(region)
