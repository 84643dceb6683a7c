"""Improves a plan's weights by what they do to the final result: damped Gauss-Newton, closed loop.

Between two computed steps the model is not asked, and so all steps of such a gap move the latents
in the same few directions: those of the kept residuals, and that of the input. One difference is
taken for each of them, not for each weight, and from the first step of the gap on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from omni_cache.planning import SKIP, Gram, Normal, directions, error_of, output_directions
from omni_cache.strategies.plans import Point
from omni_cache.tuning.gather import Course
from omni_cache.tuning.rehearse import Stage

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Direction:
    """A way to change a plan: the rows of some steps of one branch, all alike.

    Attributes:
        branch: whose rows.
        steps: which, in order.
        skips: whether they are rows of skipped steps.
        row: what is added to each of them for one unit of the Gram.
        input_weight: what is added to their input weights.
        size: how much of it is worth trying: the error that the forecasts have as they are.
    """

    branch: str
    steps: tuple[int, ...]
    skips: bool
    row: tuple[float, ...]
    input_weight: float
    size: float


def directions_of(
    point: Point, grams: Mapping[Course, Gram], depth: int, with_input: bool, per_step: bool = False
) -> list[Direction]:
    """All directions in which the weights of a plan may be changed, in the order of their steps.

    Args:
        point: the plan.
        grams: of all courses.
        depth: how many computed steps are kept.
        with_input: whether input weights may be changed.
        per_step: whether the steps of a gap are changed each for itself.
    """
    found = []
    for steps in _gaps(point, per_step):
        for course, gram in grams.items():
            if gram.present[steps[0]]:
                found += _directions(point, course.branch, gram, steps, depth, with_input)
    return found


def _gaps(point: Point, per_step: bool) -> list[tuple[int, ...]]:
    """The steps between computed ones, those apart that are skipped."""
    numbered = groupby(enumerate(point.actions), key=lambda each: each[1])
    gaps = [tuple(step for step, _ in steps) for action, steps in numbered if action != "compute"]
    return [(step,) for steps in gaps for step in steps] if per_step else gaps


def _directions(
    point: Point,
    branch: str,
    gram: Gram,
    steps: tuple[int, ...],
    depth: int,
    with_input: bool,
) -> list[Direction]:
    last = steps[-1]
    kept = kept_before(point, gram, last, depth)
    if point.actions[last] == SKIP:
        columns = output_directions(gram, kept).T
        size = math.sqrt(_mean_output_error(point, branch, gram, steps, kept))
        return [
            Direction(branch, steps, True, tuple(each), 0.0, max(size, _SMALLEST))
            for each in columns.tolist()
        ]
    columns = directions(gram, kept, last if with_input else None).T
    ...
