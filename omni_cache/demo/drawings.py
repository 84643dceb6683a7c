"""The demo's world: captioned drawings of one coloured shape on a coloured background.

Knows how to draw, describe and recognise a scene. Knows nothing of models.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Shape = Literal["circle", "square", "triangle", "diamond"]
Size = Literal["small", "large"]
Position = Literal["on the left", "on the right"]

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (150, 60, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
IMAGE_SIZE = 32
"""Side of a drawing in pixels."""

# A smaller shape has too few pixels for its corners to show, and a larger one would not fit.
_RADIUS: dict[Size | None, float] = {"small": 0.16, None: 0.2, "large": 0.25}
_CENTRE: dict[Position | None, tuple[float, float]] = {
    None: (0.5, 0.5),
    "on the left": (0.32, 0.5),
    "on the right": (0.68, 0.5),
}
_SUPERSAMPLING = 8


@dataclass(frozen=True)
class Scene:
    """What a caption says: one shape, its colour, the background, and optional size and place."""

    shape: Shape
    colour: str
    background: str
    size: Size | None = None
    position: Position | None = None

    @property
    def caption(self) -> str:
        """The sentence, e.g. ``"a large red circle on a blue background, on the left"``."""
        size = f"{self.size} " if self.size else ""
        position = f", {self.position}" if self.position else ""
        return f"a {size}{self.colour} {self.shape} on a {self.background} background{position}"


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene uniformly; about half of the captions name a size, and half a place."""
    colour, background = rng.sample(list(PALETTE), 2)
    return Scene(
        shape=rng.choice(get_args(Shape)),
        colour=colour,
        background=background,
        size=rng.choice([None, None, *get_args(Size)]),
        position=rng.choice([None, None, *get_args(Position)]),
    )


def draw(scene: Scene, rng: random.Random) -> npt.NDArray[np.uint8]:
    """Draw a scene with anti-aliased edges, moved and resized a little by ``rng``.

    Returns: RGB pixels, uint8, shape (IMAGE_SIZE, IMAGE_SIZE, 3).
    """
    x, y = (IMAGE_SIZE * (c + rng.uniform(-0.01, 0.01)) for c in _CENTRE[scene.position])
    radius = IMAGE_SIZE * _RADIUS[scene.size] * rng.uniform(0.98, 1.02)
    covered = silhouette(scene.shape, x, y, radius)[..., None]
    background, colour = (np.array(PALETTE[name]) for name in (scene.background, scene.colour))
    pixels: npt.NDArray[np.uint8] = np.rint(background + covered * (colour - background)).astype(
        np.uint8
    )
    return pixels


def silhouette(shape: Shape, x: float, y: float, radius: float) -> npt.NDArray[np.float64]:
    """How much of every pixel a shape covers, from 0 to 1; shape (IMAGE_SIZE, IMAGE_SIZE).

    Args:
        x, y, radius: centre and size in pixels; ``radius`` is exact for a circle, and gives the
            other shapes about as large an area.
    """
    side = IMAGE_SIZE * _SUPERSAMPLING
    image = Image.new("L", (side, side))
    canvas = ImageDraw.Draw(image)
    x, y, radius = _SUPERSAMPLING * x, _SUPERSAMPLING * y, _SUPERSAMPLING * radius
    match shape:
        case "circle":
            canvas.ellipse([x - radius, y - radius, x + radius, y + radius], 255)
        case "square":
            r = 0.88 * radius
            canvas.rectangle([x - r, y - r, x + r, y + r], 255)
        case "diamond":
            r = 1.2 * radius
            canvas.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], 255)
        case "triangle":
            r = 1.1 * radius
            canvas.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], 255)
    smaller = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(smaller, dtype=np.float64) / 255


@dataclass(frozen=True)
class Colours:
    """The two colour names found in a picture; ``shape`` is None on an empty background."""

    shape: str | None
    background: str


def recognise(pixels: npt.NDArray[np.uint8]) -> Colours:
    """Name the colours of a picture by rule, without any model.

    The background is the palette colour nearest to the median of the border; the shape is the one
    nearest to the median of all pixels that are far from that background.

    Args:
        pixels: RGB, uint8, shape (H, W, 3).
    """
    background = _nearest(np.median(_border(pixels), axis=0), PALETTE)
    flat = pixels.reshape(-1, 3).astype(np.float64)
    foreground = flat[np.linalg.norm(flat - PALETTE[background], axis=1) > 80]
    if len(foreground) < 10:
        return Colours(shape=None, background=background)
    others = {name: rgb for name, rgb in PALETTE.items() if name != background}
    return Colours(shape=_nearest(np.median(foreground, axis=0), others), background=background)


def _border(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[2:-2, 2:-2] = True
    return pixels[~inner]


def _nearest(colour: npt.NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - palette[name])))
