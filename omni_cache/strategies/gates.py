"""Gates: when to compute.

Each is a few lines of pure arithmetic, so that it decides on the host's floats and, traced, on
float64 tensors inside a graph, with the same bits. Gates wrap gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, ClassVar, NamedTuple

import torch

from omni_cache.strategies.base import DEFAULT_STEPS, Gate, Time, Verdict


def where(condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` or ``no``, for tensors element by element; tensors have no words, and get none."""
    if not isinstance(condition, torch.Tensor):
        return yes if condition else no
    return "" if isinstance(yes, str) else torch.where(condition, yes, no)


class Accumulated(NamedTuple):
    """State of `Accumulate`."""

    change: float = 0.0


@dataclass(frozen=True)
class Accumulate(Gate):
    """Reuse while the accumulated, rescaled distance stays below a threshold (TeaCache's rule).

    Attributes:
        coefficients: of the polynomial that rescales a distance, highest power first.
        threshold: reuse below it.
    """

    coefficients: tuple[float, ...]
    threshold: float
    measures: ClassVar[bool] = True

    def begin(self) -> Accumulated:
        """Nothing has accumulated."""
        return Accumulated()

    def decide(
        self, state: Accumulated, at: Time, total: int | None, distance: float | None
    ) -> Verdict:
        """``change + |poly(distance)| < threshold``; what is not finite computes."""
        if distance is None:
            return Verdict(False, "first step", Accumulated(), Accumulated())
        rescaled = reduce(lambda value, each: value * distance + each, self.coefficients)
        change = state.change + abs(rescaled)
        # A comparison with NaN is false.
        finite = (distance < float("inf")) & (change < float("inf"))
        reuse = finite & (change < self.threshold)
        said = where(
            reuse, "below threshold", where(finite, "threshold reached", "non-finite distance")
        )
        return Verdict(reuse, said, Accumulated(change), Accumulated(), distance, change)


class Measured(NamedTuple):
    """State of `Threshold`: the sum of all distances that were measured."""

    total: float = 0.0


@dataclass(frozen=True)
class Threshold(Gate):
    """Reuse while the signal lies near that of the last computed step (First Block Cache's rule).

    Attributes:
        threshold: reuse below it.
        most: once all distances of a generation add up to it, the rest is computed; None for never.
    """

    threshold: float
    most: float | None = None
    measures: ClassVar[bool] = True

    def begin(self) -> Measured:
        """Nothing was measured."""
        return Measured()

    def decide(
        self, state: Measured, at: Time, total: int | None, distance: float | None
    ) -> Verdict:
        """``distance < threshold``; what is not finite computes."""
        if distance is None:
            return Verdict(False, "first step", state, state)
        if self.most is not None and state.total >= self.most:
            return Verdict(False, "accumulated", state, state, distance, state.total)
        finite = distance < float("inf")
        reuse = distance < self.threshold
        said = where(
            reuse, "below threshold", where(finite, "threshold reached", "non-finite distance")
        )
        after = Measured(state.total + where(finite, distance, 0.0))
        return Verdict(reuse, said, after, after, distance, after.total)


class Ratio(NamedTuple):
    """State of `Ratios`: product of the ratios, steps and error since the last computed step."""

    product: float = 1.0
    skipped: int = 0
    error: float = 0.0


@dataclass(frozen=True)
class Ratios(Gate):
    """Reuse while the residual's magnitude, known from a calibration, says so (MagCache's rule).

    Attributes:
        ratios: calibrated magnitude ratios, nearest-interpolated to the number of steps.
        threshold: the most error that may accumulate.
        max_skip_steps: most steps in a row that are reused.
        retention_ratio: share of the first steps that are always computed.
    """

    ratios: tuple[float, ...]
    threshold: float
    max_skip_steps: int
    retention_ratio: float
    measures: ClassVar[bool] = False
    schedules: bool = True

    def begin(self) -> Ratio:
        """The last step was computed."""
        return Ratio()

    def decide(self, state: Ratio, at: Time, total: int | None, distance: float | None) -> Verdict:
        """Follow the magnitude that the calibration predicts."""
        steps = total or DEFAULT_STEPS
        if at.index < int(self.retention_ratio * steps + 0.5):
            return Verdict(False, "first step" if at.index == 0 else "retention", state, state)
        if at.index >= steps:
            return Verdict(False, "no ratio", Ratio(), Ratio())
        product = state.product * nearest_interpolation(self.ratios, steps)[at.index]
        skipped = state.skipped + 1
        off = abs(1.0 - product)
        error = state.error + off
        below = error <= self.threshold
        reuse = below & (skipped <= self.max_skip_steps)
        said = where(reuse, "below threshold", where(below, "max_skip_steps", "threshold reached"))
        return Verdict(reuse, said, Ratio(product, skipped, error), Ratio(), off, error)


