"""How long a process takes to start, alone and after another one that compiled the same.

A FLUX-architecture transformer, compiled by Inductor whole, and with the cache, its blocks rolled
and unrolled. Every start is a process of its own: a cold one finds nothing in Inductor's caches, a
warm one what the cold one left there, the ways in turn. What counts is the time from the first call
until two steps are done, which with the cache are a computed and a reused one, so that all parts
are compiled; with so few tokens the steps themselves take next to none of it. Writes start.json and
start.md.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import bench_blocks
import torch
import typer
from bench_blocks import HEAD_WIDTH, Case, Depth, Size
from rich.progress import track
from torch._dynamo.utils import counters

from omni_cache.compare.report import processor

WAYS = ("plain", "rolled", "unrolled")
STARTS = ("cold", "warm")
CACHES = {"inductor": "fxgraph_cache", "aot_autograd": "autograd_cache"}
"""PyTorch's two caches of what is compiled, by the group of its counters that counts them."""
BAR_OVER_PLAIN = 1.1


def measure(case: Case, size: Size) -> dict[str, float]:
    """Start once in this process.

    Returns:
        What `bench_blocks.measure` does, and for each of CACHES `_hit`, `_miss` and `_bypass`, how
        many graphs were found there, were not, and cannot be.
    """
    measured = bench_blocks.measure(case, size)
    for (group, name), outcome in product(CACHES.items(), ("hit", "miss", "bypass")):
        measured[f"{name}_{outcome}"] = counters[group][f"{name}_{outcome}"]
    return measured


def start_in(folder: str, case: Case, size: Size) -> dict[str, float]:
    """Start in a process of its own, whose caches lie in a folder."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, case, size).result()


def main(
    output: Annotated[Path, typer.Argument(help="Folder for start.json and start.md.")],
    blocks: Annotated[str, typer.Option(help="Blocks of two streams + of one.")] = "4+12",
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each kind.")] = 3,
    width: Annotated[int, typer.Option(help=f"A multiple of {HEAD_WIDTH}.")] = 128,
    image_tokens: int = 64,
    text_tokens: int = 16,
) -> None:
    """Start each way cold and then warm, in turn."""
    size = Size(width, image_tokens, text_tokens)
    cases = [Case(way, Depth.parse(blocks)) for way in WAYS]
    with tempfile.TemporaryDirectory() as folder:
        # C++ headers are precompiled once for each user of a machine: none of those measured does.
        start_in(folder, Case("plain", Depth(1, 1)), Size(HEAD_WIDTH, 4, 4))
    taken: dict[tuple[str, str], list[dict[str, float]]] = {
        each: [] for each in product(WAYS, STARTS)
    }
    for _, case in track([*product(range(rounds), cases)], "starts"):
        with tempfile.TemporaryDirectory() as folder:
            for start in STARTS:
                taken[case.way, start].append(start_in(folder, case, size))
    report = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "omni-cache")},
        "command": shlex.join(["python", "scripts/bench_start.py", *sys.argv[1:]]),
        "blocks": blocks,
        "size": size._asdict(),
        "rounds": rounds,
        "rows": [row(way, start, each) for (way, start), each in taken.items()],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "start.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "start.md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


def row(way: str, start: str, taken: list[dict[str, float]]) -> dict[str, Any]:
    """What one way took to start cold or warm: medians, the worst of the counters, every start."""
    return {
        "way": way,
        "start": start,
        "compile_s": statistics.median(each["compile_s"] for each in taken),
        "cpu_s": statistics.median(each["cpu_s"] for each in taken),
        "step_ms": statistics.median(each["step_ms"] for each in taken),
        **{
            cache: {
                "hits": min(each[f"{cache}_hit"] for each in taken),
                "misses": max(each[f"{cache}_miss"] for each in taken),
                "bypasses": max(each[f"{cache}_bypass"] for each in taken),
            }
            for cache in CACHES.values()
        },
        "starts_s": [each["compile_s"] for each in taken],
    }


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """How the bar is met, and what a warm start did not find."""
    warm = {each["way"]: each for each in rows if each["start"] == "warm"}
    found = [
        f"- Warm, {way} takes {warm[way]['compile_s'] / warm['plain']['compile_s']:.2f} times what "
        f"plain takes (bar {BAR_OVER_PLAIN:g}); of all processors together "
        f"{warm[way]['cpu_s'] / warm['plain']['cpu_s']:.2f} times."
        for way in WAYS[1:]
    ]
    lacking = {
        f"{way} in {cache}": each[cache]
        for way, each in warm.items()
        for cache in CACHES.values()
        if each[cache]["misses"] or each[cache]["bypasses"] or not each[cache]["hits"]
    }
    if not lacking:
        return [*found, "- A warm start finds every graph in both caches."]
    return [
        *found,
        *(f"- A warm start does not find all: {key}, {each}." for key, each in lacking.items()),
    ]


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    size = report["size"]
    return "\n".join(
        [
            "# A process's start, cold and warm",
            "",
            "Seconds until the first two steps of a FLUX-architecture transformer are done, with "
            "the cache a computed and a reused one: cold, and in a second process that has the "
            "caches of the first. Beside them what that takes of all processors together, "
            "compilers of C++ included, milliseconds of a computed step afterwards, and what was "
            "found in PyTorch's caches of graphs, Inductor's and AOTAutograd's. "
            f"{report['blocks']} blocks of two streams + of one, width {size['width']}, "
            f"{size['image_tokens']} + {size['text_tokens']} tokens, float32, a process for each "
            "start.",
            "",
            "| | s | CPU s | ms a step | Inductor: hits, misses, bypasses | AOTAutograd: alike |",
            "|---|---:|---:|---:|---:|---:|",
            *(
                f"| {each['way']}, {each['start']} | {each['compile_s']:.2f} | "
                f"{each['cpu_s']:.2f} | "
                f"{each['step_ms']:.0f} | {_counts(each['fxgraph_cache'])} | "
                f"{_counts(each['autograd_cache'])} |"
                for each in report["rows"]
            ),
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


def _counts(found: dict[str, int]) -> str:
    return ", ".join(map(str, found.values()))


if __name__ == "__main__":
    typer.run(main)
