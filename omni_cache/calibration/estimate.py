"""Estimators: TeaCache coefficients and magnitude ratios for a model that has no published ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from omni_cache.calibration.observe import MagnitudeRatios, SignalAndOutput
from omni_cache.pipelines import disable, enable, is_enabled
from omni_cache.runtime.contexts import Observer, observing


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
    observer = MagnitudeRatios()
    # A ratio of 2 is an error of 1, which a threshold of 0 never lets pass: every step is computed.
    never = {"cache": "magcache", "mag_ratios": [2.0], "threshold": 0.0}
    _observe(target, generate, observer, {**never, **flags}, num_inference_steps)
    series: dict[str, list[list[float]]] = defaultdict(list)
    for (_, branch), ratios in observer.series.items():
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
    observer = SignalAndOutput()
    # Measured on the signal that fitted coefficients are going to be used with.
    never = {"cache": "teacache", "coefficients": [1.0, 0.0], "rel_l1_thresh": 0.0}
    _observe(target, generate, observer, {**never, **flags}, num_inference_steps)
    pairs = [pair for each in observer.series.values() for pair in each]
    points = np.array([pair for pair in pairs if np.isfinite(pair).all()])
    if len(points) <= degree:
        raise RuntimeError(
            f"{len(points)} steps were measured, and a polynomial of degree {degree} needs more "
            f"than {degree}. {_nothing_measured(num_inference_steps)}"
        )
    return [float(each) for each in np.polyfit(points[:, 0], points[:, 1], degree)]


def _observe(
    target: Any,
    generate: Callable[[], object],
    observer: Observer,
    flags: dict[str, Any],
    num_inference_steps: int,
) -> None:
    """Show an observer every step that ``generate`` runs."""
    if is_enabled(target):
        raise ValueError(
            "target is enabled, and would be left disabled; call omni_cache.disable(target) first"
        )
    enable(target, num_inference_steps=num_inference_steps, **flags)
    try:
        with observing(observer):
            generate()
    finally:
        disable(target)


def _nothing_measured(num_inference_steps: int) -> str:
    return (
        f"generate() must run the target for {num_inference_steps} steps, under torch.no_grad(), "
        "with a timestep or in an omni_cache.generation()."
    )