@dataclass(frozen=True)
class Wrapped(Gate):
    """A gate around another one, which decides where this one has nothing against it."""

    gate: Gate

    @property
    def measures(self) -> bool:  # type: ignore[override]
        """As the gate within."""
        return self.gate.measures

    @property
    def schedules(self) -> bool:  # type: ignore[override]
        """As the gate within."""
        return self.gate.schedules

    def begin(self) -> Any:
        """As the gate within."""
        return self.gate.begin()

    def compares(self, state: Any) -> bool:
        """As the gate within."""
        return self.gate.compares(state)

    def against(self, at: Time, total: int | None) -> str | None:
        """Why this gate computes a step; None where it leaves that to the gate within."""
        return None

    def foretell(self, at: Time, total: int | None) -> str | None:
        """Why a step is computed whatever is measured, here or within."""
        return self.against(at, total) or self.gate.foretell(at, total)

    def skips(self, at: Time, total: int | None) -> bool:
        """As the gate within; what is foretold is computed all the same."""
        return self.gate.skips(at, total)

    def begins_anew(self, at: Time) -> bool:
        """As the gate within."""
        return self.gate.begins_anew(at)

    def decide(self, state: Any, at: Time, total: int | None, distance: float | None) -> Verdict:
        """As the gate within, for a step that is not foretold."""
        verdict = self.gate.decide(state, at, total, distance)
        why = self.foretell(at, total)
        if why is None:
            return verdict
        return verdict._replace(reuse=False, reason=why, if_reused=verdict.if_computed)


@dataclass(frozen=True)
class WarmUp(Wrapped):
    """Computes every ``interval``-th of the first ``steps`` steps.

    Attributes:
        steps: how many steps the warm-up has.
        interval: of these, steps 0, interval, 2 * interval, ... are computed.
    """

    steps: int = 0
    interval: int = 1

    def against(self, at: Time, total: int | None) -> str | None:
        """Whether a step is one of the warm-up's."""
        return "warm-up" if at.index < self.steps and at.index % self.interval == 0 else None


class Counted(NamedTuple):
    """State of `Limit`: the state within, the reused steps, and those since the last computed."""

    within: Any
    reused: int = 0
    running: int = 0


@dataclass(frozen=True)
class Limit(Wrapped):
    """Reuses so many steps at most.

    Attributes:
        most: of a generation; None for any number.
        running: in a row; None for any number.
    """

    most: int | None = None
    running: int | None = None

    def begin(self) -> Counted:
        """Nothing was reused."""
        return Counted(self.gate.begin())

    def compares(self, state: Counted) -> bool:
        """As the gate within."""
        return self.gate.compares(state.within)

    def decide(
        self, state: Counted, at: Time, total: int | None, distance: float | None
    ) -> Verdict:
        """As the gate within until one of the limits is reached, which it then hears nothing of."""
        full = self.most is not None and state.reused >= self.most
        if full or (self.running is not None and state.running >= self.running):
            computed = Counted(state.within, state.reused)
            said = "max_cached_steps" if full else "max_continuous_cached_steps"
            return Verdict(False, said, computed, computed, distance)
        verdict = super().decide(state.within, at, total, distance)
        return verdict._replace(
            if_reused=Counted(verdict.if_reused, state.reused + 1, state.running + 1),
            if_computed=Counted(verdict.if_computed, state.reused),
        )


@dataclass(frozen=True)
class Within(Wrapped):
    """Computes the steps outside of a share of the loop, and the last one where that is wanted.

    Attributes:
        start: share of the steps before which all are computed.
        end: share of the steps from which on all are computed.
        last: whether the last step is always computed. It needs the number of steps to be known.
    """

    start: float = 0.0
    end: float = 1.0
    last: bool = False

    @property
    def schedules(self) -> bool:  # type: ignore[override]
        """Whether the number of steps matters to it, or to the gate within."""
        return self.start > 0 or self.end < 1 or self.gate.schedules

    def against(self, at: Time, total: int | None) -> str | None:
        """Why a step outside is computed."""
        steps = total or DEFAULT_STEPS
        if at.index < int(self.start * steps + 0.5):
            return "before start"
        if self.end < 1 and at.index >= int(self.end * steps + 0.5):
            return "after end"
        return "last step" if self.last and total is not None and at.index >= total - 1 else None


@lru_cache(maxsize=256)
def nearest_interpolation(ratios: tuple[float, ...], length: int) -> tuple[float, ...]:
    """Ratios of another number of steps, nearest neighbour (rule as published with MagCache).

    Positions are taken in float64. diffusers' hooks take them in float32, and of 995 pairs of
    lengths they choose a neighbour in 47 for one ratio.
    """
    if length == len(ratios):
        return ratios
    if length == 1:
        return (ratios[-1],)
    scale = (len(ratios) - 1) / (length - 1)
    return tuple(ratios[round(step * scale)] for step in range(length))
