"""Improves a plan by what it does to the final result: moved steps, and damped Gauss-Newton.

Between two computed steps the model is not asked, so that all steps of such a gap move the latents
in the same few directions: those of the kept residuals, and that of the input. Differences are
taken along these, one for each gap and not for each weight, and run from the gap on.

What is chosen by some samples does better on them than on others. How much better is told by the
samples left out one at a time, and goes with the plan as its optimism.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import numpy.typing as npt

from omni_cache.planning import gram as forecasts
from omni_cache.planning.gram import Gram
from omni_cache.planning.newton import Normal, directions, output_directions
from omni_cache.planning.search import COMPUTE, SKIP
from omni_cache.strategies.plans import Point, Weights
from omni_cache.strategies.retiming import Grams
from omni_cache.tuning.rehearse import Rehearsal
from omni_cache.tuning.results import Result

DAMPINGS = tuple(np.logspace(-4, 0.5, 10).tolist())
LENGTHS = (1.0, 0.5, 0.25)
"""How much of a Gauss-Newton step is tried, in this order."""
FIRST_SAMPLES = 6
"""Samples that all moves are tried on."""
_SMALLEST = 1e-3
"""The smallest change worth a difference, in units of a mean residual: above rounding."""


@dataclass(frozen=True)
class Direction:
    """A way to change a plan: the weights of some steps of one branch, all alike.

    Attributes:
        transformer: whose weights.
        branch: likewise.
        steps: which, in order.
        row: what is added to each of them for one unit of the Gram.
        input_weight: what is added to their input weights.
        size: how far a difference reaches: as far as the forecasts are off.
    """

    transformer: str
    branch: str
    steps: tuple[int, ...]
    row: tuple[float, ...]
    input_weight: float
    size: float


def directions_of(point: Point, grams: Grams, per_step: bool = False) -> list[Direction]:
    """All directions in which the weights of a plan may change, in the order of their steps.

    Input weights change where the plan has any.

    Args:
        point: the plan.
        grams: of all transformers and branches.
        per_step: whether the steps of a gap change each for itself.
    """
    return [
        direction
        for steps in _gaps(point.actions, per_step)
        for transformer, branches in grams.items()
        for branch, gram in branches.items()
        if gram.present[steps[-1]]
        for direction in _directions(point, transformer, branch, gram, steps)
    ]


def moved(point: Point, by: Sequence[tuple[Direction, float]]) -> Point:
    """The plan with its weights changed along some directions."""
    weights = {
        transformer: {branch: dict(steps) for branch, steps in branches.items()}
        for transformer, branches in point.weights.items()
    }
    for direction, amount in by:
        own = weights[direction.transformer][direction.branch]
        for step in direction.steps:
            row, entered = own[step]
            pairs = zip(row, direction.row, strict=True)
            own[step] = Weights(
                tuple(weight + amount * change for weight, change in pairs),
                entered + amount * direction.input_weight,
            )
    return replace(point, weights=weights)


def jacobian_steps(directions: Sequence[Direction], actions: Sequence[str]) -> int:
    """How many computed steps the differences along some directions take, for one sample."""
    return sum(actions[each.steps[0] :].count(COMPUTE) for each in directions)


@dataclass(frozen=True)
class Refiner:
    """Improves plans on the calibration samples.

    Attributes:
        rehearsal: plays plans.
        references: of each sample, what it returns uncached.
        grams: of all transformers and branches.
    """

    rehearsal: Rehearsal
    references: Sequence[Result]
    grams: Grams

    @property
    def samples(self) -> range:
        """All calibration samples."""
        return range(len(self.references))

    def errors(self, point: Point, samples: Sequence[int]) -> npt.NDArray[np.float64]:
        """The mean squared error of each sample's result under a plan."""
        return np.array(
            [self._error(self.rehearsal.play(point, each).result, each) for each in samples]
        )

    def loss(self, point: Point, samples: Sequence[int]) -> float:
        """The mean error in dB: less is better, and all samples count alike."""
        return float(np.mean(decibels(self.errors(point, samples))))

    def best_move(self, point: Point, moves: Sequence[Point], samples: Sequence[int]) -> Point:
        """The best of plans that differ a little from a plan, or the plan where none is better.

        After a few samples only the best quarter goes on. What is better by chance alone does not
        count: the mean gain has to be larger than its standard error. The best one's optimism grows
        by its gain on these samples less what those gain that are chosen without them.

        Args:
            point: the plan.
            moves: the others.
            samples: what they are tried on.
        """
        alive: Sequence[int] = range(len(moves))
        gains: Gains = [{} for _ in moves]
        for number, sample in enumerate(samples):
            if number == FIRST_SAMPLES:
                alive = _going_on(gains)
            base = self.rehearsal.play(point, sample, records=True)
            before = decibels(self._error(base.result, sample))
            for each in alive:
                known = base.tape.before(first_difference(point, moves[each]))
                result = self.rehearsal.play(moves[each], sample, known=known).result
                gains[each][number] = float(before - decibels(self._error(result, sample)))
        narrowed = len(samples) > FIRST_SAMPLES
        best = _best(gains, narrowed)
        if best is None:
            return point
        optimism = 0.0
        for number, gain in gains[best].items():
            other = _best(_without(gains, number), narrowed)
            optimism += gain - (0.0 if other is None else gains[other][number])
        return replace(moves[best], optimism=point.optimism + optimism / len(self.samples))

    def gauss_newton(
        self,
        point: Point,
        samples: Sequence[int],
        per_step: bool = False,
    ) -> Point:
        """One step on all weights, or the plan itself where none helps.

        The damping is the one that helps a sample most whose differences were left out, by the
        linear model, so that no run is spent on it and few samples are not followed too far. What
        is not linear runs tell: a step counts if it gains more than it flatters the samples that
        it was taken from, and a shorter one is tried otherwise.

        Args:
            point: the plan.
            samples: whose differences are taken.
            per_step: whether each step has weights of its own.
        """
        ways = directions_of(point, self.grams, per_step)
        found: list[Normal] = []
        before: dict[int, float] = {}
        for sample in samples if ways else ():
            error, columns = self._differences(point, ways, sample)
            before[sample] = float(np.mean(error**2))
            if error.any():
                found.append(Normal(len(ways)))
                found[-1].add(error, columns)
        if len(found) < 2:
            return point
        damping = min(DAMPINGS, key=lambda each: _left_out(found, each))
        if _left_out(found, damping) >= 0:
            return point
        rest = [each for each in self.samples if each not in before]
        errors = [*before.values(), *self.errors(point, rest)]
        whole = _sum(found).step(damping)
        for length in LENGTHS:
            step = length * whole
            fitted = float(np.mean([_change(each, step) for each in found]))
            flattery = _left_out(found, damping, length) - fitted
            optimism = flattery * len(found) / len(self.samples)
            tried = replace(
                moved(point, list(zip(ways, step.tolist(), strict=True))),
                optimism=point.optimism + optimism,
            )
            gain = float(np.mean(decibels(errors))) - self.loss(tried, self.samples)
            if gain > max(optimism, 0.0):
                return tried
        return point

    def _differences(
        self, point: Point, ways: Sequence[Direction], sample: int
    ) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float32]]]:
        """How far the result of a sample is off, and its derivative along each direction."""
        base = self.rehearsal.play(point, sample, records=True)
        columns = []
        for way in ways:
            tried = moved(point, [(way, way.size)])
            played = self.rehearsal.play(tried, sample, known=base.tape.before(way.steps[0]))
            change = played.result.difference(base.result) / way.size
            columns.append(change.astype(np.float32))
        return base.result.difference(self.references[sample]), columns

    def _error(self, result: Result, sample: int) -> float:
        return float(np.mean(result.difference(self.references[sample]) ** 2))


