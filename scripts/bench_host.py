"""What a reused or skipped step costs the host beyond its parts, and how often it waits.

Runs a toy transformer whose compiled parts do nothing: each returns what it returned the first
time. A reused call of it, less a call of the same model compiled in the same way and not cached, is
the time of the runtime alone: placing, measuring, deciding, forecasting, keeping records. Writes
host.json and host.md.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.progress import track
from torch import Tensor, nn

import omni_cache
from omni_cache.compare.report import processor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "runtime")]

from following import Followed, actions  # noqa: E402
from test_device_read import pretended_device  # noqa: E402

STEPS, TOKENS, CHANNELS = 28, 16, 32
BAR_MICROSECONDS, BAR_SKIPPED, BAR_READS = 60, 50, 1

STRATEGIES: dict[str, dict[str, Any]] = {
    "TeaCache": {"cache": "teacache", "coefficients": [1.0, 0.0], "rel_l1_thresh": 1e9},
    "MagCache": {
        "cache": "magcache",
        "mag_ratios": [1.0] * STEPS,
        "max_skip_steps": STEPS,
        "num_inference_steps": STEPS,
    },
}
STRATEGIES["MagCache, newton 2"] = {
    **STRATEGIES["MagCache"],
    "forecast": "newton",
    "forecast_order": 2,
}
STRATEGIES["StepCache"] = {
    "cache": "stepcache",
    "sim_thresholds": (-2.0, -2.0),
    "skip_countdowns": (STEPS, STEPS),
}
STRATEGIES["skips by a plan"] = {"cache": Followed(actions=actions("c" + (STEPS - 1) * "s"))}
"""All reuse whatever they may; the last two skip the whole forward."""


class Block(nn.Module):
    """x + out(attention(norm(x) * (1 + scale))), (B, S, CHANNELS) -> (B, S, CHANNELS)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS, elementwise_affine=False)
        self.scale = nn.Linear(CHANNELS, CHANNELS)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Compute the block; ``time`` is (B, CHANNELS)."""
        modulated = self.norm(x) * (1 + self.scale(time)[:, None])
        q, k, v = self.qkv(modulated)[:, None].chunk(3, -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


class Toy(nn.Module):
    """Denoises (B, S, CHANNELS) latents, given a timestep (B,) and prompts (B, L, CHANNELS)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, CHANNELS)
        self.embed_time = nn.Linear(1, CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.project = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """Predict the velocity."""
        x, time = self.embed(hidden_states), prompt.mean(1) + self.embed_time(timestep[:, None])
        for block in self.blocks:
            x = block(x, time)
        prediction: Tensor = self.project(x)
        return prediction


def prepared(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a part to one that returns what it returned the first time."""
    returned: list[Any] = []

    def run(*args: Any) -> Any:
        if not returned:
            returned.append(gm(*args))
        return returned[0]

    return run


class Pipeline:
    """What a loop needs of a diffusers pipeline to be announced."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def __call__(self, inputs: Inputs) -> Iterator[int]:
        """Run a generation; yields the nanoseconds of each call."""
        self.scheduler.set_timesteps(STEPS)
        model, prompt = self.transformer, inputs.prompt
        for step, latents in zip(self.scheduler.timesteps, inputs.latents, strict=True):
            timestep = step.expand(1) / 1000
            start = time.perf_counter_ns()
            output = model(latents, timestep, prompt)
            yield time.perf_counter_ns() - start
            self.scheduler.step(output, step, latents)


class Inputs:
    """What every loop passes: other latents and timesteps at each step, always the same prompt."""

    def __init__(self) -> None:
        self.prompt = torch.randn(1, 8, CHANNELS)
        self.latents = [torch.randn(1, TOKENS, CHANNELS) for _ in range(STEPS)]
        self.timesteps = [torch.tensor([1 - step / STEPS]) for step in range(STEPS)]


def bare_loop(model: Callable[..., Tensor], inputs: Inputs, is_named: bool) -> Iterator[int]:
    """Run a generation as a loop of the user's own; yields the nanoseconds of each call."""
    nothing = contextlib.nullcontext
    whole: AbstractContextManager[Any] = omni_cache.generation(STEPS) if is_named else nothing()
    with whole:
        for latents, timestep in zip(inputs.latents, inputs.timesteps, strict=True):
            with omni_cache.branch("cond") if is_named else nothing():
                start = time.perf_counter_ns()
                model(latents, timestep, inputs.prompt)
                taken = time.perf_counter_ns() - start
            yield taken


def loops(strategy: str | None) -> dict[str, tuple[nn.Module, Callable[[Inputs], Iterator[int]]]]:
    """Each way of use, with the module that is cached; uncached for ``strategy`` None."""
    found: dict[str, tuple[nn.Module, Callable[[Inputs], Iterator[int]]]] = {}
    for place in ("named", "inferred"):
        toy = Toy().eval()
        if strategy is None:
            compiled: Callable[..., Tensor] = torch.compile(toy, backend=prepared)
        else:
            options = {**STRATEGIES[strategy], "inner": prepared}
            compiled = torch.compile(toy, backend="omni_cache", options=options)
        found[f"bare, {place}"] = toy, _loop(compiled, place == "named")
    for place in ("named", "inferred", "in a pipeline"):
        toy = Toy().eval()
        pipeline = Pipeline(toy)
        if strategy is None:
            toy.compile(backend=prepared)
        else:
            target = pipeline if place == "in a pipeline" else toy
            omni_cache.enable(target, inner=prepared, **STRATEGIES[strategy])
        is_own = place == "in a pipeline"
        found[f"enabled, {place}"] = toy, pipeline if is_own else _loop(toy, place == "named")
    return found


def _loop(model: Callable[..., Tensor], is_named: bool) -> Callable[[Inputs], Iterator[int]]:
    return lambda inputs: bare_loop(model, inputs, is_named)


def most_reads(strategy: str, inputs: Inputs) -> int:
    """The most reads from the device that a call makes, if all tensors lay on one."""
    with pretended_device(pytest.MonkeyPatch()) as reads:
        for _, loop in loops(strategy).values():
            for _ in range(3):
                list(loop(inputs))
    return max(reads)


@torch.no_grad()
def main(
    output: Annotated[Path, typer.Argument(help="Folder for host.json and host.md.")],
    rounds: Annotated[int, typer.Option(help="Generations of each kind.")] = 40,
) -> None:
    """Measure what the runtime costs the host."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    inputs = Inputs()
    uncached = loops(None)
    rows = []
    for strategy in STRATEGIES:
        for way, (toy, loop) in loops(strategy).items():
            plain: list[int] = []
            reused: list[int] = []
            for number in track(range(rounds + 1), f"{strategy}, {way}"):
                own = list(uncached[way][1](inputs))
                cached = list(loop(inputs))
                if number:  # the first one compiles
                    plain += own
                    steps = omni_cache.summary(toy).trajectories[-1].steps
                    reused += [t for t, s in zip(cached, steps, strict=True) if not s.computed]
            own_us, reused_us = (statistics.median(each) / 1e3 for each in (plain, reused))
            rows.append(
                {
                    "strategy": strategy,
                    "way": way,
                    "uncached_us": own_us,
                    "reused_us": reused_us,
                    "beyond_us": reused_us - own_us,
                }
            )
    report = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "diffusers", "omni-cache")},
        "command": shlex.join(["python", "scripts/bench_host.py", *sys.argv[1:]]),
        "rounds": rounds,
        "rows": rows,
        "reads": {strategy: most_reads(strategy, inputs) for strategy in STRATEGIES},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "host.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "host.md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    cells = (
        f"| {each['strategy']} | {each['way']} | {each['uncached_us']:.0f} | "
        f"{each['reused_us']:.0f} | {each['beyond_us']:.0f} |"
        for each in report["rows"]
    )
    reads = ", ".join(f"{strategy} {count}" for strategy, count in report["reads"].items())
    return "\n".join(
        [
            "# Host time of a reused or skipped step",
            "",
            f"Bars: {BAR_MICROSECONDS} us beyond the parts for a reused step, {BAR_SKIPPED} for "
            "one that skips the forward (the last two strategies). The parts of a toy return what "
            "they returned the first time, so a reused call, less a call of the same model "
            "compiled in the same way and not cached, is the runtime's own time. Medians in "
            "microseconds.",
            "",
            "| strategy | way | uncached call | reused call | beyond the parts |",
            "|---|---|---:|---:|---:|",
            *cells,
            "",
            f"Reads from the device, the most in any call (bar: {BAR_READS}): {reads}. Counted on "
            "the CPU, where the host is denied a look at tensors.",
            "",
            f"{report['rounds']} generations of {STEPS} steps of each kind, cached and uncached in "
            f"turn. {report['date']}, {report['machine']}, {versions}.",
            "",
            f"    {report['command']}",
            "",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
