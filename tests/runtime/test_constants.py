"""Constants are computed once for each branch of a generation, and never serve another call.

Whatever a loop does, its predictions and its schedule are those without hoisting, bit for bit.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_device_read import pretended_device
from torch import Tensor, nn
from toy_transformer import (
    CHANNELS,
    MAGCACHE,
    NEVER_REUSE,
    STRATEGIES,
    TOKENS,
    WIDTH,
    FlakyCompiler,
    Loop,
    compiled,
    computed,
    gaussian,
    interrupted,
    same,
)

import omni_cache

pytestmark = pytest.mark.usefixtures("no_grad")

PARTS = ("body", "prologue", "epilogue", "reuse", "constants")
"""In the order in which they are compiled."""


WHOLE = ("body", "reuse", "constants")
"""The same where the region is the whole model: what is empty is not compiled."""


class Block(nn.Module):
    """Modulated cross-attention to the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.modulation(time)[:, None].chunk(2, -1)
        query = self.query(self.norm(x) * (1 + scale) + shift)
        return x + F.scaled_dot_product_attention(query, self.key(text), self.value(text))


class Crossing(nn.Module):
    """Denoises (B, S, CHANNELS) latents, given a timestep, prompts and a guidance scale."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(CHANNELS, WIDTH)
            self.embed_time = nn.Linear(1, WIDTH)
            self.embed_guidance = nn.Linear(1, WIDTH)
            self.embed_prompt = nn.Linear(CHANNELS, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.project = nn.Linear(WIDTH, CHANNELS)
        self.eval().requires_grad_(False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        prompt: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        x, text = self.embed(hidden_states), self.embed_prompt(prompt)
        time = self.embed_time(timestep.reshape(-1, 1) / 500)
        if guidance is not None:
            time = time + self.embed_guidance(guidance.reshape(-1, 1)).tanh()
        for block in self.blocks:
            x = block(x, time, text)
        return self.project(x)


class Counting:
    """An inner compiler that leaves graphs as they are, and notes which part runs."""

    def __init__(self, parts: Sequence[str] = PARTS) -> None:
        self._parts, self._compiled = parts, 0
        self.ran: list[str] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        name = self._parts[self._compiled % len(self._parts)]
        self._compiled += 1

        def run(*args: Any) -> Any:
            self.ran.append(name)
            return gm.forward(*args)

        return run

    @property
    def constants(self) -> int:
        """How often they were computed."""
        return self.ran.count("constants")


Drive = Callable[[nn.Module, Callable[..., Tensor]], list[Tensor]]
"""What a test does with a model and its compiled form."""


def hoisting(drive: Drive, parts: Sequence[str] = PARTS, **flags: Any) -> int:
    """How often constants were computed, once the drive has gone as it does without hoisting."""
    plain, model, counting = Crossing(), Crossing(), Counting(parts)
    expected = drive(plain, compiled(plain, **flags))
    schedule = computed(plain)
    cached = compiled(model, **{**flags, "hoist": True, "inner": counting})
    predictions = drive(model, cached)
    assert same(predictions, expected)
    assert computed(model) == schedule
    return counting.constants


def loops(*each: Loop) -> Drive:
    """Loops one after the other."""

    def drive(_: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        return [prediction for loop in each for prediction in loop.run(cached)]

    return drive


def steps(inputs: Callable[[int], dict[str, Any]], count: int = 6, named: bool = True) -> Drive:
    """A loop whose inputs a function makes for every step."""

    def predictions(cached: Callable[..., Tensor]) -> Iterator[Tensor]:
        latents = gaussian("latents", 1, TOKENS, CHANNELS)
        for step in range(count):
            moment = torch.tensor([1000.0 * (1 - step / count)])
            noise = cached(latents, moment, **inputs(step))
            latents = latents - noise / count
            yield noise

    def drive(_: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        if not named:
            return list(predictions(cached))
        with omni_cache.generation(count), omni_cache.branch("cond"):
            return list(predictions(cached))

    return drive


PROMPT, OTHER = gaussian("prompt", 1, 5, CHANNELS), gaussian("other", 1, 5, CHANNELS)


# --- once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [True, False], ids=["named", "inferred"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_constants_are_computed_once_for_a_generation_and_branch(
    strategy: str, explicit: bool
) -> None:
    flags = STRATEGIES[strategy]
    assert hoisting(loops(Loop(explicit=explicit)), **flags) == 1
    guided = Loop(("cond", "uncond"), explicit=explicit)
    assert hoisting(loops(guided), **flags) == 2
    # Another request brings other prompts, or the same.
    assert hoisting(loops(guided, Loop(("cond", "other"), 1, explicit=explicit)), **flags) == 4


@pytest.mark.parametrize(
    "flags",
    [
        {"cache": "first_block_cache", "threshold": 0.5},
        {"cache": "dbcache", "fn_compute_blocks": 1, "bn_compute_blocks": 1, "max_warmup_steps": 2},
        {"cache": "taylorseer"},
        {"forecast": "newton"},
    ],
    ids=["first block", "first and last block", "taylorseer", "newton"],
)
def test_they_are_computed_once_whatever_is_skipped_and_forecast(flags: dict[str, Any]) -> None:
    assert hoisting(loops(Loop(steps=12)), **flags) == 1


def test_they_are_computed_once_where_the_strategy_skips_whole_forwards() -> None:
    drive = steps(lambda step: {"prompt": PROMPT}, 12)
    assert hoisting(drive, WHOLE, cache="easycache") == 1


def test_inputs_that_are_made_anew_are_known_by_their_contents() -> None:
    drive = steps(lambda step: {"prompt": PROMPT.clone()}, 8)
    assert hoisting(drive) <= 2


def test_under_inference_mode_contents_are_compared() -> None:
    def drive(model: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            prompt = PROMPT.clone()
            return steps(lambda step: {"prompt": prompt}, 8)(model, cached)

    assert hoisting(drive) <= 2


@pytest.mark.slow
def test_inductor_takes_constants_for_operands_of_rolled_blocks() -> None:
    drive = steps(lambda step: {"prompt": PROMPT if step < 4 else OTHER}, 8)
    expected = drive(plain := Crossing(), compiled(plain))
    predictions = drive(model := Crossing(), compiled(model, hoist=True, inner="inductor"))
    assert computed(model) == computed(plain)
    for one, other in zip(predictions, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# --- and anew where anything may have changed ---------------------------------------------------


@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
def test_another_prompt_in_the_middle_of_a_loop_recomputes(named: bool) -> None:
    drive = steps(lambda step: {"prompt": PROMPT if step < 3 else OTHER}, named=named)
    assert hoisting(drive) == 2


def test_a_prompt_that_is_written_into_recomputes() -> None:
    def drive(model: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        prompt = PROMPT.clone()

        def inputs(step: int) -> dict[str, Any]:
            return {"prompt": prompt.mul_(1.01) if step == 3 else prompt}

        return steps(inputs)(model, cached)

    assert hoisting(drive) == 2


def test_a_guidance_that_moves_recomputes_at_every_step() -> None:
    def inputs(step: int) -> dict[str, Any]:
        return {"prompt": PROMPT, "guidance": torch.tensor([1.0 + step])}

    assert hoisting(steps(inputs)) == 6
    assert hoisting(steps(inputs), **MAGCACHE) == 6
    stays = torch.tensor([3.5])
    assert hoisting(steps(lambda step: {"prompt": PROMPT, "guidance": stays})) == 1


def test_a_number_that_changed_on_a_skipped_call_is_not_taken_for_the_old_one() -> None:
    scales = [torch.tensor([each]) for each in (1.0, 2.0, 3.0, 3.0, 4.0, 4.0, 4.0, 5.0)]
    drive = steps(lambda step: {"prompt": PROMPT, "guidance": scales[step]}, 8)
    flags = {"cache": "stepcache", "sim_thresholds": (-1.0,), "skip_countdowns": (2,)}
    assert hoisting(drive, WHOLE, **flags) > 1


@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
def test_weights_that_changed_between_generations_recompute(named: bool) -> None:
    def drive(model: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        once = steps(lambda step: {"prompt": PROMPT}, named=named)
        first = once(model, cached)
        for block in model.blocks:
            block.key.weight.data.mul_(-2)
        return first + once(model, cached)

    assert hoisting(drive) == 2


def test_refresh_recomputes() -> None:
    def drive(model: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        def inputs(step: int) -> dict[str, Any]:
            if step == 3:
                model.blocks[0].key.weight.data.mul_(-2)
                omni_cache.refresh(model)
            return {"prompt": PROMPT}

        return steps(inputs)(model, cached)

    assert hoisting(drive) == 2


def test_branches_in_any_order_keep_to_their_own() -> None:
    def drive(_: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        predictions = []
        latents = gaussian("latents", 1, TOKENS, CHANNELS)
        for step in range(6):
            prompts = [PROMPT, OTHER] if step % 2 else [OTHER, PROMPT]
            for prompt in prompts:
                moment = torch.tensor([1000.0 - 100 * step])
                predictions.append(cached(latents, moment, prompt))
            latents = latents - predictions[-1] / 6
        return predictions

    assert hoisting(drive) == 2
    assert hoisting(drive, **NEVER_REUSE) == 2


def test_loops_that_take_turns_keep_to_their_own() -> None:
    def drive(_: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        first, second = Loop(("a",)).predictions(cached), Loop(("b",), 1).predictions(cached)
        return [noise for pair in zip(first, second, strict=True) for noise in pair]

    assert hoisting(drive) == 2


def test_threads_keep_to_their_own() -> None:
    def drive(_: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        found: dict[int, list[Tensor]] = {}
        alike = [Loop(("a",), 0, explicit=True), Loop(("b",), 1, explicit=True)]
        list(alike[0].run(cached))  # compiles

        def run(number: int) -> None:
            with torch.no_grad():
                found[number] = alike[number].run(cached)

        threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return [*found[0], *found[1], *alike[0].run(cached)]

    assert hoisting(drive) == 4


def test_models_of_one_class_keep_to_their_own() -> None:
    drive = steps(lambda step: {"prompt": PROMPT})
    expected = {seed: drive(one := Crossing(seed), compiled(one)) for seed in (0, 1)}
    models = {seed: Crossing(seed) for seed in (0, 1)}
    cached = {seed: compiled(model, hoist=True) for seed, model in models.items()}
    for seed in (0, 1, 0):
        assert same(drive(models[seed], cached[seed]), expected[seed])


def test_another_length_of_the_prompt_recomputes() -> None:
    longer = gaussian("longer", 1, 7, CHANNELS)
    drive = steps(lambda step: {"prompt": PROMPT if step % 4 < 2 else longer}, 8)
    for dynamic in (False, True):
        expected = drive(plain := Crossing(), compiled(plain, dynamic=dynamic))
        schedule = computed(plain)
        model = Crossing()
        assert same(drive(model, compiled(model, dynamic=dynamic, hoist=True)), expected)
        assert computed(model) == schedule


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    flaky = FlakyCompiler()
    model = Crossing()
    cached = compiled(model, hoist=True, inner=flaky)
    drive = steps(lambda step: {"prompt": PROMPT})
    expected = drive(model, cached)
    for parts in range(5):
        flaky.remaining = parts
        with interrupted():
            drive(model, cached)
        assert same(drive(model, cached), expected)


# --- where tensors lie on a device --------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
@pytest.mark.parametrize(
    "inputs",
    [
        lambda step: {"prompt": PROMPT},
        lambda step: {"prompt": PROMPT if step < 4 else OTHER},
        lambda step: {"prompt": (PROMPT if step < 4 else OTHER).clone()},
        lambda step: {"prompt": PROMPT, "guidance": torch.tensor([1.0 + step])},
        lambda step: {"prompt": PROMPT, "guidance": torch.tensor([1.0 + (step > 3)])},
    ],
    ids=["stays", "changes", "is made anew", "guidance moves", "guidance moves once"],
)
def test_no_read_is_added_and_no_wrong_guess_is_used(
    monkeypatch: pytest.MonkeyPatch, strategy: str, named: bool, inputs: Any
) -> None:
    drive = steps(inputs, 8, named)
    flags = STRATEGIES[strategy]
    plain, model = Crossing(), Crossing()
    with pretended_device(monkeypatch) as reads:
        expected = drive(plain, compiled(plain, **flags))
        before, schedule = list(reads), computed(plain)
        reads.clear()
        predictions = drive(model, compiled(model, **flags, hoist=True))
    assert reads == before
    assert computed(model) == schedule
    assert same(predictions, expected)


def test_a_guess_at_an_earlier_generation_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def drive(model: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        once = steps(lambda step: {"prompt": PROMPT}, named=False)
        first = once(model, cached)
        for block in model.blocks:
            block.key.weight.data.mul_(-2)
        return first + once(model, cached)

    with pretended_device(monkeypatch):
        assert hoisting(drive) == 2
        assert hoisting(drive, **MAGCACHE) == 2


def test_constants_are_held_where_the_place_is_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counting = Crossing(), Counting()
    with pretended_device(monkeypatch):
        cached = compiled(model, hoist=True, inner=counting)
        for prompt in (PROMPT, OTHER):
            steps(lambda step, prompt=prompt: {"prompt": prompt}, 8, named=False)(model, cached)
    assert counting.constants <= 3  # of the second generation one is taken for the first's
    assert len(computed(model)[0]) == 8


# --- what they take -----------------------------------------------------------------------------


def test_the_bytes_that_explain_foretells_are_held_and_freed() -> None:
    model = Crossing()
    inputs = {"timestep": torch.tensor([500.0]), "prompt": PROMPT, "guidance": torch.tensor([3.5])}
    latents = gaussian("latents", 1, TOKENS, CHANNELS)
    flags = {**NEVER_REUSE, "hoist": True}
    found = omni_cache.explain(model, latents, **inputs, cache_options=flags)
    analysis = found.graphs[0].analysis
    assert analysis is not None
    assert analysis.hoisted is not None
    foretold = analysis.hoisted.constants.held_bytes
    assert foretold == 4 * (6 * 5 * WIDTH + WIDTH)  # keys and values of three blocks, guidance
    cached = compiled(model, **flags)
    with omni_cache.generation(3), omni_cache.branch("cond"):
        cached(latents, **inputs)
        (trajectory,) = omni_cache.summary(model).trajectories
        rest = analysis.residual_bytes() + analysis.signal_bytes()
        assert trajectory.memory_bytes == foretold + rest
        held = [weakref.ref(each) for each in constants_of(model)]
        assert sum(each().nbytes for each in held) == foretold  # type: ignore[union-attr]
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


def test_they_are_freed_after_the_last_step() -> None:
    model = Crossing()
    with omni_cache.generation(6) as current:
        steps(lambda step: {"prompt": PROMPT})(model, compiled(model, hoist=True))
        assert current is not None
        assert constants_of(model) == ()


def constants_of(model: nn.Module) -> tuple[Tensor, ...]:
    """What the newest run holds."""
    (state,) = omni_cache.runtime.model_state.states_of_module(model)
    assert state.latest is not None
    (trajectory,) = state.latest.trajectories.values()
    return () if trajectory.constants is None else trajectory.constants.results
