"""Forecasts: what stands in for the residual of a reused step.

Every one is a row of weights over the residuals of the last computed steps, so that the device does
one thing, ``partner + sum_i w_i r_i``, and a method is a function from times to weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import factorial, prod
from typing import Any, ClassVar

from omni_cache.strategies.base import Forecast, Time, is_count, require


@dataclass(frozen=True)
class Hold:
    """``r_0``: the residual of the last computed step, as it is."""

    depth: ClassVar[int] = 1
    reads_values: ClassVar[bool] = False

    def weights(self, kept: Sequence[Time], now: Time) -> tuple[float, ...]:
        """All on the newest."""
        return (1.0,) + (0.0,) * (len(kept) - 1)


@dataclass(frozen=True)
class Newton:
    """The polynomial through the last ``order + 1`` residuals, at this step.

    ``r = sum_j r_j prod_{l != j} (x - x_l) / (x_j - x_l)``, exact at uneven gaps.

    Attributes:
        order: degree of the polynomial; fewer residuals give a lower one.
        axis: ``x`` is the timestep or sigma ("sigma") or the index of the step ("step"). Where a
            timestep is unknown or comes twice, it is the index.
    """

    order: int = 1
    axis: str = "sigma"

    @property
    def depth(self) -> int:
        """One residual more than the order."""
        return self.order + 1

    @property
    def reads_values(self) -> bool:
        """Whether it needs timesteps."""
        return self.axis == "sigma" and self.order > 0

    def weights(self, kept: Sequence[Time], now: Time) -> tuple[float, ...]:
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
class Taylor:
    """TaylorSeer: a Taylor expansion with finite differences in place of derivatives.

    ``r = sum_i D^i k^i / i!`` with ``k`` the steps since the last computed one, ``D^0 = r_0`` and
    ``D^i = (D^(i-1) - D^(i-1) of the computed step before) / N``, with ``N`` steps between the two.
    As cache-dit computes it, a step with an index below ``first`` has no differences; as diffusers
    does, all have (0).

    Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", 2025,
    https://arxiv.org/abs/2503.06923.
    """

    order: int = 1
    first: int = 2
    reads_values: ClassVar[bool] = False

    @property
    def depth(self) -> int:
        """One residual more than the order."""
        return self.order + 1

    def weights(self, kept: Sequence[Time], now: Time) -> tuple[float, ...]:
        """The recurrence, run on unit vectors."""
        steps = [each.index for each in kept]
        # ladder[j]: the weights of D^i at the j-th kept step, None where there is none.
        ladder: list[list[float] | None] = [
            [float(i == j) for i in range(len(kept))] for j in range(len(kept))
        ]
        total = [0.0] * len(kept)
        elapsed = now.index - steps[0]
        for order in range(self.order + 1):
            if not ladder or ladder[0] is None:
                break
            scale = elapsed**order / factorial(order)
            total = [sum_ + scale * each for sum_, each in zip(total, ladder[0], strict=True)]
            ladder = [
                [(a - b) / (step - before) for a, b in zip(new, old, strict=True)]
                if new is not None and old is not None and step >= self.first
                else None
                for (new, old), (step, before) in zip(
                    pairwise(ladder), pairwise(steps), strict=False
                )
            ]
        return tuple(total)


FORECASTS: dict[str, tuple[int, int]] = {"hold": (0, 0), "newton": (0, 4), "taylor": (1, 4)}
"""The forecasts by name, with the least and the highest order that each takes."""


def make_forecast(forecast: Any, order: int | None, axis: str) -> Forecast:
    """The forecast that flags name.

    Raises:
        ValueError: a flag has a value that is not allowed.
    """
    require(axis in ("sigma", "step"), "forecast_axis", axis, "'sigma' or 'step'")
    is_object = not isinstance(forecast, str | type)
    if is_object and callable(getattr(forecast, "weights", None)):
        require(order is None, "forecast_order", order, "None when forecast is an object")
        chosen: Forecast = forecast
        return chosen
    names = ", ".join(map(repr, FORECASTS))
    known = isinstance(forecast, str) and forecast in FORECASTS
    require(known, "forecast", forecast, f"one of {names}, or an object with weights()")
    least, most = FORECASTS[forecast]
    span = f"an integer from {least} to {most}" if least < most else str(least)
    require(
        order is None or (is_count(order, least) and order <= most),
        "forecast_order",
        order,
        f"{span} for forecast={forecast!r}, or None",
    )
    if forecast == "newton":
        return Newton(1 if order is None else order, axis)
    return Taylor(1 if order is None else order) if forecast == "taylor" else Hold()
