"""The texts of the twelve graphs, before and after the split, are those in tests/graphs."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest
from diffusers_models import REPRESENTATIVES
from twelve import captured

GRAPHS = Path(__file__).parent.parent / "graphs"
UPDATE = bool(os.environ.get("OMNI_CACHE_UPDATE_GRAPHS"))
"""Set by scripts/update_graphs: write what the pass says instead of comparing it."""


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_the_text_of_a_graph_is_the_golden_one(name: str) -> None:
    trace = captured(name)
    changes: list[str] = []
    for side, text in (("before", trace.before), ("after", trace.after)):
        path = GRAPHS / f"{name}.{side}.txt"
        if UPDATE:
            path.write_text(text, encoding="utf-8")
        golden = path.read_text(encoding="utf-8") if path.exists() else ""
        changes += difflib.unified_diff(
            golden.splitlines(keepends=True),
            text.splitlines(keepends=True),
            f"tests/graphs/{path.name}",
            "what the pass says now",
        )
    if changes:
        pytest.fail(
            f"{''.join(changes)}\nIf that is what you meant: bash scripts/update_graphs",
            pytrace=False,
        )


def test_every_golden_belongs_to_a_model() -> None:
    expected = {f"{name}.{side}.txt" for name in REPRESENTATIVES for side in ("before", "after")}
    assert {path.name for path in GRAPHS.iterdir()} == expected


@pytest.mark.parametrize("path", sorted(GRAPHS.iterdir()), ids=lambda path: path.name)
def test_a_text_fits_on_a_screen(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 70
    assert max(map(len, lines)) <= 120
