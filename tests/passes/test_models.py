"""In each of the twelve diffusers models the pass finds what the model's author would point at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_models import REPRESENTATIVES
from omni_cache.passes import calls_of
from omni_cache.passes.cost import arithmetic
from omni_cache.passes.order import computation
from omni_cache.passes.views import leaves
from test_roll import check
from torch import Tensor
from twelve import captured, model

MIXED = {"z_image": 0.5, "chroma": 0.8}
"""Cases whose tiny configuration spends more than a tenth outside of the block loop: a refiner, an
approximator of the modulations."""


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_the_block_loop_is_the_models_own(name: str) -> None:
    lists = captured(name).guarded.analysis.loop.lists
    assert tuple(each.path for each in lists) == REPRESENTATIVES[name].block_lists


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_every_block_is_in_it(name: str) -> None:
    blocks = captured(name).guarded.analysis.loop.blocks
    expected = [type(block).__name__ for block in REPRESENTATIVES[name].blocks(model(name))]
    assert [block.class_name for block in blocks] == expected


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_every_output_is_a_residual_update_of_an_input(name: str) -> None:
    analysis = captured(name).guarded.analysis
    assert not any(pair.held for pair in analysis.pairs)
    for pair in analysis.pairs:
        assert pair.additions >= len(analysis.loop.blocks)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_one_residual_is_cached_and_no_text_that_is_dropped(name: str) -> None:
    (pair,) = captured(name).guarded.analysis.pairs
    assert pair.partner is not None
    assert len(leaves(pair.partner)) == 1


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_nearly_all_arithmetic_is_in_the_region(name: str) -> None:
    analysis = captured(name).guarded.analysis
    total = sum(map(arithmetic, computation(analysis.graph)))
    share = sum(map(arithmetic, analysis.region.body)) / total
    assert share > MIXED.get(name, 0.9)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_the_signal_is_the_modulated_input(name: str) -> None:
    analysis = captured(name).guarded.analysis
    assert analysis.signal is not None
    assert analysis.signal.kind == "modulated input"
    assert analysis.timestep is not None
    assert analysis.signal_bytes() == analysis.residual_bytes()


def test_blocks_of_sd3_have_three_structures() -> None:
    blocks = captured("sd3").guarded.analysis.loop.blocks
    structures = [block.structure for block in blocks]
    first, _, third, _, last = structures
    assert structures == [first, first, third, third, last]
    assert len({first, third, last}) == 3


@pytest.mark.parametrize("name", REPRESENTATIVES)
@torch.no_grad()
def test_a_transformer_rolls_and_computes_the_same_bits(name: str) -> None:
    body, rolled = check(captured(name))["body"]
    assert len(calls_of(rolled)) >= 2
    assert len(rolled.module.graph.nodes) < len(body.module.graph.nodes)


@torch.no_grad()
def test_two_views_of_one_tensor_leave_as_that_tensor() -> None:
    """Two outputs of a subgraph may not lie in one memory; views are taken outside."""
    _, rolled = check(captured("flux"))["body"]
    for name, subgraph in rolled.module.named_children():
        if name in calls_of(rolled):
            outputs = subgraph(*map(made, subgraph.graph.find_nodes(op="placeholder")))
            memory = [each.untyped_storage().data_ptr() for each in outputs]
            assert len(memory) == len(set(memory))


def made(node: torch.fx.Node) -> Any:
    value = node.meta["example_value"]
    return torch.randn(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
