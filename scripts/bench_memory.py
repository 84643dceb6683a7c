"""What a cache holds between steps, beside what `explain` foresees and what peers hold.

Runs a loop with each cache in a process of its own, eagerly, and counts after every step the bytes
of all tensors that are alive and were not before the cache was put on the model, whoever holds
them, so that all caches are counted alike. Writes memory.json and memory.md.
"""

from __future__ import annotations

import gc
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import diffusers
import torch
import typer
from rich.progress import track
from torch import Tensor, nn

import omni_cache
from omni_cache.compare.report import processor
from omni_cache.explanation import examine
from omni_cache.options import CompileOptions

STEPS = 12
IMAGE, TEXT, WIDTH = 16, 64, 256
"""Latents are 16 x 16 tokens; the prompt's, and what a token's stream is wide."""

BAR_PREDICTED = 0.01
OURS = "omni-cache"

EVERY_THIRD: dict[str, Any] = {"cache_interval": 3, "disable_cache_before_step": 3}
NEVER_TWICE: dict[str, Any] = {"threshold": 1e9}
DBCACHE: dict[str, Any] = {
    "residual_diff_threshold": 1e9,
    "max_warmup_steps": 3,
    "max_continuous_cached_steps": 2,
}
MAGCACHE: dict[str, Any] = {
    "mag_ratios": [1.0] * STEPS,
    "max_skip_steps": 2,
    "retention_ratio": 0.2,
    "num_inference_steps": STEPS,
}
FLOAT8 = {"history_dtype": "float8_e4m3fn"}
FIRST_BLOCK = {"fn_compute_blocks": 1}

FLAGS: dict[str, dict[str, Any]] = {
    "TeaCache": {"cache": "teacache", "coefficients": [1.0, 0.0], "rel_l1_thresh": 0.2},
    "MagCache": {"cache": "magcache", **MAGCACHE},
    "First Block Cache": {"cache": "first_block_cache", **NEVER_TWICE},
    "DBCache": {"cache": "dbcache", **DBCACHE, **FIRST_BLOCK},
    "DBCache, TaylorSeer 1": {"cache": "dbcache", **DBCACHE, **FIRST_BLOCK, "forecast": "taylor"},
    "TaylorSeer 1": {"cache": "taylorseer", **EVERY_THIRD},
    "First Block Cache, newton 2": {
        "cache": "first_block_cache",
        "threshold": 0.05,
        "forecast": "newton",
        "forecast_order": 2,
    },
    "MagCache, float8": {"cache": "magcache", **MAGCACHE, **FLOAT8},
    "TaylorSeer 1, float8": {"cache": "taylorseer", **EVERY_THIRD, **FLOAT8},
    "a plan": {},
}
"""Flags of each strategy; a plan is tuned first."""

PEERS: dict[str, tuple[str, ...]] = {
    "MagCache": ("diffusers",),
    "First Block Cache": ("diffusers",),
    "DBCache": ("cache-dit",),
    "DBCache, TaylorSeer 1": ("cache-dit",),
    "TaylorSeer 1": ("diffusers",),
}
"""Who else has a strategy."""


class Architecture(NamedTuple):
    """A transformer with random weights, and what its calls bring besides latents and timestep."""

    build: Callable[[], Any]
    latents: tuple[int, ...]
    given: Callable[[], dict[str, Tensor]]
    last_block: str
    scale: float

    def call(self, latents: Tensor, step: int) -> dict[str, Any]:
        """The keyword arguments of a call."""
        timestep = torch.tensor([self.scale * (1 - step / STEPS)])
        return {
            "hidden_states": latents,
            "timestep": timestep,
            **self.given(),
            "return_dict": False,
        }


def flux() -> nn.Module:
    """Blocks of two streams, then of one."""
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=True,
    )


def wan() -> nn.Module:
    """Blocks of one stream."""
    return diffusers.WanTransformer3DModel(
        num_attention_heads=WIDTH // 64,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=2 * WIDTH,
        num_layers=6,
    )


def _drawn(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(len(shape)))


