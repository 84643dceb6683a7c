"""What a trajectory keeps, when it must not be used, and when it is freed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    MAGCACHE,
    TOKENS,
    WIDTH,
    Block,
    Loop,
    ToyTransformer,
    alone,
    compiled,
    computed,
    gaussian,
    interrupted,
    reasons,
    same,
)

import omni_cache
from omni_cache.runtime.model_state import states_of_module

pytestmark = pytest.mark.usefixtures("no_grad")

MAGCACHE_ALWAYS: dict[str, Any] = {
    **MAGCACHE,
    "threshold": 1e9,
    "max_skip_steps": 99,
    "retention_ratio": 0.0,
}
STRATEGIES = {"teacache": ALWAYS_REUSE, "magcache": MAGCACHE_ALWAYS}


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["recompiled", "one dynamic graph"])
def test_a_change_of_shape_starts_afresh(dynamic: bool, strategy: str) -> None:
    model = ToyTransformer()
    cached = compiled(model, dynamic=dynamic, **STRATEGIES[strategy])
    prompt = gaussian("cond", 1, 5, CHANNELS)

    with omni_cache.generation(), omni_cache.branch("cond"):
        for step, tokens in enumerate((6, 6, 9, 9, 6)):
            latents, timestep = gaussian(step, 1, tokens, CHANNELS), torch.tensor([900.0 - step])
            prediction = cached(latents, timestep, prompt)
            if step in (2, 4):
                plain = model(latents, timestep, prompt)
                torch.testing.assert_close(prediction, plain, rtol=0, atol=1e-6)

    changed, reused = "shape changed", "below threshold"
    assert reasons(model) == [["first step", reused, changed, reused, changed]]


def test_a_change_of_dtype_starts_afresh() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    arguments = [gaussian(0, 1, TOKENS, CHANNELS), gaussian("cond", 1, 5, CHANNELS)]

    with omni_cache.generation(), omni_cache.branch("cond"):
        for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16):
            model.to(dtype)
            latents, prompt = (each.to(dtype) for each in arguments)
            prediction = cached(latents, None, prompt)
            assert prediction.dtype == dtype

    changed, reused = "dtype changed", "below threshold"
    assert reasons(model) == [["first step", reused, changed, reused]]


def test_another_resolution_compiles_nothing_and_shares_nothing() -> None:
    def loop(cached: Callable[..., Tensor], tokens: int, name: str) -> list[Tensor]:
        latents, prompt = gaussian(tokens, 1, tokens, CHANNELS), gaussian(name, 1, 5, CHANNELS)
        timesteps = (torch.tensor([900.0 - 100 * step]) for step in range(4))
        return [cached(latents * (1 - t / 1e4), t, prompt) for t in timesteps]

    expected = loop(compiled(ToyTransformer(), dynamic=True), 12, "two")
    torch._dynamo.reset()
    model = ToyTransformer()
    cached = compiled(model, dynamic=True)
    counters.clear()

    loop(cached, 9, "one")
    predictions = loop(cached, 12, "two")

    assert counters["stats"]["unique_graphs"] == 1
    assert same(predictions, expected)
    assert False in computed(model)[0]


def test_a_signal_of_another_shape_starts_afresh() -> None:
    """The signal may change its shape where the residual does not."""
    model = ToyTransformer()
    cached = compiled(model, dynamic=True, signal="embed_prompt", **ALWAYS_REUSE)

    with omni_cache.generation(), omni_cache.branch("cond"):
        for words in (5, 5, 7, 7):
            cached(gaussian(0, 1, TOKENS, CHANNELS), None, gaussian(words, 1, words, CHANNELS))

    changed, reused = "shape changed", "below threshold"
    assert reasons(model) == [["first step", reused, changed, reused]]


def test_a_prompt_of_another_length_starts_afresh() -> None:
    """What the blocks read may decide the shape of what they return."""
    model = ToyTransformer()
    cached = compiled(model, dynamic=True, **MAGCACHE_ALWAYS)
    mask = {words: torch.zeros(words, words) for words in (5, 7)}

    with omni_cache.generation(), omni_cache.branch("cond"):
        for words in (5, 5, 7, 7):
            latents = gaussian(0, 1, words, CHANNELS)
            cached(latents, None, gaussian("cond", 1, 5, CHANNELS), mask[words])

    changed, reused = "shape changed", "below threshold"
    assert reasons(model) == [["first step", reused, changed, reused]]


class HandsContextOn(ToyTransformer):
    """Returns, beside the noise, a context that its blocks make anew and that has no partner."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Any:
        x, context = self.embed(hidden_states), self.embed_prompt(prompt)
        time = self.embed_time(timestep.reshape(-1, 1) / 500)
        for block in self.blocks:
            x = block(x, time, None)
            context = block.out(torch.tanh(context)) * x.mean()
        return self.project(x), context


