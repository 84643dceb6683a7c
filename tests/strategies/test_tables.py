"""The packaged tables are complete, agree with a live peer, and are the only copy."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

import omni_cache
from omni_cache.calibration import magcache_table, teacache_table
from omni_cache.strategies.tables import load_table

TEACACHE, MAGCACHE = load_table("teacache_coefficients"), load_table("magcache_ratios")
BRANCHES = ("cond", "uncond", "ref")


def name_of(entry: dict[str, Any]) -> str:
    return f"{entry['transformer_class']}/{entry['variant']}"


@pytest.mark.parametrize("entry", [*TEACACHE, *MAGCACHE], ids=name_of)
def test_every_entry_says_what_it_is_for_and_where_it_is_from(entry: dict[str, Any]) -> None:
    assert all(entry[key].strip() for key in ("transformer_class", "variant", "source"))


@pytest.mark.parametrize("entry", TEACACHE, ids=name_of)
def test_polynomials_are_of_degree_four_and_name_their_signal(entry: dict[str, Any]) -> None:
    assert len(entry["coefficients"]) == 5
    assert all(map(math.isfinite, entry["coefficients"]))
    assert entry["published_signal"]
    table = teacache_table(entry["transformer_class"], entry["variant"])
    assert table is not None
    assert (table.coefficients, table.signal, table.source) == (
        tuple(entry["coefficients"]),
        entry["signal"],
        entry["source"],
    )


@pytest.mark.parametrize("entry", MAGCACHE, ids=name_of)
def test_ratios_have_an_entry_per_step_and_start_neutral(entry: dict[str, Any]) -> None:
    branches = {name: entry[name] for name in BRANCHES if name in entry}
    assert "cond" in branches
    for ratios in branches.values():
        assert len(ratios) == entry["num_steps"]
        assert ratios[0] == 1.0
        assert all(0.3 < ratio < 3 for ratio in ratios)
    table = magcache_table(entry["transformer_class"], entry["variant"])
    assert table is not None
    assert table.ratios == {name: tuple(ratios) for name, ratios in branches.items()}
    assert table.source == entry["source"]


@pytest.mark.parametrize("entries", [TEACACHE, MAGCACHE], ids=["teacache", "magcache"])
def test_a_class_and_a_variant_name_one_entry(entries: tuple[dict[str, Any], ...]) -> None:
    names = [name_of(entry) for entry in entries]
    assert len(set(names)) == len(names)


def test_the_flux_ratios_are_those_of_diffusers() -> None:
    for variant in ("FLUX.1-dev", "FLUX.1-dev (diffusers table)"):
        table = magcache_table("FluxTransformer2DModel", variant)
        assert table is not None
        assert torch.equal(torch.tensor(table.ratios["cond"]), FLUX_MAG_RATIOS)


def test_named_classes_that_look_like_those_of_diffusers_are_those_of_diffusers() -> None:
    # A typing error in a class's name would leave its table unreachable.
    theirs = {entry["transformer_class"] for entry in (*TEACACHE, *MAGCACHE)}
    missing = {name for name in theirs if not hasattr(diffusers, name)}
    assert missing <= {
        "Bagel",
        "Flux2Klein",
        "HunyuanImage3Pipeline",
        "MiniMaxH3DiTModel",
        "OmniGen2Transformer2DModel",
        "SenseNovaU1ForCausalLM",
    }


def numbers_in(node: ast.expr) -> list[Any]:
    try:
        return [each for each in ast.literal_eval(node) if isinstance(each, (int, float))]
    except ValueError:  # no literal
        return []


def test_no_table_is_copied_into_the_code() -> None:
    package = Path(omni_cache.__file__).resolve().parent
    copies = [
        f"{path.relative_to(package)}:{node.lineno}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.List, ast.Tuple)) and len(numbers_in(node)) >= 5
        if any(isinstance(each, float) for each in numbers_in(node))
    ]
    assert copies == []
