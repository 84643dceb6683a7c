"""Facts about single nodes."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omni_cache.passes.node import (
    argument_name,
    arithmetic,
    dependencies,
    describe_value,
    input_name,
    is_fused_attention,
    is_static_input,
    memory_root,
    modes,
    module_class,
    module_path,
    op_name,
    parse_module_source,
    position,
    source_line,
    written_nodes,
)
from sketch import Sketch
from torch.fx import Node


@pytest.fixture
def sketch() -> Sketch:
    return Sketch()


def sourced(sketch: Sketch, source: str) -> Node:
    """A graph input of which Dynamo says where it came from."""
    node = sketch.input(source, 1)
    node.meta["grapharg"] = SimpleNamespace(source=SimpleNamespace(name=source))
    return node


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.add, "add"),
        (operator.add, "add"),
        (torch.ops.aten.add.Tensor, "add"),
        (F.linear, "linear"),
    ],
)
def test_one_operation_has_one_name(sketch: Sketch, target: Any, name: str) -> None:
    x = sketch.input("x", 2, 2)
    assert op_name(sketch(target, x, x)) == name


def test_a_method_has_the_name_of_its_function(sketch: Sketch) -> None:
    assert op_name(sketch("add", sketch.input("x", 2), 1)) == "add"


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].__dict__['_modules']['blocks'].0.attn", ("blocks", "0", "attn")),
        ("L['self']._modules['blocks']._modules['12']", ("blocks", "12")),
        ("L['self'].blocks.3.mlp", ("blocks", "3", "mlp")),
        ("L['self'].layers[3]", ("layers", "3")),
        ("G['model'].blocks.3", ("blocks", "3")),
        ("L['self']._orig_mod.blocks.3", ("blocks", "3")),
        ("L['self'].embedders.2-1", ("embedders", "2-1")),
        ("L['self']", ()),
    ],
)
def test_a_module_path_is_what_named_modules_says(source: str, path: tuple[str, ...]) -> None:
    assert parse_module_source(source) == path


def test_a_node_knows_its_module_and_its_class(sketch: Sketch) -> None:
    x = sketch.input("x", 2)
    with sketch.module("blocks.0"), sketch.module("blocks.0.attn", "Attention"):
        node = sketch("neg", x)
    assert module_path(node) == ("blocks", "0", "attn")
    assert module_class(node, ("blocks", "0")) == "Block"
    assert module_class(node, ("blocks", "0", "attn")) == "Attention"
    assert module_path(sketch("neg", x)) == ()


@pytest.mark.parametrize(
    ("source", "name", "path", "place"),
    [
        ("L['timestep']", "timestep", "timestep", None),
        ("L['kwargs']['timestep']", "timestep", "timestep", None),
        ("L['kw']['timestep']", "timestep", "kw_timestep", None),
        ("L['kwargs']['cond']['t'][0]", "t", "cond_t_0", None),
        ("L['args'][1]", "args_1", "args_1", 1),
        ("L['args'][1][0]", "args_1_0", "args_1_0", None),
        ("L['kwargs']['timestep'].size()[0]", "timestep_size_0", "timestep_size_0", None),
    ],
)
def test_an_input_has_the_name_that_its_caller_knows(
    sketch: Sketch, source: str, name: str, path: str, place: int | None
) -> None:
    node = sourced(sketch, source)
    assert (argument_name(node), input_name(node), position(node)) == (name, path, place)


@pytest.mark.parametrize(
    ("target", "name", "place"),
    [
        ("L_timestep_", "timestep", None),
        ("L_kwargs_timestep_", "timestep", None),
        ("L_args_1_", "args_1", 1),
    ],
)
def test_an_input_keeps_its_name_when_dynamo_has_taken_its_source_away(
    sketch: Sketch, target: str, name: str, place: int | None
) -> None:
    node = sketch.graph.placeholder(target)
    assert (argument_name(node), input_name(node), position(node)) == (name, name, place)


def test_weights_and_buffers_are_static(sketch: Sketch) -> None:
    buffer = sketch.input("buffer", 1)
    buffer.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    assert is_static_input(sketch.weight(1))
    assert is_static_input(buffer)
    assert not is_static_input(sketch.input("latents", 1))


def test_a_source_line_is_that_of_the_innermost_frame(sketch: Sketch) -> None:
    node = sketch.input("x", 1)
    assert source_line(node) == ""
    node.meta["stack_trace"] = 'File "a.py", line 1, in f\n x\nFile "b.py", line 22, in g\n y\n'
    assert source_line(node) == "b.py:22"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(1, 24, 64), "f32[1, 24, 64]"),
        (torch.empty(2, dtype=torch.bfloat16), "bf16[2]"),
        (torch.empty((), dtype=torch.int64), "i64[]"),
        (torch.empty(3, dtype=torch.bool), "bool[3]"),
        (3, "3"),
    ],
)
def test_values_are_described_shortly(value: Any, text: str) -> None:
    assert describe_value(value) == text


# --- cost ----------------------------------------------------------------------------------------


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


# --- memory --------------------------------------------------------------------------------------


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
