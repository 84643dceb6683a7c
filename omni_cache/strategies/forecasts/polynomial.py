"""Forecasts by polynomials through the last computed residuals, or by their differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import factorial, prod
from typing import ClassVar

from omni_cache.strategies.base import Forecast, Row, Time, is_number, require
from omni_cache.strategies.gates import where


def units(count: int) -> list[Row]:
    """The rows that are one kept residual each, newest first."""
    return [tuple(float(i == j) for i in range(count)) for j in range(count)]


def combined(scales: Sequence[float], rows: Sequence[Row]) -> Row:
    """``sum_i scales[i] * rows[i]``."""
    columns = zip(*rows, strict=True)
    return tuple(sum(s * w for s, w in zip(scales, each, strict=True)) for each in columns)


def differences(kept: Sequence[Time], since: int = 0) -> list[Row]:
    """The rows of ``D^0, D^1, ...`` at the newest step, one for each kept residual.

    ``D^0 = r_0`` and ``D^i = (D^(i-1) - D^(i-1) of the computed step before) / N``, with ``N``
    steps between the two. A step with an index below ``since`` has no differences, and what would
    be made of them is 0.
    """
    steps = [each.index for each in kept]
    ladder = units(len(kept))  # of D^i at each kept step
    rows = [ladder[0]]
    for order in range(1, len(kept)):
        # D^i at a step is made of steps down to the one i places before it.
        ladder = [
            tuple(
                where(steps[place + order - 1] >= since, each, 0.0)
                for each in combined((1 / gap, -1 / gap), (new, old))
            )
            for place, (new, old) in enumerate(pairwise(ladder))
            for gap in [steps[place] - steps[place + 1]]
        ]
        rows.append(ladder[0])
    return rows


@dataclass(frozen=True)
class Ordered(Forecast):
    """A forecast that takes one residual more than its order; fewer give a lower order."""

    order: int = 1

    @property
    def depth(self) -> int:
        """One more than the order."""
        return self.order + 1


@dataclass(frozen=True)
class Hold(Forecast):
    """``r_0``: the residual of the last computed step, as it is."""

    depth: ClassVar[int] = 1

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """All on the newest."""
        return units(len(kept))[0]


@dataclass(frozen=True)
class Newton(Ordered):
    """The polynomial through the last ``order + 1`` residuals, at this step.

    ``r = sum_j r_j prod_{l != j} (x - x_l) / (x_j - x_l)``, exact at uneven gaps.

    Attributes:
        order: degree of the polynomial.
        axis: ``x`` is the timestep or sigma ("sigma") or the index of the step ("step"). Where a
            timestep is unknown or comes twice, it is the index.
    """

    axis: str = "sigma"

    @property
    def reads_values(self) -> bool:
        """Whether it needs timesteps."""
        return self.axis == "sigma" and self.order > 0

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """The Lagrange basis polynomials at ``now``."""
        xs: list[float] = [each.index for each in kept]
        x: float = now.index
        values = [each.value for each in kept if each.value is not None]
        if self.axis == "sigma" and now.value is not None and len(set(values)) == len(kept):
            xs, x = values, now.value
        if len(set(xs)) < len(xs):
            return Hold().weights(kept, now)
        return tuple(
            prod((x - other) / (own - other) for place, other in enumerate(xs) if place != j)
            for j, own in enumerate(xs)
        )


@dataclass(frozen=True)
class Taylor(Ordered):
    """TaylorSeer: a Taylor expansion with finite differences in place of derivatives.

    ``r = sum_i D^i k^i / i!`` with ``k`` the steps since the last computed one, and ``D^i`` of
    `differences`. As cache-dit computes it, a step with an index below ``first`` has no
    differences; as diffusers does, all have (0).

    Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", 2025,
    https://arxiv.org/abs/2503.06923.
    """

    first: int = 2

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """The recurrence, run on unit vectors."""
        k = now.index - kept[0].index
        rows = differences(kept, since=self.first)[: self.depth]
        return combined([k**i / factorial(i) for i in range(len(rows))], rows)


@dataclass(frozen=True)
class Hermite(Ordered):
    """HiCache: TaylorSeer with scaled Hermite polynomials in place of powers.

    ``r = sum_i D^i s^i H_i(s k) / i!`` with ``H_0 = 1``, ``H_1 = 2y`` and ``H_(i+1) = 2y H_i -
    2i H_(i-1)``. Differences lead to later steps, so ``k``, the steps since the last computed one,
    is positive. A scale of 0.5 follows a constant slope by half, ``sqrt(1/2)`` wholly.

    "HiCache: A Plug-in Scaled-Hermite Upgrade for Taylor-Style Cache-then-Forecast Diffusion
    Acceleration", 2025, https://arxiv.org/abs/2508.16984.
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        fits = is_number(self.scale) and self.scale > 0
        require(fits, "scale", self.scale, "a finite number > 0")

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """The sum over the differences that there are."""
        s = self.scale
        y = s * (now.index - kept[0].index)
        rows = differences(kept)[: self.depth]
        hermite = [1.0, 2 * y]
        for i in range(1, len(rows)):
            hermite.append(2 * y * hermite[i] - 2 * i * hermite[i - 1])
        return combined([s**i * hermite[i] / factorial(i) for i in range(len(rows))], rows)
