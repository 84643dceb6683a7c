"""Writes the measured figures of README.md from the data under docs/benchmarks.

Usage: python scripts/report_readme.py

What stands between `<!-- figures: NAME -->` and `<!-- end of figures -->` is made by the function
of that name in `BLOCKS`; the rest of the file is left as it is. Knows the reports' data, and
nothing of how they were measured. Reports that were not made, or not completed, are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks"

Report = dict[str, Any]
MARKED = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def main() -> None:
    """Rewrite README.md."""
    README.write_text(rewritten(README.read_text(encoding="utf-8"), BENCHMARKS), encoding="utf-8")


def rewritten(text: str, benchmarks: Path) -> str:
    """A text with the figures of a folder of reports.

    Raises:
        ValueError: a block has another name than those of `BLOCKS`, or one of these is nowhere.
    """
    found = [name for _, name, _ in MARKED.findall(text)]
    if sorted(found) != sorted(BLOCKS):
        raise ValueError(f"blocks of figures are {found}; there has to be one each of {[*BLOCKS]}")
    return MARKED.sub(
        lambda each: each[1] + "\n".join([*BLOCKS[each[2]](benchmarks), each[3]]), text
    )


def read(benchmarks: Path, name: str) -> Report | None:
    """The data of a report, None before it is complete."""
    path = benchmarks / f"{name}.json"
    report: Report | None = None
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
    return report if report is not None and report.get("is_done", True) else None


def table(head: str, alignment: str, rows: Iterator[tuple[str, ...]]) -> list[str]:
    """A table in Markdown; `alignment` has an l or an r for each column."""
    lines = [f"| {' | '.join(each)} |".replace("|  |", "| |") for each in rows]
    rule = "|".join({"l": "---", "r": "---:"}[each] for each in alignment)
    return [head, f"|{rule}|", *lines] if lines else []


def span(values: list[float], digits: int) -> str:
    """From the least to the most."""
    least, most = (f"{each:.{digits}f}" for each in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


# Fidelity.


def plans(benchmarks: Path) -> list[str]:
    """Tuned plans beside fewer steps and other strategies."""
    report = read(benchmarks, "plans/plans-demo-default")
    if report is None:
        return []

    def shown(quality: dict[str, float]) -> str:
        return f"{quality['psnr']:.1f} ({quality['psnr_low']:.1f})"

    def rows() -> Iterator[tuple[str, ...]]:
        for each in report["rows"]:
            computed = each["computed_steps"]
            others = [o for o in report["others"].values() if o["computed_steps"] <= computed]
            best = max(others, key=lambda other: other["psnr"], default=None)
            cells = shown(each["plan"]), shown(each["fewer"]), "" if best is None else shown(best)
            yield each["asked"], str(computed), *cells

    head = (
        "| asked for | steps computed | tuned plan | fewer steps | best other strategy that "
        "computes no more |"
    )
    return table(head, "lrrrr", rows())


def demo(benchmarks: Path) -> list[str]:
    """The bundled pipeline, cautious and fast."""
    report = read(benchmarks, "demo/results")
    if report is None:
        return []
    wanted = (("TeaCache", 0.1), ("TeaCache", 0.3), ("MagCache", 0.1), ("MagCache", 0.4))
    found = {(each["strategy"], each["threshold"]): each for each in report["variants"]}
    rows = (
        (
            f"{strategy} {threshold:g}",
            f"{each['computed_steps']:g}",
            f"{each['speedup']:.2f}x",
            f"{each['fidelity']['psnr']:.1f} dB",
            f"{each['fewer_steps_fidelity']['psnr']:.1f} dB",
        )
        for strategy, threshold in wanted
        for each in [found[strategy, threshold]]
    )
    head = "| strategy | steps computed | speedup | PSNR | uncached with as few steps: PSNR |"
    return table(head, "lrrrr", rows)


FORECASTS = {
    "uncached with as few steps": ("uncached, fewer steps", ""),
    "TeaCache, hold": ("TeaCache", "hold"),
    'TeaCache, `forecast="newton"`': ("TeaCache", "newton 1"),
    'TeaCache, `forecast="taylor", forecast_order=2`': ("TeaCache", "taylor 2"),
    'MagCache, `retention_ratio=0`, `forecast="newton"`': (
        "MagCache, retention_ratio=0",
        "newton 1",
    ),
    'MagCache, `retention_ratio=0`, `forecast="newton", forecast_order=2`': (
        "MagCache, retention_ratio=0",
        "newton 2",
    ),
}


def forecasts(benchmarks: Path) -> list[str]:
    """What forecasts gain at as many computed steps."""
    report = read(benchmarks, "forecasts")
    if report is None:
        return []
    psnr = {(each["strategy"], each["forecast"], each["target"]): each for each in report["rows"]}
    targets = list(dict.fromkeys(each["target"] for each in report["rows"]))

    def gains(strategy: str, forecast: str) -> list[float]:
        return [
            psnr[strategy, forecast, each]["psnr"] - psnr[strategy, "hold", each]["psnr"]
            for each in targets
        ]

    first, second = gains("MagCache", "newton 1"), gains("MagCache", "newton 2")
    apart = gains("MagCache, retention_ratio=0", "newton 1")
    rows = (
        (title, *(f"{psnr[(*key, each)]['psnr']:.1f}" for each in targets))
        for title, key in FORECASTS.items()
    )
    head = f"| computed of {report['steps']} | {' | '.join(map(str, targets))} |"
    return [
        *table(head, "l" + "r" * len(targets), rows),
        "",
        "Forecasts gain most when the computed steps lie apart. MagCache's default "
        "`retention_ratio` computes the first",
        f'steps in a row: with it, `forecast="newton"` is {span(first, 1)} dB better than '
        '`"hold"`, and `forecast_order=2`',
        f"is {second[0]:+.1f} dB off it at {targets[0]} computed steps. With `retention_ratio=0`, "
        f"the first is {span(apart, 1)} dB better.",
        "Measure on your model before you choose.",
    ]


# Speed and memory.

Fact = tuple[str, str]
"""What was measured, and what was found."""


LARGE_MS = 100
"""From here on a step is large: a reused one takes about a hundredth of it."""


def growth(report: Report) -> Iterator[Fact]:
    """Over tokens, depth, batch and width."""
    rows = report["measured"]
    for is_large in (False, True):
        part = [each for each in rows if (each["plain_ms"] >= LARGE_MS) == is_large]
        if part:
            steps = span([each["plain_ms"] for each in part], 0)
            yield (
                f"cached loop over the work that it cannot avoid, at steps of {steps} ms",
                span([each["over_ideal"] for each in part], 3),
            )
    beyond = [1e3 * each["reused_beyond_parts_ms"] for each in rows]
    yield "reused step there, beyond its compiled parts", f"{span(beyond, 0)} us"


SKIPPING = {
    "StepCache": "a step that StepCache measures and repeats",
    "skips by a plan": "a step that a plan skips",
}
"""What bench_host has of strategies whose reuse leaves out the whole model, in words."""


def host(report: Report) -> Iterator[Fact]:
    """Of a call."""
    beyond: dict[str, list[float]] = {}
    for each in report["rows"]:
        what = SKIPPING.get(each["strategy"], "a reused step")
        beyond.setdefault(what, []).append(each["beyond_us"])
    for what, each_beyond in beyond.items():
        yield f"host time of {what}, beyond a plain call", f"{span(each_beyond, 0)} us"


def blocks(report: Report) -> Iterator[Fact]:
    """Cold compilation."""
    seconds = {(each["way"], each["depth"]): each["compile_s"] for each in report["rows"]}
    for depth in dict.fromkeys(each["depth"] for each in report["rows"]):
        ours, plain, regional = (
            seconds[way, depth] for way in ("rolled", "plain", "compile_repeated_blocks")
        )
        yield (
            f"cold compilation, {depth} blocks",
            f"{ours:.0f} s (`torch.compile` {plain:.0f} s, `compile_repeated_blocks` "
            f"{regional:.0f} s)",
        )


def start(report: Report) -> Iterator[Fact]:
    """Warm compilation."""
    warm = {each["way"]: each["compile_s"] for each in report["rows"] if each["start"] == "warm"}
    yield (
        f"start of a second process, {report['blocks']} blocks",
        f"{warm['rolled']:.1f} s (`torch.compile` {warm['plain']:.1f} s)",
    )


def passes(report: Report) -> Iterator[Fact]:
    """Of the compiler's front."""
    largest = report["rows"][-1]
    yield (
        f"analysis and split of a graph of {largest['nodes']:,} nodes",
        f"{largest['both']:.1f} s, growing with the nodes to the power of {report['exponent']:.2f}",
    )