ARCHITECTURES = {
    "FLUX": Architecture(
        flux,
        (IMAGE * IMAGE, 64),
        lambda: {
            "encoder_hidden_states": _drawn(TEXT, WIDTH),
            "pooled_projections": _drawn(WIDTH),
            "guidance": torch.tensor([3.5]),
            "img_ids": torch.cartesian_prod(*map(torch.arange, (1, IMAGE, IMAGE))).float(),
            "txt_ids": torch.zeros(TEXT, 3),
        },
        "single_transformer_blocks.3.attn.to_q",
        1.0,
    ),
    "Wan": Architecture(
        wan,
        (16, 1, 2 * IMAGE, 2 * IMAGE),
        lambda: {"encoder_hidden_states": _drawn(TEXT, WIDTH)},
        "blocks.5.attn1.to_q",
        1000.0,
    ),
}


class Case(NamedTuple):
    """What one process measures."""

    architecture: str
    strategy: str
    who: str


class Held(NamedTuple):
    """What a cache holds.

    Attributes:
        bytes: the most after a step, of all tensors that are alive and were not before.
        predicted: what ``explain`` says of a trajectory, None of a peer.
        schedule: "C" for a step that ran the last block, "." for another.
    """

    bytes: int
    predicted: int | None
    schedule: str


def alive() -> dict[int, int]:
    """The bytes of each piece of memory that a tensor of this process lies in, by its address."""
    gc.collect()
    kinds = (Tensor, nn.Parameter, nn.Buffer)
    tensors = [each for each in gc.get_objects() if type(each) in kinds and not each.is_meta]
    storages = (each.untyped_storage() for each in tensors)
    return {each.data_ptr(): each.nbytes() for each in storages}


@contextmanager
def cached_by(
    who: str, strategy: str, model: Any, flags: dict[str, Any]
) -> Iterator[Callable[..., Any]]:
    """A model with a cache on it, as a function of a step and of the arguments of its call."""
    if who == OURS:
        omni_cache.enable(model, inner="eager", strict=True, **flags)
        with omni_cache.generation(STEPS), omni_cache.branch("cond"):
            yield lambda step, **given: model(**given)
    elif who == "diffusers":
        configs = {
            "MagCache": lambda: diffusers.MagCacheConfig(**MAGCACHE),
            "First Block Cache": lambda: diffusers.FirstBlockCacheConfig(**NEVER_TWICE),
            "TaylorSeer 1": lambda: diffusers.TaylorSeerCacheConfig(**EVERY_THIRD, max_order=1),
        }
        model.enable_cache(configs[strategy]())

        def call(step: int, **given: Any) -> Any:
            with model.cache_context("cond"):
                return model(**given)

        yield call
    else:
        import cache_dit

        calibrator = None
        if "TaylorSeer" in strategy:
            calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
        config = cache_dit.DBCacheConfig(
            num_inference_steps=STEPS,
            enable_separate_cfg=False,
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            **DBCACHE,
        )
        cache_dit.enable_cache(model, cache_config=config, calibrator_config=calibrator)
        yield lambda step, **given: model(**given)


