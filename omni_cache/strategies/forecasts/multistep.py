"""Forecasts by multistep methods: slopes, integrated from the last computed step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from omni_cache.strategies.base import Forecast, Row, Time
from omni_cache.strategies.forecasts.polynomial import Ordered, combined, units

BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""The coefficients of the Adams-Bashforth methods, for the newest slope first."""


@dataclass(frozen=True)
class Adams(Ordered):
    """AB-Cache: the Adams-Bashforth method, with differences for slopes.

    ``r = r_0 + k (3/2 d_0 - 1/2 d_1)`` for order 2, with ``k`` the steps since the last computed
    one and ``d_i = (r_i - r_(i+1)) / N_i``, ``N_i`` steps between the two.

    "AB-Cache: Training-Free Acceleration of Diffusion Models via Adams-Bashforth Cached Feature
    Reuse", 2025, https://arxiv.org/abs/2504.10540.
    """

    order: int = 2

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """The last computed residual, and the slopes."""
        rows = units(len(kept))
        k = now.index - kept[0].index
        gaps = [new.index - old.index for new, old in pairwise(kept)]
        slopes = [
            combined((1 / gap, -1 / gap), each)
            for gap, each in zip(gaps, pairwise(rows), strict=True)
        ]
        if not slopes:
            return rows[0]
        return combined((1.0, *(k * b for b in BASHFORTH[len(slopes) - 1])), [rows[0], *slopes])


@dataclass(frozen=True)
class FoCa(Forecast):
    """FoCa as cache-dit computes it: Heun's method, from the last computed step over all others.

    ``r(k) = r_0 + h/2 ((r_0 - r_1) + (r(k-1) - r(k-2)))`` for k = 1, 2, ... steps after the last
    computed one, with ``h = k`` up to 3 and ``h = 9/k`` from there on, which draws far forecasts
    back to ``r_0``. Here ``r(0) = r_0``, and ``r(-1)`` is what was said of the step before it: a
    forecast of this kind, or a residual.

    The paper takes slopes per step; cache-dit takes ``r_0 - r_1`` whatever the gap between the two.
    A linear series is therefore met exactly where computed steps lie next to each other, and
    overshot where they lie apart.

    Zheng et al., "Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion
    Transformers", 2025, https://arxiv.org/abs/2508.16211; https://github.com/vipshop/cache-dit.
    """

    depth: ClassVar[int] = 3
    feeds_back: ClassVar[bool] = True

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """The recurrence, run on unit vectors from the last computed step to ``now``."""
        rows = units(len(kept))
        if len(rows) == 1:
            return rows[0]
        anchor, before, behind = rows[0], rows[1], rows[-1]
        row = anchor
        for k in range(1, now.index - kept[0].index + 1):
            half = min(k, 9 / k) / 2
            scales = (1 + half, -half, half, -half)
            behind, row = row, combined(scales, (anchor, before, row, behind))
        return row
