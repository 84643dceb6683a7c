"""A second small pipeline for benchmarks: it draws digits, and is not made as the bundled one is.

PixArt's architecture instead of FLUX's, a cosine noise schedule and v prediction instead of flow
matching, DPM-Solver++ instead of Euler steps, and classifier-free guidance by two calls a step. It
learns from the digits that scikit-learn has on board, on one thread in about ten minutes, and is
not in the repository:

    python scripts/digits.py train
    python scripts/digits.py draw

Other scripts run it so:

    from digits import load

    model, generate = load()                # or load(steps=12): fewer steps of the same model
    reference = generate(3)                 # sample 3: a 3 from seed 3, the same every time
    omni_cache.enable(model, "taylorseer")  # `generate` calls this very transformer
    cached = generate(3)
    plan = omni_cache.tune(model, generate, psnr=45)

Both branches are named by `omni_cache.branch`; step and number of steps come from the scheduler of
the pipeline around the transformer, `generate.pipe`, which may be enabled or tuned in its place.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import typer
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from PIL import Image
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import omni_cache

FOLDER = Path(__file__).parent.parent / "build" / "digits"
SIDE, DIGITS = 16, 10
STEPS, GUIDANCE = 28, 2.0

Pictures = npt.NDArray[np.float32]
"""Grey values in [0, 1], (N, SIDE, SIDE)."""


@dataclass(frozen=True)
class Recipe:
    """What the trained weights depend on, besides the versions of the libraries."""

    seed: int = 0
    blocks: int = 6
    heads: int = 4
    head_width: int = 24
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    ema_decay: float = 0.995
    unconditional: float = 0.1
    """Share of the pictures that are shown without their digit, for guidance."""


class DigitsPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws digits, with one call of the transformer for each branch of guidance at each step."""

    def __init__(
        self, transformer: PixArtTransformer2DModel, scheduler: DPMSolverMultistepScheduler
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, digits: Sequence[int], seeds: Sequence[int], steps: int = STEPS) -> Pictures:
        """Draw a picture of each digit, from the noise of its seed."""
        device = self.transformer.device
        caption = captions(torch.tensor(digits, device=device))
        branches = {"cond": caption, "uncond": torch.zeros_like(caption)}
        latents = torch.stack([noise(seed) for seed in seeds]).to(device)
        self.scheduler.set_timesteps(steps, device=device)
        for timestep in self.scheduler.timesteps:
            predictions = {}
            for name, text in branches.items():
                with omni_cache.branch(name):
                    predictions[name] = self.transformer(
                        latents, text, timestep.expand(len(latents)), return_dict=False
                    )[0]
            guided = torch.lerp(predictions["uncond"], predictions["cond"], GUIDANCE)
            latents = self.scheduler.step(guided, timestep, latents, return_dict=False)[0]
        pictures: Pictures = (latents[:, 0] / 2 + 0.5).clamp(0, 1).cpu().numpy()
        return pictures


class Generate:
    """Draws sample number i: digit i % 10 from seed i, the same picture every time.

    Attributes:
        pipe: whose loop draws it.
        steps: of the loop.
    """

    def __init__(self, pipe: DigitsPipeline, steps: int) -> None:
        self.pipe, self.steps = pipe, steps

    def __call__(self, sample: int) -> Pictures:
        """Grey values in [0, 1], (SIDE, SIDE)."""
        picture: Pictures = self.pipe([sample % DIGITS], [sample], self.steps)[0]
        return picture


