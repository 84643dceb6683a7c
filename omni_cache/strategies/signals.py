"""Signals: what is compared between calls, and the sums that the comparison is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from omni_cache.kernels import number_dtype, rel_l1, sea_distance
from omni_cache.strategies.base import NOTHING, Around, Made, require

LEAST_SIGMA = 1e-6
"""SeaCache's filter takes sigmas for no less than this, and for no more than 1 less this."""


class OfTwoCalls:
    """What signals have in common, unless they say otherwise: they compare two calls."""

    looks_back: ClassVar[int] = 0

    def look_back(self, computed: Sequence[Made]) -> Tensor:
        """Finds nothing."""
        return torch.empty(0)

    def progress(self, sums: Sequence[float]) -> float | None:
        """Not measured."""
        return None


@dataclass(frozen=True)
class RelativeL1(OfTwoCalls):
    """``mean|now - before| / (mean|before| + 1e-8)``, the distance of TeaCache."""

    against: Literal["last call", "last computed call"] = "last call"
    sums: ClassVar[int] = 3
    reads_values: ClassVar[bool] = False

    def measure(
        self, now: Tensor, before: Tensor, along: Sequence[Tensor], around: Around = NOTHING
    ) -> Tensor:
        """``[sum|now - before|, sum|before|, elements, *means]`` in one launch."""
        return rel_l1(_comparable(now), _comparable(before), along)

    def distance(self, sums: Sequence[float]) -> float:
        """The relative distance; NaN for empty signals."""
        moved, size, count = sums
        return (moved / count) / (size / count + 1e-8) if count else float("nan")


class BySample(OfTwoCalls):
    """The sums and the distance of signals that are compared sample by sample."""

    sums: ClassVar[int] = 2

    def distance(self, sums: Sequence[float]) -> float:
        """The mean over the samples."""
        total, samples = sums
        return total / samples


@dataclass(frozen=True)
class FilteredL1(BySample):
    """The distance of SeaCache: relative L1, by sample, of what a filter leaves of the latents.

    The filter knows how much noise there is at a frequency and a sigma (flow matching: latents are
    ``(1 - sigma) image + sigma noise``). Sigma is the timestep, or a thousandth where timesteps go
    up to 1000, or what is missing to 1 where they rise. Without a timestep the distance is NaN.

    Attributes:
        power: exponent of the power that clean latents have at a frequency.
        grid: height and width, or frames, height and width, of signals of shape (B, S, C), which
            are otherwise filtered along S. Others, (B, C, ...), are filtered along all behind C.
    """

    power: float
    grid: tuple[int, ...] | None = None
    against: ClassVar[Literal["last call"]] = "last call"
    reads_values: ClassVar[bool] = True

    def measure(
        self, now: Tensor, before: Tensor, along: Sequence[Tensor], around: Around = NOTHING
    ) -> Tensor:
        """``[sum of distances, samples, *means]`` by one operator.

        Raises:
            ValueError: ``grid`` has another number of elements than the signal.
        """
        assert around.times is not None
        axes = list(range(2, now.dim())) if now.dim() > 3 else [1]
        now, before = _comparable(now), _comparable(before)
        if self.grid is not None and now.dim() == 3:
            size, tokens = math.prod(self.grid), now.shape[1]
            require(size == tokens, "grid", self.grid, f"of {tokens} tokens, as the signal is")
            now, before = (
                each.reshape(len(each), *self.grid, each.shape[2]) for each in (now, before)
            )
            axes = list(range(1, now.dim() - 1))
        return sea_distance(now, before, _sigmas(around.times), axes, self.power, along)


@dataclass(frozen=True)
class ResultSimilarity(BySample):
    """How alike the results of the last two computed calls are: their cosine, the mean by sample.

    It is known before a call begins. 1 is no change, so that a gate reuses above a threshold.
    """

    against: ClassVar[Literal["results"]] = "results"
    reads_values: ClassVar[bool] = False
    looks_back: ClassVar[int] = 2

    def look_back(self, computed: Sequence[Made]) -> Tensor:
        """``[sum of cosines, samples]``."""
        results = (made.residuals[0] for made in computed)
        one, other = (each.reshape(len(each), -1).float() for each in results)
        cosines = torch.nn.functional.cosine_similarity(one, other)
        dtype = number_dtype(one.device)
        samples = torch.full((), len(one), dtype=dtype, device=one.device)
        return torch.stack([cosines.sum().to(dtype), samples])

    def measure(
        self, now: Tensor, before: Tensor, along: Sequence[Tensor], around: Around = NOTHING
    ) -> Tensor:
        """``[sum of cosines, samples, *means]``, of which ``now`` has what was found."""
        return torch.stack([*now, *(each.to(now.dtype).mean() for each in along)])


@dataclass(frozen=True)
class PredictedChange(OfTwoCalls):
    """How much the result will change: as much for what the latents move as it did before.

    ``(|v_0 - v_1| / |x_0 - x_1|) |x - x'| / |v_0|`` with latents ``x``, those of the last call
    ``x'``, and latents and results of the last two computed calls. Residuals are ``v - x``.
    """

    against: ClassVar[Literal["last call"]] = "last call"
    sums: ClassVar[int] = 4
    reads_values: ClassVar[bool] = False
    looks_back: ClassVar[int] = 2

    def look_back(self, computed: Sequence[Made]) -> Tensor:
        """``[sum|v_0|, sum|v_0 - v_1|, sum|x_0 - x_1|]``."""
        newest, older = computed
        assert newest.signal is not None
        assert older.signal is not None
        x0, x1 = map(_comparable, (newest.signal, older.signal))
        v0, v1 = ((x + made.residuals[0]).float() for x, made in ((x0, newest), (x1, older)))
        results, entered = rel_l1(v1, v0), rel_l1(x0, x1)
        return torch.stack([results[1], results[0], entered[0]])

    def measure(
        self, now: Tensor, before: Tensor, along: Sequence[Tensor], around: Around = NOTHING
    ) -> Tensor:
        """``[sum|x - x'|, sum|v_0|, sum|v_0 - v_1|, sum|x_0 - x_1|, *means]``."""
        assert around.past is not None
        moved = rel_l1(_comparable(now), _comparable(before), along)
        return torch.cat([moved[:1], around.past, moved[3:]])

    def distance(self, sums: Sequence[float]) -> float:
        """The relative change; NaN where the latents have not moved before."""
        moved, size, changed, entered = sums
        scale = entered * size
        return changed * moved / scale if scale else float("nan")


def _comparable(signal: Tensor) -> Tensor:
    # The kernels compare the dtypes that models run in; float64 is compared in float32.
    return signal.float() if signal.dtype == torch.float64 else signal


def _sigmas(times: Tensor) -> Tensor:
    """The noise of two calls, (2,), from their timesteps."""
    values = torch.where(times.max() > 1.0, times / 1000.0, times)
    return torch.where(values[0] > values[1], 1.0 - values, values).clamp(
        LEAST_SIGMA, 1.0 - LEAST_SIGMA
    )
