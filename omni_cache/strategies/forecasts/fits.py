"""Forecasts by fitted weights: fitted to the computed steps as they come, or to a model before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_cache.strategies.base import (
    Forecast,
    Row,
    Time,
    finite_numbers,
    is_count,
    is_number,
    require,
)
from omni_cache.strategies.forecasts.polynomial import Hold, Newton, combined

PUBLISHED_STEPS = 50
"""The number of steps that Spectrum's code divides by, whatever their number is."""


@dataclass(frozen=True)
class Chebyshev(Forecast):
    """Spectrum: ridge regression on Chebyshev polynomials of time, mixed with a straight line.

    ``r = share T(x) (P'P + ridge I)^-1 P' R + (1 - share) (r_0 + k (r_0 - r_1) / N)``, with ``T``
    the polynomials ``T_0 ... T_degree``, ``P`` their values at the computed steps, and ``x = 2 t /
    total - 1``, which runs from -1 to 1 over the generation. The published code takes 50 for the
    ``total`` of any schedule, which reaches 1 in no other; here it is the generation's own number
    of steps, and 50 only where nobody has said it. The published code also keeps every computed
    step; here ``depth`` bounds them. The paper has no line (``share=1``), which its authors added
    later. The ridge draws far forecasts towards zero.

    "Adaptive Spectral Feature Forecasting for Diffusion Sampling Acceleration", CVPR 2026,
    https://arxiv.org/abs/2603.01623.
    """

    degree: int = 4
    ridge: float = 0.1
    share: float = 0.5
    depth: int = 10

    def __post_init__(self) -> None:
        for field, least in (("degree", 1), ("depth", 2)):
            value = getattr(self, field)
            require(is_count(value, least), field, value, f"an integer >= {least}")
        fits = is_number(self.ridge) and self.ridge > 0
        require(fits, "ridge", self.ridge, "a finite number > 0")
        fits = is_number(self.share) and 0 <= self.share <= 1
        require(fits, "share", self.share, "a number from 0 to 1")

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """The regression's and the line's, mixed."""
        steps = np.array([now.index, *(each.index for each in kept)])
        x = 2 * steps / (now.total or PUBLISHED_STEPS) - 1
        target, *rows = np.polynomial.chebyshev.chebvander(x, self.degree)
        design = np.stack(rows)
        gram = design.T @ design + self.ridge * np.eye(self.degree + 1)
        regression = tuple((target @ np.linalg.solve(gram, design.T)).tolist())
        line = Newton(1, "step").weights(kept[:2], now) + (0.0,) * (len(kept) - 2)
        return combined((self.share, 1 - self.share), (regression, line))


class Fitted(Forecast):
    """Weights that were fitted to a model, one row for each step.

    The rows of L2P (https://arxiv.org/abs/2604.26365) and of ScalingCache can be given so. A step
    without a row, or with one over more residuals than are kept, holds the newest one.

    Args:
        rows: for each step the weights, newest residual first: a mapping of step indices, or a
            sequence from step 0 on, in which None is no row.

    Raises:
        ValueError: ``rows`` is something else.
    """

    def __init__(self, rows: Mapping[int, Sequence[float]] | Sequence[Any]) -> None:
        is_mapping = isinstance(rows, Mapping)
        found = rows.items() if isinstance(rows, Mapping) else enumerate(rows)
        self._rows: dict[int, Row] = {}
        for step, row in found:
            require(is_count(step, 0), "forecast", rows, "weights by steps, integers >= 0")
            if row is not None or is_mapping:
                allowed = "a sequence of at least one finite number"
                self._rows[int(step)] = finite_numbers(f"forecast[{step}]", row, allowed)
        require(len(self._rows) > 0, "forecast", rows, "weights of at least one step")

    def __repr__(self) -> str:
        return f"Fitted({self._rows})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fitted) and self._rows == other._rows

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._rows.items())))

    @property
    def depth(self) -> int:
        """The length of the longest row."""
        return max(map(len, self._rows.values()))

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """The row of this step."""
        row = self._rows.get(now.index, ())
        if not 0 < len(row) <= len(kept):
            return Hold().weights(kept, now)
        return row + (0.0,) * (len(kept) - len(row))
