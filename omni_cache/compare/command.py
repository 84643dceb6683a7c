"""The compare command: measure every kind, judge the pictures, and write the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from omni_cache.calibration import calibrate
from omni_cache.compare.figure import plot
from omni_cache.compare.kinds import (
    Kind,
    fewer_steps,
    needs_calibration,
    peer_kinds,
    strategy_kinds,
)
from omni_cache.compare.measure import KindFailed, Task, in_its_own_process
from omni_cache.compare.page import as_png, write_page
from omni_cache.compare.report import HEADINGS, Comparison, Row, as_json, as_markdown, cells, title
from omni_cache.pipelines.folder import Folder, Picture
from omni_cache.quality import fidelity_to
from omni_cache.strategies import STRATEGIES
from omni_cache.strategies.calibrations import Calibration

_CALIBRATION_PROMPTS = 4
_CALIBRATION_SEEDS = 1_000_000
"""Calibrations start from other noise than what is measured."""
_SHOWN = 6
"""Prompts whose pictures the page shows."""


def run(
    pipeline: Folder,
    prompts: Sequence[str],
    num_inference_steps: int,
    output: Path,
    *,
    peers: bool = False,
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
        inner: the inner compiler, for the uncached model also.
        seed: of the noise; prompt i starts from ``seed + i``.
    """
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    console = Console()
    progress = Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        console=console,
    )
    task = Task(pipeline, prompts, num_inference_steps, inner, seed)
    with progress:
        calibrations = _calibrate(task, output, progress)
        task = replace(task, calibration=calibrations.get("magcache"))
        measured = _Measured(task, logs, progress)
        uncached = fewer_steps([num_inference_steps])
        (reference,) = measured.add(uncached)
        kinds = [*strategy_kinds(calibrations), *(peer_kinds() if peers else [])]
        seconds = _expected_seconds(kinds, len(prompts), median(reference.seconds), measured)
        progress.console.print(
            f"{len(kinds)} kinds, {sum(len(kind.settings) for kind in kinds)} settings: about "
            f"{max(1, round(seconds / 60))} minutes"
        )
        for kind in kinds:
            measured.add(kind)
        # Once more with all steps, so that both rounds stand for the time of the whole run.
        counts = {round(median(row.computed)) for row in measured.rows} - {num_inference_steps}
        for again in measured.add(fewer_steps([num_inference_steps, *sorted(counts)]))[:1]:
            measured.rows.remove(again)
            reference.seconds += again.seconds
    if not any(logs.iterdir()):
        logs.rmdir()
    comparison = Comparison(task, measured.rows, measured.failures)
    console.print(table(comparison))
    for name, why in measured.failures.items():
        console.print(f"not measured: {name}: {why}", style="red", highlight=False)
    plot(comparison, output / "frontier.png")
    (output / "results.json").write_text(
        json.dumps(as_json(comparison), indent=1, allow_nan=False) + "\n", "utf-8"
    )
    (output / "results.md").write_text(as_markdown(comparison), "utf-8")
    write_page(comparison, output / "frontier.png", output / "index.html")
    console.print(f"Open {output / 'index.html'}; the numbers are in {output / 'results.md'}")
    return comparison


class _Measured:
    """The rows so far, and the reference that every picture is judged by."""

    def __init__(self, task: Task, logs: Path, progress: Progress) -> None:
        self.task, self.logs, self.progress = task, logs, progress
        self.rows: list[Row] = []
        self.failures: dict[str, str] = {}
        self.references: list[Picture] = []
        self.started = 0.0

    def add(self, kind: Kind) -> list[Row]:
        """Measure a kind; one that fails leaves a word on why, and what it had before."""
        rows: dict[int, Row] = {}
        name = f"{kind.name} ({kind.family})"
        total = len(kind.settings) * len(self.task.prompts)
        bar = self.progress.add_task(name, total=total)
        log = self.logs / f"{kind.family} {kind.name}.log"
        try:
            for drawn in in_its_own_process(self.task, kind, log):
                if not self.rows:
                    self.references.append(drawn.picture)
                    self.started = drawn.started
                row = rows.setdefault(drawn.setting, Row(kind, kind.settings[drawn.setting]))
                row.seconds.append(drawn.seconds)
                row.computed.append(drawn.computed)
                row.fidelity.append(fidelity_to(self.references[drawn.prompt], drawn.picture))
                if drawn.prompt < _SHOWN:
                    row.pictures.append(as_png(drawn.picture))
                self.progress.update(bar, advance=1)
            log.unlink(missing_ok=True)
        except KindFailed as failure:
            if not self.rows:
                raise RuntimeError(f"the uncached pipeline: {failure}") from None
            self.failures[name] = str(failure)
        complete = [row for row in rows.values() if len(row.seconds) == len(self.task.prompts)]
        self.rows += complete
        return complete


def _calibrate(task: Task, output: Path, progress: Progress) -> dict[str, Calibration]:
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


def _expected_seconds(
    kinds: Sequence[Kind], prompts: int, seconds: float, measured: _Measured
) -> float:
    """How long kinds will take at most, if nothing made them faster than the uncached pipeline.

    Each forecast of a strategy is compiled once, as is each setting of a peer.
    """
    settings = sum(len(kind.settings) for kind in kinds)
    starts = sum(
        len({each.forecast for each in kind.settings})
        if kind.family == "omni-cache"
        else len(kind.settings)
        for kind in kinds
    )
    return starts * measured.started + settings * (prompts + 2) * seconds


def table(comparison: Comparison) -> Table:
    """The rows for the terminal."""
    shown = Table(title=title(comparison), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="left" if number < 3 else "right")
    for row in cells(comparison):
        shown.add_row(*row)
    return shown
