"""The rule that names a shape: right on drawings, and silent on what is no shape at all."""

import math
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from omni_cache.demo.drawings import (
    IMAGE_SIZE,
    PALETTE,
    Scene,
    draw,
    random_scene,
    recognise,
)
from omni_cache.demo.recognition import recognise_shape


def scenes(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        scene = random_scene(rng)
        yield scene, draw(scene, rng)


def blob(rng):
    """An outline that wobbles at random, as large as the drawings' shapes, with soft edges."""
    side = 4 * IMAGE_SIZE
    y, x = (np.mgrid[:side, :side] + 0.5) / 4 - IMAGE_SIZE / 2
    angle = np.arctan2(y, x)
    wobble = sum(
        rng.gauss(0, 0.25) / math.sqrt(lobes) * np.cos(lobes * angle + rng.uniform(0, 2 * math.pi))
        for lobes in range(2, 6)
    )
    inside = np.hypot(x, y) < rng.uniform(5, 8) * (1 + wobble)
    covered = inside.reshape(IMAGE_SIZE, 4, IMAGE_SIZE, 4).mean(axis=(1, 3))[..., None]
    background, colour = (np.array(PALETTE[name]) for name in rng.sample(list(PALETTE), 2))
    return np.rint(background + covered * (colour - background)).astype(np.uint8)


def test_the_rule_names_the_shape_of_every_drawing():
    for scene, pixels in scenes(300, seed=0):
        assert recognise_shape(pixels) == scene.shape, scene


def test_the_rule_bears_a_little_blur_and_grain():
    grain = np.random.default_rng(0)
    right = 0
    for scene, pixels in scenes(200, seed=1):
        blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.4))
        grainy = np.asarray(blurred) + grain.normal(0, 5, pixels.shape)
        right += recognise_shape(np.clip(grainy, 0, 255).astype(np.uint8)) == scene.shape

    assert right >= 196


def test_the_rule_finds_no_shape_in_most_blobs():
    rng = random.Random(2)
    blobs = [blob(rng) for _ in range(200)]

    assert sum(recognise(pixels).shape is not None for pixels in blobs) == 200
    assert sum(recognise_shape(pixels) is None for pixels in blobs) >= 180


def test_the_rule_finds_no_shape_in_noise():
    rng = np.random.default_rng(3)
    for _ in range(50):
        noise = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)

        assert recognise_shape(noise) is None


def test_the_rule_finds_no_shape_on_an_empty_background():
    empty = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), PALETTE["green"], dtype=np.uint8)

    assert recognise_shape(empty) is None


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "diamond"])
def test_a_shape_with_a_bite_taken_out_is_none(shape):
    pixels = draw(Scene(shape, "red", "white", size="large"), random.Random(0)).copy()
    pixels[IMAGE_SIZE // 2 :, IMAGE_SIZE // 2 :] = PALETTE["white"]

    assert recognise_shape(pixels) is None
