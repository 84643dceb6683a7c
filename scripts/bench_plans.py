"""What tuned plans reach, beside fewer steps: at numbers of computed steps, and for targets.

Tunes a pipeline for each number of computed steps and for each PSNR, judges on samples that were
used for nothing else, and draws the same samples with fewer steps of the uncached model. Writes
plans-PIPELINE.json and plans-PIPELINE.md, and the plans themselves. Pipelines are "demo", the
bundled one, and "digits", which `scripts/digits.py train` makes.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import omni_cache
from omni_cache.compare.report import processor
from omni_cache.demo import load_demo_pipeline
from omni_cache.demo.command import demo_captions
from omni_cache.quality import fidelity_to, psnr_to

STEPS, SAMPLES, JUDGED = 28, 16, 32
BAR_OVER_FEWER, BAR_PREDICTION = 6.0, 1.5

Draw = Callable[[int], Any]


def bundled() -> tuple[Any, Callable[[int], Draw]]:
    """The bundled pipeline, and what draws with a number of steps; every sample has a caption."""
    pipe, captions = load_demo_pipeline(), demo_captions(SAMPLES + JUDGED)
    pipe.set_progress_bar_config(disable=True)

    def with_steps(steps: int) -> Draw:
        def draw(sample: int) -> Any:
            noise = torch.Generator().manual_seed(sample)
            made = pipe(
                captions[sample], num_inference_steps=steps, generator=noise, output_type="np"
            )
            return made.images[0]

        return draw

    return pipe, with_steps


def digits() -> tuple[Any, Callable[[int], Draw]]:
    """The pipeline of scripts/digits.py: another architecture, sampler and guidance."""
    from digits import load

    _, generate = load()
    return generate.pipe, lambda steps: type(generate)(generate.pipe, steps)


PIPELINES = {"demo": bundled, "digits": digits}


def decibels(references: Sequence[Any], made: Sequence[Any]) -> list[float]:
    """PSNR of each picture; infinite for equal ones."""
    found = [psnr_to(*pair) for pair in zip(references, made, strict=True)]
    return [float("inf") if each is None else each for each in found]


def summary_of(values: Sequence[float]) -> dict[str, float]:
    """Median, and the percentiles that are quoted."""
    return {
        "median": float(np.median(values)),
        "p5": float(np.percentile(values, 5)),
        "p10": float(np.percentile(values, 10)),
    }


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the reports and the plans.")],
    pipeline: Annotated[str, typer.Option(help="demo or digits.")] = "demo",
    computed: Annotated[str, typer.Option(help="Numbers of computed steps.")] = "6,8,10,12",
    targets: Annotated[str, typer.Option(help="PSNR to reach, in dB.")] = "40,45,50",
    confidence: Annotated[float, typer.Option(help="Share that has to reach a target.")] = 0.9,
    effort: Annotated[str, typer.Option(help="Of the tuning.")] = "default",
    inner: Annotated[str, typer.Option(help="Inner compiler.")] = "inductor",
) -> None:
    """Measure what plans reach."""
    pipe, with_steps = PIPELINES[pipeline]()
    generate, others = with_steps(STEPS), range(SAMPLES, SAMPLES + JUDGED)
    references = [generate(each) for each in others]
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    asked: list[tuple[str, dict[str, Any]]] = [
        (f"{number} computed", {"computed_steps": int(number)})
        for number in filter(None, computed.split(","))
    ]
    asked += [
        (f"PSNR >= {number}", {"psnr": float(number), "confidence": confidence})
        for number in filter(None, targets.split(","))
    ]
    for name, target in asked:
        started = time.perf_counter()
        plan = omni_cache.tune(
            pipe,
            generate,
            samples=SAMPLES,
            judged=JUDGED,
            effort=effort,
            inner=inner,
            **target,
        )
        seconds = time.perf_counter() - started
        plan.save(output / f"plan-{pipeline}-{name.split()[-1]}-{effort}.json")
        omni_cache.enable(pipe, plan, inner=inner)
        made = [generate(each) for each in others]
        omni_cache.disable(pipe)
        fewer = [with_steps(plan.point.computed_steps)(each) for each in others]
        rows.append(
            {
                "asked": name,
                "target": target,
                "computed_steps": plan.point.computed_steps,
                "actions": plan.point.actions,
                "plan": summary_of(decibels(references, made)),
                "predicted": None if plan.point.predicted is None else plan.point.predicted.psnr,
                "fewer": summary_of(decibels(references, fewer)),
                "ssim": float(
                    np.median(
                        [
                            fidelity_to(one, other).ssim or 0.0
                            for one, other in zip(map(rgb, references), map(rgb, made), strict=True)
                        ]
                    )
                ),
                "share": float(
                    np.mean(
                        [each >= target.get("psnr", 0.0) for each in decibels(references, made)]
                    )
                ),
                "loops": plan.content.made.loops,
                "seconds": seconds,
                "frontier": [
                    {
                        "computed_steps": point.computed_steps,
                        "predicted": None if point.predicted is None else point.predicted.psnr,
                        "judged": None if point.judged is None else point.judged.psnr,
                    }
                    for point in plan.frontier
                ],
            }
        )
        print(
            rows[-1]["asked"], rows[-1]["plan"], rows[-1]["fewer"], f"{seconds:.0f} s", flush=True
        )
    report = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "omni-cache")},
        "command": shlex.join(["python", "scripts/bench_plans.py", *sys.argv[1:]]),
        "pipeline": pipeline,
        "effort": effort,
        "rows": rows,
    }
    stem = output / f"plans-{pipeline}-{effort}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


def rgb(picture: Any) -> Any:
    """A picture with three channels, whatever it has."""
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=-1)


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"# Tuned plans of the pipeline {report['pipeline']!r}, effort {report['effort']!r}",
        "",
        f"{STEPS} steps, tuned on {SAMPLES} samples, judged on {JUDGED} others: PSNR in dB, "
        "against the uncached pipeline: median and, in brackets, 5th percentile. Beside it the "
        "same model with only as many steps.",
        "",
        "| asked for | computed | plan | predicted | SSIM | fewer steps | plan over fewer | "
        "reached by | loops | tuned in |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        over = row["plan"]["median"] - row["fewer"]["median"]
        share = f"{100 * row['share']:.0f}%" if "psnr" in row["target"] else ""
        predicted = "" if row["predicted"] is None else f"{row['predicted']:.1f}"
        lines.append(
            f"| {row['asked']} | {row['computed_steps']} | {row['plan']['median']:.1f} "
            f"({row['plan']['p5']:.1f}) | {predicted} | {row['ssim']:.4f} | "
            f"{row['fewer']['median']:.1f} ({row['fewer']['p5']:.1f}) | {over:+.1f} | {share} | "
            f"{row['loops']:.0f} | {row['seconds']:.0f} s |"
        )
    off = [
        abs(point["predicted"] - point["judged"])
        for row in report["rows"]
        for point in row["frontier"]
        if point["predicted"] is not None and point["judged"] is not None
    ]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += [
        "",
        f"Bars: {BAR_OVER_FEWER:g} dB over fewer steps; predicted and judged medians within "
        f"{BAR_PREDICTION:g} dB. The largest difference of the two over all points of all plans is "
        f"{max(off, default=0.0):.1f} dB.",
        "",
        f"{report['date']}, {report['machine']}, {versions}.",
        "",
        f"    {report['command']}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
