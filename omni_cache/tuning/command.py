"""The tune command: tune a pipeline, write the plan, and report on it beside what else there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from omni_cache.compare.collect import collect
from omni_cache.compare.command import calibrate_all
from omni_cache.compare.kinds import plan_kind, strategy_kinds
from omni_cache.compare.measure import Task
from omni_cache.compare.report import Comparison
from omni_cache.pipelines import disable, enable
from omni_cache.pipelines.folder import Folder
from omni_cache.runtime.contexts import generation
from omni_cache.strategies import Plan
from omni_cache.strategies.base import require
from omni_cache.strategies.named import PLAN_SUFFIX
from omni_cache.tuning.report import Shown, write_report
from omni_cache.tuning.tune import tune

_SHOWN = 4
"""Judged prompts whose pictures the report shows."""
_COMPARED = 8
"""Judged prompts that the report compares on."""


def run(
    pipeline: Folder,
    prompts: Sequence[str],
    num_inference_steps: int,
    output: Path,
    *,
    strategies: bool = True,
    inner: str = "inductor",
    seed: int = 0,
    samples: int = 16,
    judged: int = 16,
    **asked: Any,
) -> Plan:
    """Tune a plan, write it, and write a page about it beside it, with the ending .html.

    Args:
        pipeline: what to tune.
        prompts: sample i is drawn with prompt ``i % len(prompts)`` from the noise of ``seed + i``.
        num_inference_steps: steps of a generation.
        output: the plan's file.
        strategies: whether the page has fewer steps and the adaptive strategies too.
        inner: the inner compiler.
        seed: of the noise.
        samples: how many calibrate.
        judged: how many others judge.
        asked: what else `omni_cache.tune` takes: the target, the effort, the confidence.

    Raises:
        ValueError: an argument is wrong.
    """
    # By its ending a path is known for a plan's.
    require(output.suffix == PLAN_SUFFIX, "output", str(output), f"a path with {PLAN_SUFFIX}")
    console = Console()
    output.parent.mkdir(parents=True, exist_ok=True)
    pipe = pipeline.load()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        bar = progress.add_task("tuning", total=None)

        def show(stage: str, done: float, total: float) -> None:
            progress.update(bar, description=stage, completed=round(done, 1), total=round(total, 1))

        plan = tune(
            pipe,
            prompts=prompts,
            num_inference_steps=num_inference_steps,
            arguments=pipeline.arguments,
            seed=seed,
            samples=samples,
            judged=judged,
            progress=show,
            inner=inner,
            resume=output.with_suffix(".partial"),
            **asked,
        )
        plan.save(output)
        console.print(str(plan), highlight=False)
        others = [samples + number for number in range(judged)]
        own = [(prompts[number % len(prompts)], seed + number) for number in others]
        shown = _pictures(pipeline, pipe, plan, own[:_SHOWN], num_inference_steps, inner)
        comparison = None
        if strategies:
            compared = own[:_COMPARED]
            task = Task(
                pipeline,
                [prompt for prompt, _ in compared],
                num_inference_steps,
                inner,
                seed + samples,
            )
            comparison = _compared(task, plan, output, progress)
    page = output.with_suffix(".html")
    write_report(plan, shown, comparison, page)
    console.print(f"Use it: omni_cache.enable(pipe, {str(output)!r})")
    console.print(f"Open {page}")
    return plan


def _pictures(
    pipeline: Folder,
    pipe: Any,
    plan: Plan,
    own: Sequence[tuple[str, int]],
    num_inference_steps: int,
    inner: str,
) -> list[Shown]:
    enable(pipe, plan, inner=inner)
    shown = []
    for prompt, seed in own:
        with generation(cache="none"):
            uncached, _ = pipeline.draw(pipe, prompt, seed, num_inference_steps)
        planned, _ = pipeline.draw(pipe, prompt, seed, num_inference_steps)
        shown.append(Shown(prompt, uncached, planned))
    disable(pipe)
    return shown


def _compared(task: Task, plan: Plan, output: Path, progress: Progress) -> Comparison:
    folder = output.with_suffix(".comparison")
    folder.mkdir(exist_ok=True)
    calibrations = calibrate_all(task, folder, progress)
    kinds = [plan_kind(plan), *strategy_kinds(calibrations)]
    return collect(task, kinds, folder / "logs", progress)
