"""Whether the demo pipeline draws what its captions say, judged by rule."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import FluxPipeline

from omni_cache.demo.architecture import TEXT_LENGTH
from omni_cache.demo.drawings import Colours, random_scene, recognise
from omni_cache.demo.recognition import recognise_shape


@dataclass(frozen=True)
class Accuracy:
    """How many of ``captions`` random captions were drawn in the right colours and shape.

    Attributes:
        colours: pictures in which the colours of shape and background are both right.
        shape: pictures in which the shape is right, whatever its colour.
        both: pictures in which the shape and the two colours are right.
    """

    captions: int
    colours: int
    shape: int
    both: int


def accuracy(
    pipe: FluxPipeline,
    captions: int = 100,
    seed: int = 1_000_003,
    num_inference_steps: int = 28,
    batch_size: int = 20,
) -> Accuracy:
    """Generate random captions, and count the pictures in which the rules find what they say."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(captions)]
    colours = shape = both = 0
    for start in range(0, captions, batch_size):
        batch = scenes[start : start + batch_size]
        pictures = pipe(
            [scene.caption for scene in batch],
            num_inference_steps=num_inference_steps,
            max_sequence_length=TEXT_LENGTH,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))],
        ).images
        for scene, picture in zip(batch, pictures, strict=True):
            pixels = np.asarray(picture)
            right_colours = recognise(pixels) == Colours(scene.colour, scene.background)
            right_shape = recognise_shape(pixels) == scene.shape
            colours += right_colours
            shape += right_shape
            both += right_colours and right_shape
    return Accuracy(captions=captions, colours=colours, shape=shape, both=both)
