"""The demo command: measure caching on the bundled pipeline, and show and keep what was found."""

from __future__ import annotations

import dataclasses
import json
import platform
import random
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from omni_cache.compare.report import processor
from omni_cache.demo import demo_pipeline_path, load_demo_pipeline
from omni_cache.demo.drawings import Scene, random_scene
from omni_cache.demo.figures import picture_grid, timeline
from omni_cache.demo.measurement import (
    Measurement,
    VariantResult,
    calibrated_variants,
    measure,
)
from omni_cache.quality import Fidelity

REL_L1_THRESHOLDS = (0.1, 0.2, 0.3, 0.4)
MAGNITUDE_THRESHOLDS = (0.1, 0.2, 0.4)
_CALIBRATION_PROMPTS = 4
LEAST_STEPS = 3
"""Fewer do not calibrate a polynomial of degree 4 on so many prompts."""
_PSNR_FLOORS = (30, 35, 40)


def run(
    output: Path = Path("demo-output"),
    *,
    prompts: int = 16,
    num_inference_steps: int = 28,
    inner: str = "inductor",
    seed: int = 0,
    pipeline: Path | None = None,
    rel_l1_thresholds: Sequence[float] = REL_L1_THRESHOLDS,
    magnitude_thresholds: Sequence[float] = MAGNITUDE_THRESHOLDS,
) -> Measurement:
    """Generate the same prompts and seeds uncached, with TeaCache and with MagCache.

    Prints one table, and writes ``pictures.png``, ``timeline.png``, ``results.md`` and
    ``results.json``.

    Args:
        output: folder to write to; made if there is none.
        prompts: how many prompts to measure.
        num_inference_steps: steps of an uncached generation.
        inner: the inner compiler, for the uncached model also.
        seed: of the noise; prompt i starts from ``seed + i``.
        pipeline: another pipeline folder than the bundled one.
        rel_l1_thresholds: TeaCache's thresholds.
        magnitude_thresholds: MagCache's thresholds.

    Raises:
        ValueError: ``prompts`` is less than 1, or ``num_inference_steps`` less than `LEAST_STEPS`.
    """
    given = ("prompts", prompts, 1), ("num_inference_steps", num_inference_steps, LEAST_STEPS)
    for name, value, least in given:
        if value < least:
            raise ValueError(f"{name} must be at least {least}, and is {value}")
    console = Console()
    pipe = load_demo_pipeline(pipeline)
    pipe.set_progress_bar_config(disable=True)
    captions = demo_captions(_CALIBRATION_PROMPTS + prompts)
    measured, calibration = captions[:prompts], captions[prompts:]
    variant_count = len(rel_l1_thresholds) + len(magnitude_thresholds)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task("calibrating", total=1 + (1 + variant_count) * (1 + prompts))
        variants = calibrated_variants(
            pipe, calibration, num_inference_steps, rel_l1_thresholds, magnitude_thresholds
        )
        progress.update(task, advance=1, description=f"compiling with {inner}")
        measurement = measure(
            pipe,
            variants,
            measured,
            num_inference_steps,
            inner,
            seed,
            on_progress=lambda done: progress.update(task, advance=1, description=done),
        )
    console.print(table(measurement))
    for line in [*reached(measurement), compile_times(measurement)]:
        console.print(line, highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    picture_grid(measurement, output / "pictures.png")
    timeline(measurement, output / "timeline.png")
    (output / "results.json").write_text(
        json.dumps(as_json(measurement, inner, seed), indent=1, allow_nan=False) + "\n"
    )
    (output / "results.md").write_text(as_markdown(measurement), encoding="utf-8")
    console.print(
        f"To see it, open {output / 'pictures.png'} and {output / 'timeline.png'};\n"
        f"the numbers are in {output / 'results.md'} and {output / 'results.json'}.",
        highlight=False,
        soft_wrap=True,
    )
    return measurement


def demo_captions(count: int) -> list[str]:
    """Different captions, always the same ones; the first is the README's."""
    rng = random.Random(28)
    captions = [Scene("circle", "red", "blue").caption]
    while len(captions) < count:
        caption = random_scene(rng).caption
        if caption not in captions:
            captions.append(caption)
    return captions


HEADINGS = (
    "strategy",
    "time ms",
    "steps",
    "speedup",
    "PSNR dB",
    "SSIM",
    "fewer time",
    "fewer PSNR",
    "fewer SSIM",
)
FEWER = "fewer: the uncached model run with only as many steps as the strategy computed"


def rows(measurement: Measurement) -> list[tuple[str, ...]]:
    """The cells below `HEADINGS`, one row for each variant; medians over the prompts."""
    total = measurement.num_inference_steps
    uncached = _milliseconds(median(measurement.uncached_seconds))
    return [
        ("uncached", uncached, f"{total}/{total}", "1.00x", *[""] * 5),
        *(
            (
                result.variant.label,
                _milliseconds(result.seconds),
                f"{result.computed_steps:g}/{total}",
                f"{measurement.speedup(result):.2f}x",
                _decibel(result.fidelity),
                f"{result.fidelity.ssim:.3f}",
                _milliseconds(result.baseline_seconds),
                _decibel(result.baseline_fidelity),
                f"{result.baseline_fidelity.ssim:.3f}",
            )
            for result in measurement.results
        ),
    ]


def table(measurement: Measurement) -> Table:
    """The rows for the terminal, 80 columns wide at most, the honest baseline at the right."""
    shown = Table(
        title=_title(measurement), caption=FEWER, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in HEADINGS:
        shown.add_column(
            heading.replace(" ", "\n"),
            justify="left" if heading == "strategy" else "right",
            style="cyan" if heading.startswith("fewer") else None,
            no_wrap=True,
        )
    for row in rows(measurement):
        shown.add_row(*row, end_section=row[0] == "uncached")
    return shown


def as_markdown(measurement: Measurement) -> str:
    """The rows as a Markdown table, with what was reached."""
    lines = [
        f"# {_title(measurement)}",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|---{'|---:' * (len(HEADINGS) - 1)}|",
        *(f"| {' | '.join(row)} |" for row in rows(measurement)),
        "",
        f"{FEWER[0].upper()}{FEWER[1:]}.",
        "",
        *(f"- {line}" for line in reached(measurement)),
        "",
    ]
    return "\n".join(lines)


def _title(measurement: Measurement) -> str:
    prompts = len(measurement.prompts)
    return f"{measurement.num_inference_steps} steps, median of {prompts} prompts"


def compile_times(measurement: Measurement) -> str:
    """What compiling cost, in words; no other time includes it."""
    times = [("uncached", measurement.uncached_compile_seconds)]
    times += [(each.variant.label, each.compile_seconds) for each in measurement.results]
    return "first call, with compilation: " + ", ".join(
        f"{label} {seconds:.0f} s" for label, seconds in times
    )


def reached(measurement: Measurement) -> list[str]:
    """For each floor of quality, the best speedup at or above it, in words."""
    lines = []
    for floor in _PSNR_FLOORS:
        best = measurement.best_at(floor)
        what = (
            "no variant"
            if best is None
            else f"{measurement.speedup(best):.2f}x with {best.variant.label} "
            f"({_decibel(best.fidelity)} dB)"
        )
        lines.append(f"at PSNR >= {floor} dB: {what}")
    return lines


def as_json(measurement: Measurement, inner: str, seed: int) -> dict[str, Any]:
    """Everything measured, except the pictures, with what it was measured on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": {
            "platform": platform.platform(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            name: version(name) for name in ("omni-cache", "torch", "diffusers", "transformers")
        },
        "inner": inner,
        "seed": seed,
        "pipeline": json.loads((demo_pipeline_path() / "training.json").read_text()),
        "num_inference_steps": measurement.num_inference_steps,
        "uncached": {
            "compile_seconds": measurement.uncached_compile_seconds,
            "seconds": median(measurement.uncached_seconds),
            "seconds_per_prompt": dict(
                zip(measurement.prompts, measurement.uncached_seconds, strict=True)
            ),
        },
        "variants": [_variant_as_json(measurement, each) for each in measurement.results],
        "reached": {
            f"psnr>={floor}": None
            if (best := measurement.best_at(floor)) is None
            else {"variant": best.variant.label, "speedup": measurement.speedup(best)}
            for floor in _PSNR_FLOORS
        },
    }


def _variant_as_json(measurement: Measurement, result: VariantResult) -> dict[str, Any]:
    return {
        "strategy": result.variant.strategy,
        "threshold": result.variant.threshold,
        "flags": result.variant.flags,
        "compile_seconds": result.compile_seconds,
        "seconds": result.seconds,
        "speedup": measurement.speedup(result),
        "computed_steps": result.computed_steps,
        "fidelity": dataclasses.asdict(result.fidelity),
        "fewer_steps_seconds": result.baseline_seconds,
        "fewer_steps_fidelity": dataclasses.asdict(result.baseline_fidelity),
        "generations": [
            {
                "prompt": each.prompt,
                "seconds": each.seconds,
                "computed_steps": each.computed_steps,
                "fidelity": dataclasses.asdict(each.fidelity),
                "fewer_steps_seconds": each.baseline_seconds,
                "fewer_steps_fidelity": dataclasses.asdict(each.baseline_fidelity),
                "steps": [dataclasses.asdict(step) for step in each.steps],
            }
            for each in result.generations
        ],
    }


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"


def _decibel(fidelity: Fidelity) -> str:
    return "same" if fidelity.psnr is None else f"{fidelity.psnr:.1f}"
