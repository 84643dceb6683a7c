"""StepCache on a pipeline: its configuration and its state, for a loop that asks them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from omni_cache.backends.base import CacheBackend
from omni_cache.backends.stepcache.config import (
    STEP_CACHE_CONFIG_ATTR,
    STEP_CACHE_STATE_ATTR,
    StepCacheConfig,
)
from omni_cache.backends.stepcache.state import StepCacheState


def get_stepcache_config(pipeline: Any) -> StepCacheConfig | None:
    """The configuration on a pipeline; None where there is none."""
    found = getattr(pipeline, STEP_CACHE_CONFIG_ATTR, None)
    return found if isinstance(found, StepCacheConfig) else None


def get_stepcache_state(pipeline: Any) -> StepCacheState | None:
    """The state on a pipeline; None where there is none."""
    found = getattr(pipeline, STEP_CACHE_STATE_ATTR, None)
    return found if isinstance(found, StepCacheState) else None


def is_stepcache_active(pipeline: Any) -> bool:
    """Whether a pipeline's loop may leave out steps."""
    config = get_stepcache_config(pipeline)
    return config is not None and config.enabled


def enable_dreamzero_stepcache(pipeline: Any, config: Any) -> None:
    """Place what a loop asks on its pipeline.

    Args:
        pipeline: whose loop calls `StepCacheState.should_run_step`.
        config: a `DiffusionCacheConfig`.

    Raises:
        ValueError: there are not as many countdowns as thresholds.
    """
    own = StepCacheConfig.from_diffusion_cache_config(config)
    setattr(pipeline, STEP_CACHE_CONFIG_ATTR, own)
    setattr(pipeline, STEP_CACHE_STATE_ATTR, StepCacheState(own))


CUSTOM_STEPCACHE_ENABLERS: dict[str, Callable[[Any, Any], None]] = {
    "DreamZeroPipeline": enable_dreamzero_stepcache
}
"""By the name of the pipeline's class: those whose loop asks."""


class StepCacheBackend(CacheBackend):
    """StepCache for pipelines whose loop asks it; ``config`` is a `DiffusionCacheConfig`."""

    def enable(self, pipeline: Any) -> None:
        """Place configuration and state on a pipeline.

        Raises:
            ValueError: the pipeline's loop does not ask, or see `StepCacheConfig`.
        """
        name = type(pipeline).__name__
        if name not in CUSTOM_STEPCACHE_ENABLERS:
            known = ", ".join(sorted(CUSTOM_STEPCACHE_ENABLERS))
            raise ValueError(
                f"step_cache backend does not support {name}, whose loop does not ask it; known "
                f"are: {known}. omni_cache.enable(pipeline, 'stepcache') follows the same rule in "
                "any pipeline"
            )
        CUSTOM_STEPCACHE_ENABLERS[name](pipeline, self.config)
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None:
        """Begin a request; the rule does not depend on its number of steps."""
        state = get_stepcache_state(pipeline)
        if state is not None:
            state.reset()
        elif verbose and is_stepcache_active(pipeline):
            message = f"{STEP_CACHE_CONFIG_ATTR} is on the pipeline, {STEP_CACHE_STATE_ATTR} is not"
            warnings.warn(f"{message}; enable the step_cache backend again", stacklevel=2)

    def disable(self, pipeline: Any) -> None:
        """Take configuration and state off a pipeline; one without them is left alone."""
        for name in (STEP_CACHE_CONFIG_ATTR, STEP_CACHE_STATE_ATTR):
            vars(pipeline).pop(name, None)
        self.enabled = False
