"""Train the demo pipeline from nothing: first the autoencoder, then encoders and transformer.

Everything follows from one seed. The transformer is trained by flow matching (Lipman et al., 2023;
x_t = (1 - sigma) x_0 + sigma noise, target noise - x_0), as FLUX is.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FluxPipeline
from rich.console import Console
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Tokenizer

from omni_cache.demo import demo_pipeline_path, load_demo_pipeline
from omni_cache.demo.architecture import TEXT_LENGTH, build_pipeline
from omni_cache.demo.drawings import Scene, draw, random_scene
from omni_cache.demo.evaluation import Accuracy, colour_accuracy

console = Console()


@dataclass(frozen=True)
class Recipe:
    """What the result depends on, besides the versions of the libraries."""

    seed: int = 0
    pool: int = 10_000
    """Drawings that training chooses from."""
    vae_steps: int = 700
    steps: int = 2400
    batch_size: int = 16
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    long_text_every: int = 25
    """Every so many steps, train on text padded to FLUX's default of 512 tokens."""


def train(recipe: Recipe, output: Path, checkpoint_every: int = 250) -> None:
    """Train a pipeline and save it to ``output``, at every checkpoint and at the end."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    scenes = [random_scene(rng) for _ in range(recipe.pool)]
    images = torch.stack([to_tensor(draw(scene, rng)) for scene in scenes])
    pipe = build_pipeline(word for scene in scenes for word in _words(scene))
    train_autoencoder(pipe.vae, images, recipe)
    latents = encode(pipe.vae, images)
    for step in train_transformer(pipe, scenes, latents, recipe):
        if step % checkpoint_every == 0 or step == recipe.steps:
            save(pipe, output)


def _words(scene: Scene) -> list[str]:
    return scene.caption.replace(",", " ,").split()


def to_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Pixels (H, W, 3) uint8 to the range of the autoencoder: (3, H, W) float32 in [-1, 1]."""
    return torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1


def train_autoencoder(vae: AutoencoderKL, images: Tensor, recipe: Recipe) -> None:
    """Fit reconstruction with a light KL term, then set the latents' shift and scale.

    Args:
        images: (N, 3, H, W) float32 in [-1, 1].
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(recipe.vae_steps):
        _set_learning_rate(optimizer, 4e-3 * _schedule(step, recipe.vae_steps))
        batch = images[torch.randint(len(images), (16,))]
        posterior = vae.encode(batch).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(reconstruction, batch) + 1e-6 * posterior.kl().mean()
        _update(optimizer, loss, vae.parameters())
        if step % 100 == 0 or step + 1 == recipe.vae_steps:
            console.print(f"autoencoder step {step}: loss {loss.item():.5f}")
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    sample = encode(vae, images[:2000])
    vae.register_to_config(
        shift_factor=round(sample.mean().item(), 6),
        scaling_factor=round(1 / sample.std().item(), 6),
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode to the transformer's tokens: packed, shifted and scaled, (N, H*W/16, 16) float32."""
    tokens = []
    for batch in torch.split(images, 64):
        latents = vae.encode(batch).latent_dist.mean
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        tokens.append(FluxPipeline._pack_latents(latents, *latents.shape))
    return torch.cat(tokens)


