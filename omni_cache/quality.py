"""How near a result is to another one. The only place where quality is measured.

It knows arrays of numbers: neither what made them nor tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log10
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Fidelity:
    """How near a result is to the uncached one: PSNR in dB (None for identical), and SSIM.

    ``ssim`` is None for what is no picture, such as audio or latents.
    """

    psnr: float | None
    ssim: float | None


@dataclass(frozen=True)
class Quality:
    """Median and 5th percentile over results."""

    median: Fidelity
    fifth: Fidelity


def fidelity_to(reference: npt.NDArray[Any], picture: npt.NDArray[Any]) -> Fidelity:
    """Compare two pictures, in floating point.

    Args:
        reference: RGB, (H, W, 3), or (F, H, W, 3) for a video; floats in [0, 1], or uint8.
        picture: of the same shape.
    """
    # Slow to import, and of no use for what is no picture.
    from skimage.metrics import structural_similarity

    first, second = as_floats(reference), as_floats(picture)
    frames = zip(_frames(first), _frames(second), strict=True)
    ssim = [structural_similarity(*each, data_range=1.0, channel_axis=-1) for each in frames]
    return Fidelity(psnr_to(first, second), float(np.mean(ssim)))


def psnr_to(
    reference: npt.NDArray[Any], result: npt.NDArray[Any], peak: float = 1.0
) -> float | None:
    """PSNR in dB, in floating point; None for identical arrays.

    Args:
        reference: of any shape.
        result: of the same shape.
        peak: the range of the numbers, 1 for pictures.
    """
    error = float(np.mean((as_floats(reference) - as_floats(result)) ** 2))
    return None if error == 0 else 20 * log10(peak) - 10 * log10(error)


def quality_of(values: Sequence[Fidelity]) -> Quality:
    """Sum up the results of one setting."""
    return Quality(_percentile(values, 0.5), _percentile(values, 0.05))


def as_floats(picture: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """An array in float64; uint8 becomes what it stands for, numbers from 0 to 1."""
    # The difference of two uint8 would wrap around: 0 - 255 is 1.
    scale = 255.0 if picture.dtype == np.uint8 else 1.0
    return picture.astype(np.float64) / scale


def percentile_of(values: Sequence[float | None], share: float) -> float | None:
    """A percentile of PSNR, interpolated as numpy does it; None, for identical, beats all."""
    ranked = sorted(inf if each is None else each for each in values)
    whole, part = divmod(share * (len(ranked) - 1), 1)
    below, above = ranked[int(whole)], ranked[min(int(whole) + 1, len(ranked) - 1)]
    found = below if part == 0 or above == inf else below + part * (above - below)
    return None if found == inf else found


def _percentile(values: Sequence[Fidelity], share: float) -> Fidelity:
    psnr = [each.psnr for each in values]
    ssim = [each.ssim for each in values if each.ssim is not None]
    return Fidelity(percentile_of(psnr, share), percentile_of(ssim, share) if ssim else None)


def _frames(picture: npt.NDArray[np.float64]) -> Sequence[npt.NDArray[np.float64]]:
    return list(picture) if picture.ndim == 4 else [picture]
