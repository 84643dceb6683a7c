"""Plans from what was calibrated alone: the best schedules, with the weights that fit step by step.

Knows inner products and sensitivities; runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omni_cache.planning.search import COMPUTE, Schedule, frontier
from omni_cache.strategies.plans import Content, Point
from omni_cache.strategies.retiming import fitted, priced


@dataclass(frozen=True)
class Drafts:
    """Plans for every number of computed steps.

    How much an error at a step counts is known roughly: a sensitivity is measured by one kind of
    error at a time. So each number has several drafts, by the sensitivity as it was measured and
    by milder ones, and a rollout tells which is best.

    Attributes:
        content: what was calibrated.
        depth: how many computed steps are kept.
    """

    content: Content
    depth: int
    _found: dict[tuple[float, bool], dict[int, Schedule]] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> int:
        """Of a loop."""
        return len(self.content.signature.owners)

    def of(self, computed: int) -> list[Point]:
        """The drafts that compute so many steps, with and without the input as a regressor.

        Each comes once, the likeliest first.
        """
        found = {
            (self._schedules(power, with_input)[computed].actions, with_input): None
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

    def _schedules(self, power: float, with_input: bool) -> dict[int, Schedule]:
        key = power, with_input
        if key not in self._found:
            sensitivity = [each**power for each in self.content.sensitivity]
            costs = priced(self.content.grams, sensitivity, with_input)
            owners = self.content.signature.owners
            found = frontier(self.steps, self.depth, costs, owner=owners)
            self._found[key] = {each.computed: each for each in found}
        return self._found[key]


_POWERS = (1.0, 0.5, 0.0)
"""Of the measured sensitivity."""
