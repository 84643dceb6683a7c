"""MagCache, under the names of ``vllm_omni.diffusion.cache.magcache``."""

from omni_cache.backends.magcache.backend import MagCacheBackend
from omni_cache.backends.magcache.config import MagCacheConfig
from omni_cache.backends.magcache.hook import (
    MagCacheBlockHook,
    MagCacheHeadHook,
    apply_mag_cache_hook,
)
from omni_cache.backends.magcache.state import MagCacheState
from omni_cache.backends.magcache.strategy import (
    Flux2MagCacheStrategy,
    FluxMagCacheStrategy,
    MagCacheStrategy,
    MagCacheStrategyRegistry,
    get_strategy,
    register_strategy,
)

__all__ = [
    "Flux2MagCacheStrategy",
    "FluxMagCacheStrategy",
    "MagCacheBackend",
    "MagCacheBlockHook",
    "MagCacheConfig",
    "MagCacheHeadHook",
    "MagCacheState",
    "MagCacheStrategy",
    "MagCacheStrategyRegistry",
    "apply_mag_cache_hook",
    "get_strategy",
    "register_strategy",
]
