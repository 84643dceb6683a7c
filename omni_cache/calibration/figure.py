"""The plot of a fit: what was measured, and the numbers that stand for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from omni_cache.calibration.estimate import Array, Measurement
from omni_cache.strategies.calibrations import BranchNumbers, Calibration

_MEASURED, _FITTED = "#7f9fbf", "#c0504d"


def plot(measurement: Measurement, calibration: Calibration, path: Path) -> None:
    """Draw one panel for each transformer and branch."""
    panels = [
        (f"{name}, {branch}", measurement.found[name][branch], numbers)
        for name, transformer in calibration.transformers.items()
        for branch, numbers in transformer.branches.items()
    ]
    figure = Figure(figsize=(5.6 * len(panels), 4.2), layout="constrained")
    draw = _polynomial if calibration.strategy == "teacache" else _ratios
    for axes, (title, found, numbers) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        draw(axes, found, numbers)
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _polynomial(axes: Axes, points: Array, numbers: BranchNumbers) -> None:
    """Change of the output over change of the signal, and the polynomial between them."""
    axes.plot(points[:, 0], points[:, 1], ".", color=_MEASURED, label="measured steps")
    along = np.linspace(points[:, 0].min(), points[:, 0].max(), 200)
    label = f"polynomial, rms error {numbers.fit_error:.2g}"
    axes.plot(along, np.polyval(numbers.numbers, along), color=_FITTED, label=label)
    axes.set(xlabel="relative change of the signal", ylabel="relative change of the output")


def _ratios(axes: Axes, rows: Array, numbers: BranchNumbers) -> None:
    """The ratio at every step, of each generation and on average."""
    for number, row in enumerate(rows):
        axes.plot(row, color=_MEASURED, lw=0.8, label="generations" if number == 0 else None)
    label = f"mean, rms error {numbers.fit_error:.2g}"
    axes.plot(numbers.numbers, "o-", ms=3, color=_FITTED, label=label)
    axes.set(xlabel="step", ylabel="magnitude of the residual over that of the step before")