def test_a_held_value_has_the_length_of_this_calls_prompt() -> None:
    model = HandsContextOn()
    cached = compiled(model, dynamic=True, **ALWAYS_REUSE)
    with omni_cache.generation(), omni_cache.branch("cond"):
        for words in (5, 5, 7, 7):
            latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian(0, 1, words, CHANNELS)
            assert cached(latents, torch.tensor([9.0]), prompt)[1].shape[1] == words
    assert computed(model) == [[True, False, True, False]]


def test_writing_into_what_a_reused_step_returned_changes_no_later_step() -> None:
    model = HandsContextOn()
    cached = compiled(model, **ALWAYS_REUSE)
    with omni_cache.generation(), omni_cache.branch("cond"):
        arguments = (gaussian(0, 1, TOKENS, CHANNELS), torch.tensor([9.0]))
        contexts = [cached(*arguments, gaussian(0, 1, 5, CHANNELS))[1] for _ in range(2)]
        expected = contexts[1].clone()
        contexts[1].zero_()
        again = cached(*arguments, gaussian(0, 1, 5, CHANNELS))[1]
    assert expected.abs().sum() > 0
    assert torch.equal(again, expected)


def test_leaving_inference_mode_starts_afresh() -> None:
    """What is made in it cannot be written to outside of it."""
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    arguments = (gaussian(0, 1, TOKENS, CHANNELS), None, gaussian("cond", 1, 5, CHANNELS))

    with omni_cache.generation(), omni_cache.branch("cond"):
        for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.no_grad):
            with mode():
                cached(*arguments)

    changed, reused = "inference mode changed", "below threshold"
    assert reasons(model) == [["first step", reused, changed, reused]]


