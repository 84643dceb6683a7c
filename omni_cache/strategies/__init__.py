"""The caching strategies, by the name that users write."""

from omni_cache.strategies.base import BoundStrategy, Decision, Gate, Step, Strategy
from omni_cache.strategies.magcache import MagCacheConfig
from omni_cache.strategies.teacache import TeaCacheConfig

STRATEGIES: dict[str, type[Strategy]] = {
    config.name: config for config in (TeaCacheConfig, MagCacheConfig)
}

__all__ = [
    "STRATEGIES",
    "BoundStrategy",
    "Decision",
    "Gate",
    "MagCacheConfig",
    "Step",
    "Strategy",
    "TeaCacheConfig",
]
