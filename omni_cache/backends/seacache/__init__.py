"""SeaCache, under the names of ``vllm_omni.diffusion.cache.seacache``."""

from omni_cache.backends.seacache.backend import SeaCacheBackend
from omni_cache.backends.seacache.config import SeaCacheConfig
from omni_cache.backends.seacache.hook import SeaCacheRootHook, apply_sea_cache_hook
from omni_cache.backends.seacache.state import SeaCacheState

__all__ = [
    "SeaCacheBackend",
    "SeaCacheConfig",
    "SeaCacheRootHook",
    "SeaCacheState",
    "apply_sea_cache_hook",
]
