"""How long a cold compilation takes, over the number of transformer blocks.

A FLUX-architecture transformer, compiled by Inductor whole, by blocks with diffusers'
`compile_repeated_blocks`, and with the cache, its blocks rolled and unrolled. Each compilation runs
in a process of its own, without any cache of Inductor's, the ways in turn. What counts is the time
from the first call until two steps are done, which with the cache are a computed and a reused one,
so that all parts are compiled. Writes blocks.json and blocks.md.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from diffusers import FluxTransformer2DModel
from rich.progress import track

import omni_cache
from omni_cache.compare.report import processor

HEAD_WIDTH, TEXT_WIDTH, CHANNELS = 64, 256, 64
WAYS = ("plain", "rolled", "unrolled", "compile_repeated_blocks")
LONGEST_UNROLLED = 20
"""Blocks from which on compiling each is left out: it takes minutes, and grows as before."""
STEADY_STEPS = 5
SHORT, LONG = "2+6", "19+38"
BAR_OVER_REGIONAL, BAR_OVER_SHORT = 1.15, 1.2


class Depth(NamedTuple):
    """Blocks of two streams, and of one."""

    double: int
    single: int

    @classmethod
    def parse(cls, text: str) -> Depth:
        """From `4+12`."""
        try:
            double, single = map(int, text.split("+"))
        except ValueError:
            raise typer.BadParameter(f"{text!r}; write two numbers, as in 4+12") from None
        return cls(double, single)

    def __str__(self) -> str:
        return f"{self.double}+{self.single}"

    @property
    def blocks(self) -> int:
        """All of them."""
        return self.double + self.single


class Size(NamedTuple):
    """What one compilation is of."""

    width: int
    image_tokens: int
    text_tokens: int


class Case(NamedTuple):
    """What one process compiles."""

    way: str
    depth: Depth


def build(depth: Depth, width: int) -> FluxTransformer2DModel:
    """The model, with random weights in float32."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=depth.double,
        num_single_layers=depth.single,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=width // HEAD_WIDTH,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=True,
    ).eval()


def inputs(size: Size, steps: int) -> list[dict[str, Any]]:
    """What the calls of a loop pass: always the same but for latents and timestep."""
    same = {
        "encoder_hidden_states": torch.randn(1, size.text_tokens, TEXT_WIDTH),
        "pooled_projections": torch.randn(1, TEXT_WIDTH),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(size.image_tokens, 3),
        "txt_ids": torch.zeros(size.text_tokens, 3),
        "return_dict": False,
    }
    return [
        {
            **same,
            "hidden_states": torch.randn(1, size.image_tokens, CHANNELS),
            "timestep": torch.tensor([1 - step / steps]),
        }
        for step in range(steps)
    ]


def compile_by(way: str, model: FluxTransformer2DModel, steps: int) -> None:
    """Have the model compiled in one of WAYS at its next call."""
    if way == "plain":
        model.compile()
    elif way == "compile_repeated_blocks":
        model.compile_repeated_blocks()
    else:
        omni_cache.enable(
            model, "magcache", blocks=way, num_inference_steps=steps, mag_ratios=[1.0] * steps,
            retention_ratio=0.0, max_skip_steps=1,
        )  # fmt: skip


@torch.no_grad()
def measure(case: Case, size: Size) -> dict[str, float]:
    """Compile once in this process.

    Returns:
        `compile_s`, the seconds of the first two steps, `cpu_s`, what they take of all processors
        together, compilers of C++ included, and `step_ms`, of a computed step later.
    """
    calls = inputs(size, 2 + 2 * STEADY_STEPS)
    model = build(case.depth, size.width)
    compile_by(case.way, model, len(calls))
    seconds, used = [], [cpu_seconds()]
    for call in calls:
        start = time.perf_counter()
        model(**call)
        seconds.append(time.perf_counter() - start)
        used.append(cpu_seconds())
    if case.way in ("rolled", "unrolled"):
        [trajectory] = omni_cache.summary(model).trajectories
        computed = [step.computed for step in trajectory.steps]
        assert computed == [True, False] * (1 + STEADY_STEPS), computed
    return {
        "compile_s": sum(seconds[:2]),
        "cpu_s": used[2] - used[0],
        "step_ms": 1e3 * statistics.median(seconds[2::2]),
    }


def cpu_seconds() -> float:
    """What this process and those that it has waited for have used of all processors."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(each.ru_utime + each.ru_stime for each in map(resource.getrusage, kinds))


def measure_elsewhere(case: Case, size: Size) -> dict[str, float]:
    """Compile in a process of its own, which finds nothing that another one has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(measure, case, size).result()


