"""Gates that go by the step alone. They measure nothing, and need no numbers to remember.

Each wraps a gate, which decides on the steps that are left to it; `Reuse` reuses all of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from omni_cache.strategies.base import DEFAULT_STEPS, Gate, Time, Verdict
from omni_cache.strategies.gates import Wrapped
from omni_cache.strategies.masks import preset


class Nothing(NamedTuple):
    """State of a gate that remembers nothing."""


@dataclass(frozen=True)
class Reuse(Gate):
    """Reuses every step that the gates around it do not compute."""

    measures: ClassVar[bool] = False

    def begin(self) -> Nothing:
        """There is nothing to remember."""
        return Nothing()

    def decide(
        self, state: Nothing, at: Time, total: int | None, distance: float | None
    ) -> Verdict:
        """Always the same."""
        return Verdict(True, "as scheduled", state, state)


@dataclass(frozen=True)
class Compute(Wrapped):
    """Computes every step.

    Attributes:
        because: the reason that is given.
    """

    because: str = "asked for"

    def against(self, at: Time, total: int | None) -> str | None:
        """For every step alike."""
        return self.because


@dataclass(frozen=True)
class Interval(Wrapped):
    """Computes the first steps, from then on every so many-th (TaylorSeer's rule in diffusers).

    Attributes:
        every: of the steps ``first + 1, first + 2, ...`` the first and then every so many-th.
        first: how many steps at the beginning are computed.
        until: from this step on all are computed; None for never.
    """

    every: int = 5
    first: int = 3
    until: int | None = None

    def against(self, at: Time, total: int | None) -> str | None:
        """Whether a step is one of the warm-up, one of the interval, or one of the end."""
        if at.index < self.first:
            return "warm-up"
        if self.until is not None and at.index >= self.until:
            return "cool-down"
        return "interval" if (at.index - self.first - 1) % self.every == 0 else None


@dataclass(frozen=True)
class Mask(Wrapped):
    """Computes the steps of a mask (step masks of cache-dit, and of LeMiCa).

    Attributes:
        steps: whether each step is computed, or the name of a preset, which has a mask for every
            number of steps. What comes after the mask is computed.
    """

    steps: Sequence[int] | str = "medium"

    @property
    def schedules(self) -> bool:  # type: ignore[override]
        """A preset goes by the number of steps."""
        return isinstance(self.steps, str) or self.gate.schedules

    def against(self, at: Time, total: int | None) -> str | None:
        """Whether the mask has a step computed."""
        steps = self.steps
        if isinstance(steps, str):
            steps = preset(steps, total or DEFAULT_STEPS)
        return "step mask" if at.index >= len(steps) or steps[at.index] else None


@dataclass(frozen=True)
class Refresh(Wrapped):
    """Has everything begin anew at a step, for the gate within and for what is kept.

    The gate within counts its steps from there, a warm-up and limits included.

    Attributes:
        step: where; None for nowhere.
        repeats: whether every ``step`` steps, and not once.
    """

    step: int | None = None
    repeats: bool = False

    def begins_anew(self, at: Time) -> bool:
        """Whether a step is such a one."""
        return 0 < at.index == self.counts_from(at) or self.gate.begins_anew(self._counted(at))

    def foretell(self, at: Time, total: int | None) -> str | None:
        """As the gate within."""
        return self.gate.foretell(self._counted(at), total)

    def decide(self, state: Any, at: Time, total: int | None, distance: float | None) -> Verdict:
        """As the gate within."""
        return self.gate.decide(state, self._counted(at), total, distance)

    def counts_from(self, at: Time) -> int:
        """The step from which the gate within counts, at a step."""
        if self.step is None or at.index < self.step:
            return 0
        return at.index // self.step * self.step if self.repeats else self.step

    def _counted(self, at: Time) -> Time:
        return at._replace(index=at.index - self.counts_from(at))
