"""What holds for every transformer holds for hundreds that nobody wrote."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omni_cache.passes import RegionError, roll
from omni_cache.passes.build import Part, is_guard
from omni_cache.passes.order import computation
from random_transformers import Description, Transformer, descriptions, inputs
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tracing import Trace, run, trace

EXAMPLES = [
    pytest.param(20, id="a few"),
    pytest.param(80, id="some", marks=pytest.mark.exhaustive),
    pytest.param(320, id="many", marks=pytest.mark.exhaustive),
]
"""How many are drawn; two draws may come out the same."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of the norm. The formula adds and subtracts in the streams' dtype; the cut may lie where they
are in the blocks' dtype."""


def finds_the_loop(described: Description, traced: Trace) -> None:
    lists = traced.guarded.analysis.loop.lists
    found = [(each.path, len(each.blocks)) for each in lists]
    assert found == [(each.path, each.depth) for each in described.lists]
    assert {block.class_name for block in traced.guarded.analysis.loop.blocks} == {"Block"}


def computes_what_the_graph_does(traced: Trace) -> None:
    for whole, computed in zip(traced.whole(), traced.computed(), strict=True):
        assert torch.equal(computed, whole)


def is_cut_without_loss(described: Description, traced: Trace) -> None:
    guarded = traced.guarded
    whole = Counter((node.name, node.target) for node in computation(traced.gm.graph))
    assert copied(guarded.prologue) + copied(guarded.body) + copied(guarded.epilogue) == whole
    # What reuse adds may take a name that a node has in the epilogue.
    assert targets(copied(guarded.reuse)) == targets(copied(guarded.epilogue))
    # Both streams may leave as one.
    assert not any(pair.held for pair in guarded.analysis.pairs)
    assert len(guarded.analysis.pairs) <= len(described.read_after)


def rolls_to_the_same_bits(traced: Trace) -> int:
    """Returns how many nodes rolling the body saves."""
    body, values = traced.guarded.body, traced.values()
    rolled = roll(body)
    for whole, called in zip(run(body, values), run(rolled, values), strict=True):
        assert torch.equal(called, whole)
    return len(body.module.graph.nodes) - len(rolled.module.graph.nodes)


def copied(part: Part) -> Counter[Any]:
    """The operations of a part that the captured graph has too."""
    return Counter(
        (node.name, node.target) for node in computation(part.module.graph) if not is_guard(node)
    )


def targets(nodes: Counter[Any]) -> Counter[Any]:
    """The same without the names."""
    counted: Counter[Any] = Counter()
    for (_, target), count in nodes.items():
        counted[target] += count
    return counted


def reuses_by_the_formula(
    described: Description, model: Transformer, traced: Trace, given: Any
) -> bool:
    """``entry + (exit - entry of an earlier call)`` for each stream, then the model's own end.

    Returns whether computing would have given something else, so that the comparison tells.
    """
    now = inputs(described, seed=1)
    earlier_entry, conditioning = model.enter(**given)
    earlier_exit = model.loop(earlier_entry, conditioning)
    earlier_entry = model.carried(earlier_entry)
    entry = model.carried(model.enter(**now)[0])
    expected = model.leave(
        {name: entry[name] + (earlier_exit[name] - earlier_entry[name]) for name in entry}
    )
    values = traced.values()
    residuals = {name: values[name] for name in traced.guarded.residuals}
    later = with_inputs(traced, given, now)
    prologue = later.guarded.prologue
    values = {**later.inputs, **residuals}
    values.update(zip(prologue.outputs, run(prologue, values), strict=True))
    (reused,) = traced.reused(values)
    tolerance = max(TOLERANCE.get(d, 0) for d in (described.stream_dtype, described.block_dtype))
    assert distance(reused, expected) < tolerance
    return distance(model(**now), expected) > 2 * tolerance


def with_inputs(traced: Trace, given: Any, now: Any) -> Trace:
    """The same graph on other inputs."""
    renewed = dict(zip(map(id, tree_leaves(given)), tree_leaves(now), strict=True))
    inputs = {name: renewed.get(id(value), value) for name, value in traced.inputs.items()}
    return replace(traced, inputs=inputs)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.slow
@pytest.mark.parametrize("examples", EXAMPLES)
def test_random_transformers_are_found_cut_computed_and_reused_right(examples: int) -> None:
    seen: set[Description] = set()
    telling: list[bool] = []
    saved: list[int] = []

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(descriptions(), st.sampled_from(["auto", None]))
    def check(described: Description, signal: str | None) -> None:
        seen.add(described)
        model = Transformer(described)
        given = inputs(described)
        if not described.is_residual:
            with pytest.raises(RegionError, match="whatever its latents"):
                trace(model, **given, signal=signal)
            return
        with torch.no_grad():
            traced = trace(model, **given, signal=signal)
            finds_the_loop(described, traced)
            computes_what_the_graph_does(traced)
            is_cut_without_loss(described, traced)
            saved.append(rolls_to_the_same_bits(traced))
            telling.append(reuses_by_the_formula(described, model, traced, given))

    check()
    assert len(seen) >= 0.9 * examples
    assert sum(telling) > 0.9 * len(telling)
    assert sum(each > 0 for each in saved) > len(saved) / 3
