"""SeaCache under vLLM-Omni's names: its filter, its decisions, its contexts, and its requests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fake_pipeline import (
    REQUESTS,
    FakePipeline,
    FakeRunner,
    FakeTransformer,
    Request,
    check_requests,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_transformer import CHANNELS, TOKENS, ToyTransformer, computed, gaussian

import omni_cache
from omni_cache.backends import seacache
from omni_cache.backends.hooks import HookRegistry
from omni_cache.backends.seacache import (
    SeaCacheBackend,
    SeaCacheConfig,
    SeaCacheState,
    apply_sea_cache_hook,
)
from omni_cache.backends.seacache.sea_filter import (
    apply_sea_filter,
    extrapolate_residual,
    indicator_distance,
    relative_l1_distance,
)
from omni_cache.backends.selector import get_cache_backend
from omni_cache.capture.extractor import CacheContext
from omni_cache.strategies import Time

SIZES = st.integers(1, 5)


def filtered(latents: Tensor, sigma: float, power: float) -> np.ndarray[Any, Any]:
    """The published filter over all axes but the last, in float64."""
    values, axes = latents.double().numpy(), (0, 1, 2)
    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    response = np.ones([1] * 4)
    for axis in axes:
        spectrum = 1 / (np.abs(np.fft.fftfreq(values.shape[axis])) ** power + 1e-16)
        gain = (1 - sigma) * spectrum / ((1 - sigma) ** 2 * spectrum + sigma**2 + 1e-16)
        response = response * gain.reshape([-1 if each == axis else 1 for each in range(4)])
    spectra = np.fft.fftn(values, axes=axes) * response / response.mean()
    kept: np.ndarray[Any, Any] = np.fft.ifftn(spectra, axes=axes).real
    return kept


@settings(max_examples=500)
@given(
    shape=st.tuples(SIZES, SIZES, SIZES, SIZES),
    sigma=st.floats(-0.1, 1.1),
    power=st.sampled_from([1.0, 2.0, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_the_filter_is_the_published_one(
    shape: tuple[int, ...], sigma: float, power: float, dtype: torch.dtype, seed: int
) -> None:
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = apply_sea_filter(latents, sigma, power)
    assert found.dtype == dtype
    expected = torch.from_numpy(filtered(latents, sigma, power))
    tolerance = (1e-4, 1e-4) if dtype == torch.float32 else (2e-2, 2e-2)
    size = expected.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(
        found.double() / size, expected / size, rtol=tolerance[0], atol=tolerance[1]
    )


@settings(max_examples=500)
@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    order=st.integers(0, 5),
    step=st.integers(0, 50),
    seed=st.integers(0, 2**16),
)
def test_the_extrapolation_is_the_published_polynomial(
    steps: list[int], order: int, step: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    residuals = torch.randn(len(steps), 3, generator=generator, dtype=torch.float64)
    history = list(zip(steps, residuals, strict=True))
    window = history[-(min(order, len(history) - 1) + 1) :]
    found = extrapolate_residual(history, step, order)
    if len({each for each, _ in window}) < len(window):
        expected = window[-1][1]
    else:
        expected = torch.zeros(3, dtype=torch.float64)
        for at, residual in window:
            weight = math.prod((step - x) / (at - x) for x, _ in window if x != at)
            expected = expected + weight * residual
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-6)
    assert found is not window[-1][1]


def test_an_empty_history_is_refused() -> None:
    with pytest.raises(ValueError, match="history is empty"):
        extrapolate_residual([], 3, 1)


def test_distances_are_relative_and_infinite_where_nothing_fits() -> None:
    one, other = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
    assert relative_l1_distance(one, other) == pytest.approx(0.5)
    assert relative_l1_distance(one, other, eps=2.0) == pytest.approx(0.25)
    assert relative_l1_distance(one.bfloat16(), other.double()) == pytest.approx(0.5)
    assert indicator_distance([one, other], [other, other]) == pytest.approx(0.25)
    for current, previous in (
        (None, [one]),
        ([one], None),
        ([], []),
        ([one], [one, one]),
        ([one], [torch.ones(3)]),
        ([one], [one.double()]),
        ([torch.tensor([torch.nan])], [torch.ones(1)]),
    ):
        assert indicator_distance(current, previous) == math.inf


def published(
    config: SeaCacheConfig, distances: list[float], total: int, least: float = 0.0
) -> list[bool]:
    """Which steps the published rule computes, given how far each is from the one before."""
    ran, change, cached = [], 0.0, 0
    for step, distance in enumerate(distances):
        limit = config.max_consecutive_cached
        is_full = limit > 0 and cached >= limit
        if step < 1 or step >= total - 1 or is_full or not math.isfinite(distance):
            change, computes = 0.0, True
        else:
            change += distance
            if least:
                assume(abs(change - config.threshold) > least)
            computes = not change < config.threshold
            change = 0.0 if computes else change
        cached = 0 if computes else cached + 1
        ran.append(computes)
    return ran


@settings(max_examples=500)
@given(
    distances=st.lists(
        st.one_of(st.floats(0, 0.5), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=24
    ),
    threshold=st.floats(0, 1),
    limit=st.integers(0, 4),
)
def test_each_step_is_decided_as_published(
    distances: list[float], threshold: float, limit: int
) -> None:
    config, total = SeaCacheConfig(threshold, 1, limit), len(distances)
    gate = config.strategy().policy(None).gate("cond", 0)
    state, ran = gate.begin(), []
    for step, distance in enumerate(distances):
        must = step == 0 or gate.foretell(Time(step), total) is not None
        verdict = gate.decide(state, Time(step), total, None if must else distance)
        reuses = verdict.reuse and not must
        state = verdict.if_reused if reuses else verdict.if_computed
        ran.append(not reuses)
    assert ran == published(config, distances, total, least=1e-9)


@pytest.mark.parametrize(
    "given",
    [
        {"threshold": -0.1},
        {"threshold": math.inf},
        {"residual_order": True},
        {"residual_order": 1.0},
        {"residual_order": -1},
        {"max_consecutive_cached": True},
        {"max_consecutive_cached": -1},
        {"power_exp": 0.0},
        {"power_exp": math.nan},
    ],
    ids=str,
)
def test_the_configuration_refuses(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(given))}="):
        SeaCacheConfig(**given)


def test_the_configuration_has_their_defaults_and_is_frozen() -> None:
    config = SeaCacheConfig()
    numbers = config.threshold, config.residual_order, config.max_consecutive_cached
    assert (*numbers, config.power_exp) == (0.25, 1, 2, 3.0)
    assert SeaCacheConfig(residual_order=7, threshold=0).strategy().forecasting().depth == 8
    with pytest.raises(AttributeError):
        config.threshold = 1.0  # type: ignore[misc]


def test_a_state_resets() -> None:
    state = SeaCacheState(3, 0.1, [torch.ones(1)], [(1, torch.ones(1))], 2)
    state.reset()
    assert state == SeaCacheState()


class Told:
    """What a pipeline says of its calls, and its calls."""

    def __init__(self, **config: Any) -> None:
        self.model = ToyTransformer()
        self.step: Any = None
        self.sigma: Any = None
        self.total: Any = None
        self.hook = apply_sea_cache_hook(
            self.model,
            SeaCacheConfig(**{"threshold": 1e9, "max_consecutive_cached": 0, **config}),
            current_step_callback=lambda: self.step,
            current_sigma_callback=lambda: self.sigma,
            num_inference_steps_callback=lambda: self.total,
            inner="eager",
        )

    @torch.no_grad()
    def run(self, steps: int, sigma: Any = None, names: tuple[str, ...] = ("cond",)) -> None:
        for step in range(steps):
            self.step, self.total = step, steps
            self.sigma = torch.tensor(1 - step / steps) if sigma is None else sigma
            for name in names:
                with self.hook.cache_context(name):
                    latents = gaussian(step, 1, TOKENS, CHANNELS)
                    self.model(latents, None, gaussian(name, 1, 5, CHANNELS))


def test_contexts_and_callbacks_tell_branch_step_sigma_and_number() -> None:
    told = Told()
    told.run(6, names=("cond", "uncond"))
    assert computed(told.model) == [[True, *[False] * 4, True]] * 2
    assert (told.hook.full_count, told.hook.skip_count) == (4, 8)
    records = omni_cache.summary(told.model).trajectories[0].steps
    assert [each.timestep for each in records] == pytest.approx([1 - step / 6 for step in range(6)])
    assert set(told.hook.states(told.model)) == {"cond", "uncond"}
    told.hook.refresh(told.model)
    assert (told.hook.full_count, told.hook.skip_count) == (0, 0)


def test_a_loop_that_begins_again_or_has_other_steps_begins_anew() -> None:
    told = Told()
    for steps in (6, 6, 4, 8):
        told.run(steps)
        assert computed(told.model)[-1][-steps:] == [True, *[False] * (steps - 2), True]


@pytest.mark.parametrize("sigma", [-0.1, 1.5, math.nan, "noise"])
def test_a_sigma_that_cannot_be_computes_every_step(sigma: Any) -> None:
    told = Told()
    with pytest.warns(UserWarning, match="metadata is wrong"):
        told.run(5, sigma)
    assert computed(told.model) == [[True] * 5]


@torch.no_grad()
def test_a_step_that_is_left_out_computes() -> None:
    told = Told()
    told.total = 8
    for step in (0, 1, 3, 4):
        told.step, told.sigma = step, 1 - step / 8
        with told.hook.cache_context("cond"):
            told.model(gaussian(step, 1, TOKENS, CHANNELS), None, gaussian("p", 1, 5, CHANNELS))
    assert computed(told.model) == [[True, False, True, False]]


@torch.no_grad()
def test_contexts_nest_and_restore() -> None:
    told = Told()
    with told.hook.cache_context("outer"):
        with told.hook.cache_context("inner"):
            told.run(1, names=("innermost",))
            told.model(gaussian(0, 1, TOKENS, CHANNELS), None, gaussian("p", 1, 5, CHANNELS))
        told.model(gaussian(0, 1, TOKENS, CHANNELS), None, gaussian("p", 1, 5, CHANNELS))
    found = [each.branch for each in omni_cache.summary(told.model).trajectories]
    assert found == ["innermost", "inner", "outer"]


def test_with_gradients_everything_is_computed() -> None:
    told = Told()
    told.step, told.sigma, told.total = 0, 0.5, 4
    with pytest.warns(omni_cache.UncachedWarning, match="gradients"):
        told.model(gaussian(0, 1, TOKENS, CHANNELS), None, gaussian("p", 1, 5, CHANNELS))
    assert (told.hook.full_count, told.hook.skip_count) == (0, 0)


class Packed(nn.Module):
    """Takes packed tokens of several latents, as Cosmos 3 does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)
        self.blocks_ran = 0

    def forward(self, latents: list[Tensor]) -> Tensor:
        context = packed(self, latents)
        return context.postprocess(context.run_transformer_blocks()[0])


