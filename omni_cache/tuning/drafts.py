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
        with_input: whether reused steps weigh the input.
    """

    content: Content
    depth: int
    with_input: bool = False
    _found: dict[float, dict[int, Schedule]] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> int:
        """Of a loop."""
        return len(self.content.signature.owners)

    def of(self, computed: int) -> list[Point]:
        """The drafts that compute so many steps, each once; the likeliest first."""
        schedules = [self._schedules(power)[computed].actions for power in _POWERS]
        return [self.fitted(actions) for actions in dict.fromkeys(schedules)]

    def moves(self, point: Point) -> list[Point]:
        """The same plan with one computed step moved by one, with fitted weights."""
        actions, owners = point.actions, self.content.signature.owners
        found = []
        for step in range(1, self.steps):
            for other in (step - 1, step + 1):
                inside = 0 < other < self.steps and owners[step] == owners[other]
                if not inside or actions[step] != COMPUTE or actions[other] == COMPUTE:
                    continue
                if step == owners.index(owners[step]):  # a transformer computes its first step
                    continue
                swapped = list(actions)
                swapped[step], swapped[other] = actions[other], actions[step]
                found.append(self.fitted(tuple(swapped)))
        return found

    def fitted(self, actions: tuple[str, ...]) -> Point:
        """A plan with these actions."""
        signature, grams = self.content.signature, self.content.grams
        return fitted(Schedule(actions, 0.0), grams, signature.owners, self.depth, self.with_input)

    @property
    def least(self) -> int:
        """The fewest steps that can be computed: one of each transformer."""
        return len(set(self.content.signature.owners))

    def _schedules(self, power: float) -> dict[int, Schedule]:
        if power not in self._found:
            sensitivity = [each**power for each in self.content.sensitivity]
            costs = priced(self.content.grams, sensitivity, self.with_input)
            owners = self.content.signature.owners
            found = frontier(self.steps, self.depth, costs, owner=owners)
            self._found[power] = {each.computed: each for each in found}
        return self._found[power]


_POWERS = (1.0, 0.5, 0.0)
"""Of the measured sensitivity."""