def memory(report: Report) -> Iterator[Fact]:
    """Of a trajectory."""
    rows = report["rows"]
    own = {
        (each["architecture"], each["strategy"]): each
        for each in rows
        if each["predicted"] is not None
    }
    off = max(abs(each["bytes"] / each["predicted"] - 1) for each in own.values())
    shares = [
        each["bytes"] / own[each["architecture"], each["strategy"]]["bytes"]
        for each in rows
        if each["predicted"] is None and each["bytes"]  # some cache nothing of an architecture
    ]
    yield "memory of a trajectory, off what `explain` foresees", f"{100 * off:.2f}% at most"
    yield "memory of peers over it", span(shares, 2)


def history(report: Report) -> Iterator[Fact]:
    """Of residuals in fewer bits."""
    kept = [each["history_dtypes"] for each in report["measured"]]
    for dtype in [*kept[0]][1:]:
        every = [
            _middle(each[dtype]["to_every_step"]) - _middle(each["float32"]["to_every_step"])
            for each in kept
        ]
        share = [each[dtype]["bytes"] / each["float32"]["bytes"] for each in kept]
        yield (
            f'`history_dtype="{dtype}"`: median PSNR, less that of float32',
            f"{span(every, 2)} dB, in {span(share, 2)} of the memory",
        )


