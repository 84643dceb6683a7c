"""The interface of ``vllm_omni.diffusion.cache``, on this package's own strategies and runtime.

Code written for it runs unchanged once its imports name this package.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_cache.backends.base import CacheBackend
    from omni_cache.backends.exact_projection_cache import ExactProjectionCache
    from omni_cache.backends.prompt_embed_cache import (
        PromptEmbedCache,
        install_prompt_embed_cache,
        resolve_prompt_embed_cache_config,
        uninstall_prompt_embed_cache,
    )
    from omni_cache.backends.teacache import (
        TeaCacheBackend,
        TeaCacheConfig,
        apply_teacache_hook,
    )
    from omni_cache.capture.extractor import CacheContext

# Loaded on first use, like the names of the package above.
_HOMES = {
    "CacheBackend": "omni_cache.backends.base",
    "CacheContext": "omni_cache.capture.extractor",
    "ExactProjectionCache": "omni_cache.backends.exact_projection_cache",
    "PromptEmbedCache": "omni_cache.backends.prompt_embed_cache",
    "TeaCacheBackend": "omni_cache.backends.teacache",
    "TeaCacheConfig": "omni_cache.backends.teacache",
    "apply_teacache_hook": "omni_cache.backends.teacache",
    "install_prompt_embed_cache": "omni_cache.backends.prompt_embed_cache",
    "resolve_prompt_embed_cache_config": "omni_cache.backends.prompt_embed_cache",
    "uninstall_prompt_embed_cache": "omni_cache.backends.prompt_embed_cache",
}

__all__ = [
    "CacheBackend",
    "CacheContext",
    "ExactProjectionCache",
    "PromptEmbedCache",
    "TeaCacheBackend",
    "TeaCacheConfig",
    "apply_teacache_hook",
    "install_prompt_embed_cache",
    "resolve_prompt_embed_cache_config",
    "uninstall_prompt_embed_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
