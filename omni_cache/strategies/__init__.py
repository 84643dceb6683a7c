"""The caching strategies, by the name that users write."""

from omni_cache.strategies.base import Forecast, Gate, Signal, Time, Verdict
from omni_cache.strategies.dbcache import DBCache
from omni_cache.strategies.easycache import EasyCache
from omni_cache.strategies.firstblockcache import FirstBlockCache
from omni_cache.strategies.magcache import MagCache
from omni_cache.strategies.seacache import SeaCache
from omni_cache.strategies.stepcache import StepCache
from omni_cache.strategies.strategy import Guard, Policy, Strategy
from omni_cache.strategies.teacache import TeaCache

STRATEGIES: dict[str, type[Strategy]] = {
    each.name: each
    for each in (TeaCache, MagCache, FirstBlockCache, DBCache, SeaCache, StepCache, EasyCache)
}

__all__ = [
    "STRATEGIES",
    "DBCache",
    "EasyCache",
    "FirstBlockCache",
    "Forecast",
    "Gate",
    "Guard",
    "MagCache",
    "Policy",
    "SeaCache",
    "Signal",
    "StepCache",
    "Strategy",
    "TeaCache",
    "Time",
    "Verdict",
]
