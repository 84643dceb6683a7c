"""Train the demo pipeline: first the autoencoder, then the text encoders and the transformer.

Everything follows from one seed and from the pipeline that training starts with, if any; an
interrupted training goes on to the same end. The transformer is trained by flow matching (Lipman
et al., 2023; x_t = (1 - sigma) x_0 + sigma noise, target noise - x_0), as FLUX is.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FluxPipeline
from rich.console import Console
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Tokenizer

from omni_cache.demo import demo_pipeline_path, load_demo_pipeline
from omni_cache.demo.architecture import TEXT_LENGTH, build_pipeline
from omni_cache.demo.drawings import Scene, draw, random_scene
from omni_cache.demo.evaluation import Accuracy, accuracy

console = Console()

# Other captions and noise than those of the final count, which the choice must not favour.
_SCORE_SEED = 2_000_003

_PROGRESS = "progress.pt"


@dataclass(frozen=True)
class Recipe:
    """What the result depends on, besides the start and the versions of the libraries."""

    seed: int = 0
    pool: int = 4_000
    """Drawings that training chooses from."""
    vae_steps: int = 700
    steps: int = 4000
    batch_size: int = 24
    learning_rate: float = 1e-3
    ema_decay: float = 0.99
    long_text_every: int = 40
    """Every so many steps, train on text padded to FLUX's default of 512 tokens."""
    checkpoint_every: int = 100
    score_every: int = 1000
    """Steps between scores, a multiple of ``checkpoint_every``; the best is what training keeps."""
    score_captions: int = 100


@dataclass
class Progress:
    """What an interrupted training needs to go on, besides the pipeline that it began with.

    Attributes:
        start: what is known of the pipeline whose weights training started with.
        seconds: spent on all steps so far, and on scoring them.
        scores: pictures with the right shape and colours, by step.
        weights: of the step, of their average, and of the optimizer; none before the first step.
    """

    start: dict[str, Any] | None = None
    step: int = 0
    seconds: float = 0.0
    scores: dict[int, int] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)


def train(
    recipe: Recipe,
    output: Path,
    checkpoints: Path,
    start: Path | None = None,
    resume: bool = False,
) -> Progress:
    """Train a pipeline, and save to ``output`` the checkpoint that draws its captions best.

    In each of several workers, it gives them all the same weights.

    Args:
        checkpoints: folder for what an interrupted training needs to go on.
        start: go on with the weights of this pipeline, and keep its autoencoder as it is.
        resume: go on from the last checkpoint in ``checkpoints``.
    """
    begun, state = checkpoints / "begun", checkpoints / _PROGRESS
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    scenes = [random_scene(rng) for _ in range(recipe.pool)]
    images = torch.stack([to_tensor(draw(scene, rng)) for scene in scenes])
    if not resume and _rank() == 0:
        if start is None:
            pipe = build_pipeline(word for scene in scenes for word in _words(scene))
            train_autoencoder(pipe.vae, images, recipe)
        else:
            pipe = load_demo_pipeline(start)
        save(pipe, begun)
        _write(Progress(start=None if start is None else read_report(start)), state)
    if dist.is_initialized():
        dist.barrier()
    progress = Progress(**torch.load(state))
    pipe = load_demo_pipeline(begun)
    pipe.set_progress_bar_config(disable=True)
    for _ in train_transformer(pipe, scenes, encode(pipe.vae, images), recipe, progress):
        if _rank() > 0:
            continue
        if progress.step % recipe.score_every == 0 or progress.step == recipe.steps:
            score = accuracy(pipe, recipe.score_captions, seed=_SCORE_SEED)
            console.print(f"step {progress.step}: {score}")
            if score.both > max(progress.scores.values(), default=-1):
                save(pipe, output)
            progress.scores[progress.step] = score.both
        _write(progress, state)
    return progress


