"""DiCache's forecast: as far along the line of the last two residuals as a probe has gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from omni_cache.strategies.base import Forecast, Row, Time, is_number, require
from omni_cache.strategies.forecasts.polynomial import Hold


@dataclass(frozen=True)
class Aligned(Forecast):
    """``r = r_1 + g (r_0 - r_1)``, with ``g`` how far the signal has gone, from 1 to ``most``.

    How far it has gone is `Time.progress`. Signals that do not measure it leave that to the steps:
    of those since the last computed step but one, as many as lie between the two are 1.

    Bu et al., "DiCache: Let Diffusion Model Determine Its Own Cache", ICLR 2026,
    https://arxiv.org/abs/2508.17356.
    """

    most: float = 1.5
    depth: ClassVar[int] = 2

    def __post_init__(self) -> None:
        fits = is_number(self.most) and self.most >= 1
        require(fits, "most", self.most, "a finite number >= 1")

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """On the line; the newest where there is no other."""
        if len(kept) < 2:
            return Hold().weights(kept, now)
        newest, older = (each.index for each in kept)
        gone = now.progress
        if gone is None:
            gone = (now.index - older) / (newest - older)
        scale = max(1.0, min(self.most, gone))
        return (scale, 1.0 - scale)
