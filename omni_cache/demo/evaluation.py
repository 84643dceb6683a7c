"""Whether the demo pipeline draws what its captions say, judged by rule."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import FluxPipeline

from omni_cache.demo.architecture import TEXT_LENGTH
from omni_cache.demo.drawings import random_scene, recognise


@dataclass(frozen=True)
class Accuracy:
    """How many of ``captions`` random captions were drawn in the right colours."""

    captions: int
    background: int
    shape: int
    both: int


def colour_accuracy(
    pipe: FluxPipeline,
    captions: int = 100,
    seed: int = 1_000_003,
    num_inference_steps: int = 28,
    batch_size: int = 20,
) -> Accuracy:
    """Generate random captions, and count the pictures in which ``recognise`` finds the colours."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(captions)]
    background = shape = both = 0
    for start in range(0, captions, batch_size):
        batch = scenes[start : start + batch_size]
        pictures = pipe(
            [scene.caption for scene in batch],
            num_inference_steps=num_inference_steps,
            max_sequence_length=TEXT_LENGTH,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))],
        ).images
        for scene, picture in zip(batch, pictures, strict=True):
            found = recognise(np.asarray(picture))
            background += found.background == scene.background
            shape += found.shape == scene.colour
            both += (found.background, found.shape) == (scene.background, scene.colour)
    return Accuracy(captions=captions, background=background, shape=shape, both=both)
