"""What caching costs beyond the work that it cannot avoid, over tokens, depth, batch and width.

Usage: python scripts/bench_growth.py FOLDER [--rounds 5] [--point TOKENS,DEPTH,BATCH,WIDTH ...]

The kinds `plain` and `rolled` of bench_gpu over a transformer of FLUX's architecture in float32, at
one point after the other: processes that compiled plainly and processes with the cache run in turn.
There are several of each, because one and the same program takes up to 3% more or less time from
one process to the next. Writes growth.json and growth.md after each point, and goes on where it was
interrupted.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer
from bench_gpu import BAR, COMPUTED, EVERY, FULL, Setting, Size
from bench_turns import Report, Turns, Want, begun, middle, paired, signature, unavoidable, write
from rich.progress import track

HEAD_WIDTH, TEXT_TOKENS = 64, 64
CACHED_STEPS = 2 * EVERY
PLAIN_STEPS = sum(COMPUTED[:CACHED_STEPS])
"""As many as the cached loop computes, so that both work about as long in a round."""


class Point(NamedTuple):
    """Where is measured."""

    image_tokens: int
    double: int
    single: int
    batch: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Point:
        """From `1024,1+2,1,128`."""
        try:
            tokens, depth, batch, width = text.split(",")
            found = cls(int(tokens), *map(int, depth.split("+")), int(batch), int(width))
        except (TypeError, ValueError):
            raise typer.BadParameter(
                f"{text!r}; write image tokens, blocks of two streams + of one, batch and width, "
                "as in 1024,1+2,1,128"
            ) from None
        if min(found) < 1:
            raise typer.BadParameter(f"{text!r}; all numbers have to be 1 or more")
        if found.width % HEAD_WIDTH:
            raise typer.BadParameter(f"{text!r}; widths are multiples of {HEAD_WIDTH}")
        return found

    @property
    def size(self) -> Size:
        """What runs there."""
        config = {
            **FULL.config,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "attention_head_dim": HEAD_WIDTH,
            "num_attention_heads": self.width // HEAD_WIDTH,
            "joint_attention_dim": self.width,
            "pooled_projection_dim": self.width,
            "axes_dims_rope": (16, 24, 24),
        }
        return Size(config, self.image_tokens, TEXT_TOKENS, "float32", self.batch)


POINTS = [
    *(f"{tokens},1+2,1,128" for tokens in (256, 1024, 4096, 8192)),
    *(f"1024,{depth},1,128" for depth in ("2+4", "4+8")),
    *(f"1024,1+2,{batch},128" for batch in (2, 4)),
    "256,3+6,1,768",
]


def main(
    output: Annotated[Path, typer.Argument(help="Folder for growth.json and growth.md.")],
    rounds: Annotated[int, typer.Option(min=1, help="Loops of each process.")] = 5,
    processes: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 2,
    points: Annotated[
        list[str],
        typer.Option(
            "--point",
            help="Image tokens, blocks of two streams + of one, batch, width. Repeatable.",
        ),
    ] = POINTS,
    inner: Annotated[str, typer.Option(help="What compiles.")] = "inductor",
) -> None:
    """Measure at each point."""
    wanted = [Point.parse(each) for each in points]
    path = output / "growth.json"
    settings = {"inner": inner, "rounds": rounds, "processes": processes, "points": points}
    report = begun(path, settings)
    for point in track(wanted[len(report["measured"]) :], "points"):
        setting = Setting(point.size, "cpu", inner, rounds)
        kinds = {"plain": PLAIN_STEPS, "rolled": CACHED_STEPS}
        turns_of = {
            f"{kind}, {each}": Want(kind, setting, steps)
            for each in range(processes)
            for kind, steps in kinds.items()
        }
        with Turns(turns_of) as turns:
            taken = [turns.round() for _ in range(rounds)]
            if turns.failed:
                raise RuntimeError(f"{point} did not run: {turns.failed}")
        pairs = [
            {kind: found[f"{kind}, {each}"] for kind in kinds}
            for found in taken
            for each in range(processes)
        ]
        report["measured"].append(row(point, pairs))
        report["is_done"] = len(report["measured"]) == len(wanted)
        write(report, path, as_markdown(report))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def row(point: Point, taken: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """What was found at a point: medians of what pairs of processes took in turn."""
    reused = CACHED_STEPS - PLAIN_STEPS
    ideal = [
        each["rolled"]["generation_ms"] / unavoidable(each["rolled"], each["plain"], 1.0, reused)
        for each in taken
    ]
    beyond = [each["rolled"]["reused_ms"] - each["rolled"]["reused_parts_ms"] for each in taken]
    return {
        **point._asdict(),
        "plain_ms": middle(taken, "plain", "computed_ms"),
        "computed_ms": middle(taken, "rolled", "computed_ms"),
        "reused_ms": middle(taken, "rolled", "reused_ms"),
        "reused_beyond_parts_ms": median(beyond),
        "computed_over_plain": median(paired(taken, "computed_ms", "rolled", "plain")),
        "over_ideal": median(ideal),
        "over_ideal_per_pair": ideal,
        "held_mib": middle(taken, "rolled", "held_mib"),
    }


def as_markdown(report: Report) -> str:
    """The report as Markdown."""
    rows = report["measured"]
    worst = max(rows, key=lambda each: each["over_ideal"])
    return "\n".join(
        [
            "# What caching costs beyond the work that it cannot avoid",
            "",
            f"FLUX's architecture, float32, {TEXT_TOKENS} tokens of a prompt, inner compiler "
            f"{report['inner']}. A cached loop has {CACHED_STEPS} steps of which every {EVERY}th "
            "is computed (MagCache); `ideal` is a plain loop of as many steps as it computes + the "
            "compiled parts that run in the others + the loop's own work there. Plain "
            f"(`torch.compile`) and cached run in turn, in {report['processes']} processes each; "
            "the C library keeps freed memory.",
            "",
            "| image tokens | blocks | batch | width | plain step, ms | computed step, ms "
            "| over plain | reused step, ms | of it beyond its parts, us | loop over ideal "
            "| held, MiB |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
            *(
                f"| {each['image_tokens']:,} | {each['double']}+{each['single']} "
                f"| {each['batch']} | {each['width']} | {each['plain_ms']:.2f} "
                f"| {each['computed_ms']:.2f} | {each['computed_over_plain']:.3f} "
                f"| {each['reused_ms']:.3f} | {1e3 * each['reused_beyond_parts_ms']:.0f} "
                f"| {each['over_ideal']:.3f} | {each['held_mib']:.2f} |"
                for each in rows
            ),
            "",
            f"A loop takes {worst['over_ideal']:.3f} times the ideal at most (bar {BAR:g}), at "
            f"{worst['image_tokens']:,} image tokens, {worst['double']}+{worst['single']} blocks, "
            f"batch {worst['batch']} and width {worst['width']}.",
            "",
            f"Medians of {report['rounds']} rounds of each pair of processes; a ratio is the "
            "median of the pairs' ratios.",
            *signature(report),
        ]
    )


if __name__ == "__main__":
    typer.run(main)
