"""Estimators: TeaCache coefficients and magnitude ratios for a model that has no published ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from omni_cache.calibration.observe import MagnitudeRatios, Measured, SignalAndOutput
from omni_cache.pipelines import disable, enable, is_enabled, states_of
from omni_cache.runtime.contexts import observing
from omni_cache.strategies.calibrations import (
    CALIBRATED,
    BranchNumbers,
    Calibration,
    Schedule,
    TransformerNumbers,
)

Array = npt.NDArray[np.float64]

BARE = "transformer"
"""What a bare module is called in a calibration: as most pipelines call theirs."""

# Every step is computed: with a threshold of 0, and a ratio of 2, which is an error of 1.
_NEVER: dict[str, dict[str, Any]] = {
    "teacache": {"coefficients": [1.0, 0.0], "rel_l1_thresh": 0.0},
    "magcache": {"mag_ratios": [2.0], "threshold": 0.0},
}


@dataclass(frozen=True)
class Measurement:
    """What `measure` found, for each transformer and guidance branch.

    Attributes:
        strategy: "teacache" or "magcache".
        num_inference_steps: steps of each generation.
        generations: how many there were.
        found: by the transformer's name and the branch's. For TeaCache the changes of signal and
            output, (steps, 2); for MagCache the ratios, (generations, num_inference_steps), NaN
            where another transformer ran.
        classes: the transformers' classes.
        schedule: None where no scheduler was at hand.
        signal: the flag ``signal``.
    """

    strategy: str
    num_inference_steps: int
    generations: int
    found: Mapping[str, Mapping[str, Array]]
    classes: Mapping[str, str]
    schedule: Schedule | None
    signal: str | None


def calibrate(
    target: Any,
    generate: Callable[[], object],
    strategy: str = "teacache",
    num_inference_steps: int = 28,
    degree: int = 4,
    **flags: Any,
) -> Calibration:
    """Measure what a strategy needs to know of a model: `measure`, then `fit`.

    Raises:
        ValueError: an argument or a flag is wrong, or ``target`` is enabled.
        RuntimeError: ``generate`` measured too little.
    """
    _check_degree(degree)
    return fit(measure(target, generate, strategy, num_inference_steps, **flags), degree)


def estimate_mag_ratios(
    target: Any, generate: Callable[[], object], num_inference_steps: int = 28, **flags: Any
) -> dict[str, list[float]]:
    """Measure MagCache's magnitude ratios, averaged over generations.

    Transformers that take turns share one row of ratios; `calibrate` keeps them apart.

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
    found = measure(target, generate, "magcache", num_inference_steps, **flags).found.values()
    branches = dict.fromkeys(branch for each in found for branch in each)
    return {
        branch: np.nanmean(np.concatenate([each[branch] for each in found]), axis=0).tolist()
        for branch in branches
    }


