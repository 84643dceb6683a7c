"""Strategies by name: those that come with the package, and those that users register.

Knows how a name and its flags become a strategy, and says what is wrong where they do not.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omni_cache.strategies.base import one_of, require
from omni_cache.strategies.dbcache import DBCache
from omni_cache.strategies.dicache import DiCache
from omni_cache.strategies.easycache import EasyCache
from omni_cache.strategies.firstblockcache import FirstBlockCache
from omni_cache.strategies.magcache import MagCache
from omni_cache.strategies.plan import Plan
from omni_cache.strategies.seacache import SeaCache
from omni_cache.strategies.stepcache import StepCache
from omni_cache.strategies.strategy import Strategy
from omni_cache.strategies.taylorseer import TaylorSeer
from omni_cache.strategies.teacache import TeaCache

NO_CACHE = "none"
PLAN_SUFFIX = ".json"

STRATEGIES: dict[str, type[Strategy]] = {
    each.name: each
    for each in (
        TeaCache,
        MagCache,
        FirstBlockCache,
        DBCache,
        TaylorSeer,
        SeaCache,
        StepCache,
        EasyCache,
        DiCache,
    )
}


def register_strategy(cls: type[Strategy]) -> type[Strategy]:
    """Have ``cache=`` accept a strategy by the class's ``name``, with its fields as flags.

    A class that is defined anew takes the place of the one before.

    Args:
        cls: a frozen, keyword-only dataclass over :class:`Strategy`.

    Returns:
        ``cls``, so that this serves as a decorator above ``@dataclass``.

    Raises:
        TypeError: ``cls`` is no class over Strategy, an abstract one, or no dataclass.
        ValueError: its name is no identifier, or belongs to another strategy.
    """
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise TypeError(f"cls={cls!r} is not allowed; cls must be a class over Strategy")
    missing = sorted(cls.__abstractmethods__)
    if missing:
        raise TypeError(f"cls={cls.__name__} is not allowed; it lacks {', '.join(missing)}")
    if "__dataclass_fields__" not in vars(cls):
        raise TypeError(
            f"cls={cls.__name__} is not allowed; put @dataclass(frozen=True, kw_only=True) above it"
        )
    name = getattr(cls, "name", None)
    is_name = isinstance(name, str) and name.isidentifier() and name != NO_CACHE
    require(is_name, "name", name, f"an identifier other than {NO_CACHE!r}")
    owner = STRATEGIES.get(cls.name, cls)
    same = (owner.__module__, owner.__qualname__) == (cls.__module__, cls.__qualname__)
    require(same, "name", name, f"another name, as {owner.__qualname__} has this one")
    STRATEGIES[cls.name] = cls
    return cls


def make_strategy(
    cache: Any, flags: Mapping[str, Any], before: Sequence[str] = (), after: Sequence[str] = ()
) -> Strategy | None:
    """The strategy that a name or an object and flags mean; None for ``"none"``.

    Args:
        cache: a name, a strategy whose fields the flags override, or the path of a plan.
        flags: its fields, and whatever stands in ``before`` and ``after``.
        before: flags that are somebody else's; an error lists them before the strategy's.
        after: the same, listed after them.

    Raises:
        ValueError: a name, a flag or its value is not allowed.
    """
    if isinstance(cache, Path) or (isinstance(cache, str) and cache.endswith(PLAN_SUFFIX)):
        cache = _plan(cache)
    kind: type[Strategy] | None = type(cache)
    if not isinstance(cache, Strategy):
        also = "or a strategy object, or the path of a plan (.json)"
        one_of("cache", cache, (*STRATEGIES, NO_CACHE), also)
        kind = STRATEGIES.get(cache)
    fields = () if kind is None else kind.field_names()
    allowed = (*before, *fields, *after)
    for flag in flags:
        if flag not in allowed:
            raise ValueError(_unknown(flag, kind, allowed))
    if kind is None:
        return None
    values = {field: flags[field] for field in fields if field in flags}
    return replace(cache, **values) if isinstance(cache, Strategy) else kind(**values)


def _plan(path: str | Path) -> Plan:
    try:
        return Plan.load(path)
    except OSError as error:
        raise ValueError(
            f"cache={str(path)!r} is not allowed; cache must be the path of a plan that "
            f"omni_cache.tune has made: {error}"
        ) from None


def _unknown(flag: str, kind: type[Strategy] | None, allowed: Sequence[str]) -> str:
    owner = next(
        (n for n, k in STRATEGIES.items() if k is not kind and flag in k.field_names()), None
    )
    message = f"unknown flag {flag!r}"
    if owner is not None:
        message += f" for cache={kind.name if kind else NO_CACHE!r} (it belongs to cache={owner!r})"
    else:
        close = difflib.get_close_matches(str(flag), allowed, n=1)
        message += f", did you mean {close[0]!r}?" if close else ""
    return f"{message}; allowed are: {', '.join(allowed)}"
