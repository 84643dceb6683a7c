"""The caching strategies, by the name that users write."""

from omni_cache.strategies.base import Forecast, Gate, Signal, Time, Verdict
from omni_cache.strategies.dbcache import DBCache
from omni_cache.strategies.dicache import DiCache
from omni_cache.strategies.easycache import EasyCache
from omni_cache.strategies.firstblockcache import FirstBlockCache
from omni_cache.strategies.magcache import MagCache
from omni_cache.strategies.named import NO_CACHE, STRATEGIES, make_strategy, register_strategy
from omni_cache.strategies.plan import Plan
from omni_cache.strategies.seacache import SeaCache
from omni_cache.strategies.stepcache import StepCache
from omni_cache.strategies.strategy import Guard, Owner, Policy, Schedule, Strategy
from omni_cache.strategies.taylorseer import TaylorSeer
from omni_cache.strategies.teacache import TeaCache

__all__ = [
    "NO_CACHE",
    "STRATEGIES",
    "DBCache",
    "DiCache",
    "EasyCache",
    "FirstBlockCache",
    "Forecast",
    "Gate",
    "Guard",
    "MagCache",
    "Owner",
    "Plan",
    "Policy",
    "Schedule",
    "SeaCache",
    "Signal",
    "StepCache",
    "Strategy",
    "TaylorSeer",
    "TeaCache",
    "Time",
    "Verdict",
    "make_strategy",
    "register_strategy",
]