def estimate_coefficients(
    target: Any,
    generate: Callable[[], object],
    num_inference_steps: int = 28,
    degree: int = 4,
    **flags: Any,
) -> list[float]:
    """Fit TeaCache's rescaling polynomial: from the change of the signal to that of the output.

    One polynomial for all transformers and branches; `calibrate` keeps them apart.

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
    _check_degree(degree)
    found = measure(target, generate, "teacache", num_inference_steps, **flags).found
    points = [each for branches in found.values() for each in branches.values()]
    numbers, _ = _polynomial(np.concatenate(points), degree, num_inference_steps)
    return list(numbers)


def measure(
    target: Any,
    generate: Callable[[], object],
    strategy: str = "teacache",
    num_inference_steps: int = 28,
    **flags: Any,
) -> Measurement:
    """Watch every step that ``generate`` runs.

    Args:
        target: a diffusers pipeline or a module, not enabled; it is left as it was.
        generate: runs one or more generations of ``num_inference_steps`` steps on ``target``.
        strategy: "teacache" or "magcache", which want to know different things.
        num_inference_steps: steps of each generation.
        flags: further flags for ``enable``, such as ``inner`` or ``signal``.

    Raises:
        ValueError: an argument or a flag is wrong, or ``target`` is enabled.
        RuntimeError: ``generate`` ran no step through the cache, or no complete generation where
            the strategy needs one.
    """
    if strategy not in CALIBRATED:
        listed = " or ".join(map(repr, CALIBRATED))
        raise ValueError(f"strategy={strategy!r} is not allowed; strategy must be {listed}")
    if is_enabled(target):
        raise ValueError(
            "target is enabled, and would be left disabled; call omni_cache.disable(target) first"
        )
    observer = MagnitudeRatios() if strategy == "magcache" else SignalAndOutput()
    never = {"cache": strategy, "num_inference_steps": num_inference_steps, **_NEVER[strategy]}
    enable(target, **{**never, **flags})
    try:
        with observing(observer):
            generate()
        names: dict[Any, str] = {}
        classes = {}
        for name, state in states_of(target):
            module = getattr(target, name) if name else target
            classes[name or BARE] = state.model_class or type(module).__name__
            names.update(dict.fromkeys(state.runs, name or BARE))
    finally:
        disable(target)
    steps = [(names[each.run], each) for each in observer.steps]
    found = _ratios(steps, num_inference_steps) if strategy == "magcache" else _changes(steps)
    if not found:
        raise RuntimeError(_nothing_measured(num_inference_steps))
    return Measurement(
        strategy,
        num_inference_steps,
        len({each.generation for each in observer.steps}),
        found,
        {name: classes[name] for name in found},
        _schedule(getattr(target, "scheduler", None)),
        flags.get("signal"),
    )


def fit(measurement: Measurement, degree: int = 4) -> Calibration:
    """The numbers that say best what was measured.

    Args:
        measurement: what `measure` found.
        degree: degree of TeaCache's polynomial.

    Raises:
        ValueError: ``degree`` is no integer >= 0.
        RuntimeError: there are fewer measurements than the polynomial has coefficients.
    """
    _check_degree(degree)
    steps = measurement.num_inference_steps

    def numbers(found: Array) -> BranchNumbers:
        if measurement.strategy == "teacache":
            return BranchNumbers(*_polynomial(found, degree, steps))
        return BranchNumbers(*_mean_ratios(found))

    return Calibration(
        strategy=measurement.strategy,
        num_inference_steps=steps,
        generations=measurement.generations,
        transformers={
            name: TransformerNumbers(
                measurement.classes[name],
                {branch: numbers(found) for branch, found in branches.items()},
            )
            for name, branches in measurement.found.items()
        },
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={
            "torch": torch.__version__,
            **{name: version(name) for name in ("diffusers", "omni-cache")},
        },
        schedule=measurement.schedule,
        signal=measurement.signal,
    )


Named = Sequence[tuple[str, Measured]]
"""Measured steps, with the name of the transformer."""
Found = dict[str, dict[str, Array]]


def _changes(steps: Named) -> Found:
    """The changes of signal and output, for each transformer and branch."""
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for name, each in steps:
        if np.isfinite(each.value).all():
            found[name][each.branch].append(each.value)
    return {
        name: {branch: np.array(points) for branch, points in branches.items()}
        for name, branches in found.items()
    }


def _ratios(steps: Named, count: int) -> Found:
    """The ratios of all complete generations, for each transformer and branch."""
    complete: dict[tuple[int, str], list[int]] = defaultdict(list)
    for _, each in steps:
        complete[each.generation, each.branch].append(each.step)
    rows: dict[str, dict[str, dict[int, Array]]] = defaultdict(lambda: defaultdict(dict))
    for name, each in steps:
        if sorted(complete[each.generation, each.branch]) == list(range(count)):
            empty = np.full(count, np.nan)
            rows[name][each.branch].setdefault(each.generation, empty)[each.step] = each.value
    return {
        name: {branch: np.stack(list(found.values())) for branch, found in branches.items()}
        for name, branches in rows.items()
    }


def _polynomial(points: Array, degree: int, steps: int) -> tuple[tuple[float, ...], float]:
    if len(points) <= degree:
        raise RuntimeError(
            f"{len(points)} steps were measured, and a polynomial of degree {degree} needs more "
            f"than {degree}. {_nothing_measured(steps)}"
        )
    coefficients = np.polyfit(points[:, 0], points[:, 1], degree)
    off = np.polyval(coefficients, points[:, 0]) - points[:, 1]
    return tuple(map(float, coefficients)), float(np.sqrt(np.mean(off**2)))


def _mean_ratios(rows: Array) -> tuple[tuple[float, ...], float]:
    """The mean over generations; a step that another transformer ran gets the nearest one's."""
    known = np.flatnonzero(~np.isnan(rows).all(axis=0))
    means = np.nanmean(rows[:, known], axis=0)
    nearest = [int(np.abs(known - step).argmin()) for step in range(rows.shape[1])]
    off = rows[:, known] - means
    return tuple(means[nearest].tolist()), float(np.sqrt(np.nanmean(off**2)))


def _schedule(scheduler: Any) -> Schedule | None:
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return None
    sigmas = getattr(scheduler, "sigmas", None)
    return Schedule(
        type(scheduler).__name__,
        tuple(torch.as_tensor(timesteps, dtype=torch.float64).flatten().tolist()),
        None if sigmas is None else tuple(torch.as_tensor(sigmas).double().flatten().tolist()),
    )


def _check_degree(degree: Any) -> None:
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
        raise ValueError(f"degree={degree!r} is not allowed; degree must be an integer >= 0")


def _nothing_measured(num_inference_steps: int) -> str:
    return (
        f"generate() must run the target for {num_inference_steps} steps, under torch.no_grad(), "
        "with a timestep or in an omni_cache.generation()."
    )