def _middle(values: list[float]) -> float:
    ranked, half = sorted(values), len(values) // 2
    return ranked[half] if len(ranked) % 2 else (ranked[half - 1] + ranked[half]) / 2


FACTS: dict[str, Callable[[Report], Iterator[Fact]]] = {
    "growth": growth,
    "host": host,
    "blocks": blocks,
    "start": start,
    "memory": memory,
    "history": history,
    "passes": passes,
}
"""What is told of each report."""


def speed(benchmarks: Path) -> list[str]:
    """What caching costs on this machine."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name, facts in FACTS.items():
            if (report := read(benchmarks, name)) is not None:
                link = f"[report](docs/benchmarks/{name}.md)"
                yield from ((what, found, link) for what, found in facts(report))

    return table("| measured | | |", "lrl", rows())


KINDS = {
    "plain": "`torch.compile`, uncached",
    "rolled": "omni-cache, MagCache",
    "reduce-overhead": 'omni-cache, MagCache, `mode="reduce-overhead"`',
    "hoisted": "omni-cache, MagCache, `hoist=True`",
    "hooks-magcache": "diffusers' MagCache, blocks compiled",
    "first-block": "omni-cache, DBCache with one block",
    "cache-dit": "cache-dit's DBCache with one block, blocks compiled",
    "plan": "omni-cache, a plan",
    "hooks-first-block": "diffusers' First Block Cache, blocks compiled",
    "regional": "`compile_repeated_blocks`, uncached",
    "skips": "omni-cache, a plan that skips",
    "unrolled": 'omni-cache, MagCache, `blocks="unrolled"`',
    "modulations": 'omni-cache, MagCache, `hoist="modulations"`',
    "cond": 'omni-cache, DBCache with one block, `lowering="cond"`',
}
"""Kinds of bench_gpu and bench_peers in words."""


def kind(name: str) -> str:
    """In words, compiled or eager."""
    if name.endswith(", eager"):
        words = KINDS[name.removesuffix(", eager")].removesuffix(", blocks compiled")
        return "uncached, eager" if name == "plain, eager" else f"{words}, eager"
    return KINDS[name]


def peers(benchmarks: Path) -> list[str]:
    """Ours over each peer at one schedule."""
    report = read(benchmarks, "peers")
    if report is None:
        return []
    ratios = {(each["name"], each["over"], each["what"]): each for each in report["ratios"]}
    rows = (
        (kind(name), kind(over), f"{ratios[name, over, 'reused']['reached']:.3f}",
         f"{each['reached']:.3f}")
        for (name, over, what), each in ratios.items()
        if what == "generation" and over != "ideal"
    )  # fmt: skip
    skips = [each["skips"] for each in report.get("measured", ()) if "skips" in each]
    skipped = []
    if skips:
        took, own = (_middle([each[what] for each in skips]) for what in ("reused_ms", "own_ms"))
        skipped = [
            "",
            f"There a step that a plan skips takes {1e3 * (took - own):.0f} us: the steps before "
            "leave the processor's caches full.",
        ]
    return [
        "At one schedule, of which every fourth step is computed, ours over each peer of the same "
        "strategy: less than 1 is",
        "faster. Each has a process of its own, and they run in turn "
        "([report](docs/benchmarks/peers.md)).",
        "",
        *table("| | over | reused step | generation |", "llrr", rows),
        *skipped,
    ]


GPU_RUNS = ("flux", "peers", "modes", "graphs", "plan")
"""The order of the reports; others follow by name."""
LEFT_OUT = {("flux", "reduce-overhead"), ("peers", "reduce-overhead")}
"""Taken while the benchmark hid from Inductor which inputs are weights."""


def gpu(benchmarks: Path) -> list[str]:
    """FLUX.1's size on a GPU, and the kernels."""
    found = {
        path.stem: read(benchmarks, f"gpu/{path.stem}") for path in benchmarks.glob("gpu/*.json")
    }
    runs = {name: each for name, each in found.items() if each is not None and "kinds" in each}
    names = sorted(runs, key=lambda name: (*(name != each for each in GPU_RUNS), name))
    if not runs:
        return []

    def rows() -> Iterator[tuple[str, ...]]:
        for place, name in enumerate(names, 1):
            bars = {each["name"]: each["reached"] for each in runs[name]["bars"]}
            for which, each in runs[name]["kinds"].items():
                if "failed" in each or (name, which) in LEFT_OUT:
                    continue
                reused, ideal = each["reused_ms"], bars.get(f"{which}: generation over ideal")
                yield (
                    f"[{place}](docs/benchmarks/gpu/{name}.md)",
                    kind(which),
                    f"{each['compile_s']:.0f} s",
                    f"{each['computed_ms']:.1f} ms",
                    "" if reused is None else f"{reused:.2f} ms",
                    f"{each['generation_ms']:,.0f} ms",
                    "" if ideal is None else f"{ideal:.3f}",
                )

    machines = sorted({each["environment"]["machine"] for each in runs.values()})
    head = (
        "| run | kind | compile | computed step | reused step | generation | over the unavoidable |"
    )
    lines = [f"Measured on {', '.join(machines)}:", "", *table(head, "llrrrrr", rows())]
    if any(name in runs and which in runs[name]["kinds"] for name, which in LEFT_OUT):
        lines += [
            "",
            '`mode="reduce-overhead"` in the first two runs is left out: the benchmark hid from '
            "Inductor which inputs are weights.",
        ]
    if "modes" in runs:
        launches = {
            name: each["device"]["reused"]["launches"]
            for name, each in runs["modes"]["kinds"].items()
        }
        lines += [
            "",
            "CUDA graphs and hoisting save launches and work of the host: a reused step takes "
            f"{launches['rolled']} launches,",
            f"{launches['hoisted']} with `hoist=True` and {launches['reduce-overhead']} with CUDA "
            "graphs.",
        ]
    if (kernels := found.get("kernels")) is not None:
        few, many = kernels["bars"]
        rows_few, width = kernels["shape"]
        lines += [
            "",
            f"The fused relative L1 reads at {100 * few['reached']:.0f}% of the bandwidth of a "
            f"copy at {rows_few:,} x {width:,}, and",
            f"at {100 * many['reached']:.0f}% at 32,768 x {width:,} "
            "([figures](docs/benchmarks/gpu/kernels.txt)).",
        ]
    return lines


BLOCKS: dict[str, Callable[[Path], list[str]]] = {
    "plans": plans,
    "demo": demo,
    "forecasts": forecasts,
    "speed": speed,
    "peers": peers,
    "gpu": gpu,
}


if __name__ == "__main__":
    main()
