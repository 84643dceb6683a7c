"""How a plan is followed: the gate that goes by its actions, the forecast that has its weights.

Neither needs the device. With a guardrail, inner products of residuals tell after every computed
step how far off a forecast of it would have been. Where that is much more than on the samples that
the plan was made from, steps are inserted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import ClassVar, NamedTuple

from omni_cache.planning.gram import Fit, Gram, fit, fit_outputs
from omni_cache.planning.search import COMPUTE, REUSE, SKIP
from omni_cache.strategies.base import Errors, Forecast, Gate, Matrix, Row, Time, Verdict
from omni_cache.strategies.plans import Weights


class Reused(NamedTuple):
    """How many steps in a row have not been computed."""

    steps: int = 0


@dataclass(frozen=True)
class Follow(Gate):
    """Goes by the actions of a plan, and computes more where forecasts are worse than planned.

    Where a computed step turned out to be ``excess`` times as far from its forecast as the plan
    expects, and that is more than ``guardrail``, the distance to the next computed step is divided
    by the root of ``excess``, since the error of a forecast grows with the square of the distance.
    Where the plan reuses 5 steps in a row, an excess of 4 has every third step computed.

    Attributes:
        actions: for each step; "" for those that another transformer runs.
        guardrail: None to follow the plan whatever happens.
    """

    actions: tuple[str, ...]
    guardrail: float | None
    measures: ClassVar[bool] = False

    def begin(self) -> Reused:
        """Nothing has been reused."""
        return Reused()

    def foretell(self, at: Time, total: int | None) -> str | None:
        """Whether the plan has a step computed, or knows nothing of it."""
        if at.index < len(self.actions) and self.actions[at.index] in (REUSE, SKIP):
            return None
        return "planned"

    def skips(self, at: Time, total: int | None) -> bool:
        """Whether the plan runs nothing at a step."""
        return at.index < len(self.actions) and self.actions[at.index] == SKIP

    def decide(self, state: Reused, at: Time, total: int | None, distance: float | None) -> Verdict:
        """Decide by the plan, and by the excess, which is the distance."""
        reuse, reason = self.foretell(at, total) is None, "planned"
        if reuse and self.guardrail is not None and (distance or 0.0) > self.guardrail:
            reuse = (state.steps + 2) * math.sqrt(distance or 0.0) <= self._gap(at.index)
            reason = "planned" if reuse else "guardrail"
        return Verdict(reuse, reason, Reused(state.steps + 1), Reused())

    def _gap(self, step: int) -> int:
        """How far it is from the planned step before a step to the planned one after it."""
        before = max(i for i in range(step) if self.actions[i] == COMPUTE)
        after = (i for i in range(step, len(self.actions)) if self.actions[i] == COMPUTE)
        return next(after, len(self.actions)) - before


@dataclass(frozen=True)
class BranchWeights:
    """What a plan knows of one guidance branch.

    Attributes:
        steps: the weights of the steps that are not computed.
        gram: inner products on the plan's samples.
        spread: for each step by what factor the worst of these samples is further off than the
            mean; empty where that is unknown.
    """

    steps: Mapping[int, Weights]
    gram: Gram
    spread: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Planned(Forecast):
    """The weights of a plan.

    If other steps were computed than planned, the weights are those that would have fitted the
    plan's samples best.

    Attributes:
        depth: how many residuals are weighed at most.
        actions: for each step; "" for those that another transformer runs.
        branches: what the plan knows of each branch.
        checks: whether forecasts are compared with what is computed.
        branch: the one that is forecast; None where that is not said yet.
    """

    depth: int = 1
    actions: tuple[str, ...]
    branches: Mapping[str, BranchWeights] = field(repr=False)
    checks: bool = True
    branch: BranchWeights | None = field(default=None, repr=False)
    _fits: dict[tuple[Row, int, bool], Fit] = field(default_factory=dict, repr=False, compare=False)

    def of_branch(self, name: str) -> Planned:
        """With the weights of one branch."""
        return replace(self, branch=self.branches.get(name), _fits={})

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """As planned, or as fitted."""
        return self._weights(kept, now).row

    def input_weight(self, kept: Sequence[Time], now: Time) -> float:
        """As planned, or as fitted."""
        return self._weights(kept, now).input

    def skip_weights(self, kept: Sequence[Time], now: Time) -> Row:
        """As planned, or as fitted."""
        return self._weights(kept, now, skips=True).row

    def check(self, kept: Sequence[Time], products: Matrix) -> Errors | None:
        """How far off the newest step's forecast would have been, and on the worst sample."""
        steps = [each.index for each in kept]
        if self.branch is None or len(steps) < 2 or max(steps) >= len(self.actions):
            return None
        found = self._fit(steps[1:], steps[0])
        row = (1.0, *(-each for each in found.weights))
        error = sum(
            a * b * product
            for a, products_of in zip(row, products, strict=True)
            for b, product in zip(row, products_of, strict=True)
        )
        size, expected_size = products[0][0], self.branch.gram.residuals[steps[0], steps[0]]
        if not (size > 0 and expected_size > 0):
            return None
        # A difference of large numbers may come out below 0.
        observed, expected = max(error, 0.0) / size, max(found.error, 0.0) / expected_size
        worst = self.branch.spread[steps[0]] if self.branch.spread else 1.0
        return Errors(math.sqrt(observed), worst * math.sqrt(expected))

    def _weights(self, kept: Sequence[Time], now: Time, skips: bool = False) -> Weights:
        assert self.branch is not None  # another branch is refused
        steps = [each.index for each in kept]
        planned = self.branch.steps.get(now.index)
        if planned is not None and skips == (self.actions[now.index] == SKIP):
            length = len(planned.row)
            if len(steps) >= length and steps[:length] == self._planned(now.index, length):
                return planned
        found = self._fit(steps, now.index, skips)
        return Weights(found.weights)

    def _planned(self, step: int, count: int) -> list[int]:
        """The last steps that the plan has computed before a step, newest first."""
        computed = (i for i in range(step - 1, -1, -1) if self.actions[i] == COMPUTE)
        return list(islice(computed, count))

    def _fit(self, kept: Sequence[int], step: int, skips: bool = False) -> Fit:
        assert self.branch is not None
        key = tuple(kept), step, skips
        if key not in self._fits:
            gram = self.branch.gram
            self._fits[key] = (fit_outputs if skips else fit)(gram, key[0], step)
        return self._fits[key]
