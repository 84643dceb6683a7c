"""The demo's two figures: a grid of pictures, and a timeline of computed and reused steps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from omni_cache.demo.measurement import Measurement, VariantResult
from omni_cache.pipelines.folder import Picture

_COMPUTED, _REUSED, _CURVE = "#1f4e79", "#cfe0ef", "#c0504d"


def picture_grid(measurement: Measurement, path: Path, rows: int = 8) -> None:
    """Draw the first prompts, a row for each, uncached and with every variant beside it."""
    prompts = measurement.prompts[:rows]
    columns = 1 + len(measurement.results)
    figure = Figure(figsize=(1.35 * columns + 2.4, 1.45 * len(prompts) + 0.6), layout="constrained")
    axes = figure.subplots(len(prompts), columns, squeeze=False)
    for row, prompt in enumerate(prompts):
        _show(axes[row, 0], measurement.uncached_pictures[row], "uncached" if row == 0 else "")
        axes[row, 0].set_ylabel(
            _wrapped(prompt), rotation=0, ha="right", va="center", fontsize=8, labelpad=6
        )
        for column, result in enumerate(measurement.results, start=1):
            generation = result.generations[row]
            _show(axes[row, column], generation.picture, result.variant.label if row == 0 else "")
            psnr = generation.fidelity.psnr
            quality = "identical" if psnr is None else f"{psnr:.1f} dB"
            axes[row, column].set_xlabel(
                f"{generation.computed_steps} steps, {quality}", fontsize=7, labelpad=2
            )
    figure.savefig(path, dpi=150)


def timeline(measurement: Measurement, path: Path) -> None:
    """Draw which steps of the first prompt were computed, and the distance that decided on it.

    One column for each strategy: above, the steps under every threshold; below, for the middle
    threshold, the distance that gathers until the gate computes anew.
    """
    by_strategy: dict[str, list[VariantResult]] = {}
    for result in measurement.results:
        by_strategy.setdefault(result.variant.strategy, []).append(result)
    figure = Figure(figsize=(6.4 * len(by_strategy), 5.2), layout="constrained")
    axes = figure.subplots(2, len(by_strategy), squeeze=False, sharex="col", height_ratios=(1, 1.5))
    for column, (strategy, results) in enumerate(by_strategy.items()):
        _step_strips(axes[0, column], results)
        axes[0, column].set_title(f"{strategy}: {measurement.prompts[0]}", fontsize=10)
        _distance_curve(axes[1, column], results[len(results) // 2])
    figure.savefig(path, dpi=150)


def _show(axes: Axes, picture: Picture, title: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[])


def _step_strips(axes: Axes, results: Sequence[VariantResult]) -> None:
    for row, result in enumerate(results):
        steps = result.generations[0].steps
        axes.bar(
            range(len(steps)),
            0.8,
            bottom=row - 0.4,
            width=0.9,
            color=[_COMPUTED if step.computed else _REUSED for step in steps],
        )
    axes.bar([0], 0, color=_COMPUTED, label="computed")
    axes.bar([0], 0, color=_REUSED, label="reused")
    axes.legend(loc="upper right", ncols=2, fontsize=8, bbox_to_anchor=(1, 1.0))
    axes.set_yticks(
        range(len(results)),
        [
            f"{result.variant.threshold:g} ({result.generations[0].computed_steps} computed)"
            for result in results
        ],
        fontsize=8,
    )
    axes.set(ylabel="threshold", ylim=(-0.6, len(results) + 0.3))


def _distance_curve(axes: Axes, result: VariantResult) -> None:
    steps = result.generations[0].steps
    known = [
        (index, step.accumulated)
        for index, step in enumerate(steps)
        if step.accumulated is not None
    ]
    axes.plot(*zip(*known, strict=True), "o-", color=_CURVE, ms=3, label="accumulated distance")
    each = [(index, step.distance) for index, step in enumerate(steps) if step.distance is not None]
    axes.plot(*zip(*each, strict=True), ":", color="grey", label="distance of the step")
    threshold = result.variant.threshold
    axes.axhline(threshold, color="black", lw=0.8, ls="--", label=f"threshold {threshold:g}")
    for index, step in enumerate(steps):
        if step.computed:
            axes.axvspan(index - 0.45, index + 0.45, color=_COMPUTED, alpha=0.12, lw=0)
    axes.set(xlabel="step", ylabel="distance")
    axes.set_ylim(0, 2.2 * threshold)
    axes.legend(fontsize=8, loc="upper right")


def _wrapped(prompt: str) -> str:
    return "\n".join(textwrap.wrap(prompt, 22))
