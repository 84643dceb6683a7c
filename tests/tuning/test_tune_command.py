"""The tune command: a plan in a file, and a page about it that stands alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plans_by_hand import content, plan
from typer.testing import CliRunner

from omni_cache import Plan
from omni_cache.cli import app
from omni_cache.compare.kinds import Kind, Setting, fewer_steps, plan_kind
from omni_cache.compare.measure import Task
from omni_cache.compare.report import Comparison, Row
from omni_cache.demo import demo_arguments, demo_pipeline_path
from omni_cache.pipelines.folder import Folder
from omni_cache.quality import Fidelity
from omni_cache.tuning.report import Shown, write_report

STEPS = 6
ARGUMENTS = (
    *("--steps", str(STEPS), "--samples", "2", "--judged", "2", "--effort", "low"),
    *("--inner", "eager", "--no-strategies"),
)


def tune(folder: Path, *arguments: str, name: str = "plan.json") -> str:
    (folder / "prompts.txt").write_text("a red circle on a blue background")
    given = ["tune", "demo", "--prompts", str(folder / "prompts.txt"), *ARGUMENTS, *arguments]
    result = CliRunner().invoke(app, [*given, "--output", str(folder / "out" / name)])
    assert isinstance(result.exception, (SystemExit, type(None)))
    return re.sub(r"[\s\u2502]+", " ", result.output)


def test_a_pipeline_is_tuned_and_told_of(tmp_path: Path) -> None:
    words = tune(tmp_path, "--computed-steps", "3")
    made = Plan.load(tmp_path / "out" / "plan.json")
    assert made.point.computed_steps == 3
    assert made.content.made.targets == {"computed_steps": 3}
    assert "Plan(3 of 6 steps of FluxTransformer2DModel) 0 compute" in words
    assert "Unable to import" not in words
    page = (tmp_path / "out" / "plan.html").read_text()
    assert "http" not in page
    assert page.count("data:image/png") == 3 + 2 * 3  # plots, and two samples' pictures
    assert "Plan: 3 of 6 steps computed" in page
    assert [each.name for each in sorted((tmp_path / "out").iterdir())] == [
        "plan.html",
        "plan.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--psnr", "40", "--ssim", "0.9"), "psnr and ssim are given"),
        (("--psnr", "-1"), "psnr=-1.0 is not allowed"),
        (("--effort", "much"), "effort='much' is not allowed"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    assert message in tune(tmp_path, *arguments)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_file_that_would_not_be_known_for_a_plan_is_not_written(tmp_path: Path) -> None:
    words = tune(tmp_path, name="plan.html")
    assert "output must be a path with .json" in words
    assert not (tmp_path / "out").exists()


def test_the_page_has_the_frontier_the_timeline_and_what_it_was_compared_with(
    tmp_path: Path,
) -> None:
    made = plan("ccrscrsr")
    grey = np.full((8, 8, 3), 0.5, dtype=np.float32)
    task = Task(Folder(demo_pipeline_path(), demo_arguments()), ["one"], 8)

    def row(kind: Kind, place: int, psnr: float | None) -> Row:
        quality = [Fidelity(psnr, 0.9)]
        return Row(kind, kind.settings[place], [1.0], [4.0 + place], quality, [])

    other = Kind("omni-cache", "TeaCache", [Setting("rel_l1_thresh 0.2", {})])
    rows = [row(fewer_steps([8]), 0, None), row(plan_kind(made), 0, 40.0), row(other, 0, 31.7)]
    path = tmp_path / "page.html"
    write_report(made, [Shown("<a fox>", grey, grey + 0.01)], Comparison(task, rows, {}), path)
    page = path.read_text()
    assert "&lt;a fox&gt;" in page
    assert "40.0 dB" in page  # 0.01 off
    cells = re.findall(r"<td>([^<]*)</td>", page)
    assert {"41.0", "40.5", "31.7", "2.00x"} <= set(cells)
    assert page.count('<div style="background:') == 8
    assert 'title="step 2: reuse' in page
    assert 'title="step 3: skip' in page
    write_report(made, [], None, path)  # alone
    assert "Beside fewer steps" not in path.read_text()


def test_a_plan_takes_part_in_a_comparison_at_all_its_points() -> None:
    made = plan()
    kind = plan_kind(made)
    assert [each.label for each in kind.settings] == ["4 computed", "5 computed"]
    chosen = [each.flags["cache"].point.computed_steps for each in kind.settings]
    assert chosen == [4, 5]
    unverified = replace(content(), made=replace(content().made, verified=False))
    assert "unverified" in repr(Plan(content=unverified))
