"""Which plans are refined, and how far, within the loops that may be run.

Knows budgets and targets; the refining itself is in refine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from omni_cache.planning.search import COMPUTE
from omni_cache.strategies.plans import Point
from omni_cache.tuning.drafts import Drafts
from omni_cache.tuning.judge import Target, played
from omni_cache.tuning.refine import (
    FIRST_SAMPLES,
    LENGTHS,
    Refiner,
    directions_of,
    first_difference,
    jacobian_steps,
)

_ITERATIONS = 4
"""Gauss-Newton steps at most; the second one gains little, and the third hardly ever anything."""

_ROUNDS = 6
"""Of moves, one step each."""


def spread(steps: int, first: int) -> list[int]:
    """Numbers of computed steps up to six tenths of all, further apart as they grow."""
    counts, count = [], first
    while count <= max(0.6 * steps, first):
        counts.append(count)
        count = max(count + 1, round(1.2 * count))
    return counts


def improved(
    refiner: Refiner,
    drafts: Drafts,
    target: Target,
    uncached_seconds: float,
    done: Mapping[int, Point],
    tell: Callable[[Point], None],
) -> list[Point]:
    """The frontier: a plan for each of several numbers of computed steps.

    Args:
        refiner: improves plans.
        drafts: plans to start from.
        target: near it refinement is spent.
        uncached_seconds: of a whole ``generate``.
        done: plans that were refined before, by their numbers of computed steps.
        tell: is told of every plan that has been refined.
    """
    budget = refiner.rehearsal.budget
    # A quality that little meets is met by few steps; other frontiers begin at a seventh.
    first = drafts.least if target.is_quality else max(drafts.least, round(drafts.steps / 7))
    counts, playing = spread(drafts.steps, first), len(refiner.samples) / drafts.steps
    asked = {min(max(each, drafts.least), drafts.steps) for each in target.counts}
    if len(target.counts) > 1:
        counts, asked = sorted(asked), set()
    while len(counts) > 1 and sum({*counts, *asked}) * playing > budget.left:
        counts = counts[::2]
    if asked and sum({*counts, *asked}) * playing > budget.left:
        counts = []
    counts = sorted({*counts, *asked})
    points = {count: drafts.of(count)[0] for count in counts}
    if budget.effort != "low":
        points |= done
        near = _near(refiner, points, target, uncached_seconds)
        near = [count for count in near if count not in done]
        reserve = sum({*points, *near}) * playing
        for position, count in enumerate(near):
            share = (budget.left - reserve) / (len(near) - position)
            budget.begin(f"tries schedules of {count} computed steps")
            until = budget.loops + share
            point = _best_draft(refiner, drafts.of(count), count / drafts.steps, share / 4)
            budget.begin(f"moves single steps of the plan of {count} computed steps")
            point = _moved(refiner, point, drafts, (until - budget.loops) / 2)
            budget.begin(f"refines the plan of {count} computed steps by what it leads to")
            points[count] = _refined(refiner, point, drafts, until)
            tell(points[count])
    return [points[count] for count in sorted(points)]


def _near(
    refiner: Refiner, points: Mapping[int, Point], target: Target, uncached_seconds: float
) -> list[int]:
    """The numbers of computed steps among which the target will be met.

    The first draft that meets a quality, and those below it, since refining gains some decibels.
    """
    counts = sorted(points)
    if len(target.counts) == 1:
        return [max(each for each in counts if each <= max(*target.counts, counts[0]))]
    if not target.is_quality and target.speedup is None:
        return counts  # those that were asked for, or the whole frontier
    refiner.rehearsal.budget.begin("looks for the target")
    for position, count in enumerate(counts):
        found = played(refiner.rehearsal, points[count], refiner.samples, refiner.references)
        if target.speedup is not None:
            if uncached_seconds / found.seconds < target.speedup:
                return counts[max(position - 1, 0) : position + 1]
        elif target.is_met(found.fidelities, margin=True):
            before = counts[max(position - 1, 0)]
            return list(range(before, count + 1))
    return counts[-1:]


def _best_draft(refiner: Refiner, drafts: Sequence[Point], play: float, loops: float) -> Point:
    """The draft that is best on as many samples as the loops allow, or else the first."""
    allowed = min(loops / (play * len(drafts)), len(refiner.samples))
    return refiner.best_move(drafts[0], drafts[1:], refiner.samples[: max(int(allowed), 0)])


def _moved(refiner: Refiner, point: Point, drafts: Drafts, loops: float) -> Point:
    """Move single computed steps as long as that helps and loops are left."""
    samples = refiner.samples
    for _ in range(_ROUNDS):
        moves = drafts.moves(point)
        later = [each.actions[first_difference(point, each) :].count(COMPUTE) for each in moves]
        first, rest = min(len(samples), FIRST_SAMPLES), max(len(samples) - FIRST_SAMPLES, 0)
        tried = first * sum(later) + rest * sum(sorted(later)[-max(len(moves) // 4, 1) :])
        cost = (len(samples) * point.computed_steps + tried) / drafts.steps
        if cost > loops:
            return point
        better = refiner.best_move(point, moves, samples)
        if better is point:
            return point
        point, loops = better, loops - cost
    return point


def _refined(refiner: Refiner, point: Point, drafts: Drafts, until: float) -> Point:
    """Gauss-Newton steps until so many loops have been run or none helps.

    The steps of a gap change together at first; at high effort, then each for itself.
    """
    efforts = (False, True) if refiner.rehearsal.budget.effort == "high" else (False,)
    steps, play = drafts.steps, point.computed_steps / drafts.steps
    for per_step in efforts:
        for _ in range(_ITERATIONS):
            ways = directions_of(point, refiner.grams, per_step)
            differences = play + jacobian_steps(ways, point.actions) / steps
            checking = (1 + len(LENGTHS)) * play * len(refiner.samples)
            left = until - refiner.rehearsal.budget.loops - checking
            learning = int(min(left / differences, len(refiner.samples)))
            if learning < 2:
                return point
            samples = refiner.samples[:learning]
            better = refiner.gauss_newton(point, samples, per_step)
            if better is point:
                break
            point = better
    return point