def packed(module: Packed, latents: list[Tensor], **extra: Any) -> CacheContext:
    tokens = torch.cat([each.flatten() for each in latents]).reshape(-1, 4)

    def run_transformer_blocks() -> tuple[Tensor, ...]:
        module.blocks_ran += 1
        return (module.block(tokens),)

    states = {"sea_cache_latents": latents, **extra}
    return CacheContext(tokens, tokens, None, tokens, run_transformer_blocks, lambda x: x, states)


@torch.no_grad()
@pytest.mark.parametrize("items", [1, 2])
def test_an_extractor_s_latents_are_compared_item_by_item(items: int) -> None:
    model, place = Packed(), {"step": 0}
    hook = apply_sea_cache_hook(
        model,
        SeaCacheConfig(threshold=0.9, max_consecutive_cached=0),
        current_step_callback=lambda: place["step"],
        current_sigma_callback=lambda: 1 - place["step"] / 10,
        num_inference_steps_callback=lambda: 10,
        extractor_fn=packed,
        inner="eager",
    )
    generator = torch.Generator().manual_seed(items)
    loop = torch.randn(10, items, 2, 3, 2, 4, 4, generator=generator).cumsum(0) * 0.5
    controls, seen = [*loop[0, : items - 1]], []
    for step, noisy in enumerate(loop[:, -1]):
        place["step"] = step
        with hook.cache_context("cond"):
            model([*controls, noisy])
        channels_last = torch.cat([*controls, noisy]).movedim(1, -1)
        seen.append([apply_sea_filter(item, 1 - step / 10) for item in channels_last])
    pairs = zip(seen[1:], seen[:-1], strict=True)
    distances = [math.inf, *(indicator_distance(*pair) for pair in pairs)]
    expected = published(hook.config, distances, 10)
    assert computed(model) == [expected]
    assert model.blocks_ran == hook.full_count == sum(expected) < 10