def main(
    output: Annotated[Path, typer.Argument(help="Folder for blocks.json and blocks.md.")],
    depths: Annotated[
        list[str], typer.Option("--depth", help="Blocks of two streams + of one; repeatable.")
    ] = ["2+4", SHORT, "4+12", LONG],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Compilations of each kind.")] = 3,
    width: Annotated[int, typer.Option(help=f"A multiple of {HEAD_WIDTH}.")] = 384,
    image_tokens: int = 512,
    text_tokens: int = 64,
) -> None:
    """Compile each way at each depth, in turn."""
    size = Size(width, image_tokens, text_tokens)
    cases = [
        Case(way, depth)
        for depth, way in product(map(Depth.parse, depths), WAYS)
        if way != "unrolled" or depth.blocks <= LONGEST_UNROLLED
    ]
    # C++ headers are precompiled once for each user of a machine: none of those measured does it.
    measure_elsewhere(Case("plain", Depth(1, 1)), Size(HEAD_WIDTH, 4, 4))
    measured: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for _, case in track([*product(range(rounds), cases)], "compilations"):
        measured[case].append(measure_elsewhere(case, size))
    report = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "omni-cache")},
        "command": shlex.join(["python", "scripts/bench_blocks.py", *sys.argv[1:]]),
        "size": size._asdict(),
        "rounds": rounds,
        "rows": [row(case, taken) for case, taken in measured.items()],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "blocks.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "blocks.md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


def row(case: Case, taken: list[dict[str, float]]) -> dict[str, Any]:
    """What one way took at one depth: medians, and every compilation."""
    return {
        "way": case.way,
        "depth": str(case.depth),
        "compile_s": statistics.median(each["compile_s"] for each in taken),
        "cpu_s": statistics.median(each["cpu_s"] for each in taken),
        "step_ms": statistics.median(each["step_ms"] for each in taken),
        "compilations_s": [each["compile_s"] for each in taken],
    }


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """How the bars are met, as far as the depths tell."""
    seconds = {(each["way"], each["depth"]): each["compile_s"] for each in rows}
    used = {(each["way"], each["depth"]): each["cpu_s"] for each in rows}
    found = [
        f"- At {depth}, rolled takes {own / seconds['compile_repeated_blocks', depth]:.2f} times "
        f"what `compile_repeated_blocks` takes (bar {BAR_OVER_REGIONAL:g}); of all processors "
        f"together {used[way, depth] / used['compile_repeated_blocks', depth]:.2f} times."
        for (way, depth), own in seconds.items()
        if way == "rolled"
    ]
    if ("rolled", SHORT) in seconds and ("rolled", LONG) in seconds:
        ratio = seconds["rolled", LONG] / seconds["rolled", SHORT]
        found.append(
            f"- Rolled, {LONG} takes {ratio:.2f} times what {SHORT} takes (bar {BAR_OVER_SHORT:g})."
        )
    return found


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    size = report["size"]
    depths = list(dict.fromkeys(each["depth"] for each in report["rows"]))
    cells = {(each["way"], each["depth"]): each for each in report["rows"]}

    def line(way: str, key: str, digits: int) -> str:
        found = (cells.get((way, depth)) for depth in depths)
        return " | ".join("" if each is None else f"{each[key]:.{digits}f}" for each in found)

    return "\n".join(
        [
            "# Cold compilation over the number of blocks",
            "",
            "Seconds until the first two steps of a FLUX-architecture transformer are done, with "
            "the cache a computed and a reused one; below, what that takes of all processors "
            "together, compilers of C++ included, and milliseconds of a computed step "
            f"afterwards. Width {size['width']}, {size['image_tokens']} + {size['text_tokens']} "
            "tokens, float32, Inductor without its caches, a process for each compilation.",
            "",
            f"| blocks of two streams + of one | {' | '.join(depths)} |",
            f"|---|{'---:|' * len(depths)}",
            *(f"| {way}, s | {line(way, 'compile_s', 1)} |" for way in WAYS),
            *(f"| {way}, CPU s | {line(way, 'cpu_s', 1)} |" for way in WAYS),
            *(f"| {way}, ms a step | {line(way, 'step_ms', 0)} |" for way in WAYS),
            "",
            *findings(report["rows"]),
            "",
            f"Medians of {report['rounds']} rounds, all in turn. {report['date']}, "
            f"{report['machine']}, {versions}.",
            "",
            f"    {report['command']}",
            "",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
