"""Schedules: which steps to compute, to reuse and to skip, the best of every budget.

Knows costs by kept set and step; must not know what they measure.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

COMPUTE, REUSE, SKIP = "compute", "reuse", "skip"

Array = npt.NDArray[np.float64]
Steps = npt.NDArray[np.intp]
Budget = tuple[int, int]  # computed steps, skipped steps

Cost = Callable[[tuple[int, ...], int], float]
"""What a step costs from a kept set, newest first. Infinite where it is not allowed."""


@runtime_checkable
class Costs(Protocol):
    """A `Cost` that also prices many kept sets at once."""

    def __call__(self, kept: tuple[int, ...], step: int, /) -> float:
        """What ``step`` costs from one kept set."""
        ...

    def many(self, kepts: Steps, step: int, /) -> Array:
        """(K,): what ``step`` costs from each of the kept sets (K, m)."""
        ...


class Schedule(NamedTuple):
    """What is done at each step of a loop.

    Attributes:
        actions: `COMPUTE`, `REUSE` or `SKIP` for each step.
        cost: the sum over the steps.
    """

    actions: tuple[str, ...]
    cost: float

    @property
    def computed(self) -> int:
        """How many steps are computed."""
        return self.actions.count(COMPUTE)

    @property
    def reused(self) -> int:
        """How many steps reuse residuals."""
        return self.actions.count(REUSE)

    @property
    def skipped(self) -> int:
        """How many steps skip the forward."""
        return self.actions.count(SKIP)

    def kept(
        self, step: int, depth: int, owner: Sequence[Hashable] | None = None
    ) -> tuple[int, ...]:
        """The kept set at ``step``: the last ``depth`` computed steps (of its owner) before it."""
        before = [
            other
            for other in reversed(range(step))
            if self.actions[other] == COMPUTE and (owner is None or owner[other] == owner[step])
        ]
        return tuple(before[:depth])


def frontier(
    steps: int,
    depth: int,
    reuse_cost: Cost | Costs,
    skip_cost: Cost | Costs | None = None,
    *,
    owner: Sequence[Hashable] | None = None,
    computed: Collection[int] = (),
    max_gap: int | None = None,
) -> list[Schedule]:
    """The cheapest schedule for every number of computed (and of skipped) steps; exact.

    Dynamic programming over kept sets, for all budgets at once.

    Args:
        steps: of the loop.
        depth: how many computed steps a kept set holds at most.
        reuse_cost: of reusing at a step from a kept set. It is asked once for each that can occur;
            if it has `Costs.many`, for all kept sets of a step and size together.
        skip_cost: of skipping the forward there. Without it no step is skipped. With it, 50 steps
            at depth 3 take ten seconds and 0.6 GB; a ``max_gap`` of 10 leaves a second of that.
        owner: which transformer runs each step. A kept set holds steps of one owner, and the first
            step of each is computed. Without it all steps have one.
        computed: steps that are computed in any case.
        max_gap: how far apart, in steps of their owner, two computed steps may lie that follow each
            other. The end of the loop counts as computed.

    Returns:
        Schedules by falling number of computed and rising number of skipped steps. Budgets for
        which nothing is allowed are left out.

    Raises:
        ValueError: an argument is out of range, or a cost is NaN or minus infinity.
    """
    if steps < 1 or depth < 1:
        raise ValueError(f"steps and depth have to be at least 1, got {steps} and {depth}")
    if max_gap is not None and max_gap < 1:
        raise ValueError(f"max_gap has to be at least 1, got {max_gap}")
    owners: list[Hashable] = [None] * steps if owner is None else list(owner)
    if len(owners) != steps:
        raise ValueError(f"owner names {len(owners)} of {steps} steps")
    if not set(computed) <= set(range(steps)):
        raise ValueError(f"computed has to lie in 0..{steps - 1}, got {sorted(computed)}")

    prices = [_checked(cost) for cost in (reuse_cost, skip_cost) if cost is not None]
    found: dict[Budget, Schedule] = {(0, 0): Schedule(("",) * steps, 0.0)}
    for each in dict.fromkeys(owners):
        own = np.array([step for step in range(steps) if owners[step] == each], dtype=np.intp)
        found = _joined(found, _Table(own, depth, prices, frozenset(computed), max_gap))
    return [found[budget] for budget in sorted(found, key=lambda budget: (-budget[0], budget[1]))]


def undominated(
    schedules: Sequence[Schedule], time_of: Callable[[Schedule], float]
) -> list[Schedule]:
    """The schedules that no other one matches in time and cost: by rising time, the cost falls."""
    kept: list[Schedule] = []
    for schedule in sorted(schedules, key=lambda each: (time_of(each), each.cost)):
        if not kept or schedule.cost < kept[-1].cost:
            kept.append(schedule)
    return kept


Prices = Callable[[Steps, int], Array]


def _checked(cost: Cost | Costs) -> Prices:
    """The cost of many kept sets at once, where each is a number or infinite."""
    together = cost.many if isinstance(cost, Costs) else None

    def prices(kepts: Steps, step: int) -> Array:
        if together is not None:
            costs = np.asarray(together(kepts, step), dtype=np.float64)
        else:
            costs = np.array([cost(tuple(kept), step) for kept in kepts.tolist()], np.float64)
        wrong = np.isnan(costs) | (costs == -math.inf)
        if wrong.any():
            kept = tuple(kepts[wrong.argmax()].tolist())
            raise ValueError(f"step {step} costs {costs[wrong.argmax()]} from the kept set {kept}")
        return costs

    return prices


class _Table:
    """The best schedules of one owner's N steps, for all budgets.

    Steps are numbered among the owner's. A state is a kept set and a number of computed steps.
    States are numbered by rising newest step, so that those that compute a step are a range, and
    those that are near enough to go on from are one too.

    Attributes:
        own: (N,) the owner's steps.
        costs: (N + 1, skipped + 1) the least cost of each budget, infinite where none is allowed.
    """

    def __init__(
        self,
        own: Steps,
        depth: int,
        prices: Sequence[Prices],
        computed: frozenset[int],
        max_gap: int | None,
    ) -> None:
        self.own, self._prices = own, prices
        self._skippable = len(own) + 1 if len(prices) > 1 else 1
        # At a step: the number of the first state that computes it and, for each such state, the
        # number of the best state before it, by how many steps are skipped.
        self._first_new: list[int] = [0]
        self._parents: list[npt.NDArray[np.int32]] = [np.zeros((0, self._skippable), np.int32)]
        # At a step: the number of the first state that goes on without computing it and, for each
        # such state, whether it skips, by how many steps are skipped up to here.
        self._first_old: list[int] = [0]
        self._skips: list[npt.NDArray[np.bool_]] = [np.zeros((0, self._skippable), np.bool_)]

        # Kept sets, padded with -1, in lexicographic order.
        kepts = np.full((1, depth), -1, dtype=np.intp)
        kepts[0, 0] = 0
        # Of each state: which kept set, how many computed steps, and the least costs by how many
        # steps are skipped.
        which, counts = np.zeros(1, dtype=np.intp), np.ones(1, dtype=np.intp)
        costs = np.full((1, self._skippable), math.inf)
        costs[0, 0] = 0.0
        for step in range(1, len(own)):
            nearest = 0 if max_gap is None else step - max_gap + 1
            if int(own[step]) in computed:
                nearest = step
            differ = (kepts[1:, :-1] != kepts[:-1, :-1]).any(axis=1)
            first = np.flatnonzero(np.append(True, differ))
            new_kepts = np.column_stack([np.full(len(first), step), kepts[first, :-1]])
            united = np.append(0, np.cumsum(differ))
            new_which, new_counts, new_costs = self._computing(united[which], counts, costs)

            gone = int(np.searchsorted(kepts[:, 0], nearest))
            start = int(np.searchsorted(which, gone))
            kepts, which, counts = kepts[gone:], which[start:] - gone, counts[start:]
            old_costs = self._going_on(step, start, kepts, which, costs[start:])
            which = np.concatenate([which, new_which + len(kepts)])
            kepts = np.concatenate([kepts, new_kepts])
            counts = np.concatenate([counts, new_counts])
            costs = np.concatenate([old_costs, new_costs])
        some, least, last = self._best(counts, costs)
        self.costs: Array = np.full((len(own) + 1, self._skippable), math.inf)
        self.costs[some] = least
        self._last = np.zeros(self.costs.shape, np.int32)
        self._last[some] = last

    def _computing(self, which: Steps, counts: Steps, costs: Array) -> tuple[Steps, Steps, Array]:
        """The states that compute a step: of those that come to the same one, the best."""
        ways = len(self.own) + 1
        keys, least, parents = self._best(which * ways + counts, costs)
        self._first_new.append(self._first_old[-1] + len(costs))
        self._parents.append(parents)
        return keys // ways, keys % ways + 1, least

    def _best(self, keys: Steps, costs: Array) -> tuple[Steps, Array, npt.NDArray[np.int32]]:
        """Of the states with one key, the least costs and the states that have them.

        Returns:
            The keys that occur, rising, and by how many steps are skipped the costs and the states.
        """
        order = np.argsort(keys, kind="stable")
        found, starts, sizes = np.unique(keys[order], return_index=True, return_counts=True)
        costs = costs[order]
        least = np.minimum.reduceat(costs, starts, axis=0)
        numbers = (self._first_old[-1] + order).astype(np.int32)[:, None]
        equal = costs == np.repeat(least, sizes, axis=0)
        states = np.where(equal, numbers, np.iinfo(np.int32).max)
        return found, least, np.minimum.reduceat(states, starts, axis=0)

    def _going_on(self, step: int, start: int, kepts: Steps, which: Steps, costs: Array) -> Array:
        """What the states that do not compute ``step`` cost after it."""
        prices = np.empty((len(self._prices), len(kepts)))
        sizes = (kepts >= 0).sum(axis=1)
        for size in np.unique(sizes):
            alike = sizes == size
            kept = self.own[kepts[alike, :size]]
            for price, found in zip(self._prices, prices, strict=True):
                found[alike] = price(kept, int(self.own[step]))
        after: Array = costs + prices[0, which, None]
        skips = np.zeros((0, self._skippable), np.bool_)
        if len(prices) > 1:
            skipped = np.full_like(costs, math.inf)
            skipped[:, 1:] = costs[:, :-1] + prices[1, which, None]
            skips = skipped < after
            after = np.minimum(skipped, after)
        self._first_old.append(self._first_old[-1] + start)
        self._skips.append(skips)
        return after

    def budgets(self) -> list[Budget]:
        """The numbers of computed and of skipped steps that are allowed."""
        return [(int(some), int(others)) for some, others in np.argwhere(self.costs < math.inf)]

    def actions(self, computed: int, skipped: int) -> list[str]:
        """What the cheapest schedule of a budget does at each of the owner's steps."""
        actions = [REUSE] * len(self.own)
        state, end = int(self._last[computed, skipped]), len(actions)
        while True:
            newest = bisect_right(self._first_new, state) - 1
            actions[newest] = COMPUTE
            for step in range(end - 1, newest, -1):
                skips = self._skips[step]
                if len(skips) and skips[state - self._first_old[step], skipped]:
                    actions[step] = SKIP
                    skipped -= 1
            if newest == 0:
                return actions
            end, state = (
                newest,
                int(self._parents[newest][state - self._first_new[newest], skipped]),
            )


def _joined(found: dict[Budget, Schedule], table: _Table) -> dict[Budget, Schedule]:
    """The best of each budget once the steps of one more owner join."""
    best: dict[Budget, tuple[float, Budget, Budget]] = {}
    for others, schedule in found.items():
        for own in table.budgets():
            budget = (others[0] + own[0], others[1] + own[1])
            cost = schedule.cost + float(table.costs[own])
            if budget not in best or cost < best[budget][0]:
                best[budget] = (cost, others, own)
    joined = {}
    for budget, (cost, others, own) in best.items():
        actions = list(found[others].actions)
        for step, action in zip(table.own.tolist(), table.actions(*own), strict=True):
            actions[step] = action
        joined[budget] = Schedule(tuple(actions), cost)
    return joined
