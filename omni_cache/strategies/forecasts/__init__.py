"""Forecasts: what stands in for the residual of a reused step.

Every one is a row of weights over the residuals of the last computed steps, so that the device does
one thing, ``partner + sum_i w_i r_i``, and a method is a function from times to weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from omni_cache.strategies.base import Forecast, is_count, require
from omni_cache.strategies.forecasts.aligned import Aligned
from omni_cache.strategies.forecasts.dmd import DMD
from omni_cache.strategies.forecasts.fits import Chebyshev, Fitted
from omni_cache.strategies.forecasts.multistep import Adams, FoCa
from omni_cache.strategies.forecasts.polynomial import Hermite, Hold, Newton, Taylor

Make = Callable[[int | None, str], Forecast]


class Named(NamedTuple):
    """A forecast that flags name: what makes it, and the orders that it takes."""

    make: Make
    least: int = 0
    most: int = 0


FORECASTS: dict[str, Named] = {}
"""The forecasts by name."""


def register_forecast(name: str, make: Make, orders: tuple[int, int] = (0, 0)) -> None:
    """Have the flag ``forecast`` name a forecast.

    Args:
        name: what users write. A name that is known is given away anew.
        make: called as ``make(order, axis)`` with the flags ``forecast_order``, None where it is
            not set, and ``forecast_axis``, "sigma" or "step"; returns the :class:`Forecast`.
        orders: the least and the highest order that it takes; (0, 0) for one that takes none.

    Raises:
        ValueError: an argument is something else.
    """
    require(isinstance(name, str) and bool(name), "name", name, "a string")
    require(callable(make), "make", make, "callable")
    fits = len(orders) == 2 and all(is_count(each, 0) for each in orders)
    require(fits and orders[0] <= orders[1], "orders", orders, "two integers, the least first")
    FORECASTS[name] = Named(make, *orders)


register_forecast("hold", lambda order, axis: Hold())
register_forecast("newton", lambda order, axis: Newton(_or(order, 1), axis), (0, 4))
register_forecast("taylor", lambda order, axis: Taylor(_or(order, 1)), (1, 4))
register_forecast("hermite", lambda order, axis: Hermite(_or(order, 1)), (1, 4))
register_forecast("foca", lambda order, axis: FoCa())
register_forecast("adams", lambda order, axis: Adams(_or(order, 2)), (1, 4))
register_forecast("chebyshev", lambda order, axis: Chebyshev(_or(order, 4)), (1, 8))
register_forecast("aligned", lambda order, axis: Aligned())
register_forecast("dmd", lambda order, axis: DMD(order=_or(order, 1)), (1, 4))


def make_forecast(forecast: Any, order: int | None, axis: str) -> Forecast:
    """The forecast that flags name.

    Raises:
        ValueError: a flag has a value that is not allowed.
    """
    require(axis in ("sigma", "step"), "forecast_axis", axis, "'sigma' or 'step'")
    is_named = isinstance(forecast, str)
    if isinstance(forecast, Mapping | Sequence) and not is_named:
        forecast = Fitted(forecast)
    if isinstance(forecast, Forecast):
        require(order is None, "forecast_order", order, "None when forecast is an object")
        return forecast
    names = ", ".join(map(repr, FORECASTS))
    allowed = f"one of {names}, weights by steps, or a Forecast"
    require(is_named and forecast in FORECASTS, "forecast", forecast, allowed)
    make, least, most = FORECASTS[forecast]
    span = f"an integer from {least} to {most}" if least < most else str(least)
    require(
        order is None or (is_count(order, least) and order <= most),
        "forecast_order",
        order,
        f"{span} for forecast={forecast!r}, or None",
    )
    return make(order, axis)


def _or(order: int | None, default: int) -> int:
    return default if order is None else order


__all__ = [
    "DMD",
    "FORECASTS",
    "Adams",
    "Aligned",
    "Chebyshev",
    "Fitted",
    "FoCa",
    "Hermite",
    "Hold",
    "Newton",
    "Taylor",
    "make_forecast",
    "register_forecast",
]
