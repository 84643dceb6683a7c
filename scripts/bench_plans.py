"""What tuned plans reach, beside fewer steps: at numbers of computed steps, and for targets.

Tunes a pipeline for each number of computed steps and for each PSNR, judges on samples that were
used for nothing else, and draws the same samples with fewer steps of the uncached model. After
every plan it writes plans-PIPELINE-EFFORT.json, .md and .png, and the plan itself; what the JSON
has already is not measured again, and a tuning that was interrupted goes on. Pipelines are "demo",
the bundled one, and "digits", which `scripts/digits.py train` makes.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure

import omni_cache
from omni_cache.compare.report import processor
from omni_cache.demo import demo_arguments, load_demo_pipeline
from omni_cache.demo.command import demo_captions
from omni_cache.quality import Fidelity, fidelity_to

BAR_OVER_FEWER, BAR_PREDICTION = 6.0, 1.5

Draw = Callable[[int], Any]
"""Draws a sample: an RGB picture, (H, W, 3), with numbers in [0, 1]."""


def bundled(count: int) -> tuple[Any, Callable[[int], Draw]]:
    """The bundled pipeline, and what draws with a number of steps; every sample has a caption."""
    pipe, captions = load_demo_pipeline(), demo_captions(count)
    pipe.set_progress_bar_config(disable=True)

    def with_steps(steps: int) -> Draw:
        def draw(sample: int) -> Any:
            noise = torch.Generator().manual_seed(sample)
            made = pipe(
                captions[sample],
                num_inference_steps=steps,
                generator=noise,
                output_type="np",
                **demo_arguments(),
            )
            return made.images[0]

        return draw

    return pipe, with_steps


def digits(count: int) -> tuple[Any, Callable[[int], Draw]]:
    """The pipeline of scripts/digits.py: another architecture, sampler and guidance."""
    from digits import load

    _, generate = load()

    def with_steps(steps: int) -> Draw:
        draw = type(generate)(generate.pipe, steps)
        return lambda sample: np.repeat(draw(sample)[..., None], 3, axis=-1)

    return generate.pipe, with_steps


PIPELINES = {"demo": bundled, "digits": digits}


class Clock:
    """Says what is being done and for how long, at each new stage and every half minute."""

    def __init__(self) -> None:
        self.began = self._told = time.perf_counter()
        self._stage = ""

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.began

    def __call__(self, stage: str, loops: float, planned: float) -> None:
        """The progress of a tuning."""
        if stage != self._stage or time.perf_counter() - self._told > 30:
            self._stage, self._told = stage, time.perf_counter()
            print(
                f"{self.seconds:7.0f} s  {stage} ({loops:.0f} loops of {planned:.0f})", flush=True
            )


def summary_of(fidelities: Sequence[Fidelity]) -> dict[str, float]:
    """Median and 5th percentile of PSNR, infinite for equal pictures, and of SSIM."""
    psnr = [inf if each.psnr is None else each.psnr for each in fidelities]
    ssim = [each.ssim for each in fidelities if each.ssim is not None]
    low = float(np.percentile(psnr, 5, method="lower"))
    return {
        "psnr": float(np.median(psnr)),
        "psnr_low": low,
        "ssim": float(np.median(ssim)),
        "ssim_low": float(np.percentile(ssim, 5)),
    }


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the reports and the plans.")],
    pipeline: Annotated[str, typer.Option(help="demo or digits.")] = "demo",
    computed: Annotated[str, typer.Option(help="Numbers of computed steps.")] = "6,8,10,12",
    targets: Annotated[str, typer.Option(help="PSNR to reach, in dB.")] = "40,45,50",
    confidence: Annotated[float, typer.Option(help="Share that has to reach a target.")] = 0.9,
    effort: Annotated[str, typer.Option(help="Of the tuning.")] = "default",
    inner: Annotated[str, typer.Option(help="Inner compiler.")] = "inductor",
    steps: Annotated[int, typer.Option(help="Of a loop.")] = 28,
    samples: Annotated[int, typer.Option(help="How many calibrate.")] = 16,
    judged: Annotated[int, typer.Option(help="How many others judge.")] = 32,
) -> None:
    """Measure what plans reach."""
    pipe, with_steps = PIPELINES[pipeline](samples + judged)
    generate, others = with_steps(steps), range(samples, samples + judged)
    output.mkdir(parents=True, exist_ok=True)
    stem = output / f"plans-{pipeline}-{effort}"
    settings = {"pipeline": pipeline, "effort": effort, "steps": steps, "samples": samples}
    settings |= {"judged": judged, "confidence": confidence}
    rows = known(stem.with_suffix(".json"), settings)
    clock = Clock()
    references = [generate(each) for each in others]
    print(f"{clock.seconds:7.0f} s  drew {judged} pictures uncached", flush=True)
    asked: list[tuple[str, dict[str, Any]]] = [
        (f"{number} computed", {"computed_steps": int(number)})
        for number in filter(None, computed.split(","))
    ]
    asked += [
        (f"PSNR >= {number}", {"psnr": float(number), "confidence": confidence})
        for number in filter(None, targets.split(","))
    ]
    for name, target in asked:
        if name in [row["asked"] for row in rows]:
            print(f"{clock.seconds:7.0f} s  {name}: measured before", flush=True)
            continue
        print(f"{clock.seconds:7.0f} s  {name}", flush=True)
        path = output / f"plan-{pipeline}-{effort}-{name.replace(' >= ', '-').replace(' ', '-')}"
        tuning = Clock()
        plan = omni_cache.tune(
            pipe,
            generate,
            samples=samples,
            judged=judged,
            effort=effort,
            inner=inner,
            progress=tuning,
            resume=path.with_suffix(".partial"),
            **target,
        )
        seconds = tuning.seconds
        plan.save(path.with_suffix(".json"))
        omni_cache.enable(pipe, plan, inner=inner)
        made = compared(references, [generate(each) for each in others])
        omni_cache.disable(pipe)
        point, fewer = plan.point, with_steps(plan.point.computed_steps)
        reached = [each.psnr is None or each.psnr >= target.get("psnr", 0.0) for each in made]
        rows.append(
            {
                "asked": name,
                "target": target,
                "computed_steps": point.computed_steps,
                "actions": point.actions,
                "plan": summary_of(made),
                "predicted": None if point.predicted is None else point.predicted._asdict(),
                "judged": None if point.judged is None else point.judged._asdict(),
                "fewer": summary_of(compared(references, [fewer(each) for each in others])),
                "share": float(np.mean(reached)),
                "loops": plan.content.made.loops,
                "seconds": seconds,
                "frontier": [
                    {
                        "computed_steps": each.computed_steps,
                        "skipped_steps": each.skipped_steps,
                        "seconds": each.seconds,
                        "predicted": None if each.predicted is None else each.predicted._asdict(),
                        "judged": None if each.judged is None else each.judged._asdict(),
                    }
                    for each in plan.frontier
                ],
            }
        )
        report = {
            "date": date.today().isoformat(),
            "machine": f"{processor()}, {torch.get_num_threads()} threads",
            "versions": {name: version(name) for name in ("torch", "diffusers", "omni-cache")},
            "command": shlex.join(["python", "scripts/bench_plans.py", *sys.argv[1:]]),
            "settings": settings,
            "rows": rows,
        }
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
        draw(report, stem.with_suffix(".png"))
        print(f"{clock.seconds:7.0f} s  {name}: {rows[-1]['plan']}, tuned in {seconds:.0f} s")
    print(stem.with_suffix(".md").read_text(encoding="utf-8"))


def known(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured before with these settings.

    Raises:
        ValueError: the file has other settings.
    """
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["settings"] != settings:
        raise ValueError(f"{path} was measured with {report['settings']}; name another folder")
    rows: list[dict[str, Any]] = report["rows"]
    return rows