def train_transformer(
    pipe: FluxPipeline, scenes: list[Scene], latents: Tensor, recipe: Recipe
) -> Iterator[int]:
    """Train the transformer and both text encoders together by flow matching.

    Yields the number of steps done, while ``pipe`` holds the averaged weights.

    Args:
        latents: packed tokens of every scene, (N, S, C) float32.
    """
    trained = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    averaged = copy.deepcopy(trained).requires_grad_(False)
    trained.train()
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    captions = [scene.caption for scene in scenes]
    clip_ids = _token_ids(pipe.tokenizer, captions, TEXT_LENGTH)
    t5_ids = _token_ids(pipe.tokenizer_2, captions, TEXT_LENGTH)
    side = math.isqrt(latents.shape[1])
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    compiled = torch.compile(pipe.transformer)
    started = time.perf_counter()
    running = math.nan
    for step in range(1, recipe.steps + 1):
        _set_learning_rate(optimizer, recipe.learning_rate * _schedule(step, recipe.steps))
        long_text = step % recipe.long_text_every == 0
        chosen = torch.randint(len(scenes), (2 if long_text else recipe.batch_size,))
        text = t5_ids[chosen]
        if long_text:
            text = F.pad(text, (0, 512 - TEXT_LENGTH), value=pipe.tokenizer_2.pad_token_id)
        clean = latents[chosen]
        noise = torch.randn_like(clean)
        sigma = _sample_sigmas(len(chosen))
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        velocity = (pipe.transformer if long_text else compiled)(
            hidden_states=noisy,
            encoder_hidden_states=pipe.text_encoder_2(text)[0],
            pooled_projections=pipe.text_encoder(clip_ids[chosen]).pooler_output,
            timestep=sigma,
            img_ids=image_ids,
            txt_ids=torch.zeros(text.shape[1], 3),
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - clean)
        _update(optimizer, loss * (len(chosen) / recipe.batch_size), trained.parameters())
        _average(averaged, trained, min(recipe.ema_decay, (1 + step) / (10 + step)))
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            pace = (time.perf_counter() - started) / step
            console.print(f"transformer step {step}: loss {running:.4f}, {pace:.2f} s/step")
        with _weights(trained, averaged):
            yield step


def _sample_sigmas(count: int) -> Tensor:
    """Half logit-normal (Esser et al., 2024), half uniform, so that both ends are seen too."""
    uniform = torch.rand(count)
    return torch.where(torch.rand(count) < 0.5, torch.randn(count).sigmoid(), uniform)


def _token_ids(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int) -> Tensor:
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps, then half a cosine down to nothing."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _update(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter]
) -> None:
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@torch.no_grad()
def _average(averaged: nn.Module, trained: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(averaged.parameters()), list(trained.parameters()), 1 - decay)


@contextmanager
def _weights(target: nn.Module, source: nn.Module) -> Iterator[None]:
    """Lend the weights of ``source`` to ``target``, and give back its own at the end."""
    own = [parameter.data for parameter in target.parameters()]
    for parameter, other in zip(target.parameters(), source.parameters(), strict=True):
        parameter.data = other.data
    try:
        yield
    finally:
        for parameter, data in zip(target.parameters(), own, strict=True):
            parameter.data = data


def save(pipe: FluxPipeline, output: Path) -> None:
    """Save in diffusers' format; the transformer in float16, to keep the files small."""
    pipe.save_pretrained(output)
    copy.deepcopy(pipe.transformer).half().save_pretrained(output / "transformer")


def report(recipe: Recipe, accuracy: Accuracy, seconds: float) -> dict[str, Any]:
    """What ``training.json`` says: how the pipeline came about, and how well it draws."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "recipe": asdict(recipe),
        "training_minutes": round(seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")},
        "accuracy": asdict(accuracy),
    }


def main(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = demo_pipeline_path(),  # noqa: B008
    steps: Annotated[int, typer.Option(help="Steps of the transformer.")] = Recipe.steps,
    vae_steps: Annotated[int, typer.Option(help="Steps of the autoencoder.")] = Recipe.vae_steps,
    batch_size: Annotated[int, typer.Option(help="Drawings in a step.")] = Recipe.batch_size,
    seed: Annotated[int, typer.Option(help="Everything follows from it.")] = Recipe.seed,
) -> None:
    """Train the demo pipeline from nothing, then count how often it draws the right colours."""
    recipe = Recipe(seed=seed, steps=steps, vae_steps=vae_steps, batch_size=batch_size)
    started = time.perf_counter()
    train(recipe, output)
    seconds = time.perf_counter() - started
    accuracy = colour_accuracy(load_demo_pipeline(output))
    written = json.dumps(report(recipe, accuracy, seconds), indent=2)
    (output / "training.json").write_text(f"{written}\n")
    console.print(written)


if __name__ == "__main__":
    typer.run(main)
