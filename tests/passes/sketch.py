"""Graphs written by hand, node by node, with what Dynamo would attach to each node.

Values are meta tensors, so that a graph of any size costs nothing but its nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg


class Sketch:
    """A graph in the making.

    Calling it adds a call of a function or, by name, of a method, inside the modules that are open.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self._stack: dict[str, tuple[str, str]] = {}
        self._last_placeholder: Node = self.graph._root
        self._weights = 0

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
        """An argument of the model."""
        return self._placeholder(f"L_{name}_", torch.empty(shape, dtype=dtype, device="meta"))

    def weight(self, *shape: int) -> Node:
        """A parameter of the model."""
        self._weights += 1
        value = nn.Parameter(torch.empty(shape, device="meta"))
        return self._placeholder(f"weight_{self._weights}", value)

    @contextmanager
    def module(self, path: str, class_name: str = "Block") -> Iterator[None]:
        """Inside, nodes come from the module of that path."""
        outer = self._stack
        self._stack = {**outer, path: (f"L['self'].{path}", f"made_up.{class_name}")}
        yield
        self._stack = outer

    def __call__(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Node:
        with torch.no_grad():
            real_args, real_kwargs = map_arg(
                (args, kwargs), lambda node: node.meta["example_value"]
            )
            if isinstance(target, str):
                value = getattr(real_args[0], target)(*real_args[1:], **real_kwargs)
                node = self.graph.call_method(target, args, kwargs)
            else:
                value = target(*real_args, **real_kwargs)
                node = self.graph.call_function(target, args, kwargs)
        node.meta = {"example_value": value, "nn_module_stack": self._stack}
        return node

    def linear(self, x: Node, width: int) -> Node:
        return self(F.linear, x, self.weight(width, x.meta["example_value"].shape[-1]))

    def returns(self, *results: Node) -> GraphModule:
        """Close the graph."""
        self.graph.output(results)
        return GraphModule(nn.Module(), self.graph)

    def _placeholder(self, name: str, value: torch.Tensor) -> Node:
        with self.graph.inserting_after(self._last_placeholder):
            self._last_placeholder = self.graph.placeholder(name)
        self._last_placeholder.meta = {"example_value": value}
        return self._last_placeholder


def deep_transformer(depth: int) -> GraphModule:
    """A transformer of so many blocks of 63 operations, wired like FLUX's single-stream blocks."""
    width, heads = 64, 4
    sketch = Sketch()
    latents = sketch.input("latents", 1, 24, 8)
    timestep = sketch.input("timestep", 1)
    with sketch.module("embed", "Linear"):
        x = sketch.linear(latents, width)
    with sketch.module("embed_time", "Linear"):
        time = sketch.linear(sketch("unsqueeze", timestep, 1), width)
    cos = sketch.input("cos", 24, width // heads)
    sin = sketch.input("sin", 24, width // heads)
    for index in range(depth):
        with sketch.module(f"blocks.{index}"):
            x = _block(sketch, f"blocks.{index}", x, time, (cos, sin), heads)
    with sketch.module("project", "Linear"):
        return sketch.returns(sketch.linear(x, 8))


def _block(
    sketch: Sketch, path: str, x: Node, time: Node, rotary: tuple[Node, Node], heads: int
) -> Node:
    width = x.meta["example_value"].shape[-1]
    with sketch.module(f"{path}.norm", "AdaNorm"):
        modulation = sketch("chunk", sketch.linear(sketch(F.silu, time), 3 * width), 3, dim=-1)
        shift, scale, gate = (sketch(operator.getitem, modulation, index) for index in range(3))
        normed = sketch(F.layer_norm, x, (width,))
        scale = sketch(torch.add, 1, sketch("unsqueeze", scale, 1))
        normed = sketch(torch.add, sketch(torch.mul, normed, scale), sketch("unsqueeze", shift, 1))
    with sketch.module(f"{path}.attn", "Attention"):
        parts = [
            sketch("unflatten", sketch.linear(normed, width), -1, (heads, -1)) for _ in range(3)
        ]
        for place in (0, 1):
            part = sketch(
                F.rms_norm, parts[place], (width // heads,), sketch.weight(width // heads)
            )
            parts[place] = _rotate(sketch, part, rotary)
        query, key, value = (sketch("permute", part, 0, 2, 1, 3) for part in parts)
        mixed = sketch(F.scaled_dot_product_attention, query, key, value)
        mixed = sketch("flatten", sketch("permute", mixed, 0, 2, 1, 3), 2, 3)
    with sketch.module(f"{path}.mlp", "MLP"):
        hidden = sketch(F.gelu, sketch.linear(normed, 4 * width))
        update = sketch.linear(sketch(torch.cat, [mixed, hidden], dim=2), width)
    return sketch(torch.add, x, sketch(torch.mul, sketch("unsqueeze", gate, 1), update))


def _rotate(sketch: Sketch, x: Node, rotary: tuple[Node, Node]) -> Node:
    cos, sin = (
        sketch(operator.getitem, each, (None, slice(None), None, slice(None))) for each in rotary
    )
    pairs = sketch("unbind", sketch("unflatten", x, -1, (-1, 2)), -1)
    real, imaginary = (sketch(operator.getitem, pairs, index) for index in (0, 1))
    turned = sketch("flatten", sketch(torch.stack, [sketch(torch.neg, imaginary), real], dim=-1), 3)
    turned = sketch(torch.mul, sketch("float", turned), sin)
    return sketch("to", sketch(torch.add, sketch(torch.mul, sketch("float", x), cos), turned), x)
