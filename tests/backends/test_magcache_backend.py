"""MagCache under vLLM-Omni's names: its rule, its ratios, its calibration, and its requests."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

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
from toy_transformer import Loop, ToyTransformer, computed

import omni_cache
from omni_cache.backends import magcache
from omni_cache.backends.hooks import HookRegistry, StateManager
from omni_cache.backends.magcache import (
    Flux2MagCacheStrategy,
    FluxMagCacheStrategy,
    MagCacheBackend,
    MagCacheConfig,
    MagCacheHeadHook,
    MagCacheState,
    MagCacheStrategy,
    MagCacheStrategyRegistry,
    apply_mag_cache_hook,
    get_strategy,
    register_strategy,
)
from omni_cache.backends.selector import get_cache_backend
from omni_cache.strategies import Time
from omni_cache.strategies.tables import magcache_table

RATIOS = [1.0, 0.9, 1.1, 0.95, 1.05, 0.9, 1.08, 0.97]
CONFIG: dict[str, Any] = {
    "mag_threshold": 0.21,
    "mag_max_skip_steps": 2,
    "mag_ratios": RATIOS,
    "inner": "eager",
}


def published(config: MagCacheConfig, forwards: int, least: float = 0.0) -> list[bool]:
    """Which forwards the published rule computes; every N of them it begins anew."""
    steps, ratios = config.num_inference_steps, config.mag_ratios.double()
    retention = int(config.retention_ratio * steps + 0.5)
    ran, index, product, skipped, error, holds = [], 0, 1.0, 0, 0.0, False
    for _ in range(forwards):
        computes = True
        if index >= retention:
            product *= float(ratios[index]) if index < len(ratios) else 1.0
            skipped += 1
            error += abs(1.0 - product)
            if least:  # ratios are float32 there
                assume(abs(error - config.threshold) > least)
            computes = not (
                holds and error <= config.threshold and skipped <= config.max_skip_steps
            )
            if computes:
                product, skipped, error = 1.0, 0, 0.0
        ran.append(computes)
        holds = True
        index += 1
        if index >= steps:
            index, product, skipped, error, holds = 0, 1.0, 0, 0.0, False
    return ran


@settings(max_examples=500)
@given(
    ratios=st.lists(st.floats(0.7, 1.3), min_size=1, max_size=24),
    steps=st.integers(1, 24),
    loops=st.integers(1, 3),
    threshold=st.floats(0.01, 1.0),
    skips=st.integers(1, 6),
    retention=st.floats(0.01, 0.9),
)
def test_each_step_is_decided_as_published_and_each_loop_begins_anew(
    ratios: list[float], steps: int, loops: int, threshold: float, skips: int, retention: float
) -> None:
    config = MagCacheConfig(threshold, skips, retention, steps, ratios)
    gate = config.strategy().policy(None).gate("positive", 0)
    ran = []
    for _ in range(loops):
        state = gate.begin()
        for index in range(steps):
            verdict = gate.decide(state, Time(index), steps, None)
            reuses = verdict.reuse and index > 0  # nothing is held at the first step
            state = verdict.if_reused if reuses else verdict.if_computed
            ran.append(not reuses)
    assert ran == published(config, steps * loops, least=1e-5)


@settings(max_examples=500)
@given(count=st.integers(1, 60), length=st.integers(1, 120))
def test_ratios_are_interpolated_to_the_nearest_halves_to_even(count: int, length: int) -> None:
    found = MagCacheStrategy.nearest_interp(torch.arange(float(count)), length)
    scale = (count - 1) / (length - 1) if length > 1 else 0.0
    expected = [round(place * scale) for place in range(length)] if length > 1 else [count - 1]
    assert found.tolist() == expected


@settings(max_examples=500)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(2, 5),
    width=st.integers(2, 5),
    seed=st.integers(0, 2**16),
)
def test_calibration_metrics_are_the_published_ones(
    batch: int, tokens: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    now, before = torch.randn(2, batch, tokens, width, generator=generator)
    ratio = now.double().norm(dim=-1) / (before.double().norm(dim=-1) + 1e-8)
    cosine = torch.nn.functional.cosine_similarity(now.double(), before.double(), dim=-1)
    expected = torch.stack([ratio.mean(), ratio.std(), (1 - cosine).mean()])
    found = torch.tensor(FluxMagCacheStrategy().compute_calibration_metrics(now, before))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_first_residual_has_the_neutral_metrics() -> None:
    strategy = FluxMagCacheStrategy()
    assert strategy.compute_calibration_metrics(torch.ones(1, 2, 3), None) == (1.0, 0.0, 0.0)
    assert strategy.get_calibration_metrics_names() == ("norm_ratio", "norm_std", "cos_dis")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"threshold": 0, "max_skip_steps": 0}, "threshold"),
        ({"max_skip_steps": 0, "retention_ratio": 0}, "max_skip_steps"),
        ({"retention_ratio": 0.0, "num_inference_steps": None}, "retention_ratio"),
        ({"retention_ratio": 1.0}, "retention_ratio"),
        ({"num_inference_steps": None}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({}, "mag_ratios"),
    ],
)
def test_the_configuration_refuses_in_their_order(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}="):
        MagCacheConfig(**given)


def test_the_configuration_has_their_defaults() -> None:
    config = MagCacheConfig(mag_ratios=[1.0, 0.9])
    assert (config.threshold, config.max_skip_steps, config.retention_ratio) == (0.24, 5, 0.1)
    assert (config.num_inference_steps, config.mag_calibrate) == (28, False)
    assert config.transformer_type == "FluxTransformer2DModel"
    assert isinstance(config.mag_ratios, Tensor)
    assert MagCacheConfig(mag_calibrate=True).mag_ratios is None


def test_ratios_are_those_of_the_packaged_tables() -> None:
    for strategy, kind in (
        (FluxMagCacheStrategy, "FluxTransformer2DModel"),
        (Flux2MagCacheStrategy, "Flux2Transformer2DModel"),
    ):
        assert isinstance(get_strategy(kind), strategy)
        assert len(strategy().mag_ratios) == 28
    table = magcache_table("FluxTransformer2DModel", "FLUX.1-dev (vLLM-Omni table)")
    assert table is not None
    assert FluxMagCacheStrategy.FLUX_MAG_RATIOS.tolist() == pytest.approx(table.ratios["cond"])
    assert len(Flux2MagCacheStrategy.FLUX2_MAG_RATIOS) == 28


def test_a_class_that_is_only_in_the_tables_has_ratios_for_each_branch() -> None:
    with pytest.warns(UserWarning, match="several tables"):
        ratios = get_strategy("OmniGen2Transformer2DModel").mag_ratios
    assert isinstance(ratios, dict)
    assert {"cond", "uncond"} <= set(ratios)


def test_a_class_that_nobody_knows_is_refused_and_can_be_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"^Unknown model type: 'Mine'"):
        get_strategy("Mine")
    assert MagCacheStrategyRegistry.get_if_exists("Mine") is None
    monkeypatch.setattr(MagCacheStrategyRegistry, "_registry", {})
    mine = FluxMagCacheStrategy()
    register_strategy("Mine", mine)
    assert get_strategy("Mine") is mine
    assert MagCacheStrategyRegistry.get("Mine") is mine


def test_a_strategy_has_to_say_its_ratios() -> None:
    with pytest.raises(TypeError, match="mag_ratios"):
        MagCacheStrategy()  # type: ignore[abstract]
    assert FluxMagCacheStrategy().register_block_metadata(nn.Linear) is None


def test_residuals_are_the_image_s_and_go_back_to_it() -> None:
    strategy, (text, image, added) = FluxMagCacheStrategy(), torch.randn(3, 2, 4, 5)
    joint = torch.cat((text, image + added), dim=1)
    for output in (image + added, joint):
        torch.testing.assert_close(strategy.compute_residual(output, image), added)
    torch.testing.assert_close(strategy.apply_residual(image, added), image + added)
    both = torch.cat((text, image), dim=1)
    torch.testing.assert_close(strategy.apply_residual(both, added), joint)
    pair = strategy.apply_residual_tuple(image, text, (text, added))
    torch.testing.assert_close(pair, (image + added, text))


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 8, 6), (1, 8, 5), (4, 5)])
def test_residuals_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    strategy, image = Flux2MagCacheStrategy(), torch.ones(2, 4, 5)
    with pytest.raises(ValueError, match=r"^output of shape"):
        strategy.compute_residual(torch.ones(shape), image)
    with pytest.raises(ValueError, match=r"^hidden_states of shape"):
        strategy.apply_residual(torch.ones(shape), image)


def test_a_state_begins_as_documented_and_resets_to_it() -> None:
    state, new = (
        MagCacheState(accumulated_ratio=2.0, step_index=4, norm_ratios=[1.0]),
        MagCacheState(),
    )
    assert (new.accumulated_ratio, new.accumulated_err, new.accumulated_steps) == (1.0, 0.0, 0)
    assert (new.should_compute, new.step_index, new.previous_residual) == (True, 0, None)
    assert (new.head_block_input, new._is_first_step) == (None, True)
    state.reset()
    assert state == new


def hook_of(module: nn.Module) -> MagCacheHeadHook:
    hook = HookRegistry.get_or_create(module).get_hook("mag_cache_head")
    assert isinstance(hook, MagCacheHeadHook)
    return hook


@torch.no_grad()
def test_a_plain_module_follows_the_rule_and_shows_its_state() -> None:
    module = ToyTransformer()
    config = MagCacheConfig(0.21, 2, 0.1, 8, RATIOS)
    apply_mag_cache_hook(module, config, inner="eager")
    Loop(prompts=("cond", "uncond")).run(module)
    assert computed(module) == [published(config, 8)] * 2
    for calls in (5, 16):  # an aborted loop, and a whole one after a reset
        hook_of(module).reset_state(module)
        for _, _prediction in zip(range(calls), Loop().predictions(module), strict=False):
            pass
        manager = hook_of(module).state_manager
        manager.set_context("branch 0")
        state = manager.get_state()
        assert state.step_index == calls % 8 % 16
        assert (state.previous_residual is None) == (calls == 16)


@torch.no_grad()
def test_ratios_that_are_too_few_count_as_one_beyond_their_end() -> None:
    module, config = ToyTransformer(), MagCacheConfig(0.05, 3, 0.1, 8, [1.0, 1.2])
    apply_mag_cache_hook(module, config, inner="eager")
    Loop().run(module)
    assert computed(module) == [published(config, 8)]


@torch.no_grad()
def test_applying_again_replaces_and_removing_leaves_the_module_as_it_was() -> None:
    module = ToyTransformer()
    for _ in range(2):
        apply_mag_cache_hook(module, MagCacheConfig(mag_ratios=RATIOS), inner="eager")
    HookRegistry.get_or_create(module).remove_hook("mag_cache_head")
    plain, found = Loop().run(ToyTransformer()), Loop().run(module)
    assert all(map(torch.equal, found, plain))


def test_a_module_without_blocks_is_left_alone() -> None:
    module = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="Linear has no ModuleList"):
        apply_mag_cache_hook(module, MagCacheConfig(mag_ratios=RATIOS))
    assert not omni_cache.pipelines.is_enabled(module)


def test_a_pipeline_without_blocks_has_lost_no_hook(recwarn: pytest.WarningsRecorder) -> None:
    pipeline = FakePipeline(make=lambda seed: nn.Linear(2, 2))
    made = get_cache_backend("mag_cache", CONFIG)
    made.enable(pipeline)
    made.refresh(pipeline, 8)
    assert recwarn
    assert all("has no ModuleList" in str(each.message) for each in recwarn)


class Doubling(FluxMagCacheStrategy):
    def compute_residual(self, output: Tensor, head_input: Tensor) -> Tensor:
        return 2 * (output - head_input)


def test_arithmetic_of_one_s_own_is_said_to_be_unused() -> None:
    with pytest.warns(UserWarning, match="Doubling.compute_residual is not asked"):
        apply_mag_cache_hook(
            ToyTransformer(), MagCacheConfig(mag_ratios=RATIOS), Doubling(), inner="eager"
        )


def test_one_hook_stands_for_head_and_blocks() -> None:
    assert magcache.MagCacheBlockHook is MagCacheHeadHook


def mag_cache(**config: Any) -> Any:
    return get_cache_backend("mag_cache", {**CONFIG, **config})


@pytest.mark.parametrize(
    ("pipeline", "requests"),
    [({}, REQUESTS), ({"owns_scheduler": False, "tags": "branch ids"}, REQUESTS[:8])],
    ids=["inputs tell", "tags tell"],
)
def test_every_request_gives_what_a_fresh_pipeline_gives(pipeline: Any, requests: Any) -> None:
    check_requests(lambda: FakePipeline(**pipeline), mag_cache, requests)


def test_each_request_has_ratios_for_its_own_steps() -> None:
    pipeline, backend = FakePipeline(), mag_cache()
    runner = FakeRunner(pipeline, backend)
    assert (backend.enabled, backend._registered) == (True, True)
    assert backend._magcache_config.num_inference_steps == 28
    for steps in (8, 12, 5, 8):
        runner.run(Request(others=("blurry",), steps=steps))
        assert backend._transformer_id == id(pipeline.transformer)
        known = backend._magcache_config
        expected = MagCacheStrategy.nearest_interp(torch.tensor(RATIOS), steps)
        assert torch.equal(known.mag_ratios, expected)
        assert computed(pipeline.transformer) == [published(known, steps)] * 2
        assert published(known, steps).count(False) > 0


@pytest.mark.parametrize("told", [None, 0])
def test_without_a_step_count_the_configuration_s_counts(told: Any) -> None:
    pipeline, backend = FakePipeline(), mag_cache()
    backend.enable(pipeline)
    backend.refresh(pipeline, told, verbose=False)
    assert backend._magcache_config.num_inference_steps == 28
    backend = get_cache_backend("mag_cache", {**CONFIG, "num_inference_steps": 9})
    backend.enable(pipeline)
    backend.refresh(pipeline, told)
    assert backend._magcache_config.num_inference_steps == 9


def test_another_transformer_is_cached_anew_and_a_lost_hook_is_applied_again() -> None:
    pipeline, backend = FakePipeline(), mag_cache()
    backend.enable(pipeline)
    pipeline.transformer = FakeTransformer(1)
    backend.refresh(pipeline, 8)
    assert omni_cache.pipelines.is_enabled(pipeline.transformer)
    for verbose in (True, False):
        HookRegistry.get_or_create(pipeline.transformer).remove_hook("mag_cache_head")
        assert not omni_cache.pipelines.is_enabled(pipeline.transformer)
        if verbose:
            with pytest.warns(UserWarning, match="lost its MagCache hook"):
                backend.refresh(pipeline, 8)
        else:
            backend.refresh(pipeline, 8, verbose=False)
        assert omni_cache.pipelines.is_enabled(pipeline.transformer)


def test_a_cache_that_was_taken_off_past_the_hook_is_applied_again() -> None:
    pipeline, made = FakePipeline(), get_cache_backend("mag_cache", CONFIG)
    made.enable(pipeline)
    omni_cache.disable(pipeline.transformer)
    with pytest.warns(UserWarning, match="lost its MagCache hook"):
        made.refresh(pipeline, 28)
    assert omni_cache.pipelines.is_enabled(pipeline.transformer)


def test_disabling_leaves_another_backend_s_cache_on() -> None:
    pipeline = FakePipeline()
    tea = get_cache_backend("tea_cache", {"coefficients": [0, 0, 0, 1, 0], "inner": "eager"})
    tea.enable(pipeline)
    get_cache_backend("mag_cache", CONFIG).disable(pipeline)
    assert omni_cache.pipelines.is_enabled(pipeline.transformer)


def test_a_transformer_without_ratios_is_refused() -> None:
    backend = mag_cache(mag_ratios=None)
    with pytest.raises(ValueError, match="Unknown model type: 'FakeTransformer'"):
        backend.enable(FakePipeline())
    assert not backend.is_enabled()


def test_disabling_leaves_the_pipeline_as_it_was() -> None:
    runner = FakeRunner(FakePipeline(), mag_cache())
    runner.run(Request())
    runner.backend.disable(runner.pipeline)
    assert not runner.backend.is_enabled()
    expected = FakeRunner(FakePipeline(), None).run(Request())
    assert torch.equal(runner.run(Request(), refresh=False), expected)
    runner.backend.disable(runner.pipeline)


def test_a_calibration_computes_every_step_and_offers_its_ratios(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = mag_cache(mag_ratios=None, mag_calibrate=True)
    assert backend.calibrated_ratios == {}
    runner = FakeRunner(FakePipeline("branch ids"), backend)
    request = Request(others=("blurry",), steps=6)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            latents = runner.run(request)
            assert torch.equal(latents, FakeRunner(FakePipeline(), None).run(request))
            ratios = backend.calibrated_ratios
            assert {len(each) for each in ratios.values()} == {6}
    assert len(ratios) == 2
    assert all(each[0] == 1.0 for each in ratios.values())
    assert str(next(iter(ratios.values()))) in caplog.text

    pipeline = FakePipeline()

    def generate() -> None:
        FakeRunner(pipeline, None).run(request)

    measured = omni_cache.calibration.estimate_mag_ratios(
        pipeline.transformer, generate, num_inference_steps=6, inner="eager"
    )
    for ours, own in zip(ratios.values(), measured.values(), strict=True):
        assert ours == pytest.approx(own, abs=1e-4)
    again = FakeRunner(FakePipeline(), mag_cache(mag_ratios=ratios))
    assert again.run(request) is not None


def test_a_calibration_measures_against_a_copy() -> None:
    hook = MagCacheHeadHook(StateManager(MagCacheState), MagCacheConfig(mag_calibrate=True))
    residual = torch.ones(1, 4, 8)
    for index in range(2):
        residual.fill_(index + 1.0)  # in place, as graphs that reuse their memory do
        hook._measure(SimpleNamespace(residuals=(residual,), branch="b", at=Time(index)))
    assert hook.calibrated_ratios == {"b": [1.0, 2.0]}


def test_an_aborted_calibration_keeps_what_it_has_measured() -> None:
    backend = mag_cache(mag_ratios=None, mag_calibrate=True)
    FakeRunner(FakePipeline(), backend).run(Request(steps=6, abort=4))
    assert [len(each) for each in backend.calibrated_ratios.values()] == [4]


def test_a_second_transformer_runs_uncached_and_is_told() -> None:
    with pytest.warns(omni_cache.UncachedWarning, match="only the first transformer is cached"):
        mag_cache().enable(FakePipeline(experts=True))


def test_all_names_are_there() -> None:
    assert all(hasattr(magcache, name) for name in magcache.__all__)
    assert isinstance(get_cache_backend("mag_cache", {}), MagCacheBackend)