def load(folder: Path = FOLDER, steps: int = STEPS) -> tuple[PixArtTransformer2DModel, Generate]:
    """The trained transformer, and what draws with it.

    Args:
        folder: what `train` has written.
        steps: of each loop.

    Raises:
        FileNotFoundError: nothing is trained yet; the message says how to.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist; `python scripts/digits.py train` trains the model into it"
        )
    pipe = DigitsPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    return pipe.transformer, Generate(pipe, steps)


def captions(digits: Tensor) -> Tensor:
    """What the transformer attends to: one token a picture, (N, 1, DIGITS). Zeros name no digit."""
    return F.one_hot(digits, DIGITS).float()[:, None]


def noise(seed: int) -> Tensor:
    """What sampling begins with, (1, SIDE, SIDE)."""
    return torch.randn(1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def real_pictures() -> tuple[Pictures, npt.NDArray[np.int64]]:
    """All pictures of scikit-learn, from 8x8 to SIDE x SIDE, and the digits that they show."""
    pixels, digits = load_digits(return_X_y=True)
    small = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, (SIDE, SIDE), mode="bilinear", antialias=False)
    return large[:, 0].numpy(), digits


def recognise(pictures: Pictures) -> npt.NDArray[np.int64]:
    """The digits that a classifier sees, which learnt from the real pictures."""
    real, digits = real_pictures()
    classifier = SVC().fit(real.reshape(len(real), -1), digits)
    found: npt.NDArray[np.int64] = classifier.predict(pictures.reshape(len(pictures), -1))
    return found


def build(recipe: Recipe) -> DigitsPipeline:
    """An untrained pipeline."""
    torch.manual_seed(recipe.seed)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_width,
        cross_attention_dim=recipe.heads * recipe.head_width,
        num_layers=recipe.blocks,
        in_channels=1,
        out_channels=1,
        sample_size=SIDE,
        caption_channels=DIGITS,
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        # Where the cosine schedule ends there is no signal left, and its logarithm is infinite.
        lambda_min_clipped=-5.1,
    )
    return DigitsPipeline(transformer.eval(), scheduler)


def train_transformer(pipe: DigitsPipeline, recipe: Recipe) -> Iterator[float]:
    """Train by v prediction (Salimans and Ho, 2022), and leave the averaged weights in `pipe`.

    v = alpha noise - sigma picture, where noisy = alpha picture + sigma noise. Yields the loss of
    each step.
    """
    torch.manual_seed(recipe.seed)
    pictures, digits = real_pictures()
    clean, known = torch.from_numpy(2 * pictures - 1)[:, None], torch.from_numpy(digits)
    model = pipe.transformer.train()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.05
    )
    for _ in range(recipe.steps):
        chosen = torch.randint(len(clean), (recipe.batch_size,))
        timestep = torch.randint(pipe.scheduler.config.num_train_timesteps, (recipe.batch_size,))
        alpha = pipe.scheduler.alpha_t[timestep][:, None, None, None]
        sigma = pipe.scheduler.sigma_t[timestep][:, None, None, None]
        picture, drawn = clean[chosen], torch.randn_like(clean[chosen])
        shown = torch.rand(recipe.batch_size, 1, 1) >= recipe.unconditional
        predicted = model(
            alpha * picture + sigma * drawn,
            captions(known[chosen]) * shown,
            timestep,
            return_dict=False,
        )[0]
        loss = F.mse_loss(predicted, alpha * drawn - sigma * picture)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(model)
        yield loss.item()
    model.load_state_dict(averaged.module.state_dict())
    model.eval()


def draw_samples(generate: Generate, count: int) -> tuple[Pictures, int]:
    """The first samples, and how many of them a classifier recognises."""
    pictures = np.stack([generate(sample) for sample in track(range(count), "drawing")])
    right = recognise(pictures) == np.arange(count) % DIGITS
    return pictures, int(right.sum())


def sheet(pictures: Pictures) -> Image.Image:
    """All pictures in rows of DIGITS, white on black, with a margin around each."""
    framed = np.pad(pictures, ((0, 0), (2, 2), (2, 2)))
    side = framed.shape[-1]
    rows = framed.reshape(-1, DIGITS, side, side).transpose(0, 2, 1, 3)
    grey = (255 * rows.reshape(-1, DIGITS * side)).round().astype(np.uint8)
    return Image.fromarray(grey).resize((3 * grey.shape[1], 3 * grey.shape[0]))


app = typer.Typer(help="A small guided pipeline that draws digits.")


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = FOLDER,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="Everything follows from it.")] = Recipe.seed,
    blocks: Annotated[int, typer.Option(help="Transformer blocks.")] = Recipe.blocks,
) -> None:
    """Train on one thread, write the pipeline, and count how many of 100 digits are recognised."""
    torch.set_num_threads(1)
    recipe = Recipe(steps=steps, seed=seed, blocks=blocks)
    pipe = build(recipe)
    started = time.perf_counter()
    losses = list(track(train_transformer(pipe, recipe), "training", total=recipe.steps))
    minutes = (time.perf_counter() - started) / 60
    pipe.save_pretrained(output)
    _, right = draw_samples(load(output)[1], 100)
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "scripts/digits.py", *sys.argv[1:]]),
        "recipe": asdict(recipe),
        "parameters": sum(each.numel() for each in pipe.transformer.parameters()),
        "training_minutes": round(minutes, 1),
        "loss": float(np.mean(losses[-100:])),
        "recognised_of_100": right,
        "versions": {name: version(name) for name in ("torch", "diffusers", "scikit-learn")},
    }
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


@app.command()
def draw(
    folder: Annotated[Path, typer.Option(help="What `train` has written.")] = FOLDER,
    steps: Annotated[int, typer.Option(help="Steps of sampling.")] = STEPS,
) -> None:
    """Draw 100 digits into a sheet, and count how many are recognised."""
    pictures, right = draw_samples(load(folder, steps)[1], 100)
    sheet(pictures).save(folder / f"sheet_{steps}.png")
    print(f"{right} of 100 recognised; {folder / f'sheet_{steps}.png'} shows them.")


if __name__ == "__main__":
    app()
