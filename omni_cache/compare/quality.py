"""How near a picture is to another one. The only place where quality is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log10
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from skimage.metrics import structural_similarity


@dataclass(frozen=True)
class Fidelity:
    """How near a picture is to the uncached one: PSNR in dB (None for identical), and SSIM."""

    psnr: float | None
    ssim: float


@dataclass(frozen=True)
class Quality:
    """Median and 5th percentile over pictures."""

    median: Fidelity
    fifth: Fidelity


def fidelity_to(reference: npt.NDArray[Any], picture: npt.NDArray[Any]) -> Fidelity:
    """Compare two pictures, in floating point.

    Args:
        reference: RGB, (H, W, 3), or (F, H, W, 3) for a video; floats in [0, 1], or uint8.
        picture: of the same shape.
    """
    first, second = _as_float(reference), _as_float(picture)
    error = float(np.mean((first - second) ** 2))
    frames = zip(_frames(first), _frames(second), strict=True)
    ssim = [structural_similarity(*each, data_range=1.0, channel_axis=-1) for each in frames]
    return Fidelity(None if error == 0 else -10 * log10(error), float(np.mean(ssim)))


def quality_of(values: Sequence[Fidelity]) -> Quality:
    """Sum up the pictures of one setting."""
    psnr = [inf if each.psnr is None else each.psnr for each in values]
    ssim = [each.ssim for each in values]
    return Quality(
        Fidelity(_finite(median(psnr)), median(ssim)),
        Fidelity(_finite(_fifth(psnr)), _fifth(ssim)),
    )


def _as_float(picture: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    # The difference of two uint8 would wrap around: 0 - 255 is 1.
    scale = 255.0 if picture.dtype == np.uint8 else 1.0
    return picture.astype(np.float64) / scale


def _frames(picture: npt.NDArray[np.float64]) -> Sequence[npt.NDArray[np.float64]]:
    return list(picture) if picture.ndim == 4 else [picture]


def _fifth(values: Sequence[float]) -> float:
    """The 5th percentile, interpolated as numpy does it, and with infinite values too."""
    ranked = sorted(values)
    whole, share = divmod(0.05 * (len(ranked) - 1), 1)
    below, above = ranked[int(whole)], ranked[min(int(whole) + 1, len(ranked) - 1)]
    return below if share == 0 or above == inf else below + share * (above - below)


def _finite(psnr: float) -> float | None:
    return None if psnr == inf else psnr
