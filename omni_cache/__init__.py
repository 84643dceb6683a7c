"""omni-cache: a residual cache for diffusion transformers, built as a ``torch.compile`` backend."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from omni_cache import calibration
    from omni_cache.backend import omni_cache_backend
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
    from omni_cache.capture.extractor import CacheContext, register_extractor
    from omni_cache.deployment import export
    from omni_cache.errors import UncachedWarning
    from omni_cache.explanation import Explanation, explain
    from omni_cache.passes import RegionError
    from omni_cache.pipelines import disable, enable, refresh, summary
    from omni_cache.runtime.contexts import branch, generation
    from omni_cache.strategies import (
        DBCache,
        DiCache,
        EasyCache,
        FirstBlockCache,
        MagCache,
        Plan,
        SeaCache,
        StepCache,
        TaylorSeer,
        TeaCache,
        register_strategy,
    )
    from omni_cache.strategies.forecasts import register_forecast
    from omni_cache.tuning import tune

# Loaded on first use: importing the package costs little more than importing torch.
_HOMES = {
    "CacheBackend": "omni_cache.backends.base",
    "CacheContext": "omni_cache.capture.extractor",
    "DBCache": "omni_cache.strategies",
    "DiCache": "omni_cache.strategies",
    "EasyCache": "omni_cache.strategies",
    "ExactProjectionCache": "omni_cache.backends.exact_projection_cache",
    "Explanation": "omni_cache.explanation",
    "FirstBlockCache": "omni_cache.strategies",
    "MagCache": "omni_cache.strategies",
    "Plan": "omni_cache.strategies",
    "PromptEmbedCache": "omni_cache.backends.prompt_embed_cache",
    "RegionError": "omni_cache.passes",
    "SeaCache": "omni_cache.strategies",
    "StepCache": "omni_cache.strategies",
    "TaylorSeer": "omni_cache.strategies",
    "TeaCache": "omni_cache.strategies",
    "TeaCacheBackend": "omni_cache.backends.teacache",
    "TeaCacheConfig": "omni_cache.backends.teacache",
    "UncachedWarning": "omni_cache.errors",
    "apply_teacache_hook": "omni_cache.backends.teacache",
    "branch": "omni_cache.runtime.contexts",
    "calibration": "omni_cache.calibration",
    "disable": "omni_cache.pipelines",
    "enable": "omni_cache.pipelines",
    "explain": "omni_cache.explanation",
    "export": "omni_cache.deployment",
    "generation": "omni_cache.runtime.contexts",
    "install_prompt_embed_cache": "omni_cache.backends.prompt_embed_cache",
    "omni_cache_backend": "omni_cache.backend",
    "refresh": "omni_cache.pipelines",
    "register_extractor": "omni_cache.capture.extractor",
    "register_forecast": "omni_cache.strategies.forecasts",
    "register_strategy": "omni_cache.strategies",
    "resolve_prompt_embed_cache_config": "omni_cache.backends.prompt_embed_cache",
    "summary": "omni_cache.pipelines",
    "tune": "omni_cache.tuning",
    "uninstall_prompt_embed_cache": "omni_cache.backends.prompt_embed_cache",
}

__all__ = [
    "CacheBackend",
    "CacheContext",
    "DBCache",
    "DiCache",
    "EasyCache",
    "ExactProjectionCache",
    "Explanation",
    "FirstBlockCache",
    "MagCache",
    "Plan",
    "PromptEmbedCache",
    "RegionError",
    "SeaCache",
    "StepCache",
    "TaylorSeer",
    "TeaCache",
    "TeaCacheBackend",
    "TeaCacheConfig",
    "UncachedWarning",
    "apply_teacache_hook",
    "branch",
    "calibration",
    "disable",
    "enable",
    "explain",
    "export",
    "generation",
    "install_prompt_embed_cache",
    "omni_cache_backend",
    "refresh",
    "register_extractor",
    "register_forecast",
    "register_strategy",
    "resolve_prompt_embed_cache_config",
    "summary",
    "tune",
    "uninstall_prompt_embed_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = import_module(_HOMES[name])
    value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