def compared(references: Sequence[Any], made: Sequence[Any]) -> list[Fidelity]:
    """How near each picture is to its reference."""
    return [fidelity_to(*pair) for pair in zip(references, made, strict=True)]


def draw(report: dict[str, Any], path: Path) -> None:
    """PSNR over computed steps: plans, their 5th percentile, and fewer steps."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, rows = figure.subplots(), sorted(report["rows"], key=lambda row: row["computed_steps"])
    across = [row["computed_steps"] for row in rows]
    lines = {
        "plans": [row["plan"]["psnr"] for row in rows],
        "plans, 5th percentile": [row["plan"]["psnr_low"] for row in rows],
        "fewer steps": [row["fewer"]["psnr"] for row in rows],
    }
    for (name, values), style in zip(lines.items(), ("o-C3", ":C3", "s-C0"), strict=True):
        axes.plot(
            across, [each if isfinite(each) else np.nan for each in values], style, label=name
        )
    axes.set(xlabel=f"steps computed of {report['settings']['steps']}", ylabel="PSNR in dB, median")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = report["settings"]
    lines = [
        "# Tuned plans of the pipeline {pipeline!r}, effort {effort!r}".format(**settings),
        "",
        "{steps} steps, tuned on {samples} samples, judged on {judged} others: PSNR in dB and SSIM "
        'against the uncached pipeline, median and, in brackets, 5th percentile. "Reached by" is '
        "the share of the judged samples that meet the target. Beside it the same model with only "
        "as many steps.".format(**settings),
        "",
        "| asked for | computed | PSNR | predicted | SSIM | predicted | fewer steps | plan over "
        "fewer | reached by | loops | tuned in |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        over = row["plan"]["psnr"] - row["fewer"]["psnr"]
        share = f"{100 * row['share']:.0f}%" if "psnr" in row["target"] else ""
        lines.append(
            f"| {row['asked']} | {row['computed_steps']} | {cell(row['plan'], 'psnr', 1)} | "
            f"{cell(row['predicted'], 'psnr', 1)} | {cell(row['plan'], 'ssim', 4)} | "
            f"{cell(row['predicted'], 'ssim', 4)} | {cell(row['fewer'], 'psnr', 1)} | {over:+.1f} "
            f"| {share} | {row['loops']:.0f} | {row['seconds']:.0f} s |"
        )
    off = [
        abs(point["predicted"]["psnr"] - point["judged"]["psnr"])
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


def cell(quality: dict[str, float] | None, name: str, digits: int) -> str:
    """The median, and the 5th percentile in brackets."""
    if quality is None or quality[name] is None:
        return ""
    return f"{quality[name]:.{digits}f} ({quality[f'{name}_low']:.{digits}f})"


if __name__ == "__main__":
    typer.run(main)
