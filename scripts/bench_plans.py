"""What tuned plans reach, beside fewer steps and other strategies, on the same samples.

Tunes a pipeline once for all numbers of computed steps, and once for each PSNR, and judges on
samples that were used for nothing else. The same samples are drawn with fewer steps of the uncached
model, and by the strategies that lead the table of `omni-cache compare`. After every tuning it
writes plans-PIPELINE-EFFORT.json, .md and .png, and the plan itself; what the JSON has already is
not measured again, and a tuning that was interrupted goes on. Pipelines are "demo", the bundled
one, and "digits", which `scripts/digits.py train` makes.
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
from omni_cache.pipelines import is_enabled
from omni_cache.quality import Fidelity, fidelity_to

BAR_OVER_FEWER, BAR_OVER_OTHERS, BAR_PREDICTION = 6.0, 3.0, 1.5

OTHERS: dict[str, dict[str, Any]] = {
    f"{name}, {setting} {value}, newton": {"cache": cache, setting: value, "forecast": "newton"}
    for name, cache, setting, value in (
        ("FirstBlockCache", "first_block_cache", "threshold", 0.3),
        ("FirstBlockCache", "first_block_cache", "threshold", 0.2),
        ("TaylorSeer", "taylorseer", "cache_interval", 3),
    )
}
"""Those that lead docs/benchmarks/compare/results.md at up to 6, 8 and 12 computed steps."""

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
BRANCHES = {"demo": 1, "digits": 2}
"""Calls of the model at each step."""


class Clock:
    """Says what is being done and for how long, at each new stage and every half minute."""

    def __init__(self) -> None:
        self.began = self._told = time.perf_counter()
        self._processor_began = time.process_time()
        self._stage = ""

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.began

    @property
    def processor_seconds(self) -> float:
        """Of this process since then, which other processes hardly change."""
        return time.process_time() - self._processor_began

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
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    inner: Annotated[str, typer.Option(help="Inner compiler.")] = "inductor",
    steps: Annotated[int, typer.Option(help="Of a loop.")] = 28,
    samples: Annotated[int, typer.Option(help="How many calibrate.")] = 16,
    judged: Annotated[int, typer.Option(help="How many others judge.")] = 32,
    minutes: Annotated[
        float | None, typer.Option(help="That a tuning may take, judging included.")
    ] = None,
) -> None:
    """Measure what plans reach."""
    pipe, with_steps = PIPELINES[pipeline](samples + judged)
    pipe.to(device)
    generate, others = with_steps(steps), range(samples, samples + judged)
    output.mkdir(parents=True, exist_ok=True)
    stem = output / f"plans-{pipeline}-{effort}"
    settings = {"pipeline": pipeline, "effort": effort, "steps": steps, "samples": samples}
    settings |= {"judged": judged, "confidence": confidence, "device": device, "inner": inner}
    if minutes is not None:
        settings["minutes"] = minutes
    report = known(stem.with_suffix(".json"), settings) or {"others": {}, "rows": []}
    report |= {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "omni-cache")},
        "command": shlex.join(["python", "scripts/bench_plans.py", *sys.argv[1:]]),
        "settings": settings,
    }
    clock = Clock()
    references = [generate(each) for each in others]
    print(f"{clock.seconds:7.0f} s  drew {judged} pictures uncached", flush=True)

    def drawn(draw: Draw, wanted: float = 0.0) -> dict[str, Any]:
        """What the judged samples come to, the share that has the PSNR, and how many steps ran."""
        made, ran = [], []
        for each in others:
            made.append(draw(each))
            if is_enabled(pipe):
                ran.append(omni_cache.summary(pipe).computed_steps / BRANCHES[pipeline])
        found = [fidelity_to(*pair) for pair in zip(references, made, strict=True)]
        reached = [each.psnr is None or each.psnr >= wanted for each in found]
        return {
            "computed_steps": float(np.median(ran)) if ran else None,
            "reached": float(np.mean(reached)),
            **summary_of(found),
        }

    counts = [int(number) for number in filter(None, computed.split(","))]
    asked: list[tuple[str, dict[str, Any]]] = [
        ("computed", {"computed_steps": counts[0] if len(counts) == 1 else counts})
    ][: len(counts)]
    asked += [
        (f"PSNR >= {number}", {"psnr": float(number), "confidence": confidence})
        for number in filter(None, targets.split(","))
    ]
    for name, target in asked:
        wanted = [f"{number} computed" for number in counts] if name == "computed" else [name]
        if {row["asked"] for row in report["rows"]} >= set(wanted):
            print(f"{clock.seconds:7.0f} s  {name}: measured before", flush=True)
            continue
        print(f"{clock.seconds:7.0f} s  {name}", flush=True)
        path = output / f"plan-{pipeline}-{effort}-{name.replace(' >= ', '-')}"
        tuning = Clock()
        plan = omni_cache.tune(
            pipe,
            generate,
            samples=samples,
            judged=judged,
            effort=effort,
            minutes=minutes,
            inner=inner,
            progress=tuning,
            resume=path.with_suffix(".partial"),
            **target,
        )
        seconds, processor_seconds = tuning.seconds, tuning.processor_seconds
        plan.save(path.with_suffix(".json"))
        for place, row_name in enumerate(wanted):
            if name == "computed":
                plan = plan.at(computed_steps=counts[place])
            point = plan.point
            omni_cache.enable(pipe, plan, inner=inner)
            made = drawn(generate, target.get("psnr", 0.0))
            omni_cache.disable(pipe)
            report["rows"].append(
                {
                    "asked": row_name,
                    "target": target,
                    "computed_steps": point.computed_steps,
                    "actions": point.actions,
                    "plan": made,
                    "predicted": None if point.predicted is None else point.predicted._asdict(),
                    "judged": None if point.judged is None else point.judged._asdict(),
                    "fewer": drawn(with_steps(point.computed_steps)),
                    "loops": plan.content.made.loops,
                    "seconds": seconds,
                    "processor_seconds": processor_seconds,
                    "frontier": [
                        {
                            "computed_steps": each.computed_steps,
                            "skipped_steps": each.skipped_steps,
                            "seconds": each.seconds,
                            "optimism": each.optimism,
                            "predicted": each.predicted and each.predicted._asdict(),
                            "judged": each.judged and each.judged._asdict(),
                        }
                        for each in plan.frontier
                    ],
                }
            )
            write(report, stem)
            print(f"{clock.seconds:7.0f} s  {row_name}: {made}", flush=True)
    for name, flags in OTHERS.items():
        if name not in report["others"]:
            omni_cache.enable(pipe, **flags, inner=inner)
            report["others"][name] = drawn(generate)
            omni_cache.disable(pipe)
            write(report, stem)
            print(f"{clock.seconds:7.0f} s  {name}: {report['others'][name]}", flush=True)
    print(stem.with_suffix(".md").read_text(encoding="utf-8"))


def known(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The report of what was measured before with these settings.

    Raises:
        ValueError: the file has other settings.
    """
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if report["settings"] != settings:
        raise ValueError(f"{path} was measured with {report['settings']}; name another folder")
    return report


