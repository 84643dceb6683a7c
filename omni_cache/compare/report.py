"""What was compared, as numbers: rows, a table in Markdown, and everything in JSON."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from omni_cache.compare.kinds import Kind, Setting
from omni_cache.compare.measure import Task
from omni_cache.quality import Fidelity, Quality, quality_of


@dataclass
class Row:
    """One setting of one kind: a value for each prompt. ``pictures`` are PNG files."""

    kind: Kind
    setting: Setting
    seconds: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    fidelity: list[Fidelity] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)

    @property
    def line(self) -> str:
        """What it is drawn with in one line of the plot: the kind, with its forecast."""
        forecast = self.setting.forecast
        plain = forecast == "hold" or self.kind.family != "omni-cache"
        return self.kind.name if plain else f"{self.kind.name}, {forecast}"

    @property
    def quality(self) -> Quality:
        """Over the prompts."""
        return quality_of(self.fidelity)


@dataclass
class Comparison:
    """All rows, the uncached pipeline first, and why some kinds are not among them."""

    task: Task
    rows: list[Row]
    failures: Mapping[str, str]

    @property
    def uncached(self) -> Row:
        """The uncached pipeline with all steps, in both of its rounds."""
        return self.rows[0]

    def speedup(self, row: Row) -> float:
        """Uncached wall time over the row's, both medians over the prompts."""
        return median(self.uncached.seconds) / median(row.seconds)


HEADINGS = (
    "of",
    "strategy",
    "setting",
    "steps computed",
    "time ms",
    "speedup",
    "PSNR dB",
    "5th",
    "SSIM",
    "5th",
)


def cells(comparison: Comparison) -> list[tuple[str, ...]]:
    """The cells below `HEADINGS`."""
    return [
        (
            row.kind.family,
            row.line,
            row.setting.label,
            f"{median(row.computed):g}",
            f"{1000 * median(row.seconds):.0f}",
            f"{comparison.speedup(row):.2f}x",
            _decibel(row.quality.median),
            _decibel(row.quality.fifth),
            f"{row.quality.median.ssim:.4f}",
            f"{row.quality.fifth.ssim:.4f}",
        )
        for row in comparison.rows
    ]


def title(comparison: Comparison) -> str:
    """Steps and prompts."""
    task = comparison.task
    return f"{task.num_inference_steps} steps, {len(task.prompts)} prompts, inner={task.inner!r}"


def notes(comparison: Comparison) -> list[str]:
    """How to read the table."""
    return [
        "Against the uncached pipeline with all steps, on the same prompts and seeds: median, and "
        "5th percentile (the lower end) over the prompts. PSNR is taken in floating point, of "
        "pictures that were never rounded.",
        "Steps computed: in which the blocks ran. Of TaylorSeer in diffusers, whose hooks skip "
        "attention alone, those in which attention ran.",
        "Each kind ran in a process of its own; the times leave out compilation. The model of "
        "diffusers' hooks is not compiled, since they keep blocks from being compiled.",
        "TeaCache and MagCache use coefficients and ratios measured on this pipeline, with other "
        "seeds; so does MagCache of diffusers.",
        *(f"Not measured: {kind}: {why}" for kind, why in comparison.failures.items()),
    ]


def as_markdown(comparison: Comparison) -> str:
    """The table, with what it was measured on."""
    about = provenance(comparison.task)
    lines = [
        f"# Strategies, peers and fewer steps: {title(comparison)}",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|---|---|---|{'---:|' * (len(HEADINGS) - 3)}",
        *(f"| {' | '.join(row)} |" for row in cells(comparison)),
        "",
        *(f"- {note}" for note in notes(comparison)),
        "",
        f"{about['date']}, {about['machine']['processor']}, {about['machine']['threads']} threads, "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + ".",
        "",
        f"    {about['command']}",
        "",
    ]
    return "\n".join(lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything but the pictures."""
    return {
        **provenance(comparison.task),
        "rows": [
            {
                "of": row.kind.family,
                "strategy": row.line,
                "setting": row.setting.label,
                "flags": {key: repr(each) for key, each in _plain(row.setting.flags).items()},
                "computed_steps": median(row.computed),
                "seconds": median(row.seconds),
                "speedup": comparison.speedup(row),
                "median": asdict(row.quality.median),
                "fifth_percentile": asdict(row.quality.fifth),
                "prompts": {
                    "seconds": row.seconds,
                    "computed_steps": row.computed,
                    "psnr": [each.psnr for each in row.fidelity],
                    "ssim": [each.ssim for each in row.fidelity],
                },
            }
            for row in comparison.rows
        ],
        "failures": dict(comparison.failures),
    }


def provenance(task: Task) -> dict[str, Any]:
    """When, where, with what and how it was measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": {
            "platform": platform.platform(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
        },
        "versions": _versions("omni-cache", "torch", "diffusers", "cache-dit"),
        "prompts": list(task.prompts),
        "num_inference_steps": task.num_inference_steps,
        "inner": task.inner,
        "seed": task.seed,
        "device": task.pipeline.device,
        "dtype": task.pipeline.dtype,
    }


def processor() -> str:
    """The processor's name, as Linux gives it; ``platform`` knows only its architecture there."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names if find_spec(name.replace("-", "_"))}


def _plain(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {flag: value for flag, value in flags.items() if flag != "calibration"}


def _decibel(fidelity: Fidelity) -> str:
    return "same" if fidelity.psnr is None else f"{fidelity.psnr:.1f}"


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other one beats in both speed and PSNR, the fastest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda each: median(each.seconds)):
        if not best or psnr_of(row) > psnr_of(best[-1]):
            best.append(row)
    return best


def psnr_of(row: Row) -> float:
    """Median PSNR in dB, infinite for identical pictures."""
    psnr = row.quality.median.psnr
    return float("inf") if psnr is None else psnr