@torch.no_grad()
@pytest.mark.parametrize(
    ("states", "said"),
    [
        ({"sea_cache_latents": None}, "gives no list of 5-D tensors"),
        ({"sea_cache_noisy_frame_mask": torch.zeros(2)}, "no frame of the latents is noisy"),
    ],
)
def test_calls_without_noisy_latents_run_in_full(states: dict[str, Any], said: str) -> None:
    model = Packed()

    def extract(module: Packed, latents: list[Tensor]) -> CacheContext:
        return packed(module, latents, **states)

    hook = apply_sea_cache_hook(model, SeaCacheConfig(1e9), extractor_fn=extract, inner="eager")
    with pytest.warns(omni_cache.UncachedWarning, match=said):
        model([torch.ones(1, 2, 2, 2, 2)])
    model([torch.ones(1, 2, 2, 2, 2)])
    assert model.blocks_ran == 2
    assert (hook.full_count, hook.skip_count) == (0, 0)


class TellingPipeline(FakePipeline):
    """Says the step, the sigma and the branch of each call, as Cosmos 3's pipelines do."""

    def _tag(self, transformer: Any, place: int, branches: int) -> None:
        self.num_timesteps = len(self.denoiser.timesteps)
        self.current_step_index = self.at
        self.current_sigma = 1 - self.at / self.num_timesteps
        self.at += place == branches - 1

    def forward(self, request: Request) -> Tensor:
        self.at = 0
        return super().forward(request)


