"""How near forecasts come to the uncached pipeline, at equal numbers of computed steps.

Generates the bundled pipeline's prompts with each strategy and each forecast, at thresholds that
let the median generation compute as many steps as each target says, and beside them the uncached
pipeline with only so many steps. Writes forecasts.json and forecasts.md. The inner compiler is
"eager": pictures, and not times, are compared.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import FluxPipeline
from rich.progress import track

import omni_cache
from omni_cache.compare.report import processor
from omni_cache.demo import load_demo_pipeline
from omni_cache.demo.command import demo_captions
from omni_cache.demo.measurement import calibrated_variants, draw
from omni_cache.pipelines.folder import Picture
from omni_cache.quality import fidelity_to, quality_of
from omni_cache.strategies import STRATEGIES, Time

STEPS, TARGETS, CALIBRATION_PROMPTS = 28, (6, 8, 10, 12), 4
BAR_DECIBEL = 5.0
FORECASTS: dict[str, dict[str, Any]] = {
    "hold": {},
    "newton 1": {"forecast": "newton", "forecast_order": 1},
    "newton 2": {"forecast": "newton", "forecast_order": 2},
    "taylor 1": {"forecast": "taylor", "forecast_order": 1},
    "taylor 2": {"forecast": "taylor", "forecast_order": 2},
}
FEWER = "uncached, fewer steps"
THRESHOLDS = {"teacache": "rel_l1_thresh", "magcache": "threshold"}


def strategies(pipe: FluxPipeline, prompts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Flags of each strategy but its threshold, calibrated on the pipeline."""
    tea, mag = calibrated_variants(pipe, prompts, STEPS, [0.1], [0.1])
    magcache = {
        "cache": "magcache",
        "mag_ratios": mag.flags["mag_ratios"],
        "max_skip_steps": STEPS,
        "num_inference_steps": STEPS,
    }
    return {
        "TeaCache": {"cache": "teacache", "coefficients": tea.flags["coefficients"]},
        "MagCache": magcache,
        "MagCache, retention_ratio=0": {**magcache, "retention_ratio": 0.0},
    }


def computed_steps(flags: dict[str, Any], distances: Sequence[float | None]) -> int:
    """How many steps the gate of some flags computes, given the distances that it measures."""
    fields = {name: value for name, value in flags.items() if name != "cache"}
    gate = STRATEGIES[flags["cache"]](**fields).policy(None).gate("cond", 0)
    state, count = gate.begin(), 0
    for index, distance in enumerate(distances):
        verdict = gate.decide(state, Time(index), STEPS, distance)
        reuse = verdict.reuse and index > 0
        state = verdict.if_reused if reuse else verdict.if_computed
        count += not reuse
    return count


def threshold_for(
    target: int, flags: dict[str, Any], distances: Sequence[Sequence[float | None]]
) -> float:
    """The threshold at which the median generation computes ``target`` steps, by bisection."""
    flag = THRESHOLDS[flags["cache"]]
    low, high = 0.0, 64.0
    for _ in range(48):
        middle = (low + high) / 2
        counts = [computed_steps({**flags, flag: middle}, each) for each in distances]
        if median(counts) == target:
            return middle
        low, high = (middle, high) if median(counts) > target else (low, middle)
    raise ValueError(f"no threshold of {flags} computes {target} steps")


def generated(
    pipe: FluxPipeline, flags: dict[str, Any], prompts: Sequence[str]
) -> tuple[list[Picture], list[str], list[list[float | None]]]:
    """Pictures, schedules ("C" computed, "." reused) and distances, one for each prompt."""
    pictures, schedules, distances = [], [], []
    omni_cache.enable(pipe, inner="eager", **flags)
    for seed, prompt in enumerate(prompts):
        pictures.append(draw(pipe, prompt, seed, STEPS)[0])
        (trajectory,) = omni_cache.summary(pipe).trajectories
        schedules.append("".join(".C"[each.computed] for each in trajectory.steps))
        distances.append([each.distance for each in trajectory.steps])
    return pictures, schedules, distances


def at_target(
    pipe: FluxPipeline,
    flags: dict[str, Any],
    prompts: Sequence[str],
    target: int,
    distances: Sequence[Sequence[float | None]],
) -> dict[str, Any]:
    """What one strategy and forecast make of the prompts, at a number of computed steps."""
    flag = THRESHOLDS[flags["cache"]]
    for _ in range(3):  # what is forecast changes the latents, and they change the distances
        threshold = threshold_for(target, flags, distances)
        pictures, schedules, distances = generated(pipe, {**flags, flag: threshold}, prompts)
        if median(each.count("C") for each in schedules) == target:
            break
    return {"threshold": threshold, "pictures": pictures, "schedules": schedules}


