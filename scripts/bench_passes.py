"""How long the passes take on graphs of growing depth.

Builds transformer graphs by hand, node by node as Dynamo would capture them, times analysis and
split of each, fits time = a * nodes ** exponent, and writes passes.json and passes.md.
"""

from __future__ import annotations

import gc
import json
import platform
import shlex
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from omni_cache.passes import analyse, split
from torch.fx import GraphModule

from omni_cache.compare.report import processor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "passes"))

from sketch import deep_transformer  # noqa: E402

DEPTHS = (10, 20, 40, 80, 160, 320, 340)
BAR_NODES, BAR_SECONDS = 20_000, 2.0


def measure(gm: GraphModule, repeats: int) -> dict[str, float]:
    """Median seconds of analysis, split and both, and of the processor time of both."""
    walls: dict[str, list[float]] = {"analyse": [], "split": [], "both": [], "processor": []}
    for _ in range(repeats):
        gc.collect()
        start, busy = time.perf_counter(), time.process_time()
        analysis = analyse(gm.graph)
        middle = time.perf_counter()
        split(gm, analysis)
        end = time.perf_counter()
        walls["analyse"].append(middle - start)
        walls["split"].append(end - middle)
        walls["both"].append(end - start)
        walls["processor"].append(time.process_time() - busy)
    return {name: statistics.median(values) for name, values in walls.items()}


def exponent(rows: list[dict[str, float]], key: str) -> float:
    """The power of the number of nodes that the time grows with, by least squares on logarithms."""
    nodes = np.log([row["nodes"] for row in rows])
    seconds = np.log([row[key] for row in rows])
    return float(np.polyfit(nodes, seconds, 1)[0])


def table(report: dict[str, object], rows: list[dict[str, float]]) -> str:
    """The report as Markdown."""
    lines = [
        "# Time of analysis and split",
        "",
        f"Bar: {BAR_NODES:,} nodes in under {BAR_SECONDS:g} s, and linear growth. "
        f"{report['finding']}",
        "",
        "| blocks | nodes | analyse (s) | split (s) | both (s) | both, processor time (s) |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['blocks']:,} | {row['nodes']:,} | {row['analyse']:.3f} | {row['split']:.3f} | "
        f"{row['both']:.3f} | {row['processor']:.3f} |"
        for row in rows
    ]
    lines += [
        "",
        f"Medians of {report['repeats']} runs. {report['date']}, {report['machine']}, "
        f"Python {report['python']}, torch {report['torch']}.",
        "",
        f"    {report['command']}",
        "",
    ]
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = ROOT / "docs" / "benchmarks",
    repeats: Annotated[int, typer.Option(help="Runs of each depth.")] = 7,
) -> None:
    """Time the passes over depth and write the figures down."""
    rows: list[dict[str, float]] = []
    for depth in DEPTHS:
        gm = deep_transformer(depth)
        row = {"blocks": depth, "nodes": len(gm.graph.nodes), **measure(gm, repeats)}
        typer.echo(f"{row['nodes']:>7,} nodes: {row['both']:.3f} s")
        rows.append(row)
    power = exponent(rows, "both")
    deepest = rows[-1]
    report: dict[str, object] = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": shlex.join(["python", "scripts/bench_passes.py", *sys.argv[1:]]),
        "repeats": repeats,
        "exponent": power,
        "finding": f"{deepest['nodes']:,} nodes took {deepest['both']:.2f} s; the time grows with "
        f"the number of nodes to the power of {power:.2f}.",
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "passes.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "passes.md").write_text(table(report, rows), encoding="utf-8")
    typer.echo(f"{report['finding']} Wrote {out / 'passes.json'} and {out / 'passes.md'}.")


if __name__ == "__main__":
    typer.run(main)
