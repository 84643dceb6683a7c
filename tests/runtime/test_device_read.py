"""Decisions where tensors lie on a device, driven on the CPU by denying the host a look at them.

One read per call brings measurement, timestep and contents of inputs together, so the call's place
must be guessed before it is known. Schedules and predictions must be those of the path that need
not guess.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    MAGCACHE,
    STRATEGIES,
    TEACACHE,
    TOKENS,
    Loop,
    ToyTransformer,
    compiled,
    computed,
    gaussian,
    interrupted,
    reasons,
    same,
)

import omni_cache
from omni_cache.runtime import decision, executor, history, inference, modulations, reading
from omni_cache.strategies import signals

BRANCHES = {1: ("cond",), 2: ("cond", "uncond"), 3: ("cond", "uncond", "reference")}
MAGCACHE_ALWAYS = {**MAGCACHE, "threshold": 1e9, "max_skip_steps": 99, "retention_ratio": 0.0}
ALWAYS = {"teacache": ALWAYS_REUSE, "magcache": MAGCACHE_ALWAYS}
READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
"""The ways of a tensor to the host."""

pytestmark = pytest.mark.usefixtures("no_grad")


@contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let the host see no tensor but by a read; yields how many reads each call has made."""
    reads: list[int] = []
    inside = False

    def counting(read: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(read)
        def counted(*args: Any) -> Any:
            if inside:
                reads[-1] += 1
            return read(*args)

        return counted

    def watched(function: Callable[..., Any], begins: bool = False) -> Callable[..., Any]:
        @wraps(function)
        def watching(*args: Any) -> Any:
            nonlocal inside
            if begins:
                reads.append(0)
            before, inside = inside, True
            try:
                return function(*args)
            finally:
                inside = before

        return watching

    def elsewhere(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def unwatched(*args: Any) -> Any:
            nonlocal inside
            before, inside = inside, False
            try:
                return function(*args)
            finally:
                inside = before

        return unwatched

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, counting(getattr(Tensor, name)))
        patch.setattr(executor.Executor, "__call__", watched(executor.Executor.__call__, True))
        patch.setattr(decision.Step, "_commit", watched(decision.Step._commit))
        # What kernels do on the CPU says nothing of what they do on a device.
        patch.setattr(signals, "rel_l1", elsewhere(signals.rel_l1))
        patch.setattr(inference, "fingerprint", elsewhere(inference.fingerprint))
        for module in (history, inference, modulations, reading):
            patch.setattr(module, "on_host", lambda tensor: False)
        yield reads


def generations(
    loops: Sequence[Loop], **flags: Any
) -> tuple[list[Tensor], list[list[list[bool]]], ToyTransformer]:
    """All predictions of loops that go over one model, and the schedule of each."""
    model = ToyTransformer()
    cached = compiled(model, **flags)
    predictions, schedules = [], []
    for loop in loops:
        predictions += loop.run(cached)
        schedules.append(computed(model))
    return predictions, schedules, model


def test_the_pretence_counts_every_read_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_device(monkeypatch) as reads:
        measure = decision.Step._read

        def curious(step: decision.Step, view: Any) -> Any:
            assert float(torch.zeros(())) == 0.0
            return measure(step, view)

        monkeypatch.setattr(decision.Step, "_read", curious)
        Loop().run(compiled(ToyTransformer()))
    assert reads == [2] * 8


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("branches", BRANCHES)
def test_schedules_and_predictions_are_those_of_the_host(
    branches: int, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = [Loop(BRANCHES[branches], seed=seed) for seed in (0, 1, 0)]
    expected, expected_schedules, _ = generations(loops, **STRATEGIES[strategy])

    with pretended_device(monkeypatch) as reads:
        predictions, schedules, _ = generations(loops, **STRATEGIES[strategy])

    assert schedules == expected_schedules
    assert same(predictions, expected)
    assert any(False in schedule for schedule in schedules[-1])
    assert len(reads) == len(predictions)
    assert set(reads) == {1}  # the timestep at least, and never twice


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("explicit", [False, True], ids=["inferred", "named"])
@pytest.mark.parametrize("axis", ["sigma", "step"])
def test_forecasts_are_those_of_the_host(
    axis: str, explicit: bool, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forecast over timesteps has them, whoever else needs them or not."""

    class Uneven(Loop):
        @property
        def timesteps(self) -> list[float]:
            return [1000.0, 950.0, 700.0, 640.0, 400.0, 380.0, 150.0, 20.0]

    loops = [Uneven(BRANCHES[2], explicit=explicit)]
    flags = {"forecast": "newton", "forecast_order": 2, "forecast_axis": axis}
    expected, expected_schedules, _ = generations(loops, **STRATEGIES[strategy], **flags)

    with pretended_device(monkeypatch) as reads:
        predictions, schedules, model = generations(loops, **STRATEGIES[strategy], **flags)

    assert (schedules, same(predictions, expected)) == (expected_schedules, True)
    assert max(reads) <= 1
    if explicit and axis == "step":
        assert reads[6:] == [int(strategy == "teacache")] * 10
    else:
        known = [each.timestep for each in omni_cache.summary(model).trajectories[0].steps]
        assert known == loops[0].timesteps


@pytest.mark.parametrize("forecast", ["dmd", "foca"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("explicit", [False, True], ids=["inferred", "named"])
def test_a_forecast_that_looks_at_residuals_costs_no_second_read(
    explicit: bool, strategy: str, forecast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = [Loop(BRANCHES[2], steps=16, explicit=explicit, seed=seed) for seed in (0, 1)]
    flags = {**STRATEGIES[strategy], "forecast": forecast}
    if strategy == "magcache":
        often = {"num_inference_steps": 16, "threshold": 9.0, "max_skip_steps": 1}
        flags = {**flags, **often, "retention_ratio": 0.0}
    expected, expected_schedules, _ = generations(loops, **flags)

    with pretended_device(monkeypatch) as reads:
        predictions, schedules, _ = generations(loops, **flags)

    assert (schedules, same(predictions, expected)) == (expected_schedules, True)
    assert all(False in schedule for schedule in schedules[-1])
    assert max(reads) == 1


def test_a_known_place_costs_a_host_decided_strategy_no_read_once_it_knows_its_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which inputs change is learned from the first calls, whose contents are compared."""
    loop = Loop(BRANCHES[2], explicit=True)
    expected, expected_schedules, _ = generations([loop], **MAGCACHE)

    with pretended_device(monkeypatch) as reads:
        predictions, schedules, _ = generations([loop], **MAGCACHE)

    assert (same(predictions, expected), schedules) == (True, expected_schedules)
    assert reads == [0, 0] + [1] * 2 * inference.LEARNED + [0] * 10


def test_a_known_place_costs_a_measuring_strategy_one_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Loop(BRANCHES[2], explicit=True)
    expected, expected_schedules, _ = generations([loop])

    with pretended_device(monkeypatch) as reads:
        predictions, schedules, _ = generations([loop])

    assert (same(predictions, expected), schedules) == (True, expected_schedules)
    assert reads == [0, 0] + [1] * 14  # nothing to compare at the first step


SEACACHE = {"cache": "seacache", "threshold": 0.4, "num_inference_steps": 8}


@pytest.mark.parametrize("explicit", [False, True], ids=["inferred", "named"])
def test_a_distance_that_depends_on_sigma_costs_one_read(
    explicit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timestep itself is read with what was measured by it."""
    loops = [Loop(BRANCHES[2], explicit=explicit, seed=seed) for seed in (0, 1)]
    expected, expected_schedules, _ = generations(loops, **SEACACHE)
    with pretended_device(monkeypatch) as reads:
        predictions, schedules, _ = generations(loops, **SEACACHE)
    assert (schedules, same(predictions, expected)) == (expected_schedules, True)
    assert all(2 <= sum(each) <= 6 for schedule in schedules for each in schedule), schedules
    assert set(reads) == {1}


# --- every kind of loop ---------------------------------------------------------------------------

Run = Callable[[Callable[..., Tensor], Sequence[float], int], None]


def each_call(generation: bool, branch: bool, anew: bool, index: bool = False) -> Run:
    """A loop over two branches: what it names, and whether it makes its prompts anew."""

    def run(model: Callable[..., Tensor], timesteps: Sequence[float], seed: int) -> None:
        prompts = {name: gaussian((seed, name), 1, 5, CHANNELS) for name in BRANCHES[2]}
        latents = gaussian(seed, 1, TOKENS, CHANNELS)
        with omni_cache.generation(len(timesteps)) if generation else contextlib.nullcontext():
            for step, timestep in enumerate(timesteps):
                noises = []
                for name, prompt in prompts.items():
                    place = omni_cache.branch(name, step if index else None)
                    with place if branch else contextlib.nullcontext():
                        words = prompt.clone() if anew else prompt
                        noises.append(model(latents, torch.tensor([timestep]), words))
                latents = latents - torch.stack(noises).mean(0) / len(timesteps)

    return run


LOOPS: dict[str, Run] = {
    f"{'anew' if anew else 'kept'}, {named}": each_call(*told, anew, indexed)
    for anew in (False, True)
    for named, told, indexed in (
        ("bare", (False, False), False),
        ("a generation", (True, False), False),
        ("branches", (False, True), False),
        ("branches and steps", (False, True), True),
        ("both", (True, True), False),
    )
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", LOOPS)
def test_every_kind_of_loop_is_decided_as_on_the_host_with_one_read_at_most(
    kind: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[list[list[str]]]:
        model = ToyTransformer()
        cached = compiled(model, **STRATEGIES[strategy])
        found = []
        for seed in (0, 1):
            LOOPS[kind](cached, Loop().timesteps, seed)
            found.append(reasons(model))
        return found

    expected = run()
    torch._dynamo.reset()
    with pretended_device(monkeypatch) as reads:
        found = run()
    assert found == expected
    assert len(reads) == 2 * 2 * 8
    assert max(reads) <= 1


class Pipeline:
    """Announces its loop by its scheduler, as those of diffusers do."""

    def __init__(self, kind: str) -> None:
        self.transformer, self.kind = ToyTransformer(), kind
        counts = kind != "uncounted and unnamed"
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler() if counts else DDPMScheduler()

    def __call__(self, seed: int) -> Tensor:
        prompts = {name: gaussian((seed, name), 1, 5, CHANNELS) for name in BRANCHES[2]}
        latents = gaussian(seed, 1, TOKENS, CHANNELS)
        self.scheduler.set_timesteps(8)
        is_named = self.kind != "uncounted and unnamed"
        stepped = copy.deepcopy(self.scheduler) if self.kind == "copied" else self.scheduler
        for timestep in self.scheduler.timesteps:
            noises = []
            for name, prompt in prompts.items():
                with omni_cache.branch(name) if is_named else contextlib.nullcontext():
                    noises.append(self.transformer(latents, timestep.expand(1), prompt))
            mean = torch.stack(noises).mean(0)
            if is_named:
                (latents,) = stepped.step(mean, timestep, latents, return_dict=False)
            else:
                latents = latents - mean / 8
        return latents


@pytest.mark.parametrize("forecast", ["hold", "newton"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["counted", "copied", "uncounted and unnamed"])
def test_an_announced_loop_is_decided_as_on_the_host_with_one_read_at_most(
    kind: str, strategy: str, forecast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's own timesteps lie on the device too, and come with the call's."""

    def run() -> tuple[list[Tensor], list[list[bool]]]:
        pipeline = Pipeline(kind)
        flags = {**STRATEGIES[strategy], "forecast": forecast}
        omni_cache.enable(pipeline, inner="eager", **flags)
        return [pipeline(seed) for seed in (0, 1, 0)], computed(pipeline)

    expected, schedule = run()
    with pretended_device(monkeypatch) as reads:
        found, found_schedule = run()
    assert (found_schedule, same(found, expected)) == (schedule, True)
    assert any(False in each for each in schedule)
    assert len(reads) == 3 * 2 * 8
    assert max(reads) <= 1
    if (kind, strategy, forecast) == ("counted", "magcache", "hold"):
        assert all(sum(reads[16 * run + 6 : 16 * (run + 1)]) == 0 for run in range(3))


# --- guesses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ALWAYS)
def test_a_branch_that_ends_early_costs_no_step(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance that stops half-way: the branch that goes on is known by its prompt."""
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS[strategy])
    prompts = [gaussian(name, 1, 5, CHANNELS) for name in BRANCHES[2]]
    latents = gaussian(0, 1, TOKENS, CHANNELS)

    with pretended_device(monkeypatch) as reads:
        for step in range(7):
            for prompt in prompts[: 2 if step < 3 else 1]:
                cached(latents.clone(), torch.tensor([1000.0 - step]), prompt)

    assert set(reads) == {1}
    assert computed(model) == [[True] + [False] * 6, [True, False, False]]


def test_a_wrong_guess_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two branches of the same words: the second is expected, and ends half-way."""
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    prompt, latents = gaussian("cond", 1, 5, CHANNELS), gaussian(0, 1, TOKENS, CHANNELS)

    with pretended_device(monkeypatch) as reads:
        for step in range(7):
            for _ in range(2 if step < 4 else 1):
                cached(latents.clone(), torch.tensor([1000.0 - step]), prompt)

    assert set(reads) == {1}
    assert reasons(model)[0][4:6] == ["below threshold", "unexpected call"]


def test_prompts_made_anew_are_known_by_their_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    def schedule(words: Sequence[str]) -> list[list[bool]]:
        model = ToyTransformer()
        cached = compiled(model, **ALWAYS_REUSE)
        for step, name in enumerate(words):
            prompt, latents = gaussian(name, 1, 5, CHANNELS), gaussian(step, 1, TOKENS, CHANNELS)
            cached(latents, torch.tensor([1000.0 - step]), prompt)
        return computed(model)

    for words in ("pppp", "ppqq", "pqqq", "pqpq", "pqrs"):
        expected = schedule(words)
        with pretended_device(monkeypatch) as reads:
            assert schedule(words) == expected, words
        assert set(reads) == {1}
    assert schedule("pppp") == [[True, False, False, False]]


@pytest.mark.parametrize("calls", range(1, 6))
def test_abandoned_loop_is_not_reused(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(BRANCHES[2])
    expected = loop.run(compiled(ToyTransformer(), **ALWAYS_REUSE))

    cached = compiled(ToyTransformer(), **ALWAYS_REUSE)
    with pretended_device(monkeypatch) as reads:
        with interrupted():
            replace(loop, prompts=("one", "two"), seed=1, calls=calls).run(cached)
        assert same(loop.run(cached), expected)
    assert set(reads) == {1}


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ALWAYS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_that_a_residual_is_not_finite_comes_over_with_what_is_read(
    value: float, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device the flag must not cost a read of its own."""
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS[strategy])
    healthy = model.blocks[1].out.bias.clone()
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("cond", 1, 5, CHANNELS)
    finite = []
    with pretended_device(monkeypatch) as reads:
        for step in range(4):
            model.blocks[1].out.bias.copy_(healthy)
            if step == 0:
                model.blocks[1].out.bias[0] = value
            prediction = cached(latents.clone(), torch.tensor([900.0 - step]), prompt)
            finite.append(prediction.isfinite().all())
    assert torch.stack(finite).tolist() == [False, True, True, True]
    assert reasons(model) == [
        ["first step", "non-finite residual", "below threshold", "below threshold"]
    ]
    assert set(reads) == {1}


@pytest.mark.parametrize("forecast", ["hold", "newton"])
def test_an_older_residual_that_is_not_finite_is_left_out_of_a_forecast(
    forecast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[list[list[str]], list[Tensor]]:
        model = ToyTransformer()
        cached = compiled(model, **TEACACHE, forecast=forecast)
        healthy, predictions = model.blocks[1].out.bias.clone(), []
        prompt = gaussian("cond", 1, 5, CHANNELS)
        for step in range(8):
            model.blocks[1].out.bias.copy_(healthy)
            if step == 0:
                model.blocks[1].out.bias[0] = torch.nan
            latents = gaussian(0, 1, TOKENS, CHANNELS)
            predictions.append(cached(latents, torch.tensor([900.0 - 50 * step]), prompt))
        return reasons(model), predictions

    expected, predictions = run()
    torch._dynamo.reset()
    with pretended_device(monkeypatch) as reads:
        found, on_device = run()
    assert found == expected
    assert same(on_device[1:], predictions[1:])
    assert all(each.isfinite().all() for each in on_device[1:])
    assert "below threshold" in found[0][2:4]
    assert set(reads) == {1}
