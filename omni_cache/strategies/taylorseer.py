"""TaylorSeer: every so many-th step is computed, and the others are forecast.

    compute t if  t < warm-up  or  (t - warm-up - 1) mod interval = 0;  otherwise
    r(t) = sum_i D^i k^i / i!     k steps since the last computed one, D^i its finite differences

Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", 2025,
https://arxiv.org/abs/2503.06923. The schedule and its flags are those of diffusers'
``TaylorSeerCacheConfig``; its ``max_order`` is ``forecast_order``. The peer forecasts what each
attention returns, or ``proj_out`` in lite mode; this one forecasts what all the blocks add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omni_cache.strategies.base import Forecast, is_count, require
from omni_cache.strategies.forecasts import Taylor
from omni_cache.strategies.gates import Within
from omni_cache.strategies.schedules import Interval, Reuse
from omni_cache.strategies.strategy import Guard, Policy, Strategy


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Strategy):
    """TaylorSeer. `Strategy` has the flags that every strategy takes.

    Attributes:
        cache_interval (int, default 5): of so many steps one is computed.
        disable_cache_before_step (int, default 3): the first steps, which are computed.
        disable_cache_after_step (int, optional): from this step on all are computed.
        forecast (str, default "taylor"): as everywhere, with another default.
    """

    name: ClassVar[str] = "taylorseer"

    cache_interval: int = 5
    disable_cache_before_step: int = 3
    disable_cache_after_step: int | None = None
    forecast: str | Forecast = "taylor"

    def __post_init__(self) -> None:
        super().__post_init__()
        interval, before = self.cache_interval, self.disable_cache_before_step
        require(is_count(interval, 1), "cache_interval", interval, "an integer >= 1")
        require(is_count(before, 0), "disable_cache_before_step", before, "an integer >= 0")
        after = self.disable_cache_after_step
        fits = after is None or is_count(after, 0)
        require(fits, "disable_cache_after_step", after, "an integer >= 0 or None")

    def forecasting(self) -> Forecast:
        """The forecast that the flags name; Taylor's takes differences from the first step on."""
        forecast = super().forecasting()
        return Taylor(forecast.depth - 1, first=0) if self.forecast == "taylor" else forecast

    def guard(self) -> Guard:
        """No signal."""
        return Guard(None, self.forecasting().depth)

    def policy(self, model_class: str | None) -> Policy:
        """The same for every class."""
        every, before, after = (
            self.cache_interval,
            self.disable_cache_before_step,
            self.disable_cache_after_step,
        )
        gate = Within(Interval(Reuse(), every, before, after), self.start, self.end)
        steps = self.num_inference_steps
        return Policy(None, lambda branch, position: gate, self.forecasting(), steps)
