"""Estimators: TeaCache coefficients and magnitude ratios for a model that has no published ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from omni_cache.pipelines import disable, enable, is_enabled
from omni_cache.runtime.generation import recording


def estimate_mag_ratios(
    target: Any, generate: Callable[[], object], num_inference_steps: int = 28, **flags: Any
) -> dict[str, list[float]]:
    """Measure MagCache's magnitude ratios, averaged over generations.

    Args:
        target: a diffusers pipeline or a module, not enabled; it is left as it was.
        generate: runs one or more generations of ``num_inference_steps`` steps on ``target``.
        num_inference_steps: steps of each generation.
        flags: further flags for ``enable``, such as ``inner``.

    Returns:
        For each guidance branch ``num_inference_steps`` ratios, the first 1.0, ready for
        ``mag_ratios``.

    Raises:
        ValueError: ``target`` is enabled, or a flag is wrong.
        RuntimeError: ``generate`` ran no complete generation through the cache.
    """
    measured = _measure(target, generate, "magcache", num_inference_steps, flags)
    series: dict[str, list[list[float]]] = defaultdict(list)
    for branch, steps in measured:
        ratios = [step["mag_ratio"] for step in steps if "mag_ratio" in step]
        if len(ratios) == num_inference_steps:
            series[branch].append(ratios)
    if not series:
        raise RuntimeError(_nothing_measured(num_inference_steps))
    return {branch: np.mean(rows, axis=0).tolist() for branch, rows in series.items()}


def estimate_coefficients(
    target: Any,
    generate: Callable[[], object],
    num_inference_steps: int = 28,
    degree: int = 4,
    **flags: Any,
) -> list[float]:
    """Fit TeaCache's rescaling polynomial: from the change of the signal to that of the output.

    Args:
        target: a diffusers pipeline or a module, not enabled; it is left as it was.
        generate: runs one or more generations of ``num_inference_steps`` steps on ``target``.
        num_inference_steps: steps of each generation.
        degree: degree of the polynomial.
        flags: further flags for ``enable``, such as ``inner`` or ``signal``.

    Returns:
        ``degree + 1`` coefficients, highest power first, ready for ``coefficients``.

    Raises:
        ValueError: ``degree`` is no integer >= 0, ``target`` is enabled, or a flag is wrong.
        RuntimeError: ``generate`` gave fewer measurements than the polynomial has coefficients.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
        raise ValueError(f"degree={degree!r} is not allowed; degree must be an integer >= 0")
    measured = _measure(target, generate, "teacache", num_inference_steps, flags)
    pairs = [
        (step["signal_change"], step["output_change"])
        for _, steps in measured
        for step in steps
        if "output_change" in step
    ]
    points = np.array([pair for pair in pairs if np.isfinite(pair).all()])
    if len(points) <= degree:
        raise RuntimeError(
            f"{len(points)} steps were measured, and a polynomial of degree {degree} needs more "
            f"than {degree}. {_nothing_measured(num_inference_steps)}"
        )
    return [float(each) for each in np.polyfit(points[:, 0], points[:, 1], degree)]


def _measure(
    target: Any,
    generate: Callable[[], object],
    cache: str,
    num_inference_steps: int,
    flags: dict[str, Any],
) -> list[tuple[str, list[dict[str, float]]]]:
    """Measurements of every guidance branch that ``generate`` ran, with the branch's name."""
    if is_enabled(target):
        raise ValueError(
            "target is enabled, and would be left disabled; call omni_cache.disable(target) first"
        )
    enable(target, cache=cache, calibrate=True, num_inference_steps=num_inference_steps, **flags)
    try:
        with recording() as runs:
            generate()
    finally:
        disable(target)
    # Models that take turns within a generation continue each other's trajectories.
    joined: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    for run in runs:
        for trajectory in run.trajectories.values():
            steps = joined[run.generation_id, trajectory.branch]
            steps += (step.measured for step in trajectory.steps)
    return [(branch, steps) for (_, branch), steps in joined.items()]


def _nothing_measured(num_inference_steps: int) -> str:
    return (
        f"generate() must run the target for {num_inference_steps} steps, under torch.no_grad(), "
        "with a timestep or in an omni_cache.generation()."
    )
