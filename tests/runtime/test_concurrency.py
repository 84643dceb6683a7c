"""Generations that run at once on one compiled model get what each would get alone, bit for bit."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    STRATEGIES,
    TOKENS,
    Loop,
    ToyTransformer,
    alone,
    compiled,
    gaussian,
    same,
)

import omni_cache
from omni_cache.pipelines.enable import states_of
from omni_cache.runtime import contexts
from omni_cache.runtime.model_state import ModelState

LOOPS = [Loop(("cond", "uncond"), seed=0), Loop(("one", "two"), seed=1)]

Model = Callable[..., Tensor]


def compiled_or_enabled(way: str, **flags: Any) -> Model:
    model = ToyTransformer()
    if way == "bare":
        return compiled(model, **flags)
    return omni_cache.enable(model, inner="eager", **flags)


def at_once(loops: list[Loop], model: Model) -> list[list[Tensor]]:
    """Run each loop in a thread of its own, in lock-step: every call meets one of another loop."""
    barrier = threading.Barrier(len(loops), timeout=120)

    def in_step(*args: Tensor) -> Tensor:
        barrier.wait()
        return model(*args)

    @torch.no_grad()  # is a thread's own affair
    def run(loop: Loop) -> list[Tensor]:
        return loop.run(in_step)

    with ThreadPoolExecutor(len(loops)) as threads:
        return list(threads.map(run, loops))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("way", ["bare", "enabled"])
@pytest.mark.parametrize("explicit", [True, False], ids=["generation", "timestep"])
def test_threads(explicit: bool, way: str, strategy: str) -> None:
    flags = STRATEGIES[strategy]
    loops = [replace(loop, explicit=explicit) for loop in LOOPS]
    with torch.no_grad():
        expected = [alone(loop, **flags) for loop in loops]
    torch._dynamo.reset()
    model = compiled_or_enabled(way, **flags)

    for _ in range(2):  # once while the model is being compiled, once after
        for found, wanted in zip(at_once(loops, model), expected, strict=True):
            assert same(found, wanted)


@torch.no_grad()
def test_tasks() -> None:
    expected = [alone(loop, **ALWAYS_REUSE) for loop in LOOPS]
    cached = compiled(ToyTransformer(), **ALWAYS_REUSE)

    async def generate(loop: Loop) -> list[Tensor]:
        prompts = {name: gaussian(name, 1, 5, CHANNELS) for name in loop.prompts}
        latents = gaussian(loop.seed, 1, TOKENS, CHANNELS)
        predictions = []
        with omni_cache.generation():
            for timestep in loop.timesteps:
                for name, prompt in prompts.items():
                    with omni_cache.branch(name):
                        await asyncio.sleep(0)  # the other task goes on
                        predictions.append(cached(latents, torch.tensor([timestep]), prompt))
                noise = torch.stack(predictions[-len(prompts) :]).mean(0)
                latents = latents - noise / loop.steps
        return predictions

    async def both() -> list[list[Tensor]]:
        return list(await asyncio.gather(*map(generate, LOOPS)))

    for found, wanted in zip(asyncio.run(both()), expected, strict=True):
        assert same(found, wanted)


@torch.no_grad()
def test_branches_of_one_generation_in_threads_of_their_own() -> None:
    """A server may compute the branches side by side: the context goes with the thread."""
    loop = Loop(("cond", "uncond"), explicit=True)
    expected = alone(loop)
    cached = compiled(ToyTransformer())
    barrier = threading.Barrier(2, timeout=120)
    prompts = {name: gaussian(name, 1, 5, CHANNELS) for name in loop.prompts}

    @torch.no_grad()
    def predict(name: str, latents: Tensor, timestep: float) -> Tensor:
        barrier.wait()
        with omni_cache.branch(name):
            return cached(latents, torch.tensor([timestep]), prompts[name])

    latents, predictions = gaussian(loop.seed, 1, TOKENS, CHANNELS), []
    with omni_cache.generation(loop.steps), ThreadPoolExecutor(2) as threads:
        for timestep in loop.timesteps:
            pending = [
                threads.submit(contextvars.copy_context().run, predict, name, latents, timestep)
                for name in loop.prompts
            ]
            noises = [each.result() for each in pending]
            predictions += noises
            latents = latents - torch.stack(noises).mean(0) / loop.steps

    assert same(predictions, expected)


@torch.no_grad()
def test_many_threads_that_come_and_go() -> None:
    """A pool of workers, each with a generation of its own, again and again."""
    loops = [replace(LOOPS[0], seed=seed, steps=4) for seed in range(6)]
    expected = [alone(loop) for loop in loops]
    cached = compiled(ToyTransformer())

    @torch.no_grad()
    def run(loop: Loop) -> list[Tensor]:
        return replace(loop, explicit=loop.seed % 2 == 0).run(cached)

    with ThreadPoolExecutor(3) as threads:
        for found, wanted in zip(threads.map(run, loops), expected, strict=True):
            assert same(found, wanted)


@pytest.mark.parametrize("kind", ["branches", "parts"])
def test_what_two_threads_begin_at_once_has_one_place(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each branch of a run has its own, and a model has one part in a generation."""
    made = {"branches": "Course", "parts": "Run"}[kind]
    make = getattr(contexts, made)

    def slowly(*args: Any) -> Any:
        time.sleep(0.05)
        return make(*args)

    current, state = contexts.Generation(), ModelState()
    run, barrier = contexts.Run(current), threading.Barrier(2, timeout=120)
    monkeypatch.setattr(contexts, made, slowly)

    def begin(name: str) -> Any:
        barrier.wait()
        return run.course(name).position if kind == "branches" else current.run(state)

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(begin, ("cond", "uncond"))
    assert {one, other} == {0, 1} if kind == "branches" else one is other


@torch.no_grad()
def test_summary_may_be_asked_for_while_another_thread_begins_branches() -> None:
    model = ToyTransformer()
    Loop(("cond",), steps=2).run(compiled(model))
    ((_, state),) = states_of(model)
    assert state.latest is not None
    trajectories, interval = state.latest.trajectories, sys.getswitchinterval()
    (only,) = trajectories.values()
    is_over = threading.Event()

    def begin_branches() -> None:
        while not is_over.is_set():
            for number in range(50):
                trajectories[f"more {number}", None] = only
            for number in range(50):
                del trajectories[f"more {number}", None]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as threads:
            pending = threads.submit(begin_branches)
            try:
                for _ in range(500):
                    assert len(omni_cache.summary(model).trajectories) >= 1
            finally:
                is_over.set()
            pending.result()
    finally:
        sys.setswitchinterval(interval)
