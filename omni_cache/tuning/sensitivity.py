"""How much an error at one step moves the final result: measured, by holding that step alone.

Knows plans and results; nothing of how schedules are chosen by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omni_cache.planning.gram import Gram, error_of
from omni_cache.planning.search import COMPUTE, REUSE
from omni_cache.runtime.contexts import Observed
from omni_cache.strategies.plans import Point
from omni_cache.tuning.gather import Course
from omni_cache.tuning.rehearse import Rehearsal, Tape

Array = npt.NDArray[np.float64]


class Sensitivity(NamedTuple):
    """The final result's squared error over a step's own.

    Attributes:
        residuals: over the error of the residual, in units of the Gram.
        outputs: over the error of the output, in units of the Gram.
    """

    residuals: Array
    outputs: Array


def measure(
    rehearsal: Rehearsal,
    grams: Sequence[Mapping[Course, Gram]],
    steps: Sequence[Sequence[int]],
    on_progress: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Hold each step alone, and look at the end.

    Args:
        rehearsal: plays plans.
        grams: for each sample, the products of its own uncached loop.
        steps: for each of the first samples, the steps to hold. What no sample holds is
            interpolated.
        on_progress: called after each run.
    """
    count = len(next(iter(grams[0].values())))
    residuals: list[list[float]] = [[] for _ in range(count)]
    outputs: list[list[float]] = [[] for _ in range(count)]
    for sample, wanted in enumerate(steps):
        uncached = rehearsal.play(uncached_point(count), sample, records=True)
        units = _output_units(uncached.tape)
        for step in wanted:
            present = {each: gram for each, gram in grams[sample].items() if gram.present[step]}
            before = [
                other for other in range(step) if all(g.present[other] for g in present.values())
            ]
            if not before:  # the first step of a transformer has nothing to hold
                continue
            rows = {each.branch: {step: (1.0,)} for each in present}
            actions = [REUSE if each == step else COMPUTE for each in range(count)]
            seen = _Results(step)
            played = rehearsal.play(
                Point(tuple(actions), rows=rows),
                sample,
                known=uncached.tape.before(step),
                observer=seen,
            )
            on_progress()
            final = float(np.mean(played.result.difference(uncached.result) ** 2))
            own = sum(error_of(gram, before[-1:], step, (1.0,)) for gram in present.values())
            off = sum(
                _squared(seen.results[branch], uncached.tape.calls[branch, step].result) / unit
                for branch, unit in units.items()
                if branch in seen.results
            )
            if own > 0 and off > 0 and final > 0:
                residuals[step].append(final / own)
                outputs[step].append(final / off)
    return Sensitivity(_completed(residuals), _completed(outputs))


def uncached_point(steps: int) -> Point:
    """The plan that computes every step."""
    return Point((COMPUTE,) * steps)


class _Results:
    """An observer that keeps what the model returns at one step, by branch."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.results: dict[str, list[Tensor]] = {}

    def __call__(self, step: Observed) -> None:
        if step.at.index == self._step:
            self.results[step.branch] = [each.to("cpu", copy=True) for each in _floats(step.result)]


def _output_units(tape: Tape) -> dict[str, float]:
    """The mean squared norm of each branch's outputs."""
    squares: dict[str, list[float]] = {}
    for (branch, _), made in tape.calls.items():
        squares.setdefault(branch, []).append(_squared(_floats(made.result)))
    return {branch: float(np.mean(each)) for branch, each in squares.items()}


def _squared(values: Sequence[Tensor], others: Sequence[object] = ()) -> float:
    pairs = zip(values, _floats(others) or map(torch.zeros_like, values), strict=True)
    return sum(float((one.double() - other.double()).abs().square().sum()) for one, other in pairs)


def _floats(values: Sequence[object]) -> list[Tensor]:
    tensors = [each for each in values if isinstance(each, Tensor)]
    return [each for each in tensors if each.is_floating_point() or each.is_complex()]


def _completed(found: Sequence[Sequence[float]]) -> Array:
    """The geometric mean at each step, interpolated between those that were measured."""
    steps = np.arange(len(found))
    known = [step for step, each in enumerate(found) if each]
    if not known:
        return np.ones(len(found))
    logs = [float(np.mean(np.log(found[step]))) for step in known]
    return np.exp(np.interp(steps, known, logs))
