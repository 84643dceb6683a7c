"""What keeping residuals in fewer bits costs in fidelity.

Draws the bundled pipeline's prompts with residuals kept in each dtype, at schedules that do not
depend on them, and compares the pictures with those of every step computed and with those of
residuals in float32. Writes history.json and history.md after each strategy, and goes on where it
was interrupted. The inner compiler is "eager": pictures, and not times, are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_turns import Report, begun, signature, write
from diffusers import FluxPipeline
from omni_cache.passes.storage import restored, scaled
from rich.progress import track

import omni_cache
from omni_cache.demo import load_demo_pipeline
from omni_cache.demo.command import demo_captions
from omni_cache.demo.measurement import calibrated_variants, draw
from omni_cache.pipelines.folder import Picture
from omni_cache.quality import percentile_of, psnr_to

CALIBRATION_PROMPTS = 4
EXACT, *FEWER = ("float32", "bfloat16", "float8_e4m3fn")
STRATEGIES: dict[str, dict[str, Any]] = {
    "MagCache, hold": {"cache": "magcache", "threshold": 0.4, "retention_ratio": 0.0},
    "MagCache, newton 2": {
        "cache": "magcache", "threshold": 0.4, "retention_ratio": 0.0, "forecast": "newton",
        "forecast_order": 2,
    },
    "TaylorSeer, taylor 1": {"cache": "taylorseer", "cache_interval": 3},
    "TaylorSeer, taylor 2": {"cache": "taylorseer", "cache_interval": 3, "forecast_order": 2},
}  # fmt: skip
"""They decide by the number of the step alone; a forecast weighs one to three residuals."""


def main(
    output: Annotated[Path, typer.Argument(help="Folder for history.json and history.md.")],
    prompts: Annotated[int, typer.Option(min=1, help="Pictures of each kind.")] = 16,
    steps: Annotated[int, typer.Option(min=4, help="Of a generation.")] = 28,
) -> None:
    """Measure what fewer bits cost."""
    path = output / "history.json"
    report = begun(path, {"prompts": prompts, "steps": steps, "strategies": STRATEGIES})
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    captions = demo_captions(prompts + CALIBRATION_PROMPTS)
    measured, calibration = captions[:prompts], captions[prompts:]
    mag = calibrated_variants(pipe, calibration, steps, [0.1], [0.1])[1]
    ratios = {"mag_ratios": mag.flags["mag_ratios"], "num_inference_steps": steps}
    exact = [draw(pipe, prompt, seed, steps)[0] for seed, prompt in enumerate(measured)]
    report["rounding"] = rounding()
    for name in track([*STRATEGIES][len(report["measured"]) :], "strategies"):
        flags = STRATEGIES[name] | (ratios if STRATEGIES[name]["cache"] == "magcache" else {})
        found = compared(pipe, flags, measured, exact, steps)
        report["measured"].append({"strategy": name, "history_dtypes": found})
        report["is_done"] = len(report["measured"]) == len(STRATEGIES)
        write(report, path, as_markdown(report))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def compared(
    pipe: FluxPipeline,
    flags: dict[str, Any],
    prompts: Sequence[str],
    exact: Sequence[Picture],
    steps: int,
) -> dict[str, Any]:
    """A strategy's pictures with residuals in each dtype, beside those of every step computed."""
    pictures: dict[str, list[Picture]] = {}
    found: dict[str, Any] = {}
    for dtype in (EXACT, *FEWER):
        omni_cache.enable(pipe, inner="eager", history_dtype=dtype, strict=True, **flags)
        pictures[dtype] = [draw(pipe, each, seed, steps)[0] for seed, each in enumerate(prompts)]
        summary = omni_cache.summary(pipe)
        found[dtype] = {
            "computed_steps": summary.computed_steps,
            "bytes": summary.memory_bytes,
            "to_every_step": decibels(exact, pictures[dtype]),
            f"to_{EXACT}": decibels(pictures[EXACT], pictures[dtype]),
        }
        omni_cache.disable(pipe)
    assert len({each["computed_steps"] for each in found.values()}) == 1, found
    return found


def decibels(references: Sequence[Picture], pictures: Sequence[Picture]) -> list[float | None]:
    """The PSNR of each picture, None where it is the same."""
    return [psnr_to(*pair) for pair in zip(references, pictures, strict=True)]


def rounding() -> dict[str, float]:
    """How far residuals are rounded, relative to their own size, in the mean over all elements."""
    drawn = torch.randn(4, 1024, 256, generator=torch.Generator().manual_seed(0))
    found = {
        str(dtype).removeprefix("torch."): drawn.to(dtype).float()
        for dtype in (torch.bfloat16, torch.float16)
    }
    found["float8_e4m3fn"] = restored(*scaled(drawn))
    return {name: float((each - drawn).norm() / drawn.norm()) for name, each in found.items()}


def as_markdown(report: Report) -> str:
    """The report as Markdown."""
    rounded = ", ".join(f"{name} {100 * off:.2f}%" for name, off in report["rounding"].items())
    lines = []
    for row in report["measured"]:
        exact = row["history_dtypes"][EXACT]
        for dtype, each in row["history_dtypes"].items():
            cells = (
                row["strategy"],
                dtype,
                str(each["computed_steps"]),
                f"{each['bytes'] / exact['bytes']:.2f}",
                shown(each["to_every_step"]),
                "" if dtype == EXACT else shown(each[f"to_{EXACT}"]),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            "# Residuals in fewer bits",
            "",
            f"The bundled pipeline, {report['steps']} steps, {report['prompts']} prompts, "
            "residuals kept in several dtypes (`history_dtype`) at one schedule of each strategy. "
            "PSNR in dB to the pictures of every step computed, and to those of residuals in "
            f"{EXACT}: median and, in brackets, 5th percentile. Where the second is far above the "
            "first, rounding costs next to nothing beside reuse itself.",
            "",
            f"| strategy | kept in | computed | memory over {EXACT} | to every step computed "
            f"| to {EXACT} |",
            "|---|---|---:|---:|---:|---:|",
            *lines,
            "",
            f"Error of Gaussian residuals, relative to them: {rounded}.",
            "",
            'The inner compiler is "eager".',
            *signature(report),
        ]
    )


def shown(decibel: Sequence[float | None]) -> str:
    """Median and 5th percentile."""
    middle, fifth = (percentile_of(decibel, share) for share in (0.5, 0.05))
    texts = ["same" if each is None else f"{each:.2f}" for each in (middle, fifth)]
    return f"{texts[0]} ({texts[1]})"


if __name__ == "__main__":
    typer.run(main)
