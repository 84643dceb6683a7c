"""Measures kind after kind, judges every picture, and puts the rows of a comparison together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.progress import Progress

from omni_cache.compare.kinds import Kind, fewer_steps
from omni_cache.compare.measure import KindFailed, Task, in_its_own_process
from omni_cache.compare.page import as_png
from omni_cache.compare.report import Comparison, Row
from omni_cache.pipelines.folder import Picture
from omni_cache.quality import fidelity_to

_SHOWN = 6
"""Prompts whose pictures a page shows."""


def collect(task: Task, kinds: Sequence[Kind], logs: Path, progress: Progress) -> Comparison:
    """Draw all prompts with all settings of all kinds, uncached, and with as few steps as they.

    Args:
        task: what the kinds have in common.
        kinds: what to measure besides the uncached pipeline.
        logs: folder for what the processes of kinds that failed have printed; none is left where
            none has failed.
        progress: shows a bar for each kind.
    """
    logs.mkdir(parents=True, exist_ok=True)
    steps = task.num_inference_steps
    measured = _Measured(task, logs, progress)
    (reference,) = measured.add(fewer_steps([steps]))
    seconds = _expected_seconds(kinds, len(task.prompts), median(reference.seconds), measured)
    progress.console.print(
        f"{len(kinds)} kinds, {sum(len(kind.settings) for kind in kinds)} settings: about "
        f"{max(1, round(seconds / 60))} minutes"
    )
    for kind in kinds:
        measured.add(kind)
    # Once more with all steps, so that both rounds stand for the time of the whole run.
    counts = {round(median(row.computed)) for row in measured.rows} - {steps}
    for again in measured.add(fewer_steps([steps, *sorted(counts)]))[:1]:
        measured.rows.remove(again)
        reference.seconds += again.seconds
    if not any(logs.iterdir()):
        logs.rmdir()
    return Comparison(task, measured.rows, measured.failures)


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
