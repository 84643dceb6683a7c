"""The code of the pages about other caches runs, and the tests that they name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_pipeline import FakePipeline, FakeTransformer
from test_teacache_names import IDENTITY, extract_toy
from toy_transformer import Loop

import omni_cache
from omni_cache.backends.teacache.extractors import EXTRACTOR_REGISTRY
from omni_cache.pipelines.enable import is_enabled

ROOT = Path(__file__).resolve().parents[2]
MIGRATION = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
INTERFACE = (ROOT / "docs" / "vllm_omni.md").read_text(encoding="utf-8")


def after(change: str) -> str:
    """What a change leaves of a piece of code."""
    lines = [line for line in change.splitlines() if not line.startswith("-")]
    return "\n".join(line[1:] for line in lines)


CODE = [after(each) for each in re.findall(r"```diff\n(.*?)```", MIGRATION, re.DOTALL)]
VLLM_OMNI, FURTHER_KEYS, EXTRACTOR, CACHE_DIT, HOOKS = CODE


def flux() -> FakePipeline:
    return FakePipeline(make=type("FluxTransformer2DModel", (FakeTransformer,), {}))


def test_vllm_omni() -> None:
    seen: list[Any] = []
    names = {"pipeline": flux(), "requests": [1, 2], "run": lambda *given: seen.append(given)}
    exec(VLLM_OMNI, names)
    assert len(seen) == 2
    assert is_enabled(names["pipeline"].transformer)
    names = {**names, "pipeline": flux()}
    exec(FURTHER_KEYS, names)
    flags = omni_cache.pipelines.enabled_flags(names["pipeline"].transformer)
    assert flags is not None
    assert flags["inner"] == "eager"
    assert flags["cache"].forecast == "newton"


@torch.no_grad()
def test_an_extractor() -> None:
    seen: list[Any] = []

    def extract(*given: Any) -> Any:
        seen.append(given)
        return extract_toy(*given)

    transformer = FakeTransformer()
    names = {
        "transformer": transformer,
        "extract_my_context": extract,
        "coefficients": IDENTITY,
    }
    try:
        exec(
            EXTRACTOR.replace("(transformer, config)", "(transformer, config, inner='eager')"),
            names,
        )
    finally:
        EXTRACTOR_REGISTRY.pop("MyTransformer", None)
    Loop().run(transformer)
    assert len(seen) == 8


@pytest.mark.parametrize(("code", "name"), [(CACHE_DIT, "dbcache"), (HOOKS, "first_block_cache")])
def test_caches_that_are_enabled_on_a_pipeline(code: str, name: str) -> None:
    seen: list[Any] = []

    def run(pipe: Any) -> None:
        flags = omni_cache.pipelines.enabled_flags(pipe.transformer)
        assert flags is not None
        seen.append(flags["cache"].name)

    pipe = type("Pipeline", (), {"transformer": FakeTransformer()})()
    exec(code, {"pipe": pipe, "run": run})
    assert seen == [name]
    assert not is_enabled(pipe)


def test_every_test_that_the_table_names_exists() -> None:
    sources = [each.read_text(encoding="utf-8") for each in (ROOT / "tests").rglob("test_*.py")]
    defined = set(re.findall(r"def (test_\w+)", "\n".join(sources)))
    named = set(re.findall(r"`(test_\w+)`", INTERFACE))
    assert named
    assert named <= defined
