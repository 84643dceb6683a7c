"""The backend cache-dit under the name of its module in older releases of vLLM-Omni."""

from omni_cache.backends.cachedit import CUSTOM_DIT_ENABLERS, CacheDiTBackend, cache_summary
from omni_cache.backends.cachedit.backend import enable_cache_for_dit
from omni_cache.backends.cachedit.model_specific import enable_cache_for_wan22

__all__ = [
    "CUSTOM_DIT_ENABLERS",
    "CacheDiTBackend",
    "cache_summary",
    "enable_cache_for_dit",
    "enable_cache_for_wan22",
]
