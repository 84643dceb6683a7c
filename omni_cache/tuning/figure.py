"""The plots of a plan: what its points reach, how much each step counts, and what it foretold."""

from __future__ import annotations

from itertools import cycle
from math import isfinite
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from omni_cache.compare.report import Comparison, Row, psnr_of
from omni_cache.strategies import Plan

COLOURS = {"compute": "#c0504d", "reuse": "#9fbfdf", "skip": "#e8e8e8"}
"""Of the actions."""
_WITHIN = 1.5
"""How near predictions are expected to be, in dB."""


def plot_frontier(plan: Plan, comparison: Comparison | None, path: Path) -> None:
    """PSNR over computed steps: the plan's points, and whatever it was compared with."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    reached = [
        (each.computed_steps, each.quality.psnr, each.quality.psnr_low)
        for each in plan.frontier
        if each.quality is not None and isfinite(each.quality.psnr)
    ]
    across, medians, low = ([each[place] for each in reached] for place in range(3))
    axes.plot(across, medians, "o-", color="C3", lw=2, label="plan")
    axes.plot(across, low, ":", color="C3", lw=1, label="plan, 5th percentile")
    if comparison is not None:
        _plot_others(axes, comparison)
    axes.axvline(plan.point.computed_steps, color="C3", alpha=0.3, lw=6, label="chosen")
    steps = plan.content.signature.num_inference_steps
    axes.set(xlabel=f"steps computed of {steps}", ylabel="PSNR in dB, median")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _plot_others(axes: Axes, comparison: Comparison) -> None:
    lines: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if isfinite(psnr_of(row)) and row.kind.name != "Plan":
            lines.setdefault(row.line, []).append(row)
    colours = cycle(f"C{number}" for number in (0, 1, 2, 4, 5, 6, 7, 8, 9))
    for name, rows in lines.items():
        rows.sort(key=lambda row: median(row.computed))
        is_uncached = rows[0].kind.family == "uncached"
        axes.plot(
            [median(row.computed) for row in rows],
            [psnr_of(row) for row in rows],
            "s-" if is_uncached else ".--",
            color="black" if is_uncached else next(colours),
            lw=1,
            label=name,
        )


def plot_steps(plan: Plan, path: Path) -> None:
    """How much an error at each step counts at the end, and what the plan does there."""
    steps = range(plan.content.signature.num_inference_steps)
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    colours = [COLOURS[action] for action in plan.point.actions]
    floor = min((each for each in plan.content.sensitivity if each > 0), default=1.0)
    heights = [max(each, floor) for each in plan.content.sensitivity]
    axes.bar(steps, heights, color=colours, edgecolor="#555", lw=0.4)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="final error over the step's own")
    for action, colour in COLOURS.items():
        axes.bar([0], [0], color=colour, label=action)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_predictions(plan: Plan, path: Path) -> None:
    """What every point was predicted to reach, and what it reached on other samples."""
    pairs = [
        (each.predicted.psnr, each.judged.psnr)
        for each in plan.frontier
        if each.predicted and each.judged and isfinite(each.predicted.psnr + each.judged.psnr)
    ]
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    if pairs:
        least, most = min(map(min, pairs)) - 2, max(map(max, pairs)) + 2
        ends = [least, most]
        axes.fill_between(
            ends,
            [each - _WITHIN for each in ends],
            [each + _WITHIN for each in ends],
            color="#eee",
            label=f"within {_WITHIN} dB",
        )
        axes.plot(*zip(*pairs, strict=True), "o", color="C3")
        axes.legend(fontsize=8)
    axes.set(xlabel="predicted PSNR in dB, median", ylabel="judged PSNR in dB, median")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
