"""FLUX.1-dev's transformer on a GPU: caching, its peers and no caching, all at one schedule.

Usage: python scripts/bench_gpu.py FOLDER [--seconds 400] [--kind NAME ...]
       python scripts/bench_gpu.py FOLDER --tiny --device cpu --inner eager

Random weights in bfloat16, 1024 x 1024 pixels, an Euler loop of 28 steps of which every fourth is
computed, whatever the strategy. Each kind of run has a process of its own and an empty compile
cache, one after the other in the order of `KINDS`; the next process imports while one measures.
Writes gpu.json and gpu.md after each kind, so that nothing is lost where time runs out.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from math import isqrt
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from omni_cache.passes import is_static_input
from torch import Tensor

import omni_cache
from omni_cache.compare.report import processor
from omni_cache.dynamo import inductor_modes, lookup_backend, run_inductor
from omni_cache.pipelines.identity import owner_of
from omni_cache.planning.gram import Gram
from omni_cache.planning.search import COMPUTE, REUSE, SKIP, Schedule
from omni_cache.strategies.plans import Content, Made, Signature
from omni_cache.strategies.retiming import fitted

STEPS, EVERY = 28, 4
COMPUTED = [step % EVERY == 0 for step in range(STEPS)]
PROFILED = {"computed": EVERY, "reused": EVERY + 1}
"""Steps that are looked at one by one."""
BAR = 1.02


class Size(NamedTuple):
    """What is run."""

    config: dict[str, Any]
    image_tokens: int
    text_tokens: int
    dtype: str
    batch: int = 1


FULL = Size(
    {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": (16, 56, 56),
        "guidance_embeds": True,
    },
    image_tokens=4096,
    text_tokens=512,
    dtype="bfloat16",
)
TINY = Size(
    {
        **FULL.config,
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 6, 6),
    },
    image_tokens=16,
    text_tokens=5,
    dtype="float32",
)


class Setting(NamedTuple):
    """What all kinds have in common.

    Attributes:
        size: of the model and its inputs.
        device: cuda or cpu.
        inner: what compiles; None for nothing, so that peers run without Dynamo, and the parts of
            ours as they are.
        rounds: generations that are timed.
    """

    size: Size
    device: str
    inner: str | None
    rounds: int


class Ready(NamedTuple):
    """A model that is switched on.

    Attributes:
        before: called before each step with its number.
        generation: entered around a loop.
        branch: entered around each call.
        computed: which steps of the last loop ran the last block.
        parts: how long the compiled parts took, where they are ours.
    """

    before: Callable[[int], object] = lambda step: None
    generation: Callable[[], AbstractContextManager[Any]] = nullcontext
    branch: Callable[[], AbstractContextManager[Any]] = nullcontext
    computed: Callable[[], list[bool]] | None = None
    parts: TimedParts | None = None


class Clock:
    """Moments on the device, in its order of work; on the CPU they are those of the host."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"

    def now(self) -> Any:
        """Mark this moment."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two moments that the device has passed."""
        return start.elapsed_time(end) if self._is_cuda else 1e3 * (end - start)

    def wait(self) -> None:
        """Until the device has done all."""
        if self._is_cuda:
            torch.cuda.synchronize()


class TimedParts:
    """The inner compiler, with the moments at which compiled parts began and ended in each step."""

    def __init__(self, inner: str, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock
        self._steps: list[list[tuple[Any, Any]]] = []

    def __call__(
        self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], mode: str | None = None
    ) -> Callable[..., Any]:
        """Compile one part."""
        if self._inner == "inductor":
            placeholders = gm.graph.find_nodes(op="placeholder")
            weights = {i for i, node in enumerate(placeholders) if is_static_input(node)}
            run = run_inductor(gm, example_inputs, inductor_modes()[mode or "default"], weights)
        else:
            run = lookup_backend(self._inner)(gm, list(example_inputs))

        def timed(*args: Any) -> Any:
            start = self._clock.now()
            result = run(*args)
            self._steps[-1].append((start, self._clock.now()))
            return result

        return timed

    def begin(self, step: int) -> None:
        """Say that what comes belongs to a step."""
        if step == 0:
            self._steps.clear()
        self._steps.append([])

    def milliseconds(self) -> list[float]:
        """For each step of the last loop, what its parts took."""
        return [sum(self._clock.milliseconds(*each) for each in moments) for moments in self._steps]


