"""The page about a plan: plots, its frontier as a table, a timeline and pictures, in one file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from omni_cache.compare.page import as_png, data_uri
from omni_cache.compare.report import HEADINGS, Comparison, cells
from omni_cache.pipelines.folder import Picture
from omni_cache.quality import fidelity_to
from omni_cache.strategies import Plan
from omni_cache.strategies.plans import Point, Quality
from omni_cache.tuning.figure import COLOURS, plot_frontier, plot_predictions, plot_steps

_GAIN = 10
"""By how much differences are shown larger than they are."""


@dataclass(frozen=True)
class Shown:
    """A prompt with its uncached and its planned picture."""

    prompt: str
    uncached: Picture
    planned: Picture


def write_report(plan: Plan, shown: list[Shown], comparison: Comparison | None, path: Path) -> None:
    """Write the page, which loads nothing.

    Args:
        plan: the plan.
        shown: pictures to show.
        comparison: what else was measured on the judged prompts.
        path: of the page.
    """
    template = (resources.files(__package__) / "report.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    steps = plan.content.signature.num_inference_steps
    page = environment.from_string(template).render(
        title=f"{plan.point.computed_steps} of {steps} steps computed",
        plan=plan,
        made=plan.content.made,
        signature=plan.content.signature,
        frontier=_drawn(lambda to: plot_frontier(plan, comparison, to)),
        by_step=_drawn(lambda to: plot_steps(plan, to)),
        predictions=_drawn(lambda to: plot_predictions(plan, to)),
        points=[_row(plan, place) for place in range(len(plan.frontier))],
        timeline=[
            {"step": step, "action": action, "colour": COLOURS[action], "weights": words}
            for step, (action, words) in enumerate(
                zip(plan.point.actions, _weights(plan), strict=True)
            )
        ],
        pictures=[_pictures(each) for each in shown],
        gain=_GAIN,
        headings=() if comparison is None else HEADINGS,
        rows=() if comparison is None else cells(comparison),
    )
    path.write_text(page, "utf-8")


def _drawn(draw: Callable[[Path], None]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.png"
        draw(path)
        return data_uri(path.read_bytes())


def _row(plan: Plan, place: int) -> dict[str, Any]:
    point: Point = plan.frontier[place]
    whole = plan.content.made.seconds
    is_timed = whole is not None and point.seconds
    return {
        "is_chosen": place == plan.content.chosen,
        "cells": [
            str(point.computed_steps),
            str(point.actions.count("skip")),
            "" if point.seconds is None else f"{1000 * point.seconds:.0f}",
            f"{whole / point.seconds:.2f}x" if is_timed and whole and point.seconds else "",
            *_quality(point.predicted),
            *_quality(point.judged),
        ],
    }


def _quality(quality: Quality | None) -> list[str]:
    numbers = (None,) * 4 if quality is None else quality
    digits = (1, 1, 4, 4)
    return [
        "" if each is None else "equal" if each == float("inf") else f"{each:.{places}f}"
        for each, places in zip(numbers, digits, strict=True)
    ]


def _weights(plan: Plan) -> list[str]:
    """For each step its line of the printed plan, without the step and the action."""
    return [line[14:] for line in str(plan).splitlines()[1:]]


def _pictures(shown: Shown) -> dict[str, str]:
    difference = np.abs(shown.planned - shown.uncached) * _GAIN
    fidelity = fidelity_to(shown.uncached, shown.planned)
    psnr = "equal" if fidelity.psnr is None else f"{fidelity.psnr:.1f} dB"
    return {
        "prompt": shown.prompt,
        "uncached": data_uri(as_png(shown.uncached)),
        "planned": data_uri(as_png(shown.planned)),
        "difference": data_uri(as_png(difference)),
        "words": f"{psnr}, SSIM {fidelity.ssim:.4f}",
    }
