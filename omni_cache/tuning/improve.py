"""Which plans are refined, and how far, within the loops that may be run.

Knows budgets and targets; the refining itself is in refine.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from omni_cache.strategies.plans import Point
from omni_cache.tuning.budget import Budget
from omni_cache.tuning.drafts import Drafts
from omni_cache.tuning.judge import Target
from omni_cache.tuning.refine import Refiner, directions_of, jacobian_steps


def spread(steps: int, least: int) -> list[int]:
    """Numbers of computed steps from a seventh to six tenths of all, further apart as they grow."""
    counts, count = [], max(least, round(steps / 7))
    while count <= max(0.6 * steps, least):
        counts.append(count)
        count = max(count + 1, round(1.2 * count))
    return counts


def improved(refiner: Refiner, drafts: Drafts, target: Target, budget: Budget) -> list[Point]:
    """The frontier: a plan for each of several numbers of computed steps.

    Args:
        refiner: improves plans.
        drafts: plans to start from.
        target: near it refinement is spent.
        budget: what may be spent.
    """
    counts = spread(drafts.steps, drafts.least)
    playing = len(refiner.samples) / drafts.steps
    while len(counts) > 2 and sum(counts) * playing > budget.left:
        counts = counts[::2]
    if target.computed_steps is not None:
        asked = min(max(target.computed_steps, drafts.least), drafts.steps)
        counts = sorted({*counts, asked})
    if budget.effort == "low":
        return [drafts.of(count)[0] for count in counts]
    near = counts if target.computed_steps is None else [asked]
    points = {count: drafts.of(count)[0] for count in counts}
    budget.begin("tries schedules")
    for count in near:
        points[count] = _best_draft(refiner, drafts.of(count))
    budget.begin("refines plans by their results")
    reserve = sum(counts) * playing
    for position, count in enumerate(near):
        share = (budget.left - reserve) / (len(near) - position)
        points[count] = _refined(refiner, points[count], drafts, share)
    return [points[count] for count in counts]


def _best_draft(refiner: Refiner, drafts: Sequence[Point]) -> Point:
    if len(drafts) == 1:
        return drafts[0]
    return min(drafts, key=lambda each: refiner.loss(each, refiner.samples))


def _refined(refiner: Refiner, point: Point, drafts: Drafts, loops: float) -> Point:
    """Gauss-Newton steps until the loops are spent or a step hardly helps."""
    steps, play = drafts.steps, point.computed_steps / drafts.steps
    for _ in range(4):
        ways = directions_of(point, refiner.grams, drafts.with_input)
        differences = play + jacobian_steps(ways, point.actions) / steps
        checking = 2 * play * len(refiner.samples)
        learning = int(min((loops - checking) / differences, len(refiner.samples)))
        if learning < 2:
            return point
        samples = refiner.samples[:learning]
        better = refiner.gauss_newton(point, samples, with_input=drafts.with_input)
        loops -= learning * differences + checking
        if better is point:
            return point
        point = better
    return point
