"""Operations, modules, source lines and graph inputs have the names that people know them by."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omni_cache.passes.names import (
    argument_name,
    input_name,
    module_class,
    module_path,
    op_name,
    parse_module_source,
    position,
    source_line,
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


def test_a_source_line_is_that_of_the_innermost_frame(sketch: Sketch) -> None:
    node = sketch.input("x", 1)
    assert source_line(node) == ""
    node.meta["stack_trace"] = 'File "a.py", line 1, in f\n x\nFile "b.py", line 22, in g\n y\n'
    assert source_line(node) == "b.py:22"