def _rank() -> int:
    """Which of the worker processes this is; 0 is the only one that scores and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def _workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _write(progress: Progress, path: Path) -> None:
    """Replace the file at once, so that an interruption leaves the one or the other."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(vars(progress), unfinished)
    unfinished.replace(path)


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
    pipe: FluxPipeline, scenes: list[Scene], latents: Tensor, recipe: Recipe, progress: Progress
) -> Iterator[None]:
    """Train the transformer and both text encoders together by flow matching.

    Yields whenever a checkpoint is due, with ``progress`` up to date, and while ``pipe`` holds the
    averaged weights.

    Args:
        latents: packed tokens of every scene, (N, S, C) float32.
        progress: where to go on.
    """
    trained = nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    averaged = copy.deepcopy(trained).requires_grad_(False)
    trained.train()
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    stateful: dict[str, Any] = {"trained": trained, "averaged": averaged, "optimizer": optimizer}
    for name, weights in progress.weights.items():
        stateful[name].load_state_dict(weights)
    captions = [scene.caption for scene in scenes]
    clip_ids = _token_ids(pipe.tokenizer, captions, TEXT_LENGTH)
    t5_ids = _token_ids(pipe.tokenizer_2, captions, TEXT_LENGTH)
    side = math.isqrt(latents.shape[1])
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    compiled = torch.compile(pipe.transformer)
    resumed_at, started = progress.step, time.perf_counter()
    seconds_before = progress.seconds
    running = math.nan
    for step in range(progress.step + 1, recipe.steps + 1):
        torch.manual_seed(recipe.seed << 32 | step)
        _set_learning_rate(optimizer, recipe.learning_rate * _schedule(step, recipe.steps))
        long_text = step % recipe.long_text_every == 0
        chosen = torch.randint(len(scenes), (2 if long_text else recipe.batch_size,))
        chosen = chosen[_rank() :: _workers()]
        torch.manual_seed((recipe.seed << 32 | step) + (_rank() << 24))
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
        share = len(chosen) * _workers() / recipe.batch_size
        _update(optimizer, loss * share, trained.parameters())
        _average(averaged, trained, min(recipe.ema_decay, (1 + step) / (10 + step)))
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        seconds = time.perf_counter() - started
        if step % 50 == 0:
            pace = seconds / (step - resumed_at)
            console.print(f"transformer step {step}: loss {running:.4f}, {pace:.2f} s/step")
        if step % recipe.checkpoint_every == 0 or step == recipe.steps:
            progress.step, progress.seconds = step, seconds_before + seconds
            progress.weights = {name: each.state_dict() for name, each in stateful.items()}
            with _weights(trained, averaged):
                yield


def _sample_sigmas(count: int) -> Tensor:
    """Most of them near 1, where nothing but the caption tells what the picture is to be.

    There a model that is trained on uniform sigmas draws every shape as the same blob for longest.
    """
    return 1 - torch.rand(count).square()


def _token_ids(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int) -> Tensor:
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, then constant, and over the last 40 % linear to nothing."""
    return min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _update(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter]
) -> None:
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    parameters = [each for each in parameters if each.grad is not None]
    if dist.is_initialized():
        _average_gradients(parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give all workers the mean of their gradients, in one message."""
    gradients = [cast(Tensor, each.grad) for each in parameters]
    message = torch.cat([each.flatten() for each in gradients]) / _workers()
    dist.all_reduce(message)
    means = torch.split(message, [each.numel() for each in gradients])
    for each, mean in zip(gradients, means, strict=True):
        each.copy_(mean.view_as(each))


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
    # diffusers notes the folder that each part was loaded from, which means nothing elsewhere.
    for path in [output / "model_index.json", *output.glob("*/config.json")]:
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def report(recipe: Recipe, workers: int, progress: Progress, found: Accuracy) -> dict[str, Any]:
    """What ``training.json`` says: how the pipeline came about, and how well it draws."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "recipe": asdict(recipe),
        "start": progress.start,
        "training_minutes": round(progress.seconds / 60, 1),
        "workers": workers,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")},
        "scores": progress.scores,
        "accuracy": asdict(found),
    }


def read_report(pipeline: Path) -> dict[str, Any]:
    """The report that a trained pipeline's folder holds."""
    read: dict[str, Any] = json.loads((pipeline / "training.json").read_text())
    return read


def main(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = demo_pipeline_path(),  # noqa: B008
    checkpoints: Annotated[
        Path, typer.Option(help="Folder for what an interrupted training needs to go on.")
    ] = Path("build/train"),
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    start: Annotated[
        Path | None, typer.Option(help="Go on with the weights of this pipeline.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the transformer.")] = Recipe.steps,
    vae_steps: Annotated[int, typer.Option(help="Steps of the autoencoder.")] = Recipe.vae_steps,
    batch_size: Annotated[int, typer.Option(help="Drawings in a step.")] = Recipe.batch_size,
    seed: Annotated[int, typer.Option(help="Everything follows from it.")] = Recipe.seed,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
) -> None:
    """Train the demo pipeline, then count how often it draws the right shape and colours."""
    recipe = Recipe(seed=seed, steps=steps, vae_steps=vae_steps, batch_size=batch_size)
    with TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _work, (workers, meeting, recipe, output, checkpoints, start, resume), nprocs=workers
        )
    pipe = load_demo_pipeline(output)
    pipe.set_progress_bar_config(disable=True)
    progress = Progress(**torch.load(checkpoints / _PROGRESS))
    written = json.dumps(report(recipe, workers, progress, accuracy(pipe)), indent=2)
    (output / "training.json").write_text(f"{written}\n")
    console.print(written)


def _work(rank: int, workers: int, meeting: str, *arguments: Any) -> None:
    """One worker: two of one thread each are faster than one of two threads on tensors so small."""
    torch.set_num_threads(1)
    console.quiet = rank > 0
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    train(*arguments)


if __name__ == "__main__":
    typer.run(main)
