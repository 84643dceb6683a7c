"""DMD: the residuals follow a linear map, found in the last of them by its eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Any, ClassVar, NamedTuple

import numpy as np

from omni_cache.strategies.base import Forecast, Matrix, Row, Time, is_count, is_number, require
from omni_cache.strategies.forecasts.polynomial import Hold, Taylor

SNAPSHOTS = 4
"""A mode that oscillates is two numbers, and takes three pairs of snapshots to be found."""


@dataclass(frozen=True)
class DMD(Forecast):
    """Dynamic mode decomposition, as cache-dit's calibrator has it.

    With the snapshots ``y_1 ... y_n`` of computed steps at even gaps, oldest first, ``X = [y_1 ...
    y_(n-1)]`` and ``X' = [y_2 ... y_n]``:

        X = U S V',   A = U' X' V S^-1 = W diag(l) W^-1,   M = V S^-1 W,   b = argmin |X' M b - y_n|
        r = Re(X' M diag(l^k) b)

    with ``k`` the gaps since the last computed step, a fraction between two. ``X'`` stands at the
    left, so that the rest is a row of weights, and all of it follows from the inner products of the
    snapshots: ``X'X = V S^2 V'`` and ``U' X' = S^-1 V' (X' X)``. Modes with less than ``tolerance``
    of the largest singular value are left out. Each sample has its own fit, over all of its
    streams; cache-dit fits each stream alone.

    Without four snapshots at even gaps it is TaylorSeer; where the fit fails, the newest residual
    is held. (In cache-dit 1.5 that TaylorSeer takes the difference from the last computed step but
    one, over the gap to the last one.)

    Schmid, "Dynamic mode decomposition of numerical and experimental data", 2010,
    https://doi.org/10.1017/S0022112010001217; https://github.com/vipshop/cache-dit.

    Attributes:
        depth: how many snapshots are kept.
        order: of TaylorSeer.
        ridge: added to the singular values before they are inverted.
        tolerance: singular values below this share of the largest one are noise.
    """

    depth: int = 6
    order: int = 1
    ridge: float = 1e-8
    tolerance: float = 1e-4
    reads_products: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field, least in (("depth", SNAPSHOTS), ("order", 1)):
            value = getattr(self, field)
            require(is_count(value, least), field, value, f"an integer >= {least}")
        for field in ("ridge", "tolerance"):
            value = getattr(self, field)
            require(is_number(value) and value >= 0, field, value, "a finite number >= 0")

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """TaylorSeer's, over the residuals that it takes."""
        row = Taylor(self.order).weights(kept[: self.order + 1], now)
        return row + (0.0,) * (len(kept) - len(row))

    def rows(self, kept: Sequence[Time], now: Time, products: Sequence[Matrix]) -> Sequence[Row]:
        """Each sample's, from its fit to the newest snapshots at even gaps."""
        steps = [each.index for each in kept]
        gaps = [new - old for new, old in pairwise(steps)]
        count = 1 + len(list(takewhile(lambda gap: gap == gaps[0], gaps)))
        if count < SNAPSHOTS:
            return [self.weights(kept, now)]
        ahead = (now.index - steps[0]) / gaps[0]
        unfit = Hold().weights(kept, now)
        rows = []
        for gram in products:
            found = _fit(tuple(row[:count] for row in gram[:count]), self.ridge, self.tolerance)
            row = None if found is None else found.at(ahead)
            rows.append(unfit if row is None else row + (0.0,) * (len(kept) - len(row)))
        return rows


class _Fit(NamedTuple):
    """``M``, ``l`` and ``b`` of a sample; hence the weights at any time after its snapshots."""

    modes: Any
    eigenvalues: Any
    amplitudes: Any

    def at(self, gaps: float) -> Row | None:
        """The weights of all snapshots but the oldest, newest first; None where any is infinite."""
        with np.errstate(all="ignore"):
            row = (self.modes @ (self.eigenvalues**gaps * self.amplitudes)).real[::-1]
        return tuple(row.tolist()) if np.isfinite(row).all() else None


@lru_cache(maxsize=256)
def _fit(gram: Matrix, ridge: float, tolerance: float) -> _Fit | None:
    """The fit that all steps up to the next computed one share; None where there is none."""
    products = np.array(gram)[::-1, ::-1]  # oldest first
    before, across, after = products[:-1, :-1], products[:-1, 1:], products[1:, 1:]
    try:
        squares, vectors = np.linalg.eigh(before)
        values = np.sqrt(squares.clip(0.0))
        kept = values > tolerance * values[-1]
        if not kept.any():
            return None
        v, s = vectors[:, kept], values[kept]
        modes, eigen = v / (s + ridge), (v / s).T @ across @ v / (s + ridge)
        eigenvalues, w = np.linalg.eig(eigen)
        modes = modes @ w
        # |X' x| = |root x|: the least squares of as few rows as there are snapshots.
        spread, axes = np.linalg.eigh(after)
        root = np.sqrt(spread.clip(0.0))[:, None] * axes.T
        amplitudes = np.linalg.lstsq(root @ modes, root[:, -1], rcond=None)[0]
    except np.linalg.LinAlgError:
        return None
    return _Fit(modes, eigenvalues.astype(complex), amplitudes)
