"""Forecasts within DBCache: the same schedules and outputs as cache-dit's calibrators, live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cache_dit
import pytest
import torch
from cache_dit import (
    DBCacheConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    TaylorSeerCalibratorConfig,
)
from test_parity_of_spans import MODELS, STEPS, Found, assert_same, denoise, ours

from omni_cache.strategies import Time
from omni_cache.strategies.forecasts import DMD, Hold, Taylor

pytestmark = pytest.mark.slow

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


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def of_cache_dit(name: str, calibrator: Any, **config: Any) -> Found:
    model = MODELS[name].build()
    settings = DBCacheConfig(num_inference_steps=STEPS, enable_separate_cfg=False, **config)
    cache_dit.enable_cache(model, cache_config=settings, calibrator_config=calibrator)
    try:
        outputs = denoise(model, MODELS[name])
        stats, *_ = cache_dit.summary(model, logging=False)
        return [step not in stats.cached_steps for step in range(STEPS)], outputs
    finally:
        cache_dit.disable_cache(model)


@pytest.mark.parametrize("model", ["flux", "qwen_image"])
@pytest.mark.parametrize("forecast", FORECASTS)
def test_a_forecast_within_dbcache_is_the_calibrator_of_cache_dit(
    forecast: str, model: str
) -> None:
    flags, calibrator, schedule, row = FORECASTS[forecast]
    knobs = {**schedule, "max_continuous_cached_steps": row}
    mine = ours(MODELS[model], cache="dbcache", fn_compute_blocks=1, **knobs, **flags)
    theirs = of_cache_dit(model, calibrator, Fn_compute_blocks=1, Bn_compute_blocks=0, **knobs)
    assert_same(mine, theirs)
