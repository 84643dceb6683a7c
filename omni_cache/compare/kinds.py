"""What is compared: the kinds of caching, and the settings of each.

A new strategy needs a line in `GRID`; without one it takes part with its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from omni_cache.strategies import STRATEGIES, Plan, Strategy
from omni_cache.strategies.calibrated import CalibratedStrategy
from omni_cache.strategies.calibrations import Calibration

Family = Literal["uncached", "omni-cache", "diffusers", "cache-dit"]
Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One point of a kind: the flags that are special to it, and all of them.

    ``forecast`` is what the point is drawn with, a line of its own.
    """

    label: str
    flags: Flags
    forecast: str = "hold"


@dataclass(frozen=True)
class Kind:
    """What runs in a process of its own."""

    family: Family
    name: str
    settings: Sequence[Setting]


GRID: dict[str, Sequence[Flags]] = {
    "teacache": [{"rel_l1_thresh": each} for each in (0.1, 0.2, 0.3)],
    "magcache": [{"threshold": each, "retention_ratio": 0.1} for each in (0.1, 0.2, 0.4)],
    "first_block_cache": [{"threshold": each} for each in (0.1, 0.2, 0.3)],
    "dbcache": [
        {"residual_diff_threshold": each, "fn_compute_blocks": 1, "max_warmup_steps": 4}
        for each in (0.1, 0.2, 0.3)
    ],
    "taylorseer": [{"cache_interval": each} for each in (2, 3, 5)],
    "seacache": [{"threshold": each} for each in (0.1, 0.2, 0.4)],
    "easycache": [{"threshold": each} for each in (0.02, 0.05, 0.1)],
    "dicache": [{"threshold": each} for each in (0.2, 0.3, 0.4, 0.6)],
    "stepcache": [{"sim_thresholds": each} for each in ((0.99, 0.97), (0.97, 0.95), (0.95, 0.93))],
}
"""Flags of each strategy's settings, from cautious to fast."""

FORECASTS = ("hold", "newton")
"""What every strategy is tried with, besides the forecast that it has by default."""

PEER_GRID: dict[tuple[Family, str], Sequence[Flags]] = {
    ("diffusers", "FirstBlockCache"): GRID["first_block_cache"],
    ("diffusers", "MagCache"): [{**each, "max_skip_steps": 5} for each in GRID["magcache"]],
    ("diffusers", "TaylorSeer"): [{"cache_interval": each} for each in (2, 3, 5)],
    ("cache-dit", "DBCache"): GRID["dbcache"],
    ("cache-dit", "DBCache + TaylorSeer"): GRID["dbcache"],
}
"""The same thresholds for the peers, so that equal rules can be compared point by point."""

_PACKAGES = {"diffusers": "diffusers", "cache-dit": "cache_dit"}


def strategy_kinds(calibrations: Mapping[str, Calibration]) -> list[Kind]:
    """Every built-in strategy, with every forecast at every setting."""
    kinds = []
    for name, strategy in STRATEGIES.items():
        own = {"calibration": calibrations[name]} if name in calibrations else {}
        settings = [
            Setting(_label(flags), {**flags, **own, "cache": name, "forecast": forecast}, forecast)
            for forecast in dict.fromkeys((*FORECASTS, str(strategy.forecast)))
            for flags in GRID.get(name, [{}])
        ]
        kinds.append(Kind("omni-cache", strategy.__name__, settings))
    return kinds


def peer_kinds() -> list[Kind]:
    """The peers that are installed."""
    return [
        Kind(family, name, [Setting(_label(flags), flags, _forecast_of(name)) for flags in grid])
        for (family, name), grid in PEER_GRID.items()
        if find_spec(_PACKAGES[family]) is not None
    ]


def plan_kind(plan: Plan) -> Kind:
    """A tuned plan, at all its points."""
    settings = [
        Setting(f"{point.computed_steps} computed", {"cache": plan.at_point(place)})
        for place, point in enumerate(plan.frontier)
    ]
    return Kind("omni-cache", "Plan", settings)


def fewer_steps(counts: Sequence[int]) -> Kind:
    """The uncached pipeline with other numbers of steps."""
    return Kind("uncached", "fewer steps", [Setting(f"{n} steps", {"steps": n}) for n in counts])


def needs_calibration(strategy: type[Strategy]) -> bool:
    """Whether a strategy decides by numbers of the model."""
    return issubclass(strategy, CalibratedStrategy)


def _forecast_of(peer: str) -> str:
    return "taylor" if "TaylorSeer" in peer else "hold"


def _label(flags: Flags) -> str:
    # What is the same at every setting goes without saying.
    flag, value = next(iter(flags.items()), ("defaults", ""))
    return f"{flag} {value}".strip()
