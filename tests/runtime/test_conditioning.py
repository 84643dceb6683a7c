"""What has stayed is conditioning: with another label, image or prompt it is another request."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    MAGCACHE,
    TOKENS,
    AbandonedError,
    FlakyCompiler,
    ToyTransformer,
    compiled,
    gaussian,
    reasons,
)

import omni_cache

pytestmark = pytest.mark.usefixtures("no_grad")

MAGCACHE_ALWAYS = {**MAGCACHE, "threshold": 1e9, "max_skip_steps": 99, "retention_ratio": 0.0}
STRATEGIES = {"teacache": ALWAYS_REUSE, "magcache": MAGCACHE_ALWAYS}


class Controlled(ToyTransformer):
    """Adds a control image of the latents' shape, or an embedding of class labels."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.labels = nn.Embedding(10, CHANNELS)
        self.requires_grad_(False)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, given: Tensor
    ) -> Any:
        if given.dtype == torch.int64:
            return super().forward(hidden_states, timestep, prompt + self.labels(given)[:, None])
        return super().forward(hidden_states + given, timestep, prompt)


GIVEN: dict[str, tuple[Tensor, Tensor]] = {
    "control image": (gaussian("a", 1, TOKENS, CHANNELS), gaussian("b", 1, TOKENS, CHANNELS)),
    "label": (torch.tensor([1]), torch.tensor([7])),
}
PROMPT = gaussian("prompt", 1, 5, CHANNELS)


def step(model: Any, number: int, given: Tensor, seed: int = 0) -> Tensor:
    latents = gaussian((seed, number), 1, TOKENS, CHANNELS)
    prediction: Tensor = model(latents, torch.tensor([1000.0 - 100 * number]), PROMPT, given)
    return prediction


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("named", [False, True], ids=["inferred", "named"])
def test_another_image_or_label_is_never_given_the_residual_of_the_first(
    kind: str, strategy: str, named: bool
) -> None:
    first, second = GIVEN[kind]
    model = Controlled()
    cached = compiled(model, **STRATEGIES[strategy])
    with omni_cache.generation(8) if named else nullcontext():
        for number in range(6):
            given = first if number < 3 else second
            with omni_cache.branch("cond") if named else nullcontext():
                prediction = step(cached, number, given)
            if number == 3:
                assert torch.equal(prediction, step(Controlled(), number, given))
    assert reasons(model)[-1][-1] == "below threshold"  # it goes on from there


@pytest.mark.parametrize("kind", GIVEN)
def test_two_requests_that_differ_in_it_alone_are_told_apart(kind: str) -> None:
    first, second = GIVEN[kind]
    model = Controlled()
    cached = compiled(model, **ALWAYS_REUSE)
    for number in range(3):
        step(cached, number, first)
    step(cached, 0, second, seed=1)
    found = step(cached, 3, first)

    alone = Controlled()
    cached_alone = compiled(alone, **ALWAYS_REUSE)
    for number in range(3):
        step(cached_alone, number, first)
    assert torch.equal(found, step(cached_alone, 3, first))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_prompt_written_in_place_is_seen_in_inference_mode_too(strategy: str) -> None:
    model, plain = ToyTransformer(), ToyTransformer()
    cached = compiled(model, **STRATEGIES[strategy])
    with torch.inference_mode():
        prompt = gaussian("fox", 1, 5, CHANNELS).clone()
        for number in range(6):
            if number == 3:
                prompt.copy_(gaussian("hen", 1, 5, CHANNELS))
            latents = gaussian(number, 1, TOKENS, CHANNELS)
            args = latents, torch.tensor([1000.0 - 100 * number]), prompt
            prediction = cached(*args)
            if number in (0, 3):
                assert torch.equal(prediction, plain(*args))


class Skipping(ToyTransformer):
    """Leaves out one of its blocks, as guidance by skipped layers does."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, skip: int = -1
    ) -> Any:
        x, time = self.embed(hidden_states), self.embed_prompt(prompt).mean(1)
        time = time + self.embed_time(timestep.reshape(-1, 1) / 500)
        for number, block in enumerate(self.blocks):
            x = x if number == skip else block(x, time, None)
        return self.project(x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_set_of_blocks_is_another_computation(strategy: str) -> None:
    model, plain = Skipping(blocks=4), Skipping(blocks=4)
    cached = compiled(model, **STRATEGIES[strategy])
    prompt = gaussian("fox", 1, 5, CHANNELS)
    for number, skip in enumerate([1, 1, 2, 3]):
        latents = gaussian(number, 1, TOKENS, CHANNELS)
        args = latents, torch.tensor([1000.0 - 100 * number]), prompt, skip
        if number != 1:
            assert torch.equal(cached(*args), plain(*args))
        else:
            cached(*args)


def test_a_first_call_that_fails_changes_nothing_for_others() -> None:
    inner, model = FlakyCompiler(), ToyTransformer()
    cached = compiled(model, **{**ALWAYS_REUSE, "inner": inner})

    def call(name: str, number: int) -> None:
        prompt = PROMPTS[name]
        cached(gaussian((name, number), 1, TOKENS, CHANNELS), torch.tensor([1e3 - number]), prompt)

    for number in range(3):
        call("fox", number)
    for _ in range(2):
        inner.remaining = 0
        with pytest.raises(AbandonedError):
            call("hen", 0)
        inner.remaining = None
    assert len(reasons(model)[0]) == 3
    call("fox", 3)
    assert reasons(model) == [["first step", *["below threshold"] * 3]]


PROMPTS = {name: gaussian(name, 1, 5, CHANNELS) for name in ("fox", "hen")}


def test_conditioning_that_differs_at_every_step_is_told_once() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    with warnings.catch_warnings(record=True) as told, omni_cache.generation(8):
        warnings.simplefilter("always")
        for number in range(8):
            latents, prompt = (gaussian((number, n), 1, n, CHANNELS) for n in (TOKENS, 5))
            with omni_cache.branch("cond"):
                cached(latents, torch.tensor([1e3 - 100 * number]), prompt)
    said = [str(each.message) for each in told if "differs at every step" in str(each.message)]
    assert len(said) == 1
    assert "[0, 1]" in said[0]


def test_residuals_that_overflow_at_every_step_are_told_once() -> None:
    model = ToyTransformer()
    model.blocks[0].out.weight.mul_(1e9)
    cached = compiled(model, **ALWAYS_REUSE, history_dtype="float16")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(5):
            latents = gaussian(number, 1, TOKENS, CHANNELS)
            cached(latents, torch.tensor([1e3 - number]), PROMPTS["fox"])
    assert reasons(model) == [["first step", *["non-finite residual"] * 4]]
    assert len([each for each in told if "history_dtype" in str(each.message)]) == 1
