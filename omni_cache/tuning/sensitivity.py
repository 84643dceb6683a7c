"""How much an error at one step moves the final result: measured, by holding that step alone.

Knows plans and results; nothing of how schedules are chosen by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omni_cache.planning.gram import error_of
from omni_cache.planning.search import COMPUTE, REUSE
from omni_cache.runtime.contexts import Observed
from omni_cache.strategies.plans import Point, Weights
from omni_cache.tuning.gather import Grams
from omni_cache.tuning.rehearse import Rehearsal, Tape

Array = npt.NDArray[np.float64]

_SMOOTHING = np.array([1, 2, 3, 2, 1]) / 9


class Sensitivity(NamedTuple):
    """The final result's squared error over a step's own.

    Attributes:
        residuals: over the error of the residual, in units of the Gram.
        outputs: over the error of the output, in units of the Gram.
    """

    residuals: Array
    outputs: Array


def measure(
    rehearsal: Rehearsal, grams: Sequence[Grams], steps: Sequence[Sequence[int]]
) -> Sensitivity:
    """Hold each step alone, and look at the end.

    Args:
        rehearsal: plays plans.
        grams: for each sample, the products of its own uncached loop.
        steps: for each of the first samples, the steps to hold. What no sample holds is
            interpolated.
    """
    count = len(next(iter(next(iter(grams[0].values())).values())))
    residuals: list[list[float]] = [[] for _ in range(count)]
    outputs: list[list[float]] = [[] for _ in range(count)]
    for sample, wanted in enumerate(steps):
        uncached = rehearsal.play(None, sample, records=True)
        units = _output_units(uncached.tape)
        for step in wanted:
            name, branches = next(
                (name, branches)
                for name, branches in grams[sample].items()
                if next(iter(branches.values())).present[step]
            )
            before = np.flatnonzero(next(iter(branches.values())).present[:step])
            if not before.size:  # the first step of a transformer has nothing to hold
                continue
            actions = [REUSE if each == step else COMPUTE for each in range(count)]
            weights = {name: {branch: {step: Weights((1.0,))} for branch in branches}}
            seen = _Results(step)
            played = rehearsal.play(
                Point(tuple(actions), 1, weights),
                sample,
                known=uncached.tape.before(step),
                observer=seen,
            )
            final = float(np.mean(played.result.difference(uncached.result) ** 2))
            last = int(before[-1])
            own = sum(error_of(gram, (last,), step, (1.0,)) for gram in branches.values())
            off = sum(
                _squared(results, uncached.tape.results(branch, step)) / units[branch]
                for branch, results in seen.results.items()
            )
            if own > 0 and off > 0 and final > 0:
                residuals[step].append(final / own)
                outputs[step].append(final / off)
    return Sensitivity(_completed(residuals), _completed(outputs))


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
    for _, branch, step in tape.calls:
        squares.setdefault(branch, []).append(_squared(_floats(tape.results(branch, step))))
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
    logs = np.interp(steps, known, [float(np.mean(np.log(found[step]))) for step in known])
    # Neighbours hardly differ in truth, and a few samples scatter by a factor of 2.
    padded = np.pad(logs, len(_SMOOTHING) // 2, mode="edge")
    return np.exp(np.convolve(padded, _SMOOTHING, mode="valid"))