def sea_cache(**config: Any) -> Any:
    return get_cache_backend("sea_cache", {"sea_threshold": 0.6, "inner": "eager", **config})


@pytest.mark.parametrize("make", [FakePipeline, TellingPipeline])
def test_every_request_gives_what_a_fresh_pipeline_gives(make: Any) -> None:
    check_requests(make, sea_cache, REQUESTS[:9])


def test_the_backend_places_a_context_factory_and_takes_it_off_again() -> None:
    runner = FakeRunner(FakePipeline(), sea_cache(sea_threshold=1e9))
    pipeline, backend = runner.pipeline, runner.backend
    with pipeline._cache_context_factory("cond"):
        runner.run(Request())
    (trajectory,) = omni_cache.summary(pipeline.transformer).trajectories
    assert trajectory.branch == "cond"
    assert trajectory.reused_steps > 0
    backend.disable(pipeline)
    assert not hasattr(pipeline, "_cache_context_factory")
    expected = FakeRunner(FakePipeline(), None).run(Request())
    assert torch.equal(runner.run(Request(), refresh=False), expected)


def test_a_request_s_step_count_has_its_last_step_computed() -> None:
    config = {"sea_threshold": 1e9, "sea_max_consecutive_cached": 0}
    runner = FakeRunner(FakePipeline(owns_scheduler=False), sea_cache(**config))
    for steps in (5, 9):
        runner.run(Request(steps=steps))
        assert computed(runner.pipeline.transformer) == [[True, *[False] * (steps - 2), True]]


def test_a_cache_that_was_taken_off_past_the_hook_is_an_error() -> None:
    pipeline, made = FakePipeline(), get_cache_backend("sea_cache", {"inner": "eager"})
    made.enable(pipeline)
    omni_cache.disable(pipeline.transformer)
    with pytest.raises(RuntimeError, match="lost its SeaCache hook"):
        made.refresh(pipeline, 8)


def test_another_transformer_is_cached_anew_and_a_lost_hook_is_an_error() -> None:
    pipeline, backend = FakePipeline(), sea_cache()
    backend.enable(pipeline)
    backend.enable(pipeline)
    pipeline.transformer = FakeTransformer(1)
    backend.refresh(pipeline, 8)
    assert omni_cache.pipelines.is_enabled(pipeline.transformer)
    HookRegistry.get_or_create(pipeline.transformer).remove_hook("sea_cache")
    with pytest.raises(RuntimeError, match="lost its SeaCache hook"):
        backend.refresh(pipeline, 8)


def test_a_second_transformer_runs_uncached_and_is_told() -> None:
    with pytest.warns(omni_cache.UncachedWarning, match="only the first transformer is cached"):
        sea_cache().enable(FakePipeline(experts=True))


def test_all_names_are_there() -> None:
    assert all(hasattr(seacache, name) for name in seacache.__all__)
    assert isinstance(get_cache_backend("sea_cache", {}), SeaCacheBackend)
