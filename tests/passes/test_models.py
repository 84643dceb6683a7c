"""In each of the twelve diffusers models the pass finds what the model's author would point at."""

from __future__ import annotations

import pytest
from diffusers_models import REPRESENTATIVES
from omni_cache.passes.cost import arithmetic
from omni_cache.passes.order import computation
from omni_cache.passes.views import leaves
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
