"""Which shape a picture shows, by rule and without any model.

Knows what the demo's shapes look like and how to compare; knows nothing of captions or pipelines.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import numpy.typing as npt

from omni_cache.demo.drawings import IMAGE_SIZE, PALETTE, Shape, recognise, silhouette

LEAST_OVERLAP = 0.87
"""Intersection over union with the ideal shape, below which a picture shows none."""
_NOISE = 0.15


def recognise_shape(pixels: npt.NDArray[np.uint8]) -> Shape | None:
    """Name the shape that a picture shows; None where it resembles none of them.

    The part of the picture in the shape's colour is compared with every ideal shape of the same
    area and centre of mass. Both are exact under blur, which a bounding box is not.

    Args:
        pixels: RGB, uint8, shape (IMAGE_SIZE, IMAGE_SIZE, 3).
    """
    overlaps = shape_overlaps(pixels)
    best = max(overlaps, key=overlaps.__getitem__, default=None)
    return best if best is not None and overlaps[best] >= LEAST_OVERLAP else None


def shape_overlaps(pixels: npt.NDArray[np.uint8]) -> dict[Shape, float]:
    """Intersection over union with the ideal of every shape; empty where nothing is drawn."""
    colours = recognise(pixels)
    if colours.shape is None:
        return {}
    drawn = _coverage(pixels, PALETTE[colours.background], PALETTE[colours.shape])
    return {shape: _overlap(drawn, _ideal(shape, drawn)) for shape in get_args(Shape)}


def _coverage(
    pixels: npt.NDArray[np.uint8], background: tuple[int, int, int], colour: tuple[int, int, int]
) -> npt.NDArray[np.float64]:
    """How far every pixel is on the way from one colour to the other, from 0 to 1."""
    way = np.subtract(colour, background, dtype=np.float64)
    covered = (pixels - np.array(background, dtype=np.float64)) @ way / (way @ way)
    return np.where(covered < _NOISE, 0.0, np.minimum(covered, 1.0))


def _ideal(shape: Shape, drawn: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The shape with the area and the centre of mass of what is drawn."""
    middle = IMAGE_SIZE / 2
    unit = IMAGE_SIZE / 4
    model = silhouette(shape, middle, middle, unit)
    radius = unit * float(np.sqrt(drawn.sum() / model.sum()))
    x, y = _centre(drawn)
    model_x, model_y = _centre(model)
    scale = radius / unit
    return silhouette(shape, x - scale * (model_x - middle), y - scale * (model_y - middle), radius)


def _centre(drawn: npt.NDArray[np.float64]) -> tuple[float, float]:
    at = np.arange(IMAGE_SIZE) + 0.5
    area = drawn.sum()
    return float(drawn.sum(axis=0) @ at / area), float(drawn.sum(axis=1) @ at / area)


def _overlap(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())
