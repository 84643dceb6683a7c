"""The configuration of SeaCache, under the names of ``vllm_omni.diffusion.cache.seacache``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omni_cache.strategies import SeaCache
from omni_cache.strategies.base import is_count, is_number, require
from omni_cache.strategies.forecasts import Newton


@dataclass(frozen=True)
class SeaCacheConfig:
    """When SeaCache reuses, and what it extrapolates.

    Attributes:
        threshold: accumulated change of the filtered latents at which a step is computed; finite
            and >= 0.
        residual_order: degree of the polynomial through the last residuals.
        max_consecutive_cached: most steps in a row that are reused; 0 for any number.
        power_exp: exponent of the power that clean latents have at a frequency; finite and > 0.

    Raises:
        ValueError: a value is not allowed.
    """

    threshold: float = 0.25
    residual_order: int = 1
    max_consecutive_cached: int = 2
    power_exp: float = 3.0

    def __post_init__(self) -> None:
        fits = is_number(self.threshold) and self.threshold >= 0
        require(fits, "threshold", self.threshold, "a finite number >= 0")
        for name in ("residual_order", "max_consecutive_cached"):
            value = getattr(self, name)
            require(is_count(value, 0), name, value, "an integer >= 0")
        fits = is_number(self.power_exp) and self.power_exp > 0
        require(fits, "power_exp", self.power_exp, "a finite number > 0")

    @classmethod
    def from_diffusion_cache_config(cls, config: Any) -> SeaCacheConfig:
        """What a `DiffusionCacheConfig` says of SeaCache."""
        return cls(
            threshold=config.sea_threshold,
            residual_order=config.sea_residual_order,
            max_consecutive_cached=config.sea_max_consecutive_cached,
            power_exp=config.sea_power_exp,
        )

    def strategy(self) -> SeaCache:
        """The strategy that decides so."""
        return SeaCache(
            threshold=self.threshold,
            power_exp=self.power_exp,
            max_consecutive_cached=self.max_consecutive_cached,
            forecast=Newton(self.residual_order, "step"),
        )
