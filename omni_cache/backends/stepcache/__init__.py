"""StepCache: a denoising loop that repeats predictions, and asks here when.

The names with ``step_cache_dit`` are older ones of the same things.
"""

from omni_cache.backends.stepcache.backend import (
    CUSTOM_STEPCACHE_ENABLERS,
    StepCacheBackend,
    enable_dreamzero_stepcache,
    get_stepcache_config,
    get_stepcache_state,
    is_stepcache_active,
)
from omni_cache.backends.stepcache.config import (
    STEP_CACHE_CONFIG_ATTR,
    STEP_CACHE_STATE_ATTR,
    StepCacheConfig,
)
from omni_cache.backends.stepcache.state import StepCacheState

STEP_CACHE_DIT_CONFIG_ATTR = STEP_CACHE_CONFIG_ATTR
STEP_CACHE_DIT_STATE_ATTR = STEP_CACHE_STATE_ATTR
CUSTOM_STEP_CACHE_DIT_ENABLERS = CUSTOM_STEPCACHE_ENABLERS
StepCacheDiTBackend = StepCacheBackend
StepCacheDiTConfig = StepCacheConfig
StepCacheDiTState = StepCacheState
enable_dreamzero_step_cache_dit = enable_dreamzero_stepcache
get_step_cache_dit_config = get_stepcache_config
get_step_cache_dit_state = get_stepcache_state
is_step_cache_dit_active = is_stepcache_active

__all__ = [
    "CUSTOM_STEPCACHE_ENABLERS",
    "CUSTOM_STEP_CACHE_DIT_ENABLERS",
    "STEP_CACHE_CONFIG_ATTR",
    "STEP_CACHE_DIT_CONFIG_ATTR",
    "STEP_CACHE_DIT_STATE_ATTR",
    "STEP_CACHE_STATE_ATTR",
    "StepCacheBackend",
    "StepCacheConfig",
    "StepCacheDiTBackend",
    "StepCacheDiTConfig",
    "StepCacheDiTState",
    "StepCacheState",
    "enable_dreamzero_step_cache_dit",
    "enable_dreamzero_stepcache",
    "get_step_cache_dit_config",
    "get_step_cache_dit_state",
    "get_stepcache_config",
    "get_stepcache_state",
    "is_step_cache_dit_active",
    "is_stepcache_active",
]
