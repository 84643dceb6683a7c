"""Caching for whole pipelines and bare modules: enable, disable, refresh, summary."""

from omni_cache.pipelines.enable import (
    disable,
    enable,
    enabled_flags,
    is_enabled,
    refresh,
    states_of,
    summary,
)

__all__ = ["disable", "enable", "enabled_flags", "is_enabled", "refresh", "states_of", "summary"]
