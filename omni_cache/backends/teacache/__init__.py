"""TeaCache under the names of ``vllm_omni.diffusion.cache.teacache``."""

from omni_cache.backends.teacache.backend import TeaCacheBackend
from omni_cache.backends.teacache.config import TeaCacheConfig
from omni_cache.backends.teacache.extractors import CacheContext, register_extractor
from omni_cache.backends.teacache.hook import TeaCacheHook, apply_teacache_hook
from omni_cache.backends.teacache.state import TeaCacheState

__all__ = [
    "CacheContext",
    "TeaCacheBackend",
    "TeaCacheConfig",
    "TeaCacheHook",
    "TeaCacheState",
    "apply_teacache_hook",
    "register_extractor",
]
