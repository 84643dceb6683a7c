"""The backend cache-dit, under the names of ``vllm_omni.diffusion.cache.cachedit``.

config -> engines -> recipes of pipelines -> backend -> runtime of requests
"""

from omni_cache.backends.cachedit.backend import (
    CUSTOM_DIT_ENABLERS,
    CacheDiTBackend,
    CacheDiTEnableResult,
    cache_summary,
    enable_cache_for_dit,
)
from omni_cache.backends.cachedit.config import CacheDiTAdapterConfig, CacheDiTConfig
from omni_cache.backends.cachedit.model_specific import BagelCachedAdapter, SensenovaCachedAdapter
from omni_cache.backends.cachedit.runtime import CacheDiTRequestSpec, RequestScopedCacheDiTRuntime

__all__ = [
    "CUSTOM_DIT_ENABLERS",
    "BagelCachedAdapter",
    "CacheDiTAdapterConfig",
    "CacheDiTBackend",
    "CacheDiTConfig",
    "CacheDiTEnableResult",
    "CacheDiTRequestSpec",
    "RequestScopedCacheDiTRuntime",
    "SensenovaCachedAdapter",
    "cache_summary",
    "enable_cache_for_dit",
]
