"""Captions, drawings, and the rule that reads colours back from a picture."""

import random

import numpy as np
import pytest

from omni_cache.demo.drawings import IMAGE_SIZE, PALETTE, Scene, draw, random_scene, recognise


def test_a_caption_names_what_is_in_the_scene():
    scene = Scene("triangle", "red", "blue", size="large", position="on the left")

    assert scene.caption == "a large red triangle on a blue background, on the left"
    assert Scene("circle", "red", "blue").caption == "a red circle on a blue background"


def test_the_rule_finds_the_colours_of_every_drawing():
    rng = random.Random(0)
    for _ in range(300):
        scene = random_scene(rng)

        found = recognise(draw(scene, rng))

        assert (found.shape, found.background) == (scene.colour, scene.background), scene


def test_the_rule_finds_no_shape_on_an_empty_background():
    empty = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), PALETTE["green"], dtype=np.uint8)

    assert recognise(empty).background == "green"
    assert recognise(empty).shape is None


@pytest.mark.parametrize("noise", [10, 20])
def test_the_rule_bears_a_noisy_picture(noise):
    rng = random.Random(1)
    for _ in range(100):
        scene = random_scene(rng)
        grain = np.random.default_rng(0).normal(0, noise, (IMAGE_SIZE, IMAGE_SIZE, 3))
        noisy = np.clip(draw(scene, rng) + grain, 0, 255).astype(np.uint8)

        assert recognise(noisy).background == scene.background


def test_size_and_position_move_the_drawing():
    def foreground(**words):
        pixels = draw(Scene("square", "white", "black", **words), random.Random(0))
        return np.argwhere(pixels[..., 0] > 128)

    assert len(foreground(size="large")) > 2 * len(foreground(size="small"))
    assert foreground(position="on the left")[:, 1].mean() < 0.4 * IMAGE_SIZE
    assert foreground(position="on the right")[:, 1].mean() > 0.6 * IMAGE_SIZE


def test_a_drawing_has_soft_edges():
    pixels = draw(Scene("circle", "white", "black"), random.Random(0))

    assert len(np.unique(pixels[..., 0])) > 5


def test_drawings_follow_from_the_seed():
    def drawn(seed):
        rng = random.Random(seed)
        return draw(random_scene(rng), rng)

    assert np.array_equal(drawn(3), drawn(3))
    assert not np.array_equal(drawn(3), drawn(4))