def row(
    strategy: str,
    forecast: str,
    target: int,
    references: Sequence[Picture],
    pictures: Sequence[Picture],
) -> dict[str, Any]:
    """The fidelity of some pictures."""
    each = [fidelity_to(*pair) for pair in zip(references, pictures, strict=True)]
    quality = quality_of(each)
    return {
        "strategy": strategy,
        "forecast": forecast,
        "target": target,
        "psnr": quality.median.psnr,
        "psnr_5th": quality.fifth.psnr,
        "ssim": quality.median.ssim,
        "ssim_5th": quality.fifth.ssim,
        "psnr_per_prompt": [fidelity.psnr for fidelity in each],
    }


def main(
    output: Annotated[Path, typer.Argument(help="Folder for forecasts.json and forecasts.md.")],
    prompts: Annotated[int, typer.Option(help="How many prompts.")] = 16,
) -> None:
    """Measure how near forecasts come."""
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    captions = demo_captions(prompts + CALIBRATION_PROMPTS)
    measured, calibration = captions[:prompts], captions[prompts:]
    flags = strategies(pipe, calibration)
    references = [draw(pipe, prompt, seed, STEPS)[0] for seed, prompt in enumerate(measured)]
    rows = []
    for target in TARGETS:
        fewer = [draw(pipe, prompt, seed, target)[0] for seed, prompt in enumerate(measured)]
        rows.append(row(FEWER, "", target, references, fewer))
    every = {**flags["TeaCache"], "rel_l1_thresh": 0.0}
    exact, _, distances = generated(pipe, every, measured)
    assert all(map(np.array_equal, exact, references)), "computing every step must change nothing"
    for strategy, own in flags.items():
        for forecast, kind in track(FORECASTS.items(), strategy):
            for target in TARGETS:
                made = at_target(pipe, {**own, **kind}, measured, target, distances)
                rows.append(
                    {
                        **row(strategy, forecast, target, references, made["pictures"]),
                        "threshold": made["threshold"],
                        "schedules": made["schedules"],
                    }
                )
    report = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "omni-cache")},
        "command": shlex.join(["python", "scripts/bench_forecasts.py", *sys.argv[1:]]),
        "steps": STEPS,
        "prompts": measured,
        "strategies": flags,
        "bar_decibel": BAR_DECIBEL,
        "rows": rows,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "forecasts.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "forecasts.md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = report["rows"]
    found = {(each["strategy"], each["forecast"], each["target"]): each for each in rows}
    lines = {(each["strategy"], each["forecast"]): None for each in rows}
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    tables = []
    for measure, digits in (("psnr", 1), ("ssim", 4)):
        tables += [
            f"| {measure.upper()} | forecast | {' | '.join(map(str, TARGETS))} |",
            f"|---|---|{'---:|' * len(TARGETS)}",
        ]
        for strategy, forecast in lines:
            cells = [found[strategy, forecast, target] for target in TARGETS]
            texts = (f"{c[measure]:.{digits}f} ({c[f'{measure}_5th']:.{digits}f})" for c in cells)
            tables.append(f"| {strategy} | {forecast} | {' | '.join(texts)} |")
        tables.append("")
    return "\n".join(
        [
            f"# Forecasts, by the number of computed steps of {report['steps']}",
            "",
            f"Against the uncached pipeline with {report['steps']} steps: median and, in brackets, "
            f"5th percentile of {len(report['prompts'])} prompts; PSNR in dB. Each threshold is "
            "such that the median generation computes as many steps as the column says.",
            "",
            *tables,
            f"Bar: the best forecast is at least {report['bar_decibel']:g} dB better than as few "
            "uncached steps.",
            "",
            *(best(rows, target) for target in TARGETS),
            "",
            f'{report["date"]}, {report["machine"]}, {versions}, inner="eager".',
            "",
            f"    {report['command']}",
            "",
        ]
    )


def best(rows: Sequence[dict[str, Any]], target: int) -> str:
    """The best row at a number of computed steps, in words."""
    own = [each for each in rows if each["target"] == target]
    fewer = next(each for each in own if each["strategy"] == FEWER)
    top = max((each for each in own if each is not fewer), key=lambda each: each["psnr"])
    return (
        f"- {target} steps: {top['strategy']} with {top['forecast']}, {top['psnr']:.1f} dB, "
        f"{top['psnr'] - fewer['psnr']:+.1f} dB"
    )


if __name__ == "__main__":
    typer.run(main)