class Bare(nn.Module):
    """Blocks alone: what the residual is added to is the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, time, None)
        return hidden_states.relu()


def test_a_change_of_shape_shows_where_the_blocks_read_the_input_itself() -> None:
    model = Bare().eval()
    cached = compiled(model, dynamic=True, **ALWAYS_REUSE)

    with omni_cache.generation(), omni_cache.branch("cond"):
        for tokens in (6, 6, 9, 9):
            cached(gaussian(tokens, 1, tokens, WIDTH), gaussian("time", 1, WIDTH))

    changed, reused = "shape changed", "below threshold"
    assert reasons(model) == [["first step", reused, changed, reused]]


def test_graphs_that_differ_do_not_share_residuals() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("cond", 1, 5, CHANNELS)
    mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)

    with omni_cache.generation(), omni_cache.branch("cond"):
        for each in (None, None, mask, mask, None):
            cached(latents, None, prompt, each)

    changed, reused = "shape changed", "below threshold"
    assert reasons(model) == [["first step", reused, changed, reused, changed]]


def test_compilations_with_other_flags_do_not_share_residuals() -> None:
    model = ToyTransformer()
    often, seldom = compiled(model, **ALWAYS_REUSE), compiled(model, rel_l1_thresh=0.3)
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("cond", 1, 5, CHANNELS)

    with omni_cache.generation(), omni_cache.branch("cond"):
        for cached in (often, often, seldom, seldom):
            cached(latents, None, prompt)

    # Each has a trajectory of its own.
    assert reasons(model) == [["first step", "below threshold"]] * 2


def test_equal_graphs_share_residuals() -> None:
    """Threads that come first both compile; and what ``return_dict`` changes is in no graph."""
    model = ToyTransformer()
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("cond", 1, 5, CHANNELS)

    with omni_cache.generation(), omni_cache.branch("cond"):
        for wrap in (False, True):
            torch._dynamo.reset()
            compiled(model, **ALWAYS_REUSE)(latents, None, prompt, return_dict=wrap)

    assert reasons(model) == [["first step", "below threshold"]]


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_residual_that_is_not_finite_is_not_reused(strategy: str, value: float) -> None:
    model = ToyTransformer()
    cached = compiled(model, **STRATEGIES[strategy])
    healthy = model.blocks[1].out.bias.clone()
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("cond", 1, 5, CHANNELS)

    finite = []
    for step in range(4):
        model.blocks[1].out.bias.copy_(healthy)
        if step == 0:
            model.blocks[1].out.bias[0] = value
        prediction = cached(latents.clone(), torch.tensor([900.0 - step]), prompt)
        finite.append(bool(prediction.isfinite().all()))
        assert all(each().isfinite().all() for each in held(model))

    assert finite == [False, True, True, True]
    expected = ["first step", "non-finite residual", "below threshold", "below threshold"]
    assert reasons(model) == [expected]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_signal_that_is_not_finite_computes(value: float) -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    prompt = gaussian("cond", 1, 5, CHANNELS)

    for step in range(5):
        latents = gaussian(0, 1, TOKENS, CHANNELS)
        if step == 1:
            latents[0, 0, 0] = value
        prediction = cached(latents, torch.tensor([900.0 - step]), prompt)
        assert bool(prediction.isfinite().all()) == (step != 1)

    assert computed(model) == [[True, True, True, False, False]]
    assert reasons(model)[0][1:3] == ["non-finite distance", "non-finite residual"]


# --- what is freed --------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Whatever is freed is freed at once: no reference cycle holds it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def held(model: nn.Module) -> list[weakref.ref[Tensor]]:
    """The residuals that the latest generation of a model holds now."""
    (state,) = states_of_module(model)
    assert state.latest is not None
    return [
        weakref.ref(residual)
        for trajectory in state.latest.trajectories.values()
        for kept in trajectory.history.kept
        for residual in kept.residuals
    ]


def freed(references: list[weakref.ref[Tensor]]) -> list[bool]:
    return [reference() is None for reference in references]


@pytest.mark.usefixtures("no_collector")
def test_residuals_are_freed_with_the_last_step() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    prompt = gaussian("cond", 1, 5, CHANNELS)

    with omni_cache.generation(3), omni_cache.branch("cond"):
        for step in range(3):
            cached(gaussian(0, 1, TOKENS, CHANNELS), torch.tensor([900.0 - step]), prompt)
            if step == 1:
                references = held(model)
                assert freed(references) == [False]
        assert freed(references) == [True]
        assert held(model) == []


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("calls", [None, 5], ids=["done", "abandoned"])
def test_residuals_are_freed_at_the_end_of_a_generation(calls: int | None) -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    references: list[weakref.ref[Tensor]] = []

    def watched(*arguments: Tensor) -> Tensor:
        prediction = cached(*arguments)
        references.extend(held(model))
        return prediction

    loop = Loop(("cond", "uncond"), explicit=True, calls=calls)
    if calls is None:
        loop.run(watched)
    else:
        with interrupted():
            loop.run(watched)

    assert len(references) > 2
    assert all(freed(references))


@pytest.mark.usefixtures("no_collector")
def test_residuals_are_freed_by_the_next_generation() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    with interrupted():
        Loop(("cond", "uncond"), calls=6).run(cached)
    references = held(model)
    assert freed(references) == [False, False]

    with interrupted():
        Loop(("one", "two"), calls=1).run(cached)

    assert freed(references) == [True, True]


@pytest.mark.usefixtures("no_collector")
def test_a_computed_step_frees_the_residual_before() -> None:
    model = ToyTransformer()
    cached = compiled(model, rel_l1_thresh=0.0)
    loop = Loop().predictions(cached)
    next(loop)
    references = held(model)
    next(loop)

    assert freed(references) == [True]
    assert freed(held(model)) == [False]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("enabled", [False, True], ids=["bare", "enabled"])
def test_all_is_freed_with_the_model(enabled: bool) -> None:
    model = ToyTransformer()
    if enabled:
        omni_cache.enable(model, inner="eager", **ALWAYS_REUSE)
        Loop().run(model)
        state = model._compiled_call_impl.state
        (trajectory,) = state.latest.trajectories.values()
        references = [weakref.ref(each) for each in trajectory.history.kept[0].residuals]
        del state, trajectory
    else:
        Loop().run(compiled(model, **ALWAYS_REUSE))
        references = held(model)
    references.append(weakref.ref(model))
    assert freed(references) == [False, False]

    del model

    assert freed(references) == [True, True]


@pytest.mark.usefixtures("no_collector")
def test_all_is_freed_with_the_thread() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    references: list[weakref.ref[Tensor]] = []

    @torch.no_grad()
    def work() -> None:
        Loop().run(cached)
        references.extend(held(model))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    # The latest generation is kept for the summary; the next one, here, takes its place.
    with interrupted():
        Loop(calls=1).run(cached)

    assert freed(references) == [True]


@pytest.mark.usefixtures("no_collector")
def test_refresh_frees_all_and_starts_afresh() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    with interrupted():
        Loop(calls=3).run(cached)
    references = held(model)

    omni_cache.refresh(cached)

    assert freed(references) == [True]
    assert omni_cache.summary(cached).trajectories == ()
    assert same(Loop().run(cached), alone(Loop(), **ALWAYS_REUSE))


def test_steps_told_before_the_first_call_of_a_compiled_model_count() -> None:
    model = ToyTransformer()
    cached = compiled(model, force_last_step=True, **ALWAYS_REUSE)
    omni_cache.refresh(model, num_inference_steps=4)
    Loop(steps=4).run(cached)

    assert reasons(model)[0][-1] == "last step"


def test_refresh_reaches_the_generations_of_other_threads() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    first, other = (gaussian(seed, 1, TOKENS, CHANNELS) for seed in (0, 1))
    prompt = gaussian("cond", 1, 5, CHANNELS)
    expected = model(other, None, prompt)

    with omni_cache.generation(), omni_cache.branch("cond"):
        cached(first, None, prompt)
        assert not torch.allclose(cached(other, None, prompt), expected, atol=1e-3)
        with omni_cache.generation(), omni_cache.branch("cond"):
            cached(first, None, prompt)  # so that the outer one is not the latest
        thread = threading.Thread(target=omni_cache.refresh, args=(model,))
        thread.start()
        thread.join()
        assert torch.equal(cached(other, None, prompt), expected)


def test_refresh_within_a_generation_starts_it_over() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("cond", 1, 5, CHANNELS)

    with omni_cache.generation(9), omni_cache.branch("cond"):
        for step in range(4):
            if step == 2:
                omni_cache.refresh(model)
            cached(latents, None, prompt)

    assert computed(model) == [[True, False]]


# --- what it costs --------------------------------------------------------------------------------


def test_memory_is_that_of_residual_and_previous_signal() -> None:
    hidden_states = TOKENS * WIDTH * 4
    for flags, expected in ((ALWAYS_REUSE, 2 * hidden_states), (MAGCACHE_ALWAYS, hidden_states)):
        model = ToyTransformer()
        Loop(("cond", "uncond")).run(compiled(model, **flags))
        summary = omni_cache.summary(model)
        assert [each.memory_bytes for each in summary.trajectories] == [expected, expected]
        assert summary.memory_bytes == 2 * expected


def test_memory_is_the_most_that_was_held() -> None:
    """It is freed after the last step, and the summary is asked for after that."""
    model = ToyTransformer()
    cached = compiled(model, dynamic=True, **MAGCACHE_ALWAYS)
    with omni_cache.generation(3), omni_cache.branch("cond"):
        for tokens in (6, 9, 6):
            cached(gaussian(0, 1, tokens, CHANNELS), None, gaussian("cond", 1, 5, CHANNELS))

    assert omni_cache.summary(model).memory_bytes == 9 * WIDTH * 4


def test_at_a_refresh_the_residuals_before_it_are_dropped() -> None:
    """A line through two residuals is then a single one, which is held."""
    flags: dict[str, Any] = {
        "cache": "dbcache",
        "fn_compute_blocks": 1,
        "steps_computation_policy": "static",
    }
    line = {"forecast": "newton", "forecast_axis": "step"}
    twice, once = [1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0]
    found = {}
    for name, others in {
        "hold": {"steps_computation_mask": twice},
        "line": {"steps_computation_mask": twice, **line},
        "refreshed": {"steps_computation_mask": once, "force_refresh_step_hint": 4, **line},
    }.items():
        model = ToyTransformer(blocks=3)
        found[name] = Loop(explicit=True).run(compiled(model, **flags, **others))
        assert computed(model) == [[each == 1 for each in twice]]
    assert reasons(model)[0][4:6] == ["refresh", "as scheduled"]
    assert same(found["refreshed"], found["hold"])
    assert not same(found["line"], found["hold"])