def tuned(model: Any, architecture: Architecture) -> omni_cache.Plan:
    """A plan that computes every second step."""

    def generate(sample: int) -> Tensor:
        generator = torch.Generator().manual_seed(sample)
        latents = torch.randn(1, *architecture.latents, generator=generator)
        with omni_cache.generation(STEPS), omni_cache.branch("cond"):
            for step in range(STEPS):
                latents = latents - model(**architecture.call(latents, step))[0] / STEPS
        return latents

    few = {"samples": 3, "judged": 2, "effort": "low", "progress": lambda *_: None}
    return omni_cache.tune(model, generate, computed_steps=STEPS // 2, inner="eager", **few)


@torch.no_grad()
def measure(case: Case) -> Held:
    """Run a loop in this process."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[case.architecture]
    model, other = (architecture.build().eval() for _ in range(2))
    flags = dict(FLAGS[case.strategy])
    if "cache" not in flags:
        flags = {"cache": tuned(model, architecture), "guardrail": None, **flags}
    # The last step is left out, because a cache may free all after it.
    calls = [architecture.call(_drawn(*architecture.latents), step) for step in range(STEPS - 1)]
    predicted = None
    if case.who == OURS:
        options = CompileOptions.parse({**flags, "inner": "eager"})
        (graph,) = examine(model, (), calls[0], options).graphs
        predicted = graph.held_bytes
    # What a process has once, for all models, another one has brought.
    run(case, architecture, other, flags, calls[: STEPS // 2])
    del other
    most, schedule = run(case, architecture, model, flags, calls)
    return Held(most, predicted, schedule)


def run(
    case: Case,
    architecture: Architecture,
    model: Any,
    flags: dict[str, Any],
    calls: list[dict[str, Any]],
) -> tuple[int, str]:
    """The most bytes that a model's cache holds after a step of a loop, and which it computed."""
    ran: list[bool] = []
    if case.who != OURS:  # Dynamo would have the hook run at every step
        last = model.get_submodule(architecture.last_block)
        last.register_forward_hook(lambda *_: ran.__setitem__(-1, True))
    before, most = alive(), 0
    gc.freeze()  # what there is by now is not looked through again
    with cached_by(case.who, case.strategy, model, flags) as cached:
        for step, call in enumerate(calls):
            ran.append(False)
            cached(step, **call)
            now = alive()
            most = max(most, sum(size for where, size in now.items() if where not in before))
    gc.unfreeze()
    if case.who == OURS:
        (trajectory,) = omni_cache.summary(model).trajectories
        ran = [each.computed for each in trajectory.steps]
    return most, "".join(".C"[each] for each in ran)


def measure_elsewhere(case: Case) -> Held:
    """Measure in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, case).result()


def main(
    output: Annotated[Path, typer.Argument(help="Folder for memory.json and memory.md.")],
) -> None:
    """Measure what caches hold."""
    cases = [
        Case(architecture, strategy, who)
        for architecture in ARCHITECTURES
        for strategy in FLAGS
        for who in (OURS, *PEERS.get(strategy, ()))
    ]
    held = {case: measure_elsewhere(case) for case in track(cases, "caches")}
    report = {
        "date": date.today().isoformat(),
        "machine": processor(),
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "cache-dit", "omni-cache")
        },
        "command": shlex.join(["python", "scripts/bench_memory.py", *sys.argv[1:]]),
        "steps": STEPS,
        "rows": [{**case._asdict(), **each._asdict()} for case, each in held.items()],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "memory.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "memory.md").write_text(as_markdown(report), encoding="utf-8")
    print(as_markdown(report))


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = {Case(*map(each.get, Case._fields)): each for each in report["rows"]}
    lines = []
    for case, mine in rows.items():
        if case.who != OURS:
            continue
        peers = [(who, rows[case._replace(who=who)]) for who in PEERS.get(case.strategy, ())]
        named = "; ".join(
            (f"{who} {each['bytes']:,}" if each["bytes"] else f"{who} caches nothing")
            + ("" if each["schedule"] == mine["schedule"] else f" at {each['schedule']}")
            for who, each in peers
        )
        off = mine["bytes"] / mine["predicted"] - 1
        lines.append(
            f"| {case.architecture} | {case.strategy} | `{mine['schedule']}` | "
            f"{mine['predicted']:,} | {mine['bytes']:,} | {100 * off:+.2f}% | {named} |"
        )
    ours = [each for case, each in rows.items() if case.who == OURS]
    worst = max(abs(each["bytes"] / each["predicted"] - 1) for each in ours)
    theirs = [(case, each) for case, each in rows.items() if case.who != OURS and each["bytes"]]
    shares = [each["bytes"] / rows[case._replace(who=OURS)]["bytes"] for case, each in theirs]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return "\n".join(
        [
            "# Memory of a trajectory",
            "",
            "Bytes that a cache holds between the steps of a loop, the most of all steps: all "
            "tensors of the process that are alive and were not before the cache was put on the "
            f"model. {IMAGE * IMAGE} tokens of an image and {TEXT} of a prompt, streams {WIDTH} "
            "wide, float32. A peer is at the same strategy and the same schedule (C computed) "
            "unless another one is named.",
            "",
            "| architecture | strategy | schedule | foreseen by `explain` | held | off | peers |",
            "|---|---|---|---:|---:|---:|---|",
            *lines,
            "",
            f"- What is held differs from what is foreseen by {100 * worst:.2f}% at most (bar "
            f"{100 * BAR_PREDICTED:g}%).",
            f"- Peers hold {min(shares):.2f} to {max(shares):.2f} times as much (bar 1 or more).",
            "",
            f"Each cache in a process of its own. {report['date']}, {report['machine']}, "
            f"{versions}.",
            "",
            f"    {report['command']}",
            "",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
