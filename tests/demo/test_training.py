"""Training, with few steps: it follows from its seed, learns, and leaves a folder that loads."""

import random

import pytest
import torch

from omni_cache.demo import load_demo_pipeline
from omni_cache.demo.architecture import build_pipeline
from omni_cache.demo.drawings import draw, random_scene
from omni_cache.demo.training import Recipe, encode, to_tensor, train, train_autoencoder

WORDS = ["a", "red", "circle", "on", "blue", "background", ","]
TINY = Recipe(pool=64, vae_steps=3, steps=3, batch_size=4, long_text_every=3)


def weights(pipe):
    parts = (pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    return [parameter for part in parts for parameter in part.parameters()]


def drawings(count):
    rng = random.Random(0)
    return torch.stack([to_tensor(draw(random_scene(rng), rng)) for _ in range(count)])


def test_tokenizers_follow_from_the_vocabulary():
    first, second = build_pipeline(WORDS), build_pipeline(reversed(WORDS))

    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert first.tokenizer_2.get_vocab() == second.tokenizer_2.get_vocab()


def test_the_autoencoder_learns_to_reconstruct_and_unit_latents_come_out():
    torch.manual_seed(0)
    vae = build_pipeline(WORDS).vae
    images = drawings(64)

    def error():
        with torch.no_grad():
            decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
        return (decoded - images).square().mean().item()

    before = error()
    train_autoencoder(vae, images, Recipe(vae_steps=30))

    assert error() < before / 3
    assert encode(vae, images).std().item() == pytest.approx(1, abs=0.02)
    assert encode(vae, images).mean().item() == pytest.approx(0, abs=0.02)


@pytest.mark.slow
def test_the_same_seed_trains_the_same_pipeline_twice(tmp_path):
    with torch.compiler.set_stance("force_eager"):
        for name in ("first", "second"):
            train(TINY, tmp_path / name)

    first, second = (load_demo_pipeline(tmp_path / name) for name in ("first", "second"))
    untrained = build_pipeline(WORDS)
    assert all(map(torch.equal, weights(first), weights(second)))
    assert (
        first.transformer.proj_out.weight.abs().max() > untrained.transformer.proj_out.weight.max()
    )
    assert first.vae.config.scaling_factor == second.vae.config.scaling_factor != 1
    assert first("a red circle on a blue background", num_inference_steps=2).images[0].size == (
        32,
        32,
    )
