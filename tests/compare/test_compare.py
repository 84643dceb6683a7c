"""The compare command: every strategy and peer in one run, and a report that stands alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import log10
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from omni_cache.cli import app
from omni_cache.compare import collect, command
from omni_cache.compare.command import table
from omni_cache.compare.figure import plot
from omni_cache.compare.kinds import (
    FORECASTS,
    GRID,
    Kind,
    Setting,
    fewer_steps,
    peer_kinds,
    strategy_kinds,
)
from omni_cache.compare.measure import Drawn, KindFailed, Task, draw_all, in_its_own_process
from omni_cache.compare.page import as_png, write_page
from omni_cache.compare.report import (
    HEADINGS,
    Comparison,
    Row,
    as_json,
    as_markdown,
    cells,
    frontier,
)
from omni_cache.demo import demo_arguments, demo_pipeline_path
from omni_cache.pipelines.folder import Folder
from omni_cache.quality import fidelity_to
from omni_cache.strategies import STRATEGIES
from omni_cache.strategies.calibrations import BranchNumbers, Calibration, TransformerNumbers

DEMO = Folder(demo_pipeline_path(), demo_arguments())
GREY = np.full((8, 8, 3), 0.5, dtype=np.float32)
TASK = Task(DEMO, ["<b>one</b>", "two", "three"], 10, "eager")


def row(kind: Kind, errors: list[float], seconds: list[float], computed: list[float]) -> Row:
    """A row of grey pictures, each off by a constant."""
    pictures = [GREY + error for error in errors]
    fidelity = [fidelity_to(GREY, each) for each in pictures]
    shown = [as_png(each) for each in pictures]
    return Row(kind, kind.settings[0], seconds, computed, fidelity, shown)


@pytest.fixture
def comparison() -> Comparison:
    tea = Kind("omni-cache", "TeaCache", [Setting("rel_l1_thresh 0.2", {"rel_l1_thresh": 0.2})])
    slow = replace(tea, name="Slow")
    rows = [
        row(fewer_steps([10]), [0, 0, 0], [1.0, 1.2, 1.1], [10, 10, 10]),
        row(tea, [0.1, 0.01, 0.001], [0.5, 0.6, 0.55], [4, 5, 6]),
        row(slow, [0.1, 0.1, 0.1], [0.7, 0.7, 0.7], [6, 6, 7]),
    ]
    return Comparison(TASK, rows, {"MagCache (diffusers)": "ValueError: <no>"})


def test_the_table_says_what_a_hand_computes(comparison: Comparison) -> None:
    uncached, tea, _ = cells(comparison)
    assert uncached[3:8] == ("10", "1100", "1.00x", "same", "same")
    # 0.1, 0.01 and 0.001 off are 20, 40 and 60 dB; the percentile is a tenth of the way to 40.
    assert tea[:8] == (
        *("omni-cache", "TeaCache", "rel_l1_thresh 0.2"),
        *("5", "550", "2.00x", "40.0", "22.0"),
    )
    (_, found, _) = as_json(comparison)["rows"]
    assert found["median"]["psnr"] == pytest.approx(-20 * log10(0.01), abs=1e-3)
    assert found["prompts"]["psnr"] == pytest.approx([20, 40, 60], abs=0.01)
    assert (found["computed_steps"], found["seconds"], found["speedup"]) == (5, 0.55, 2.0)
    ssim = [each.ssim for each in comparison.rows[1].fidelity]
    assert found["median"]["ssim"] == pytest.approx(np.median(ssim))
    assert found["fifth_percentile"]["ssim"] == pytest.approx(np.percentile(ssim, 5))


def test_terminal_and_markdown_show_the_same_cells(comparison: Comparison) -> None:
    console, markdown = Console(width=160), as_markdown(comparison)
    with console.capture() as capture:
        console.print(table(comparison))
    for cell in cells(comparison):
        assert len(cell) == len(HEADINGS)
        assert all(each in capture.get() for each in cell)
        assert f"| {' | '.join(cell)} |" in markdown
    assert "Not measured: MagCache (diffusers): ValueError" in markdown


def test_the_frontier_leaves_out_what_is_slower_and_worse(comparison: Comparison) -> None:
    uncached, tea, _ = comparison.rows
    assert frontier(comparison.rows) == [tea, uncached]


def test_the_page_needs_nothing_but_itself(comparison: Comparison, tmp_path: Path) -> None:
    plot(comparison, tmp_path / "frontier.png")
    write_page(comparison, tmp_path / "frontier.png", tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    sources = re.findall(r'(?:src|href|srcset)="([^"]*)"', page)
    assert len(sources) == 1 + 3 * 3
    assert all(each.startswith("data:image/png;base64,") for each in sources)
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    assert "&lt;b&gt;one&lt;/b&gt;" in page  # prompts are text
    assert all(cell in page for shown in cells(comparison) for cell in shown)


def test_every_strategy_takes_part_with_every_forecast() -> None:
    kinds = strategy_kinds({})
    assert [kind.name for kind in kinds] == [each.__name__ for each in STRATEGIES.values()]
    for name, kind in zip(STRATEGIES, kinds, strict=True):
        forecasts = {*FORECASTS, STRATEGIES[name].forecast}
        assert {each.forecast for each in kind.settings} == forecasts
        assert len(kind.settings) == len(forecasts) * len(GRID.get(name, [{}]))
        for setting in kind.settings:  # its flags are flags
            flags = {key: value for key, value in setting.flags.items() if key != "cache"}
            STRATEGIES[name](**flags)


def test_a_strategy_without_a_line_in_the_table_takes_part_with_its_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(GRID, "dbcache")
    (kind,) = (each for each in strategy_kinds({}) if each.name == "DBCache")
    assert [each.label for each in kind.settings] == ["defaults", "defaults"]
    assert kind.settings[1].flags == {"cache": "dbcache", "forecast": "newton"}


SMALL = {
    # Holding and forecasting at one threshold, and a peer that cannot be switched on.
    "strategy_kinds": lambda calibrations: [
        Kind(kind.family, kind.name, [kind.settings[2], kind.settings[5]])
        for kind in strategy_kinds(calibrations)
        if kind.name == "MagCache"
    ],
    "peer_kinds": lambda: [Kind("omni-cache", "Broken", [Setting("x", {"unknown": 1})])],
}


def in_this_process(task: Task, kind: Kind, log: Path) -> Iterator[Drawn]:
    """Processes take long to start; that one is started is tested by itself."""
    try:
        yield from draw_all(task, kind)
    except ValueError as error:
        raise KindFailed(str(error)) from None


@pytest.mark.slow
def test_one_run_leaves_page_plot_table_and_calibrations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, stand_in in SMALL.items():
        monkeypatch.setattr(command, name, stand_in)
    monkeypatch.setattr(collect, "in_its_own_process", in_this_process)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle on a blue background\na green square on a red background\n")
    arguments = ["compare", "demo", "--prompts", str(prompts), "--steps", "6", "--peers"]
    arguments += ["--inner", "eager", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "2 kinds, 3 settings: about" in result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    uncached, hold, newton, *fewer = found["rows"]
    assert (uncached["computed_steps"], uncached["median"]["psnr"]) == (6, None)
    assert len(uncached["prompts"]["seconds"]) == 4  # both rounds
    assert (hold["strategy"], newton["strategy"]) == ("MagCache", "MagCache, newton")
    assert hold["computed_steps"] == newton["computed_steps"] < 6
    assert [each["computed_steps"] for each in fewer] == [hold["computed_steps"]]
    assert list(found["failures"]) == ["Broken (omni-cache)"]
    for name in ("index.html", "frontier.png", "results.md", "calibration-magcache.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def one(kind: Kind, setting: int) -> Kind:
    return replace(kind, settings=[kind.settings[setting]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "peer", "own"),
    # One that is calibrated and whose rule is ours, and one in a process of its own.
    [
        pytest.param(
            *("diffusers", "FirstBlockCache", "first_block_cache"), marks=pytest.mark.exhaustive
        ),
        ("diffusers", "MagCache", "magcache"),
        ("cache-dit", "DBCache", None),
        pytest.param("diffusers", "TaylorSeer", None, marks=pytest.mark.exhaustive),
    ],
)
def test_a_peer_computes_some_steps_and_where_the_rule_is_ours_draws_our_picture(
    family: str, peer: str, own: str | None, tmp_path: Path
) -> None:
    ratios = Calibration(
        strategy="magcache",
        num_inference_steps=10,
        generations=1,
        transformers={
            "transformer": TransformerNumbers(
                "FluxTransformer2DModel", {"cond": BranchNumbers((1.0, *[0.95] * 9), 0.0)}
            )
        },
        date="today",
        versions={},
    )
    task = replace(TASK, prompts=["a red circle on a blue background"], calibration=ratios)
    (kind,) = (each for each in peer_kinds() if (each.family, each.name) == (family, peer))
    # cache-dit changes classes, and the hooks of diffusers only the model that they are on.
    apart = family == "cache-dit"
    run = partial(in_its_own_process, log=tmp_path / "log") if apart else draw_all
    (theirs,) = run(task, one(kind, 2))
    assert 2 <= theirs.computed < 10
    if own is not None:
        (kind,) = (
            each
            for each in strategy_kinds({"magcache": ratios})
            if each.name == STRATEGIES[own].__name__
        )
        ours = next(draw_all(task, one(kind, 2)))
        assert ours.computed == theirs.computed
        assert np.abs(ours.picture - theirs.picture).max() < 1e-4


def test_a_kind_that_fails_says_why_and_leaves_a_log(tmp_path: Path) -> None:
    task = replace(TASK, pipeline=Folder(tmp_path / "nothing"))
    with pytest.raises(KindFailed, match=r"ValueError: .*model_index.json is missing"):
        list(in_its_own_process(task, fewer_steps([2]), tmp_path / "log"))
    assert "Traceback" in (tmp_path / "log").read_text()
