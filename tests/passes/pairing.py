"""Small regions behind one node ``x``, and the pairs that are found in them, spelt out."""

from __future__ import annotations

import operator

import torch
from omni_cache.passes import ResidualPair, close_region, pair_outputs
from omni_cache.passes.views import Cat, Leaf, Permute, Reshape, Slice, View
from sketch import Sketch
from torch.fx import Node

SHAPE = (2, 6, 8)


def update(sketch: Sketch, x: Node) -> Node:
    """Something of the shape of ``x`` that depends on it and is no view of it."""
    return sketch.linear(x, x.meta["example_value"].shape[-1])


def added(sketch: Sketch, x: Node) -> Node:
    return sketch(torch.add, x, update(sketch, x))


def pairs(sketch: Sketch, x: Node, last: Node, *results: Node) -> list[ResidualPair]:
    """The pairs of the region that holds everything after ``x``, up to ``last``."""
    sketch.returns(*results)
    nodes = [node for node in sketch.graph.nodes if node.op not in ("placeholder", "output")]
    seeds = nodes[nodes.index(x) + 1 : nodes.index(last) + 1]
    return list(pair_outputs(sketch.graph, close_region(sketch.graph, seeds))[1])


def pair(sketch: Sketch, x: Node, last: Node) -> ResidualPair:
    """The only pair of a region of which ``last`` alone is read."""
    (only,) = pairs(sketch, x, last, sketch("exp", last))
    assert only.output is last
    return only


def expression(view: View | None) -> str:
    match view:
        case Leaf():
            return view.node.name
        case Cat():
            return f"cat({', '.join(map(expression, view.parts))}; {view.dim})"
        case Slice():
            return f"{expression(view.of)}[{view.dim}: {view.start}..{view.stop}]"
        case Permute():
            return f"{expression(view.of)}.permute{view.dims}"
        case Reshape():
            return f"{expression(view.of)}.reshape{view.shape}"
    return "held"


def joint(sketch: Sketch, x: Node) -> Node:
    """A stream of a text of 4 tokens and ``x`` of 6, after one addition."""
    return added(sketch, sketch(torch.cat, [sketch.input("text", 2, 4, 8), x], dim=1))


def sliced(sketch: Sketch, x: Node, start: int, stop: int | None) -> Node:
    return sketch(operator.getitem, x, (slice(None), slice(start, stop)))