def _sum(normals: Sequence[Normal]) -> Normal:
    """The normal equations of several samples."""
    total = Normal(len(normals[0].vector))
    for each in normals:
        total.matrix += each.matrix
        total.vector += each.vector
        total.samples += each.samples
    return total


def _left_out(normals: Sequence[Normal], damping: float, length: float = 1.0) -> float:
    """The change of a sample's error in dB, by a step that was taken from the others: the mean."""
    total, changes = _sum(normals), []
    for each in normals:
        others = Normal(len(total.vector))
        others.matrix = total.matrix - each.matrix
        others.vector = total.vector - each.vector
        others.samples = total.samples - each.samples
        changes.append(_change(each, length * others.step(damping)))
    return float(np.mean(changes))


def _change(normal: Normal, step: npt.NDArray[np.float64]) -> float:
    """The change of one sample's error in dB by a step, if all is linear."""
    return 10 * math.log10(max(1.0 - normal.decrease(step), 1e-3))


Gains = list[dict[int, float]]
"""For each move, what it gains in dB, by the number of the sample."""


def _going_on(gains: Gains) -> list[int]:
    """The moves that are tried on more than the first samples."""
    first = [[gain for number, gain in each.items() if number < FIRST_SAMPLES] for each in gains]
    ranked = sorted(range(len(gains)), key=lambda each: -float(np.mean(first[each])))
    return ranked[: max(len(gains) // 4, 1)]


def _best(gains: Gains, narrowed: bool) -> int | None:
    """The move that gains most, of those that go on if any end early; None if it may be chance."""
    if not gains or not gains[0]:
        return None
    alive = _going_on(gains) if narrowed else range(len(gains))
    best = max(alive, key=lambda each: float(np.mean(list(gains[each].values()))))
    found = list(gains[best].values())
    if len(found) < 2:
        return None
    chance = float(np.std(found, ddof=1)) / math.sqrt(len(found))
    return best if np.mean(found) > chance else None


def _without(gains: Gains, sample: int) -> Gains:
    return [{number: gain for number, gain in each.items() if number != sample} for each in gains]


def decibels(errors: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Squared errors on the scale on which they are judged."""
    found: npt.NDArray[np.float64] = 10 * np.log10(np.maximum(errors, 1e-20))
    return found


def first_difference(one: Point, other: Point) -> int:
    """The first step at which two plans do not do the same."""

    def done(point: Point, step: int) -> object:
        weights = [
            steps.get(step) for branches in point.weights.values() for steps in branches.values()
        ]
        return point.actions[step], weights

    steps = range(len(one.actions))
    return next((each for each in steps if done(one, each) != done(other, each)), len(steps))


def _gaps(actions: Sequence[str], per_step: bool) -> Iterator[tuple[int, ...]]:
    """Runs of steps with one action, computed ones left out."""
    for action, numbered in groupby(enumerate(actions), key=lambda each: each[1]):
        steps = tuple(step for step, _ in numbered)
        if action != COMPUTE:
            yield from ((step,) for step in steps) if per_step else (steps,)


def _directions(
    point: Point,
    transformer: str,
    branch: str,
    gram: Gram,
    steps: tuple[int, ...],
) -> list[Direction]:
    last, with_input = steps[-1], point.weighs_inputs
    row, entered = point.weights[transformer][branch][last]
    computed = [
        step
        for step in reversed(range(last))
        if point.actions[step] == COMPUTE and gram.present[step]
    ]
    kept = tuple(computed[: len(row)])
    if point.actions[last] == SKIP:
        error = forecasts.output_error_of(gram, kept, last, row)
        columns, with_input = output_directions(gram, kept), False
    else:
        error = forecasts.error_of(gram, kept, last, row, entered)
        columns = directions(gram, kept, last if with_input else None)
    size = max(math.sqrt(error), _SMALLEST)
    return [
        Direction(
            transformer,
            branch,
            steps,
            tuple(column[: len(kept)]),
            column[len(kept)] if with_input else 0.0,
            size,
        )
        for column in columns.T.tolist()
    ]
