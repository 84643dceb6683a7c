"""Ours, its peers and no caching on this machine's processor, compiled and eager, at one schedule.

Usage: python scripts/bench_peers.py FOLDER [--rounds 7] [--kind NAME ...]

The kinds of bench_gpu, over a small transformer of FLUX's architecture in float32: 28 steps of
which every fourth is computed, whatever the strategy. Each kind has a process of its own, and they
run one generation each, in turn. Writes peers.json and peers.md after each round, and goes on where
it was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import typer
from bench_gpu import BAR, COMPUTED, EVERY, FULL, KINDS, STEPS, TINY, Setting, Size
from bench_turns import Report, Turns, Want, begun, middle, paired, signature, unavoidable, write
from rich.progress import track

COMPILED = (
    "plain", "regional", "rolled", "hooks-magcache", "first-block", "hooks-first-block",
    "cache-dit", "skips",
)  # fmt: skip
EAGER = ("plain", "rolled", "hooks-magcache", "first-block", "hooks-first-block", "cache-dit")
KINDS_HERE = (*COMPILED, *(f"{name}, eager" for name in EAGER))
BAR_SKIPPED_MICROSECONDS = 50

SMALL = Size(
    {
        **FULL.config,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 6,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 256,
        "axes_dims_rope": (16, 24, 24),
    },
    image_tokens=256,
    text_tokens=64,
    dtype="float32",
)


def kind_of(name: str) -> str:
    """The kind of bench_gpu, compiled or eager."""
    return name.removesuffix(", eager")


def title(name: str) -> str:
    """A kind in words."""
    found = KINDS[kind_of(name)].title
    if name == "plain, eager":
        return "uncached, eager"
    return found if name == kind_of(name) else f"{found.removesuffix(', blocks compiled')}, eager"


def main(
    output: Annotated[Path, typer.Argument(help="Folder for peers.json and peers.md.")],
    rounds: Annotated[int, typer.Option(min=1, help="Generations of each kind.")] = 7,
    only: Annotated[
        list[str], typer.Option("--kind", help=f"One of {'; '.join(KINDS_HERE)}. Repeatable.")
    ] = [*KINDS_HERE],  # noqa: B006
    inner: Annotated[str, typer.Option(help="What compiles.")] = "inductor",
    tiny: Annotated[bool, typer.Option(help="A few smaller blocks.")] = False,
) -> None:
    """Run the kinds in turn."""
    if unknown := [each for each in only if each not in KINDS_HERE]:
        raise typer.BadParameter(f"--kind {unknown[0]!r}; allowed are {'; '.join(KINDS_HERE)}")
    size, path = TINY if tiny else SMALL, output / "peers.json"
    names = [name for name in KINDS_HERE if name in only]
    settings = {"size": size._asdict(), "inner": inner, "rounds": rounds, "kinds": names}
    report = begun(path, settings)
    wanted = {
        name: Want(
            kind_of(name), Setting(size, "cpu", inner if name == kind_of(name) else None, rounds)
        )
        for name in names
    }
    with Turns(wanted) as turns:
        for _ in track(range(len(report["measured"]), rounds), "rounds"):
            report["measured"].append(turns.round())
            report["failed"] = turns.failed
            report["is_done"] = len(report["measured"]) == rounds
            report["ratios"] = [each._asdict() for each in ratios(report)]
            write(report, path, as_markdown(report))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    if report["failed"]:
        raise typer.Exit(1)


class Ratio(NamedTuple):
    """What one of ours takes over something else: medians and extremes of the rounds' ratios."""

    name: str
    over: str
    what: str
    reached: float
    least: float
    most: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the median is low enough."""
        return self.reached <= self.allowed


def ratios(report: Report) -> Iterator[Ratio]:
    """Ours over plain compiled steps, over the unavoidable, and over every peer of its strategy.

    What is eager is compared with what is eager; what is compiled, with both.
    """
    measured, computed = report["measured"], sum(COMPUTED)
    names = [name for name in report["kinds"] if any(name in each for each in measured)]

    def over(name: str, other: str, what: str, allowed: float) -> Iterator[Ratio]:
        if found := paired(measured, f"{what}_ms", name, other):
            yield Ratio(name, other, what, median(found), min(found), max(found), allowed)

    for name in names:
        kind, is_eager = KINDS[kind_of(name)], name != kind_of(name)
        if not kind.is_ours:
            continue
        yield from over(name, "plain, eager" if is_eager else "plain", "computed", BAR)
        ideal = [
            each[name]["generation_ms"]
            / unavoidable(each[name], each["plain"], computed / STEPS, STEPS - computed)
            for each in measured
            if not is_eager and {name, "plain"} <= {*each}
        ]
        if ideal:
            yield Ratio(name, "ideal", "generation", median(ideal), min(ideal), max(ideal), BAR)
        for other in names:
            peer = KINDS[kind_of(other)]
            is_slower_sort = not is_eager or other != kind_of(other)
            if peer.strategy == kind.strategy and not peer.is_ours and is_slower_sort:
                yield from over(name, other, "reused", 1.0)
                yield from over(name, other, "generation", 1.0)


def as_markdown(report: Report) -> str:
    """The report as Markdown."""
    measured, size, failed = report["measured"], report["size"], report["failed"]
    config = size["config"]
    rows = []
    for name in report["kinds"]:
        if name in failed:
            continue
        digits = {"computed_ms": 2, "reused_ms": 3, "generation_ms": 1}
        times = {what: middle(measured, name, what) for what in digits}
        cells = ("" if each is None else f"{each:.{digits[what]}f}" for what, each in times.items())
        rows.append(f"| {title(name)} | {' | '.join(cells)} |")
    skipped, own = (middle(measured, "skips", what) for what in ("reused_ms", "own_ms"))
    verdicts = {True: "passed", False: "**missed**"}
    return "\n".join(
        [
            "# Caches at one schedule on a processor",
            "",
            f"FLUX's architecture, {config['num_layers']} + {config['num_single_layers']} blocks, "
            f"width {config['num_attention_heads'] * config['attention_head_dim']}, random weights "
            f"in {size['dtype']}, {size['image_tokens']} + {size['text_tokens']} tokens, {STEPS} "
            f"steps of which every {EVERY}th is computed, inner compiler {report['inner']}. Each "
            "kind has a process of its own, whose C library keeps freed memory, and they run one "
            "generation each, in turn. What is eager does not use Dynamo, but for ours, whose "
            'compiled parts then are the operations as they are (`inner="eager"`).',
            "",
            "| | computed step, ms | reused step, ms | generation, ms |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            *(f"- {title(name)} did not run: {reason}" for name, reason in failed.items()),
            *([""] if failed else []),
            *(
                []
                if skipped is None or own is None
                else [
                    f"A skipped step takes {1e3 * (skipped - own):.0f} us (bar "
                    f"{BAR_SKIPPED_MICROSECONDS:g}) beyond the loop's own work, which takes "
                    f"{1e3 * own:.0f} us. It is one of {EVERY - 1} in a row: the first one finds "
                    "the processor's caches full of what the step before has computed.",
                    "",
                ]
            ),
            "`ideal` is a generation of `torch.compile` of as many steps as are computed + the "
            "compiled parts that run in the others + the loop's own work there.",
            "",
            "| ratio | reached | least, most of a round | allowed | |",
            "|---|---:|---:|---:|---|",
            *(
                f"| {title(each.name)}: {each.what} over "
                f"{each.over if each.over == 'ideal' else title(each.over)} | {each.reached:.3f} "
                f"| {each.least:.3f}, {each.most:.3f} | {each.allowed:g} "
                f"| {verdicts[each.passed]} |"
                for each in ratios(report)
            ),
            "",
            f"Medians of {len(measured)} rounds; a ratio is the median of the rounds' ratios.",
            *signature(report),
        ]
    )


if __name__ == "__main__":
    typer.run(main)
