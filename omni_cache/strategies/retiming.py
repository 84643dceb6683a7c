"""A plan for other sigmas: its inner products are interpolated, and the schedule is searched anew.

Nothing is run for it, so the plan says that it is unverified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np

from omni_cache.planning.gram import (
    FittedCosts,
    Gram,
    fit,
    fit_outputs,
    fits,
    fits_outputs,
    resampled,
)
from omni_cache.planning.search import COMPUTE, SKIP, Schedule, frontier
from omni_cache.strategies.base import finite_numbers, require
from omni_cache.strategies.plans import Content, Point, Weights

Grams = Mapping[str, Mapping[str, Gram]]


def retimed(content: Content, sigmas: Sequence[float] | Any) -> Content:
    """The points of a plan for a loop with other sigmas, and as many computed steps in each.

    Args:
        content: of a plan that knows its sigmas.
        sigmas: those of the scheduler for the loop wanted, where the last step goes to included
            if the plan has it: one for each step, in order, falling or rising as the plan's do.

    Raises:
        ValueError: ``sigmas`` is no sequence of numbers, or lies outside of what was calibrated.
    """
    signature = content.signature
    allowed = "a sequence of finite numbers, as the scheduler has them"
    after = finite_numbers("sigmas", sigmas, allowed)
    before = signature.sigmas
    if before is None:
        raise ValueError("the plan has no sigmas, because it was tuned without a pipeline")
    beyond = len(before) - signature.num_inference_steps  # the 0, or 1, that the last step goes to
    steps = len(after) - beyond
    require(steps >= 1, "sigmas", sigmas, f"at least {beyond + 1} numbers")
    falls = before[0] > before[-1]
    ordered = all((one > other) == falls and one != other for one, other in pairwise(after))
    allowed = f"{'falling' if falls else 'rising'} numbers, as those that the plan was made on"
    require(ordered, "sigmas", sigmas, allowed)
    old, new = np.array(before[: signature.num_inference_steps]), np.array(after[:steps])
    nearest = np.abs(new[:, None] - old).argmin(1)
    owners = tuple(signature.owners[place] for place in nearest)
    grams = {
        name: {
            branch: resampled(gram, old.tolist(), new.tolist()) for branch, gram in branches.items()
        }
        for name, branches in content.grams.items()
    }
    # An error of the model's result counts by how far the step goes.
    sensitivity = _importance(content.sensitivity, before, after)
    skipping = _importance(content.output_sensitivity, before, after)

    @cache
    def found_for(depth: int, with_input: bool, with_skips: bool) -> list[Schedule]:
        costs = priced(grams, sensitivity, with_input)
        skips = priced_outputs(grams, skipping) if with_skips and skipping else None
        return frontier(steps, depth, costs, skips, owner=owners)

    points = []
    for point in content.frontier:
        found = found_for(point.depth, point.weighs_inputs, point.skipped_steps > 0)
        share = steps / signature.num_inference_steps
        computed = max(1, round(share * point.computed_steps))
        skipped = round(share * point.skipped_steps)
        off = [(abs(each.computed - computed), abs(each.skipped - skipped)) for each in found]
        near = found[min(range(len(found)), key=off.__getitem__)]
        points.append(fitted(near, grams, owners, point.depth, point.weighs_inputs))
    return replace(
        content,
        signature=replace(signature, sigmas=after, timesteps=None, owners=owners),
        made=replace(content.made, verified=False, seconds=None),
        grams=grams,
        sensitivity=sensitivity,
        output_sensitivity=skipping,
        frontier=tuple(points),
        spread=tuple(content.spread[place] for place in nearest) if content.spread else (),
    )


def priced(grams: Grams, sensitivity: Sequence[float], with_input: bool) -> FittedCosts:
    """What reusing costs, over all transformers and branches."""
    solve = partial(fits, with_input=with_input)
    return FittedCosts(_listed(grams), sensitivity, solve)


def priced_outputs(grams: Grams, sensitivity: Sequence[float]) -> FittedCosts:
    """What skipping the forward costs, over all transformers and branches."""
    return FittedCosts(_listed(grams), sensitivity, fits_outputs)


def fitted(
    schedule: Schedule, grams: Grams, owners: Sequence[str], depth: int, with_input: bool
) -> Point:
    """A schedule with the weights that fit the calibration best."""
    weights: dict[str, dict[str, dict[int, Weights]]] = {}
    for name, branches in grams.items():
        for branch, gram in branches.items():
            own = weights.setdefault(name, {}).setdefault(branch, {})
            for step, action in enumerate(schedule.actions):
                if action == COMPUTE or owners[step] != name:
                    continue
                kept = schedule.kept(step, depth, owners)
                if action == SKIP:
                    found = fit_outputs(gram, kept, step)
                else:
                    found = fit(gram, kept, step, with_input)
                own[step] = Weights(found.weights, found.input_weight)
    return Point(schedule.actions, depth, weights)


def _listed(grams: Grams) -> list[Gram]:
    return [gram for branches in grams.values() for gram in branches.values()]


def _importance(
    numbers: Sequence[float], before: Sequence[float], after: Sequence[float]
) -> tuple[float, ...]:
    """Sensitivities at other sigmas: they go with the square of how far a step goes."""
    if not numbers:
        return ()
    lengths, wanted = (np.abs(np.diff(each)) for each in (before, after))
    if len(lengths) < len(numbers):  # nothing says how far the last step goes
        lengths, wanted = (np.append(each, each[-1]) for each in (lengths, wanted))
    per_length = np.array(numbers) / np.maximum(lengths, 1e-12) ** 2
    known, times = np.array(before[: len(numbers)]), np.array(after[: len(wanted)])
    order = np.argsort(known)
    at = np.interp(times, known[order], per_length[order])
    return tuple((at * wanted**2).tolist())
