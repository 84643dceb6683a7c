"""Plans from what was calibrated alone: the best schedules, with the weights that fit step by step.

Knows inner products and sensitivities; runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from omni_cache.planning.search import COMPUTE, Schedule, frontier
from omni_cache.strategies.plans import Content, Point
from omni_cache.strategies.retiming import fitted, priced, priced_outputs

SLACK = 1.1
"""By what factor skipping forwards may raise the predicted error of a number of computed steps."""
_LONGEST = 10
"""How far apart computed steps lie at most where steps are skipped, which bounds the search."""


@dataclass(frozen=True)
class Drafts:
    """Plans for every number of computed steps.

    How much an error at a step counts is known roughly: a sensitivity is measured by one kind of
    error at a time. So each number has several drafts, by the sensitivity as it was measured and
    by milder ones, and a rollout tells which is best.

    Attributes:
        content: what was calibrated.
        depth: how many computed steps are kept.
        skips: whether forwards are skipped, as many as `SLACK` allows.
    """

    content: Content
    depth: int
    skips: bool = False
    _found: dict[tuple[float, bool], dict[int, list[Schedule]]] = field(
        default_factory=dict, repr=False
    )

    @property
    def steps(self) -> int:
        """Of a loop."""
        return len(self.content.signature.owners)

    def of(self, computed: int) -> list[Point]:
        """The drafts that compute so many steps, with and without the input as a regressor.

        Each comes once, the likeliest first.
        """
        found = {
            (self._schedule(power, with_input, computed).actions, with_input): None
            for with_input in (False, True)
            for power in _POWERS
        }
        points = [self.fitted(*each) for each in found]
        return [each for place, each in enumerate(points) if each not in points[:place]]

    def moves(self, point: Point) -> list[Point]:
        """The plans with one computed step moved by one, and with fitted weights."""
        actions, owners = point.actions, self.content.signature.owners
        firsts = {owners.index(each) for each in owners}
        found = []
        for step in range(1, self.steps):
            other = step - 1
            is_one = (actions[step] == COMPUTE) != (actions[other] == COMPUTE)
            if is_one and owners[step] == owners[other] and not {step, other} & firsts:
                swapped = list(actions)
                swapped[step], swapped[other] = actions[other], actions[step]
                found.append(self.fitted(tuple(swapped), point.weighs_inputs))
        return found

    def fitted(self, actions: tuple[str, ...], with_input: bool) -> Point:
        """A plan with these actions."""
        signature, grams = self.content.signature, self.content.grams
        return fitted(Schedule(actions, 0.0), grams, signature.owners, self.depth, with_input)

    @property
    def least(self) -> int:
        """The fewest steps that can be computed: one of each transformer."""
        return len(set(self.content.signature.owners))

    def _schedule(self, power: float, with_input: bool, computed: int) -> Schedule:
        """The one that skips most, of those whose error is about the least."""
        found = self._schedules(power, with_input)[computed]
        least = min(each.cost for each in found)
        return max((each for each in found if each.cost <= SLACK * least), key=_by_skipped)

    def _schedules(self, power: float, with_input: bool) -> dict[int, list[Schedule]]:
        """By their numbers of computed steps, one for each number of skipped ones."""
        key = power, with_input
        if key not in self._found:
            grams, owners = self.content.grams, self.content.signature.owners
            reusing = np.array(self.content.sensitivity)
            costs = priced(grams, (reusing**power).tolist(), with_input)
            found = frontier(self.steps, self.depth, costs, owner=owners)
            if self.skips:
                skipping = np.array(self.content.output_sensitivity)
                # A milder sensitivity of results is as large as one of residuals, in the mean.
                level = np.exp(np.mean(np.log(skipping)) - np.mean(np.log(reusing)))
                scaled = skipping**power * level ** (1 - power)
                outputs = priced_outputs(grams, scaled.tolist())
                gap = min(_LONGEST, self.steps)
                found += frontier(self.steps, self.depth, costs, outputs, owner=owners, max_gap=gap)
            self._found[key] = {}
            for each in found:
                self._found[key].setdefault(each.computed, []).append(each)
        return self._found[key]


def _by_skipped(schedule: Schedule) -> tuple[int, float]:
    return schedule.skipped, -schedule.cost


_POWERS = (1.0, 0.5, 0.0)
"""Of the measured sensitivity."""