class Loop:
    """What every generation passes: the same noise, prompt and sigmas."""

    def __init__(self, setting: Setting) -> None:
        size, config = setting.size, setting.size.config
        dtype = getattr(torch, size.dtype)
        place = {"device": setting.device, "dtype": dtype}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(STEPS)
        self.sigmas: list[float] = scheduler.sigmas.tolist()
        self.timesteps = torch.tensor(self.sigmas, **place).unsqueeze(1).repeat(1, size.batch)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(size.batch, *shape, generator=generator).to(**place)

        rows = max(n for n in range(1, isqrt(size.image_tokens) + 1) if size.image_tokens % n == 0)
        grid = [torch.arange(n).float() for n in (rows, size.image_tokens // rows)]
        ids = torch.cartesian_prod(torch.zeros(1), *grid)
        self.noise = draw(size.image_tokens, config["in_channels"])
        self.same = {
            "encoder_hidden_states": draw(size.text_tokens, config["joint_attention_dim"]),
            "pooled_projections": draw(config["pooled_projection_dim"]),
            "guidance": torch.full((size.batch,), 3.5, **place),
            "img_ids": ids.to(**place),
            "txt_ids": torch.zeros(size.text_tokens, 3, **place),
            "return_dict": False,
        }

    def inputs(self, step: int, latents: Tensor) -> dict[str, Any]:
        """Of the model, at a step."""
        return {**self.same, "hidden_states": latents, "timestep": self.timesteps[step]}

    def moved(self, step: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """The latents of the next step."""
        return latents + (self.sigmas[step + 1] - self.sigmas[step]) * velocity


def build(setting: Setting) -> FluxTransformer2DModel:
    """The model, its weights drawn where they lie."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = FluxTransformer2DModel(**setting.size.config)
    model = model.to(getattr(torch, setting.size.dtype)).to_empty(device=setting.device)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.02)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval().requires_grad_(False)


# How each kind is switched on.

Start = Callable[[FluxTransformer2DModel, Setting], Ready]


def plain(model: FluxTransformer2DModel, setting: Setting) -> Ready:
    """`torch.compile` of the whole model."""
    if setting.inner is not None:
        model.compile(backend=setting.inner)
    return Ready()


def regional(model: FluxTransformer2DModel, setting: Setting) -> Ready:
    """Compile the blocks alone, as diffusers does."""
    model.compile_repeated_blocks(backend=setting.inner)
    return Ready()


def ours(
    blocks: str = "rolled", mode: str | None = None, is_listed: bool = False, **flags: Any
) -> Start:
    """Of omni-cache, with timed parts.

    Args:
        blocks: as for ``enable``.
        mode: as for ``enable``.
        is_listed: whether a generation is told all of its timesteps.
        flags: for ``enable``.
    """

    def start(model: FluxTransformer2DModel, setting: Setting) -> Ready:
        parts = TimedParts(setting.inner or "eager", Clock(setting.device))
        given = dict(flags)
        if (letters := given.pop("plan", None)) is not None:
            given = {"cache": plan(model, setting, letters)}
        chosen = "unrolled" if setting.inner is None else blocks  # as it is without a compiler
        omni_cache.enable(model, inner=parts, blocks=chosen, mode=mode, strict=True, **given)

        timesteps = Loop(setting).sigmas[:STEPS] if is_listed else None

        def computed() -> list[bool]:
            (trajectory,) = omni_cache.summary(model).trajectories
            return [step.computed for step in trajectory.steps]

        return Ready(
            before=parts.begin,
            generation=lambda: omni_cache.generation(STEPS, timesteps=timesteps),
            branch=lambda: omni_cache.branch("cond"),
            computed=computed,
            parts=parts,
        )

    return start


MAGCACHE: dict[str, Any] = {
    "threshold": 1e9,
    "max_skip_steps": EVERY - 1,
    "retention_ratio": 0.0,
    "mag_ratios": [1.0] * STEPS,
    "num_inference_steps": STEPS,
}
FIRST_BLOCK: dict[str, Any] = {
    "cache": "dbcache",
    "fn_compute_blocks": 1,
    "steps_computation_mask": [int(each) for each in COMPUTED],
    "steps_computation_policy": "static",
    "num_inference_steps": STEPS,
}
MEASURED: dict[str, Any] = {
    **FIRST_BLOCK,
    "steps_computation_policy": "dynamic",
    "residual_diff_threshold": 1e9,
    "max_warmup_steps": 0,
}
"""The same schedule, but that steps which may be reused measure whether they are."""


def plan(model: FluxTransformer2DModel, setting: Setting, other: str) -> omni_cache.Plan:
    """A plan that nobody has tuned: weights for smooth curves, at the schedule of all kinds.

    Args:
        model: it is for.
        setting: of the run.
        other: what it does at the steps that are not computed.
    """
    draw = np.random.default_rng(0)
    powers = np.stack([np.linspace(1, 0, STEPS) ** power for power in range(4)], axis=1)
    curves = powers @ draw.normal(size=(4, 24))
    products = curves @ curves.T
    grams = {"": {"cond": Gram(products, products, products, products)}}
    owners = ("",) * STEPS
    actions = tuple(COMPUTE if each else other for each in COMPUTED)
    owner = owner_of("", model)
    signature = Signature(
        transformers={"": (owner.classes[0], owner.digest)},
        scheduler=None,
        sigmas=None,
        timesteps=None,
        owners=owners,
        size=(setting.size.image_tokens, setting.size.config["in_channels"]),
        dtype=f"torch.{setting.size.dtype}",
        guidance=None,
        versions={"torch": torch.__version__},
    )
    made = Made(date.today().isoformat(), "low", 1, 0, 0.0, None, {}, verified=False)
    point = fitted(Schedule(actions, 0.0), grams, owners, depth=2, with_input=False)
    ones = (1.0,) * STEPS
    content = Content(signature, made, grams, ones, ones if other == SKIP else (), (point,), 0)
    return omni_cache.Plan(content=content, guardrail=None)


def compile_blocks(model: FluxTransformer2DModel, setting: Setting) -> list[bool]:
    """Compile what the hooks of a peer call; returns what notes whether the last block has run.

    Hooks keep a compiled block from running, so it is the function below them that is compiled.
    """
    ran: list[bool] = []
    blocks: list[Any] = [*chain(model.transformer_blocks, model.single_transformer_blocks)]
    for block in blocks if setting.inner is not None else ():
        block.forward = torch.compile(block.forward, backend=setting.inner)
    last = blocks[-1].forward

    @wraps(last)
    def noting(*args: Any, **kwargs: Any) -> Any:
        ran[-1] = True
        return last(*args, **kwargs)

    blocks[-1].forward = noting
    return ran


def noted(ran: list[bool]) -> Callable[[], list[bool]]:
    """The steps of the last loop."""
    return lambda: ran[-STEPS:]


def hooks_magcache(model: FluxTransformer2DModel, setting: Setting) -> Ready:
    """MagCache of diffusers."""
    from diffusers.hooks import MagCacheConfig

    ran = compile_blocks(model, setting)
    model.enable_cache(MagCacheConfig(**MAGCACHE))
    return Ready(
        before=lambda step: ran.append(False),
        branch=lambda: model.cache_context("cond"),
        computed=noted(ran),
    )


def hooks_first_block(model: FluxTransformer2DModel, setting: Setting) -> Ready:
    """First Block Cache of diffusers; its threshold is moved before each step."""
    from diffusers.hooks import FirstBlockCacheConfig

    ran = compile_blocks(model, setting)
    model.enable_cache(FirstBlockCacheConfig(threshold=1.0))
    first: Any = model.transformer_blocks[0]
    (hook,) = first._diffusers_hook.hooks.values()

    def before(step: int) -> None:
        ran.append(False)
        hook.threshold = -1.0 if COMPUTED[step] else float("inf")

    return Ready(before, branch=lambda: model.cache_context("cond"), computed=noted(ran))


def cache_dit(model: FluxTransformer2DModel, setting: Setting) -> Ready:
    """cache-dit's DBCache with one first block; it counts steps, from each refresh on."""
    import cache_dit as peer

    ran = compile_blocks(model, setting)
    config = peer.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        num_inference_steps=STEPS,
        enable_separate_cfg=False,
        steps_computation_mask=FIRST_BLOCK["steps_computation_mask"],
        steps_computation_policy="static",
    )
    peer.enable_cache(model, cache_config=config)

    def generation() -> AbstractContextManager[Any]:
        peer.refresh_context(model, cache_config=deepcopy(config))
        return nullcontext()

    return Ready(lambda step: ran.append(False), generation, computed=noted(ran))


@dataclass(frozen=True)
class Kind:
    """One kind of run.

    Attributes:
        title: in the report.
        start: switches it on.
        strategy: kinds of one strategy are compared with each other; None for no caching.
        is_ours: whether bars are for it.
    """

    title: str
    start: Start
    strategy: str | None = None
    is_ours: bool = False


KINDS = {
    "plain": Kind("`torch.compile`", plain),
    "rolled": Kind("ours, MagCache", ours(cache="magcache", **MAGCACHE), "MagCache", is_ours=True),
    "reduce-overhead": Kind(
        'ours, MagCache, `mode="reduce-overhead"`',
        ours(mode="reduce-overhead", cache="magcache", **MAGCACHE),
        "MagCache",
        is_ours=True,
    ),
    "hoisted": Kind(
        "ours, MagCache, `hoist=True`",
        ours(hoist=True, cache="magcache", **MAGCACHE),
        "MagCache",
        is_ours=True,
    ),
    "hooks-magcache": Kind("diffusers MagCache, blocks compiled", hooks_magcache, "MagCache"),
    "first-block": Kind(
        "ours, DBCache with 1 block", ours(**FIRST_BLOCK), "first block", is_ours=True
    ),
    "cache-dit": Kind("cache-dit DBCache with 1 block, blocks compiled", cache_dit, "first block"),
    "plan": Kind("ours, a plan", ours(plan=REUSE), "plan", is_ours=True),
    "hooks-first-block": Kind(
        "diffusers FirstBlockCache, blocks compiled", hooks_first_block, "first block"
    ),
    "regional": Kind("`compile_repeated_blocks`", regional),
    "skips": Kind("ours, a plan that skips", ours(plan=SKIP), "plan that skips", is_ours=True),
    "unrolled": Kind(
        'ours, MagCache, `blocks="unrolled"`',
        ours(blocks="unrolled", cache="magcache", **MAGCACHE),
        "MagCache",
        is_ours=True,
    ),
    "modulations": Kind(
        'ours, MagCache, `hoist="modulations"`',
        ours(hoist="modulations", is_listed=True, cache="magcache", **MAGCACHE),
        "MagCache",
        is_ours=True,
    ),
    "cond": Kind(
        'ours, DBCache with 1 block, `lowering="cond"`',
        ours(blocks="unrolled", lowering="cond", **MEASURED),
        "first block",
        is_ours=True,
    ),
}
"""In the order of their importance."""


# One kind, in a process of its own.


@dataclass
class Runner:
    """A model in a loop."""

    model: FluxTransformer2DModel
    loop: Loop
    ready: Ready
    clock: Clock
    schedule: Sequence[bool]
    moments: list[Any] = field(default_factory=list)

    def generate(
        self, around: Callable[[int, Callable[[], Tensor]], Tensor], steps: int = STEPS
    ) -> Tensor:
        """One loop.

        Args:
            around: is given each step's number and call, and has to make the call.
            steps: after which to stop.

        Returns:
            The last latents.
        """
        latents = self.loop.noise
        self.moments = [self.clock.now()]
        with self.ready.generation():
            for step in range(steps):
                self.ready.before(step)
                inputs = self.loop.inputs(step, latents)

                def call(inputs: dict[str, Any] = inputs) -> Tensor:
                    with self.ready.branch():
                        result: Tensor = self.model(**inputs)[0]
                        return result

                latents = self.loop.moved(step, latents, around(step, call))
                self.moments.append(self.clock.now())
        return latents


def simply(step: int, call: Callable[[], Tensor]) -> Tensor:
    """Make the call."""
    return call()


class Round(NamedTuple):
    """What one generation took, in milliseconds: all of it, its steps, and our parts in each."""

    whole: float
    computed: list[float]
    reused: list[float]
    reused_parts: list[float]


@torch.no_grad()
def prepared(name: str, setting: Setting, steps: int = STEPS) -> tuple[Runner, dict[str, Any]]:
    """A kind that has run for so many steps, and the seconds of its weights and compilation."""
    kind, clock = KINDS[name], Clock(setting.device)
    began = time.perf_counter()
    model = build(setting)
    clock.wait()
    found: dict[str, Any] = {"weights_s": time.perf_counter() - began}
    schedule = [True] * STEPS if kind.strategy is None else COMPUTED
    runner = Runner(model, Loop(setting), kind.start(model, setting), clock, schedule)

    began = time.perf_counter()

    def first(step: int, call: Callable[[], Tensor]) -> Tensor:
        result = call()
        if step == 1:
            clock.wait()
            found["compile_s"] = time.perf_counter() - began
        return result

    latents = runner.generate(first, steps)
    assert latents.isfinite().all(), "the latents are not finite"
    hold_to_schedule(runner, steps)
    return runner, found


def hold_to_schedule(runner: Runner, steps: int = STEPS) -> None:
    """Check that the last generation computed what every strategy shall compute."""
    computed = runner.ready.computed
    assert computed is None or computed() == runner.schedule[:steps], computed()


def timed(runner: Runner, steps: int = STEPS) -> Round:
    """Run a generation and take its times."""
    clock, parts = runner.clock, runner.ready.parts
    clock.wait()
    runner.generate(simply, steps)
    clock.wait()
    moments = runner.moments
    taken: dict[bool, list[float]] = {True: [], False: []}
    for step, computed in enumerate(runner.schedule[:steps]):
        taken[computed].append(clock.milliseconds(moments[step], moments[step + 1]))
    whole = clock.milliseconds(moments[0], moments[-1])
    if parts is None:
        return Round(whole, taken[True], taken[False], [])
    each = zip(parts.milliseconds(), runner.schedule, strict=False)
    return Round(whole, taken[True], taken[False], [part for part, ran in each if not ran])


@torch.no_grad()
def own_time(runner: Runner, steps: int = STEPS) -> float:
    """The milliseconds of a step of the loop whose model takes none: the loop's own work."""
    runner.generate(lambda step, call: runner.loop.noise, steps)
    runner.clock.wait()
    moments = zip(runner.moments, runner.moments[1:], strict=False)
    return statistics.median(runner.clock.milliseconds(*each) for each in moments)


@torch.no_grad()
def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Run one kind in this process.

    Returns:
        Times in milliseconds, compilation in seconds, memory in MiB.
    """
    is_cuda = setting.device == "cuda"
    runner, found = prepared(name, setting)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    rounds = [timed(runner) for _ in range(setting.rounds)]
    hold_to_schedule(runner)
    found |= medians(rounds)
    if is_cuda:
        weights = sum(each.numel() * each.element_size() for each in runner.model.parameters())
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        found["beyond_weights_mib"] = found["peak_mib"] - weights / 2**20
    if KINDS[name].is_ours:
        found["held_mib"] = omni_cache.summary(runner.model).memory_bytes / 2**20
    found["host_ms"] = host_times(runner)
    found["device"] = {} if not is_cuda else device_work(runner)
    return found


def medians(rounds: Sequence[Round]) -> dict[str, Any]:
    """Of generations, and of the steps of all of them; None where there are none."""
    wholes = [each.whole for each in rounds]

    def middle(times: Iterable[float]) -> float | None:
        found = [*times]
        return statistics.median(found) if found else None

    return {
        "generations_ms": wholes,
        "generation_ms": middle(wholes),
        "computed_ms": middle(chain(*(each.computed for each in rounds))),
        "reused_ms": middle(chain(*(each.reused for each in rounds))),
        "reused_parts_ms": middle(chain(*(each.reused_parts for each in rounds))),
    }


def host_times(runner: Runner) -> dict[str, float]:
    """How long the host is busy in a call that finds the device idle, in milliseconds."""
    taken: dict[bool, list[float]] = {True: [], False: []}

    def around(step: int, call: Callable[[], Tensor]) -> Tensor:
        runner.clock.wait()
        start = time.perf_counter()
        result = call()
        taken[runner.schedule[step]].append(1e3 * (time.perf_counter() - start))
        return result

    runner.generate(around, steps=2 * EVERY)
    names = {True: "computed", False: "reused"}
    return {names[each]: statistics.median(times) for each, times in taken.items() if times}


def device_work(runner: Runner) -> dict[str, dict[str, int]]:
    """What a step of each sort starts on the device."""
    from torch.profiler import ProfilerActivity, profile

    found: dict[str, dict[str, int]] = {}

    def around(step: int, call: Callable[[], Tensor]) -> Tensor:
        for name, wanted in PROFILED.items():
            if step == wanted:
                runner.clock.wait()
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                    result = call()
                    runner.clock.wait()
                events = list(profiled.events())
                on_device = [
                    each.name
                    for each in events
                    if each.device_type == torch.autograd.DeviceType.CUDA
                ]
                found[name] = counted(on_device, [each.name for each in events])
                return result
        return call()

    runner.generate(around, steps=max(PROFILED.values()) + 1)
    return found


LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


def counted(on_device: Sequence[str], all_names: Sequence[str]) -> dict[str, int]:
    """Kernels, copies and launches, by the names that the profiler gives them."""
    real = [name for name in on_device if not name.startswith("Activity Buffer")]
    copies = [name for name in real if name.startswith("Memcpy")]
    return {
        "kernels": sum(not name.startswith(("Memcpy", "Memset")) for name in real),
        "launches": sum(name.startswith(LAUNCHES) for name in all_names),
        "copies_to_host": sum(name.startswith("Memcpy DtoH") for name in copies),
        "other_copies": sum(not name.startswith("Memcpy DtoH") for name in copies),
    }


def child(pipe: Connection) -> None:
    """Wait for a kind, measure it, and send what was found; or the reason why not."""
    request: tuple[str, Setting] | None = pipe.recv()
    if request is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = folder
        try:
            found = measure(*request)
        except Exception as error:
            lines = str(error).strip().splitlines()
            found = {"failed": f"{type(error).__name__}: {lines[0] if lines else ''}"}
            traceback.print_exc()
        pipe.send(found)


class Waiting:
    """A process that has imported all, and waits for what to measure."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=child, args=(theirs,), daemon=False)
        self._process.start()
        theirs.close()

    def measure(self, name: str, setting: Setting, seconds: float) -> dict[str, Any]:
        """Measure one kind, for so many seconds at most."""
        self._pipe.send((name, setting))
        try:
            if self._pipe.poll(seconds):
                found: dict[str, Any] = self._pipe.recv()
                self._process.join(30)
                return found
        except EOFError:
            self._process.join(30)
            return {"failed": f"the process ended with {self._process.exitcode}"}
        finally:
            self._process.kill()
            self._process.join()
        return {"failed": f"not done after {seconds:.0f} s", "timed_out": True}

    def dismiss(self) -> None:
        """Let it go without a measurement."""
        self._process.kill()
        self._process.join()


# All kinds, and the report.


def main(
    output: Annotated[Path, typer.Argument(help="Folder for gpu.json and gpu.md.")],
    seconds: Annotated[float, typer.Option(help="All that it may take.")] = 400.0,
    rounds: Annotated[int, typer.Option(min=1, help="Generations that are timed.")] = 3,
    only: Annotated[
        list[str], typer.Option("--kind", help=f"One of {', '.join(KINDS)}; repeatable.")
    ] = [*KINDS],  # noqa: B006
    tiny: Annotated[bool, typer.Option(help="A few small blocks.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    inner: Annotated[str, typer.Option(help="What compiles.")] = "inductor",
) -> None:
    """Measure each kind in turn, until time is up."""
    if unknown := [each for each in only if each not in KINDS]:
        raise typer.BadParameter(f"--kind {unknown[0]}; allowed are {', '.join(KINDS)}")
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"--device {device}; allowed are cuda and cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("bench_gpu needs a CUDA device, and torch sees none here.", file=sys.stderr)
        raise typer.Exit(2)
    end = time.monotonic() + seconds
    setting = Setting(TINY if tiny else FULL, device, inner, rounds)
    report: dict[str, Any] = {
        "environment": environment(device),
        "size": setting.size._asdict(),
        "inner": inner,
        "rounds": rounds,
        "kinds": {},
    }
    output.mkdir(parents=True, exist_ok=True)
    names = [name for name in KINDS if name in only]
    waiting = Waiting()
    for place, name in enumerate(names):
        left = end - time.monotonic()
        if left <= 0:
            late = {"failed": f"no time was left of {seconds:.0f} s", "timed_out": True}
            report["kinds"] |= dict.fromkeys(names[place:], late)
            write(report, output)
            break
        current, began = waiting, time.monotonic()
        # The next one imports meanwhile.
        waiting = Waiting() if place + 1 < len(names) else current
        report["kinds"][name] = current.measure(name, setting, left)
        report["kinds"][name]["process_s"] = time.monotonic() - began
        write(report, output)
        line = report["kinds"][name].get("failed") or row(name, report["kinds"])
        print(f"{name} ({time.monotonic() - began:.0f} s): {line}", flush=True)
    waiting.dismiss()
    print((output / "gpu.md").read_text(encoding="utf-8"))
    failed = [each for each in report["kinds"].values() if "failed" in each]
    if any(not each.get("timed_out") for each in failed):
        raise typer.Exit(1)


def environment(device: str) -> dict[str, str]:
    """What the figures depend on."""
    found = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "scripts/bench_gpu.py", *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    peers = ("triton", "diffusers", "cache-dit")
    return found | {
        name: version(name) if find_spec(name.replace("-", "_")) else "none" for name in peers
    }


def write(report: dict[str, Any], output: Path) -> None:
    """As data and for people."""
    report["bars"] = bars(report["kinds"])
    (output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "gpu.md").write_text(as_markdown(report), encoding="utf-8")


def over_ideal(found: dict[str, Any], plain_step: float) -> float:
    """A generation over the work that it cannot avoid: plain steps, and parts of reused ones."""
    computed = sum(COMPUTED)
    ideal = computed * plain_step + (STEPS - computed) * found["reused_parts_ms"]
    ratio: float = found["generation_ms"] / ideal
    return ratio


def bars(kinds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What ours must reach, what it reached, and whether that is enough."""
    done = {name: each for name, each in kinds.items() if "failed" not in each}
    found = []
    for name, mine in done.items():
        kind = KINDS[name]
        if not kind.is_ours:
            continue
        if "plain" in done:
            step = done["plain"]["computed_ms"]
            found.append((f"{name}: computed step over plain", mine["computed_ms"] / step, BAR))
            found.append((f"{name}: generation over ideal", over_ideal(mine, step), BAR))
        peers = {
            other: each
            for other, each in done.items()
            if KINDS[other].strategy == kind.strategy and not KINDS[other].is_ours
        }
        for other, each in peers.items():
            for what in ("reused", "generation"):
                ratio = mine[f"{what}_ms"] / each[f"{what}_ms"]
                found.append((f"{name}: {what} over {other}", ratio, 1.0))
    return [
        {"name": name, "reached": ratio, "allowed": allowed, "passed": ratio <= allowed}
        for name, ratio, allowed in found
    ]


COLUMNS = (
    "compile, s",
    "computed step, ms",
    "reused step, ms",
    "generation, ms",
    "over plain",
    "over ideal",
    "host, ms: computed, reused",
    "kernels, launches of a reused step",
    "copies to the host",
    "MiB beyond weights",
)


def row(name: str, kinds: dict[str, dict[str, Any]]) -> str:
    """One kind's cells."""
    found, whole = kinds[name], kinds.get("plain", {})
    host, work = found["host_ms"], found["device"].get("reused", {})
    step = whole.get("computed_ms")
    knows_ideal = KINDS[name].is_ours and step is not None
    cells = (
        f"{found['compile_s']:.1f}",
        f"{found['computed_ms']:.2f}",
        "" if found["reused_ms"] is None else f"{found['reused_ms']:.3f}",
        f"{found['generation_ms']:.1f}",
        "" if step is None else f"{whole['generation_ms'] / found['generation_ms']:.2f}x",
        f"{over_ideal(found, step):.4f}" if knows_ideal else "",
        ", ".join(f"{host[each]:.2f}" for each in ("computed", "reused") if each in host),
        f"{work['kernels']}, {work['launches']}" if work else "",
        str(work["copies_to_host"]) if work else "",
        f"{found['beyond_weights_mib']:.0f}" if "beyond_weights_mib" in found else "",
    )
    return " | ".join(cells)


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    kinds, size, about = report["kinds"], report["size"], report["environment"]
    failed = {name: each["failed"] for name, each in kinds.items() if "failed" in each}
    config = size["config"]
    shown = ("machine", "torch", "triton", "diffusers", "cache-dit")
    verdicts = {True: "passed", False: "**missed**"}
    return "\n".join(
        [
            "# FLUX.1's transformer on a GPU",
            "",
            f"{config['num_layers']} + {config['num_single_layers']} blocks, random weights in "
            f"{size['dtype']}, {size['image_tokens']} + {size['text_tokens']} tokens, {STEPS} "
            f"steps of which every {EVERY}th is computed, inner compiler {report['inner']}. Each "
            "kind has a process of its own and an empty compile cache. `compile` is the time of "
            "the first two steps, a computed and a reused one. `ideal` is computed steps x "
            "`torch.compile`'s step + the compiled parts that run in the others. `host` is how "
            "long a call takes to return that finds the device idle.",
            "",
            f"| | {' | '.join(COLUMNS)} |",
            f"|---|{'---:|' * len(COLUMNS)}",
            *(f"| {KINDS[name].title} | {row(name, kinds)} |" for name in kinds
              if name not in failed),
            "",
            *(f"- {KINDS[name].title} did not run: {reason}" for name, reason in failed.items()),
            *([""] if failed else []),
            "| bar | reached | allowed | |",
            "|---|---:|---:|---|",
            *(
                f"| {bar['name']} | {bar['reached']:.3f} | {bar['allowed']:g} "
                f"| {verdicts[bar['passed']]} |"
                for bar in report["bars"]
            ),
            "",
            f"Medians of {report['rounds']} generations. {about['date']}, "
            + ", ".join(f"{name} {about[name]}" for name in shown)
            + ".",
            "",
            f"    {about['command']}",
            "",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
