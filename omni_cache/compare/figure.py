"""The frontier plot: PSNR over computed steps and over speedup, a line for each strategy."""

from __future__ import annotations

from itertools import cycle
from math import isfinite
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from omni_cache.compare.report import Comparison, Row, frontier, psnr_of, title

_MARKERS = {"uncached": "s", "omni-cache": "o", "diffusers": "^", "cache-dit": "D"}
_STYLES = {"uncached": "-", "omni-cache": "-", "diffusers": "--", "cache-dit": ":"}


def plot(comparison: Comparison, path: Path) -> None:
    """Draw both panels; identical pictures have no finite PSNR and are left out."""
    figure = Figure(figsize=(15, 6.2), layout="constrained")
    by_steps, by_time = figure.subplots(1, 2)
    rows = [row for row in comparison.rows if isfinite(psnr_of(row))]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(f"{row.line} ({row.kind.family})", []).append(row)
    colours = cycle(f"C{number}" for number in range(10))
    for name, points in lines.items():
        points.sort(key=lambda row: median(row.computed))
        family = points[0].kind.family
        look = {
            "marker": _MARKERS[family],
            "ls": _STYLES[family],
            "color": "black" if family == "uncached" else next(colours),
            "ms": 5,
            "lw": 1.2,
        }
        psnr = [psnr_of(row) for row in points]
        by_steps.plot([median(row.computed) for row in points], psnr, label=name, **look)
        by_time.plot([comparison.speedup(row) for row in points], psnr, **look)
    best = frontier(rows)
    speeds = [comparison.speedup(row) for row in best]
    by_time.step(
        *(speeds, [psnr_of(row) for row in best]),
        where="post",
        color="gold",
        lw=5,
        alpha=0.4,
        zorder=0,
        label="frontier",
    )
    by_time.legend(fontsize=8, loc="upper right")
    _label(by_steps, f"steps computed of {comparison.task.num_inference_steps}")
    _label(by_time, "speedup over the uncached pipeline")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.suptitle(title(comparison), fontsize=11)
    figure.savefig(path, dpi=120)


def _label(axes: Axes, across: str) -> None:
    axes.set(xlabel=across, ylabel="PSNR in dB against the uncached picture, median")
    axes.grid(alpha=0.3)
