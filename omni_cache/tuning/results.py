"""What a user's ``generate`` returns, as arrays of floating-point numbers.

Knows pictures, videos, audio and latents; nothing of what made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from omni_cache.quality import Fidelity, fidelity_to, psnr_to

Array = npt.NDArray[Any]

_FIELDS = ("images", "frames", "videos", "audios", "image_embeds", "sample")
"""Where the outputs of diffusers' pipelines have what they made."""
_BEYOND = 0.5
"""How far the numbers of a picture may lie beyond [0, 1]: less far than those in [-1, 1] do."""
_ALLOWED = (
    "it has to return what quality is judged on: a tensor, an array, a PIL image, or a list of them"
)


@dataclass(frozen=True)
class Result:
    """What one run of ``generate`` returned.

    Attributes:
        arrays: float32, or float64 where that was returned, in the shapes that were returned.
        is_picture: whether all of them are RGB pictures with numbers in [0, 1], (..., H, W, 3) or
            (..., 3, H, W). Decoders that do not clamp go a little beyond.
        peak: the range that PSNR refers to: 1 for pictures, else that of the numbers.
    """

    arrays: tuple[Array, ...]
    is_picture: bool
    peak: float

    @classmethod
    def of(cls, returned: Any) -> Result:
        """Take what ``generate`` returned.

        Raises:
            TypeError: it holds neither numbers nor pictures.
        """
        arrays = [_floating(each) for each in _leaves(returned)]
        if not arrays or not all(each.size for each in arrays):
            raise TypeError(
                f"generate returned a {type(returned).__name__!r} without numbers; {_ALLOWED}"
            )
        low, high = min(map(np.min, arrays)), max(map(np.max, arrays))
        if low >= -_BEYOND and high <= 1 + _BEYOND and all(map(_has_pixels, arrays)):
            return cls(tuple(arrays), True, 1.0)
        return cls(tuple(arrays), False, float(high - low) or 1.0)

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(bool(np.isfinite(each).all()) for each in self.arrays)

    def difference(self, other: Result) -> npt.NDArray[np.float64]:
        """All numbers of this result less those of another one: one vector.

        Raises:
            ValueError: the other one has other shapes.
        """
        shapes = [[each.shape for each in one.arrays] for one in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "generate is not repeatable: its results have the shapes "
                f"{shapes[0]} and {shapes[1]}"
            )
        pairs = zip(self.arrays, other.arrays, strict=True)
        return np.concatenate([np.subtract(*pair, dtype=np.float64).ravel() for pair in pairs])

    def fidelity(self, other: Result) -> Fidelity:
        """How near another result is to this one, over all of its arrays.

        What this one is decides for both; pictures are compared as they are shown, clamped.
        """
        own, others = (
            [each.clip(0, 1) if self.is_picture else each for each in one.arrays]
            for one in (self, other)
        )
        first, second = (np.concatenate([each.ravel() for each in one]) for one in (own, others))
        psnr = psnr_to(first, second, peak=self.peak)
        if not self.is_picture:
            return Fidelity(psnr, None)
        pairs = zip(map(_frames, own), map(_frames, others), strict=True)
        ssim = [fidelity_to(*pair).ssim for pair in pairs]
        return Fidelity(psnr, float(np.mean([each for each in ssim if each is not None])))


def _leaves(value: Any) -> list[Any]:
    """The tensors, arrays and pictures of what was returned."""
    for name in _FIELDS:
        if not isinstance(value, (Tensor, np.ndarray, Sequence)) and hasattr(value, name):
            return _leaves(getattr(value, name))
    if isinstance(value, Mapping):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in _leaves(each)]
    return [] if value is None or isinstance(value, (str, bytes)) else [value]


def _floating(leaf: Any) -> Array:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu()
        leaf = (
            leaf.float() if leaf.is_floating_point() and leaf.element_size() < 4 else leaf
        ).numpy()
    # PIL pictures may be grey, or have an alpha channel or a palette.
    array = np.asarray(leaf.convert("RGB") if hasattr(leaf, "convert") else leaf)
    if array.dtype == np.uint8:  # differences of two uint8 wrap around
        return array.astype(np.float32) / np.float32(255)
    if array.dtype.kind == "c":
        return np.stack([array.real, array.imag], axis=-1)
    if array.dtype.kind not in "fiub":
        raise TypeError(
            f"generate returned a {type(leaf).__name__!r}, which has no numbers; {_ALLOWED}"
        )
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def _has_pixels(array: Array) -> bool:
    """Whether an array has the shape of RGB pictures; SSIM looks at windows of 7 by 7."""
    return array.ndim >= 3 and 3 in (array.shape[-1], array.shape[-3]) and _smallest(array) >= 7


def _smallest(array: Array) -> int:
    """Height or width of pictures, whichever is less."""
    sides = array.shape[-3:-1] if array.shape[-1] == 3 else array.shape[-2:]
    return int(min(sides))


def _frames(array: Array) -> Array:
    """Pictures as (F, H, W, 3), whatever batches they came in."""
    last = array if array.shape[-1] == 3 else np.moveaxis(array, -3, -1)
    return last.reshape(-1, *last.shape[-3:])
