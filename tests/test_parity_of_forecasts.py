"""Forecasts within DBCache: the same schedules and outputs as cache-dit's calibrators, live."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from cache_dit import DMDCalibratorConfig, FoCaCalibratorConfig, TaylorSeerCalibratorConfig
from cross_section import also
from diffusers_models import CASES
from parity import Found, assert_same, of_cache_dit, ours_of_all

from omni_cache.strategies import Time
from omni_cache.strategies.forecasts import DMD, Hold, Taylor

pytestmark = pytest.mark.slow

STEPS = 20
MODELS = {name: CASES[name].deep for name in ("flux", "qwen_image")}

UNEVEN: dict[str, Any] = {"residual_diff_threshold": 9.0, "max_warmup_steps": 3}
"""Three steps, and then every third; the limit on steps in a row decides."""

EVEN: dict[str, Any] = {
    "residual_diff_threshold": 9.0,
    "max_warmup_steps": 9,
    "warmup_interval": 2,
}
"""Every second step, so that a fit to snapshots at even gaps becomes possible."""


class OneLate(Taylor):
    """TaylorSeer as cache-dit's DBCache runs it.

    Its state is made at the end of the first step, and counts from there, so that differences,
    which the first two steps do not have, come a step later than in a state that counts all steps.
    """

    def weights(self, kept: Sequence[Time], now: Time) -> tuple[float, ...]:
        late = [each._replace(index=each.index - 1) for each in (now, *kept)]
        return super().weights(late[1:], late[0])


class OfCacheDit(DMD):
    """DMD with cache-dit's differences until a fit is possible; see test_forecast_rules.py."""

    def weights(self, kept: Sequence[Time], now: Time) -> tuple[float, ...]:
        if len(kept) < 3:
            return Hold().weights(kept, now)
        slope = (now.index - kept[0].index) / (kept[0].index - kept[1].index)
        return (1 + slope, 0.0, -slope, *[0.0] * (len(kept) - 3))


FORECASTS: dict[str, tuple[dict[str, Any], Any, dict[str, Any], int]] = {
    "taylorseer 1": (
        {"forecast": OneLate(1)},
        TaylorSeerCalibratorConfig(taylorseer_order=1),
        UNEVEN,
        2,
    ),
    "taylorseer 2": (
        {"forecast": OneLate(2)},
        TaylorSeerCalibratorConfig(taylorseer_order=2),
        UNEVEN,
        2,
    ),
    "foca": ({"forecast": "foca"}, FoCaCalibratorConfig(), UNEVEN, 2),
    "dmd": ({"forecast": OfCacheDit()}, DMDCalibratorConfig(), EVEN, 1),
}
"""Flags here, the calibrator there, the schedule, and the most reused steps in a row."""


@cache
def mine(model: str) -> dict[str, Found]:
    """What each forecast leaves here."""
    settings = {
        name: {**schedule, "max_continuous_cached_steps": row, **flags}
        for name, (flags, _, schedule, row) in FORECASTS.items()
    }
    always = {"cache": "dbcache", "fn_compute_blocks": 1}
    every = {name: {**always, **flags} for name, flags in settings.items()}
    return ours_of_all(MODELS[model], STEPS, every)


# The image alone goes on behind the blocks of both; Flux joins its streams on the way.
@pytest.mark.parametrize("model", ["flux", also("qwen_image")])
@pytest.mark.parametrize("forecast", FORECASTS)
def test_a_forecast_within_dbcache_is_the_calibrator_of_cache_dit(
    forecast: str, model: str
) -> None:
    _, calibrator, schedule, row = FORECASTS[forecast]
    span = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0}
    knobs = {**schedule, "max_continuous_cached_steps": row}
    theirs = of_cache_dit(MODELS[model], STEPS, calibrator, **span, **knobs)
    assert_same(mine(model)[forecast], theirs)
