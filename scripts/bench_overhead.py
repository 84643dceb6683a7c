"""What caching costs beyond the work it cannot avoid.

Times generations of a FLUX-architecture transformer on this machine, uncached and cached in turn,
and compares a cached generation with

    computed steps x plain compiled step + reused steps x (prologue + reuse epilogue)

where the parts are timed inside the same cached generation. Writes overhead.json and overhead.md.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxTransformer2DModel
from rich.progress import track

import omni_cache
from omni_cache.compare.report import processor

STEPS = 28
CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 12,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 256,
    "axes_dims_rope": (16, 24, 24),
    "guidance_embeds": True,
}
IMAGE_TOKENS, TEXT_TOKENS = 256, 64
BAR_RATIO = 1.05
PARTS = ("body", "prologue", "epilogue", "reuse")


class TimedInductor:
    """Inductor, with the seconds that each compiled part took in every call."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in PARTS}
        self._compiled = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one part; the executor compiles them in the order of `PARTS`."""
        from torch._inductor.compile_fx import compile_fx

        compiled: Callable[..., Any] = compile_fx(gm, example_inputs)
        spent = self.seconds[PARTS[self._compiled % len(PARTS)]]
        self._compiled += 1

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = compiled(*args)
            spent.append(time.perf_counter() - start)
            return result

        return timed

    def median(self, part: str) -> float:
        """The seconds that a call of a part takes."""
        return statistics.median(self.seconds[part])


def inputs(step: int) -> dict[str, Any]:
    """Inputs on the straight line from noise to image, as a flow-matching loop gives them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, IMAGE_TOKENS, CONFIG["in_channels"], generator=generator)
    image = torch.randn(1, IMAGE_TOKENS, CONFIG["in_channels"], generator=generator)
    sigma = 1 - step / STEPS
    return {
        "hidden_states": torch.lerp(image, noise, sigma),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 256, generator=generator),
        "pooled_projections": torch.randn(1, 256, generator=generator),
        "timestep": torch.tensor([sigma]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(IMAGE_TOKENS, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "return_dict": False,
    }


def generation_seconds(model: torch.nn.Module, calls: list[dict[str, Any]]) -> float:
    """Wall time of one denoising loop over the transformer alone."""
    start = time.perf_counter()
    for call in calls:
        model(**call)
    return time.perf_counter() - start


@torch.no_grad()
def main(
    output: Annotated[Path, typer.Argument(help="Folder for overhead.json and overhead.md.")],
    rounds: Annotated[int, typer.Option(help="Generations of each kind.")] = 7,
    threshold: Annotated[float, typer.Option(help="TeaCache threshold.")] = 0.24,
) -> None:
    """Measure the overhead of caching."""
    torch.manual_seed(0)
    weights = FluxTransformer2DModel(**CONFIG).eval().state_dict()
    plain, cached = (FluxTransformer2DModel(**CONFIG).eval() for _ in range(2))
    plain.load_state_dict(weights)
    cached.load_state_dict(weights)
    calls = [inputs(step) for step in range(STEPS)]

    plain.compile(backend="inductor")
    inner = TimedInductor()
    strategy = {"cache": "teacache", "coefficients": [1.0, 0.0], "rel_l1_thresh": threshold}
    omni_cache.enable(cached, inner=inner, num_inference_steps=STEPS, **strategy)
    for model in (plain, cached):
        generation_seconds(model, calls)

    plain_seconds, cached_seconds, floors = [], [], []
    for _ in track(range(rounds), "generations"):
        plain_seconds.append(generation_seconds(plain, calls))
        for each in inner.seconds.values():
            each.clear()
        cached_seconds.append(generation_seconds(cached, calls))
        summary = omni_cache.summary(cached)
        step = plain_seconds[-1] / STEPS
        reused = inner.median("prologue") + inner.median("reuse")
        floors.append(summary.computed_steps * step + summary.reused_steps * reused)

    ratios = [spent / floor for spent, floor in zip(cached_seconds, floors, strict=True)]
    report = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "omni-cache")},
        "command": shlex.join(["python", "scripts/bench_overhead.py", *sys.argv[1:]]),
        "steps": STEPS,
        "rounds": rounds,
        "strategy": strategy,
        "computed_steps": summary.computed_steps,
        "reused_steps": summary.reused_steps,
        "plain_step_ms": 1e3 * statistics.median(plain_seconds) / STEPS,
        "prologue_ms": 1e3 * inner.median("prologue"),
        "reuse_epilogue_ms": 1e3 * inner.median("reuse"),
        "plain_generation_s": statistics.median(plain_seconds),
        "cached_generation_s": statistics.median(cached_seconds),
        "floor_s": statistics.median(floors),
        "ratio_to_floor": statistics.median(ratios),
        "ratios": ratios,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "overhead.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "overhead.md").write_text(table(report), encoding="utf-8")
    print(table(report))


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    rows = {
        "plain compiled step": f"{report['plain_step_ms']:.1f} ms",
        "prologue": f"{report['prologue_ms']:.2f} ms",
        "reuse epilogue": f"{report['reuse_epilogue_ms']:.2f} ms",
        "steps computed + reused": f"{report['computed_steps']} + {report['reused_steps']}",
        "uncached generation": f"{report['plain_generation_s']:.2f} s",
        "cached generation": f"{report['cached_generation_s']:.3f} s",
        "work that caching cannot avoid": f"{report['floor_s']:.3f} s",
        "cached generation over that work": f"{report['ratio_to_floor']:.3f}",
    }
    return "\n".join(
        [
            "# Overhead of caching",
            "",
            f"Bar: a cached generation takes at most {BAR_RATIO:g} times the work that it cannot "
            "avoid, which is computed steps x plain compiled step + reused steps x (prologue + "
            "reuse epilogue).",
            "",
            "| | |",
            "|---|---:|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            f"Medians of {report['rounds']} rounds, uncached and cached in turn; the last line is "
            f"the median of the rounds' ratios, which lie between {min(report['ratios']):.3f} and "
            f"{max(report['ratios']):.3f}. {report['date']}, {report['machine']}, {versions}.",
            "",
            f"    {report['command']}",
            "",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
