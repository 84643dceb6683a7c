"""Signals: what is compared between calls, and the sums that the comparison is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from omni_cache.kernels import rel_l1


@dataclass(frozen=True)
class RelativeL1:
    """``mean|now - before| / (mean|before| + 1e-8)``, the distance of TeaCache."""

    against: Literal["last call", "last computed call"] = "last call"
    sums: ClassVar[int] = 3

    def measure(self, now: Tensor, before: Tensor, along: Sequence[Tensor]) -> Tensor:
        """``[sum|now - before|, sum|before|, elements, *means]`` in one launch."""
        if now.dtype == torch.float64:
            # The kernel compares the dtypes that models run in; float64 is compared in float32.
            now, before = now.float(), before.float()
        return rel_l1(now, before, along)

    def distance(self, sums: Sequence[float]) -> float:
        """The relative distance; NaN for empty signals."""
        moved, size, count = sums
        return (moved / count) / (size / count + 1e-8) if count else float("nan")
