"""What the guardrail of a plan does where a run is unlike the samples that the plan was made from.

Follows a plan of the bundled pipeline with and without a guardrail: on captions like those of the
plan, on prompts that the model never learnt, and with weights that noise was added to after the
plan was made. Every picture is compared with an uncached one of the same prompt and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

import omni_cache
from omni_cache.demo import demo_arguments, load_demo_pipeline
from omni_cache.demo.command import demo_captions
from omni_cache.pipelines import is_enabled
from omni_cache.quality import psnr_to

UNKNOWN = (
    "zzzz qqqq",
    "a photo of an astronaut riding a horse",
    "",
    "2 3 4",
    "the man in the moon",
)
NOISE = (0.3, 1.0, 3.0)
"""Added to the weights of one block, in units of their standard deviation."""


def main(
    plan: Annotated[Path, typer.Argument(help="File of a plan, as bench_plans.py writes.")],
    prompts: Annotated[int, typer.Option(help="How many captions.")] = 8,
    inner: Annotated[str, typer.Option(help="Inner compiler.")] = "inductor",
    steps: Annotated[int, typer.Option(help="Of a loop.")] = 28,
) -> None:
    """Print a table."""
    pipe, followed = load_demo_pipeline(), omni_cache.Plan.load(plan)
    pipe.set_progress_bar_config(disable=True)
    captions = demo_captions(16 + prompts)[16:]

    def drawn(texts: Sequence[str]) -> list[Any]:
        made = []
        for seed, text in enumerate(texts):
            noise = torch.Generator().manual_seed(100 + seed)
            call = {"num_inference_steps": steps, "generator": noise, "output_type": "np"}
            image = pipe(text, **call, **demo_arguments()).images[0]
            cached = is_enabled(pipe)
            made.append((image, omni_cache.summary(pipe).computed_steps if cached else steps))
        return made

    print(
        f"{followed!r}, guardrail {followed.guardrail:g}: median PSNR, lowest PSNR, steps computed"
    )
    print("| runs | without | | | with | | |\n|---|---:|---:|---:|---:|---:|---:|")

    def compare(name: str, texts: Sequence[str]) -> None:
        uncached, cells = drawn(texts), []
        for factor in (None, followed.guardrail):
            omni_cache.enable(pipe, replace(followed, guardrail=factor), inner=inner)
            made = drawn(texts)
            omni_cache.disable(pipe)
            pairs = zip(uncached, made, strict=True)
            found = [psnr_to(one, other, peak=1.0) for (one, _), (other, _) in pairs]
            psnr = [float("inf") if each is None else each for each in found]
            mean = sum(count for _, count in made) / len(made)
            cells += [f"{median(psnr):.1f}", f"{min(psnr):.1f}", f"{mean:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    compare("captions", captions)
    compare("prompts that were never learnt", UNKNOWN)
    block = pipe.transformer.single_transformer_blocks[3].proj_out.weight
    before = block.detach().clone()
    for size in NOISE:
        noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            block.copy_(before + size * before.std() * noise)
        compare(f"a block's weights off by {size:g} of their spread", captions)


if __name__ == "__main__":
    typer.run(main)
