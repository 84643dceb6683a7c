"""A strategy that follows a list of actions with weights that a test gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from omni_cache.strategies import Forecast, Gate, Guard, Policy, Strategy, Time, Verdict
from omni_cache.strategies.base import Row

COMPUTE, REUSE, SKIP = "compute", "reuse", "skip"


@dataclass(frozen=True)
class Follow(Gate):
    """Does what it is told for each step, as far as something is kept."""

    measures: ClassVar[bool] = False
    actions: Sequence[str] = ()

    def begin(self) -> tuple[()]:
        return ()

    def skips(self, at: Time, total: int | None) -> bool:
        return self.actions[at.index] == SKIP

    def decide(
        self, state: tuple[()], at: Time, total: int | None, distance: float | None
    ) -> Verdict:
        return Verdict(self.actions[at.index] != COMPUTE, "as told", (), ())


@dataclass(frozen=True)
class Weighed(Forecast):
    """Weighs by the same numbers at every step; fewer kept steps share what the others leave."""

    row: Row
    input: float = 0.0
    skipped: Row = (1.0,)

    @property
    def depth(self) -> int:
        return len(self.row)

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        return self.row[: len(kept)]

    def input_weight(self, kept: Sequence[Time], now: Time) -> float:
        return self.input * (now.index - kept[0].index)

    def skip_weights(self, kept: Sequence[Time], now: Time) -> Row:
        return self.skipped[: len(kept)]


@dataclass(frozen=True, kw_only=True)
class Followed(Strategy):
    """Follows ``actions``; the fields are those of the gate and the forecast."""

    name: ClassVar[str] = "followed"
    actions: tuple[str, ...] = ()
    row: Row = (1.0,)
    input: float = 0.0
    skipped: Row = (1.0,)
    whole: bool = False

    def guard(self) -> Guard:
        weighs, skips = self.input != 0, SKIP in self.actions
        return Guard(None, len(self.row), whole=self.whole, inputs=weighs, skips=skips)

    def policy(self, model_class: str | None) -> Policy:
        forecast = Weighed(self.row, self.input, self.skipped)
        return Policy(None, lambda name, position: Follow(self.actions), forecast, None)


def actions(text: str) -> tuple[str, ...]:
    """``"crs"`` and the like as actions: compute, reuse, skip."""
    return tuple({each[0]: each for each in (COMPUTE, REUSE, SKIP)}[letter] for letter in text)
