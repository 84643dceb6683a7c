"""The configuration of StepCache, and where it lies on a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STEP_CACHE_CONFIG_ATTR = "_stepcache_config"
"""The attribute of a pipeline that holds its `StepCacheConfig`."""
STEP_CACHE_STATE_ATTR = "_stepcache_state"
"""The attribute of a pipeline that holds its `StepCacheState`."""


@dataclass(frozen=True)
class StepCacheConfig:
    """When a denoising loop may repeat the model's last prediction.

    Attributes:
        enabled: whether steps are left out at all.
        min_history_steps: with fewer predictions than these, a step runs.
        max_history: the most predictions that `StepCacheState.trim_history` leaves.
        sim_thresholds: similarities of the last two predictions, the highest first.
        skip_countdowns: for each of them, how many steps are left out.
    """

    enabled: bool = True
    min_history_steps: int = 2
    max_history: int = 2
    sim_thresholds: tuple[float, ...] = (0.95, 0.93)
    skip_countdowns: tuple[int, ...] = (4, 2)

    @classmethod
    def from_diffusion_cache_config(cls, config: Any) -> StepCacheConfig:
        """What a `DiffusionCacheConfig` says of StepCache.

        Raises:
            ValueError: there are not as many countdowns as thresholds.
        """
        thresholds = tuple(config.velocity_sim_thresholds)
        countdowns = tuple(config.velocity_skip_countdowns)
        if len(thresholds) != len(countdowns):
            raise ValueError(
                f"velocity_skip_countdowns={countdowns} is not allowed; velocity_skip_countdowns "
                f"must have as many entries as velocity_sim_thresholds={thresholds}"
            )
        return cls(
            enabled=config.step_cache_dit_enabled,
            min_history_steps=config.step_cache_dit_min_history,
            max_history=config.step_cache_dit_max_history,
            sim_thresholds=thresholds,
            skip_countdowns=countdowns,
        )
