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
_ALLOWED = (
    "it has to return what quality is judged on: a tensor, an array, a PIL image, or a list of them"
)


@dataclass(frozen=True)
class Result:
    """What one run of ``generate`` returned.

    Attributes:
        arrays: float32, or float64 where that was returned. Pictures are numbers in [0, 1] with
            their channels last, (..., H, W, 3).
        is_picture: whether all of them are pictures.
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
        pictures = [_picture(each) for each in arrays]
        if all(each is not None for each in pictures):
            return cls(tuple(each for each in pictures if each is not None), True, 1.0)
        low, high = min(map(np.min, arrays)), max(map(np.max, arrays))
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
        """How near another result is to this one, over all of its arrays."""
        if len(self.arrays) == 1 and self.is_picture:
            return fidelity_to(self._frames()[0], other._frames()[0])
        own, others = (
            np.concatenate([each.ravel() for each in one.arrays]) for one in (self, other)
        )
        psnr = psnr_to(own, others, peak=self.peak)
        if not self.is_picture:
            return Fidelity(psnr, None)
        pairs = zip(self._frames(), other._frames(), strict=True)
        ssim = [fidelity_to(*pair).ssim for pair in pairs]
        return Fidelity(psnr, float(np.mean([each for each in ssim if each is not None])))

    def _frames(self) -> list[Array]:
        """Pictures as (H, W, 3) or (F, H, W, 3), whatever batches they came in."""
        return [each.reshape(-1, *each.shape[-3:]) for each in self.arrays]


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


def _picture(array: Array) -> Array | None:
    """An array as RGB pictures with channels last; None where it is none."""
    if array.ndim < 2 or array.min() < 0.0 or array.max() > 1.0:
        return None
    if array.ndim >= 3 and array.shape[-1] == 3:
        last = array
    elif array.ndim >= 3 and array.shape[-3] == 3:
        last = np.moveaxis(array, -3, -1)
    else:
        return None
    # SSIM looks at windows of 7 by 7.
    return last if min(last.shape[-3:-1]) >= 7 else None
