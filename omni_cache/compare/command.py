"""The compare command: measure every kind, judge the pictures, and write the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from omni_cache.calibration import calibrate
from omni_cache.compare.collect import collect
from omni_cache.compare.figure import plot
from omni_cache.compare.kinds import needs_calibration, peer_kinds, plan_kind, strategy_kinds
from omni_cache.compare.measure import Task
from omni_cache.compare.page import write_page
from omni_cache.compare.report import HEADINGS, Comparison, as_json, as_markdown, cells, title
from omni_cache.pipelines.folder import Folder
from omni_cache.strategies import STRATEGIES, Plan
from omni_cache.strategies.calibrations import Calibration

_CALIBRATION_PROMPTS = 4
_CALIBRATION_SEEDS = 1_000_000
"""Calibrations start from other noise than what is measured."""


def run(
    pipeline: Folder,
    prompts: Sequence[str],
    num_inference_steps: int,
    output: Path,
    *,
    peers: bool = False,
    plan: Plan | None = None,
    inner: str = "inductor",
    seed: int = 0,
) -> Comparison:
    """Compare strategies, peers and fewer steps on the same prompts and seeds.

    Writes ``results.json``, ``results.md``, ``frontier.png`` and ``index.html``, the calibrations
    that were used, and what the processes of kinds that failed have printed.

    Args:
        pipeline: what to compare them on.
        prompts: one picture each per setting.
        num_inference_steps: steps of an uncached generation.
        output: folder to write to; made if there is none.
        peers: whether the peers that are installed take part.
        plan: a tuned plan that takes part with all its points.
        inner: the inner compiler, for the uncached model also.
        seed: of the noise; prompt i starts from ``seed + i``.
    """
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    progress = Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        console=console,
    )
    task = Task(pipeline, prompts, num_inference_steps, inner, seed)
    with progress:
        calibrations = calibrate_all(task, output, progress)
        task = replace(task, calibration=calibrations.get("magcache"))
        kinds = [*strategy_kinds(calibrations), *(peer_kinds() if peers else [])]
        kinds += [] if plan is None else [plan_kind(plan)]
        comparison = collect(task, kinds, output / "logs", progress)
    console.print(table(comparison))
    for name, why in comparison.failures.items():
        console.print(f"not measured: {name}: {why}", style="red", highlight=False)
    plot(comparison, output / "frontier.png")
    (output / "results.json").write_text(
        json.dumps(as_json(comparison), indent=1, allow_nan=False) + "\n", "utf-8"
    )
    (output / "results.md").write_text(as_markdown(comparison), "utf-8")
    write_page(comparison, output / "frontier.png", output / "index.html")
    console.print(f"Open {output / 'index.html'}; the numbers are in {output / 'results.md'}")
    return comparison


def calibrate_all(task: Task, output: Path, progress: Progress) -> dict[str, Calibration]:
    """The numbers of each strategy that needs some, measured on this pipeline and kept in files."""
    names = [name for name, strategy in STRATEGIES.items() if needs_calibration(strategy)]
    prompts = task.prompts[:_CALIBRATION_PROMPTS]
    bar = progress.add_task("calibrating", total=len(names) * len(prompts))
    pipe = task.pipeline.load()

    def generate() -> None:
        for number, prompt in enumerate(prompts):
            start = task.seed + _CALIBRATION_SEEDS + number
            task.pipeline.draw(pipe, prompt, start, task.num_inference_steps)
            progress.update(bar, advance=1)

    found = {}
    for name in names:
        found[name] = calibrate(pipe, generate, name, task.num_inference_steps, inner="eager")
        found[name].save(output / f"calibration-{name}.json")
    return found


def table(comparison: Comparison) -> Table:
    """The rows for the terminal."""
    shown = Table(title=title(comparison), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="left" if number < 3 else "right")
    for row in cells(comparison):
        shown.add_row(*row)
    return shown
