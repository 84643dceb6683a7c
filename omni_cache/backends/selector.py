"""From a name to a cache backend, and what the environment says of both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from omni_cache.backends.base import CacheBackend
from omni_cache.backends.config import DiffusionCacheConfig

NO_BACKEND = "none"

_HOMES = {
    "cache_dit": ("cachedit", "CacheDiTBackend"),
    "tea_cache": ("teacache", "TeaCacheBackend"),
    "mag_cache": ("magcache", "MagCacheBackend"),
    "sea_cache": ("seacache", "SeaCacheBackend"),
    "step_cache": ("stepcache", "StepCacheBackend"),
}
_ALIASES = {"stepcache": "step_cache", "step_cache_dit": "step_cache"}


def get_cache_backend(cache_backend: str | None, cache_config: Any) -> CacheBackend | None:
    """A new backend of a name.

    Args:
        cache_backend: "cache_dit", "tea_cache", "mag_cache", "sea_cache", "step_cache", or its
            aliases "stepcache" and "step_cache_dit"; None or "none" for no cache.
        cache_config: a dictionary for :meth:`DiffusionCacheConfig.from_dict`; what is none is
            passed on as it is.

    Raises:
        ValueError: the name is none of these.
    """
    if cache_backend is None or cache_backend == NO_BACKEND:
        return None
    name = _ALIASES.get(cache_backend, cache_backend)
    if name not in _HOMES:
        listed = ", ".join(map(repr, _HOMES))
        raise ValueError(f"Unsupported cache backend: {cache_backend}. Supported are: {listed}")
    if isinstance(cache_config, dict):
        cache_config = DiffusionCacheConfig.from_dict(cache_config, stacklevel=2)
    module, class_name = _HOMES[name]
    backend: CacheBackend = getattr(import_module(f"omni_cache.backends.{module}"), class_name)(
        cache_config
    )
    return backend


def resolve_cache_backend(arguments: Mapping[str, Any]) -> str:
    """The name of the backend that a runner's keyword arguments ask for.

    Only where they have no key "cache_backend" the environment is asked, in letters of either case:
    ``DIFFUSION_CACHE_BACKEND``, else the older ``DIFFUSION_CACHE_ADAPTER``.
    """
    if "cache_backend" in arguments:
        value: str | None = arguments["cache_backend"]
        return NO_BACKEND if value is None else value
    variables = ("DIFFUSION_CACHE_BACKEND", "DIFFUSION_CACHE_ADAPTER")
    named = [os.environ[each] for each in variables if os.environ.get(each)]
    return named[0].lower() if named else NO_BACKEND