def write(report: dict[str, Any], stem: Path) -> None:
    """The report in all its forms."""
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(as_markdown(report), encoding="utf-8")
    draw(report, stem.with_suffix(".png"))


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
    settings, others = report["settings"], report["others"]
    limit = f", within {settings['minutes']:g} minutes" if "minutes" in settings else ""
    lines = [
        "# Tuned plans of the pipeline {pipeline!r}, effort {effort!r}{limit}".format(
            **settings, limit=limit
        ),
        "",
        "{steps} steps, tuned on {samples} samples, judged on {judged} others: PSNR in dB and SSIM "
        'against the uncached pipeline, median and, in brackets, 5th percentile. "Reached by" is '
        "the share of the judged samples that meet the target. On the same samples: the model with "
        "only as many steps, and the best of the other strategies below that computes no "
        "more.".format(**settings),
        "",
        "| asked for | computed | PSNR | predicted | SSIM | fewer steps | plan over fewer | best "
        "other | plan over other | reached by | loops | processor time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        plan, count = row["plan"], row["plan"]["computed_steps"]
        fits = [each for each in others.values() if each["computed_steps"] <= count]
        best = max(fits, key=lambda each: each["psnr"], default=None)
        over = "" if best is None else f"{plan['psnr'] - best['psnr']:+.1f}"
        lines.append(
            f"| {row['asked']} | {count:g} | {cell(plan, 'psnr', 1)} | "
            f"{cell(row['predicted'], 'psnr', 1)} | {cell(plan, 'ssim', 4)} | "
            f"{cell(row['fewer'], 'psnr', 1)} | {plan['psnr'] - row['fewer']['psnr']:+.1f} | "
            f"{cell(best, 'psnr', 1)} | {over} | "
            f"{100 * plan['reached']:.0f}% | {row['loops']:.0f} | "
            f"{row['processor_seconds']:.0f} s |"
        )
    off = [
        abs(row["predicted"]["psnr"] - row["judged"]["psnr"])
        for row in report["rows"]
        if row["predicted"] is not None and row["judged"] is not None
    ]
    lines += ["", "| strategy | computed | PSNR | SSIM |", "|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {each['computed_steps']:g} | {cell(each, 'psnr', 1)} | "
        f"{cell(each, 'ssim', 4)} |"
        for name, each in others.items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += [
        "",
        f"- Aims: {BAR_OVER_FEWER:g} dB over fewer steps and {BAR_OVER_OTHERS:g} dB over other "
        f"strategies; predicted and judged medians within {BAR_PREDICTION:g} dB. The largest "
        f"difference of the two is {max(off, default=0.0):.1f} dB.",
        "- Loops, of one sample, and processor time are those of the tuning, judging and "
        "compilation included. All numbers of computed steps were tuned together, and cost so much "
        "in all.",
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
