"""StepCache under vLLM-Omni's names: its configuration, its countdowns, and a loop that asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_cache.backends import stepcache
from omni_cache.backends.config import DiffusionCacheConfig
from omni_cache.backends.stepcache import StepCacheBackend, StepCacheConfig, StepCacheState


def published(
    config: StepCacheConfig, countdown: int, history: list[tuple[Tensor, ...]]
) -> tuple[bool, int, float]:
    """Whether the published rule runs a step, its countdown afterwards, and the similarity."""
    if not config.enabled or len(history) < config.min_history_steps:
        return True, countdown, 9.0
    if countdown > 1:
        return False, countdown - 1, 9.0
    if countdown == 1:
        return True, 0, 9.0
    last, before = (history[place][0].flatten(1).double() for place in (-1, -2))
    similarity = float((last * before).sum(1).div(last.norm(dim=1) * before.norm(dim=1)).mean())
    for threshold, skips in zip(config.sim_thresholds, config.skip_countdowns, strict=True):
        if similarity > threshold:
            return False, skips, similarity
    return True, 0, similarity


@settings(max_examples=500)
@given(
    thresholds=st.lists(st.floats(-0.5, 0.999), min_size=1, max_size=3),
    countdowns=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    turns=st.lists(st.floats(0, 2), min_size=4, max_size=20),
    batch=st.integers(1, 3),
    min_history=st.integers(2, 3),
    max_history=st.integers(3, 4),
    enabled=st.sampled_from([True, True, True, False]),
    seed=st.integers(0, 2**16),
)
def test_countdowns_are_the_published_ones(
    thresholds: list[float],
    countdowns: list[int],
    turns: list[float],
    batch: int,
    min_history: int,
    max_history: int,
    enabled: bool,
    seed: int,
) -> None:
    thresholds = sorted(thresholds, reverse=True)
    skips = tuple(countdowns[: len(thresholds)])
    config = StepCacheConfig(enabled, min_history, max_history, tuple(thresholds), skips)
    state, generator, countdown = StepCacheState(config), torch.Generator().manual_seed(seed), 0
    velocity = torch.randn(batch, 2, 3, generator=generator)
    history: list[tuple[Tensor, ...]] = []
    for turn in turns:
        runs, countdown, similarity = published(config, countdown, history)
        assume(all(abs(similarity - each) > 1e-5 for each in thresholds))
        assert state.should_run_step(history) == runs
        assert state.skip_countdown == countdown
        if runs:
            velocity = velocity + turn * torch.randn(velocity.shape, generator=generator)
            history.append((velocity, torch.ones(1)))
            state.trim_history(history)
            assert len(history) <= max_history
            assert history[-1][0] is velocity


def alike(count: int = 2) -> list[tuple[Tensor, ...]]:
    return [(torch.ones(1, 4),)] * count


def runs(state: StepCacheState, steps: int) -> list[bool]:
    return [state.should_run_step(alike()) for _ in range(steps)]


def test_a_countdown_of_four_leaves_out_four_steps_and_one_of_one_leaves_out_one() -> None:
    assert runs(StepCacheState(StepCacheConfig()), 6) == [False] * 4 + [True, False]
    config = StepCacheConfig(sim_thresholds=(0.9,), skip_countdowns=(1,))
    assert runs(StepCacheState(config), 4) == [False, True, False, True]


def test_a_countdown_of_zero_never_leaves_out_a_step() -> None:
    config = StepCacheConfig(sim_thresholds=(0.9,), skip_countdowns=(0,))
    assert runs(StepCacheState(config), 3) == [True] * 3


def test_predictions_that_are_not_finite_run_the_step() -> None:
    broken = [(torch.full((1, 4), torch.nan),)] * 2
    assert StepCacheState(StepCacheConfig()).should_run_step(broken)


def test_one_prediction_is_compared_with_nothing() -> None:
    assert StepCacheState(StepCacheConfig(min_history_steps=1)).should_run_step(alike(1))


def test_reset_ends_the_countdown() -> None:
    state = StepCacheState(StepCacheConfig())
    assert not state.should_run_step(alike())
    state.reset()
    assert state.skip_countdown == 0


def test_the_history_is_trimmed_in_place_and_loses_its_oldest() -> None:
    history = [(torch.full((1,), float(index)),) for index in range(4)]
    same = history
    StepCacheState(StepCacheConfig(max_history=3)).trim_history(history)
    assert same is history
    assert [float(each[0]) for each in history] == [1.0, 2.0, 3.0]


def test_the_configuration_has_their_defaults_and_is_frozen() -> None:
    config = StepCacheConfig()
    assert (config.enabled, config.min_history_steps, config.max_history) == (True, 2, 2)
    assert (config.sim_thresholds, config.skip_countdowns) == ((0.95, 0.93), (4, 2))
    with pytest.raises(AttributeError):
        config.enabled = False  # type: ignore[misc]


def test_the_configuration_comes_from_a_diffusion_cache_config() -> None:
    given = DiffusionCacheConfig(
        step_cache_dit_enabled=False,
        velocity_sim_thresholds=[0.8],
        velocity_skip_countdowns=[3],
        step_cache_dit_min_history=4,
        step_cache_dit_max_history=5,
    )
    expected = StepCacheConfig(False, 4, 5, (0.8,), (3,))
    assert StepCacheConfig.from_diffusion_cache_config(given) == expected


def test_as_many_countdowns_as_thresholds_are_wanted() -> None:
    given = DiffusionCacheConfig(velocity_skip_countdowns=[1])
    with pytest.raises(ValueError, match="as many entries as velocity_sim_thresholds"):
        StepCacheConfig.from_diffusion_cache_config(given)


class DreamZeroPipeline:
    """A loop that asks, as the pipeline of this name does."""

    def __call__(self, steps: int) -> list[bool]:
        state, history, ran = stepcache.get_stepcache_state(self), [], []
        for _ in range(steps):
            ran.append(state is None or state.should_run_step(history))
            if ran[-1]:
                history.append((torch.ones(1, 4), torch.zeros(1)))
                if state is not None:
                    state.trim_history(history)
        return ran


class FluxPipeline:
    """A loop that does not ask."""


def test_a_pipeline_that_asks_follows_the_rule_in_every_request() -> None:
    pipeline, backend = DreamZeroPipeline(), StepCacheBackend(DiffusionCacheConfig())
    assert all(pipeline(6))
    backend.enable(pipeline)
    assert backend.is_enabled()
    assert stepcache.is_stepcache_active(pipeline)
    assert pipeline._stepcache_config == stepcache.get_stepcache_config(pipeline)  # type: ignore[attr-defined]
    first = pipeline(4)
    assert first == [True, True, False, False]
    backend.refresh(pipeline, None, verbose=False)
    assert pipeline(8) == [True, True, False, False, False, False, True, False]
    backend.disable(pipeline)
    assert not backend.is_enabled()
    assert all(pipeline(6))
    backend.disable(pipeline)


def test_what_is_disabled_by_the_configuration_is_placed_and_not_active() -> None:
    pipeline = DreamZeroPipeline()
    StepCacheBackend(DiffusionCacheConfig(step_cache_dit_enabled=False)).enable(pipeline)
    assert stepcache.get_stepcache_config(pipeline) is not None
    assert not stepcache.is_stepcache_active(pipeline)
    assert all(pipeline(6))


def test_another_pipeline_is_refused() -> None:
    backend = StepCacheBackend(DiffusionCacheConfig())
    with pytest.raises(ValueError, match="step_cache backend does not support FluxPipeline"):
        backend.enable(FluxPipeline())
    assert not backend.is_enabled()


def test_an_enabler_that_is_added_serves_its_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    enablers = stepcache.CUSTOM_STEPCACHE_ENABLERS
    monkeypatch.setitem(enablers, "FluxPipeline", stepcache.enable_dreamzero_stepcache)
    pipeline = FluxPipeline()
    StepCacheBackend(DiffusionCacheConfig()).enable(pipeline)
    assert stepcache.is_stepcache_active(pipeline)


def test_refresh_says_that_the_state_is_missing_if_it_may() -> None:
    pipeline, backend = DreamZeroPipeline(), StepCacheBackend(DiffusionCacheConfig())
    backend.enable(pipeline)
    del pipeline._stepcache_state  # type: ignore[attr-defined]
    backend.refresh(pipeline, 4, verbose=False)
    with pytest.warns(UserWarning, match="enable the step_cache backend again"):
        backend.refresh(pipeline, 4)


@pytest.mark.parametrize("name", [each for each in stepcache.__all__ if "DIT" in each.upper()])
def test_older_names_are_the_same_things(name: str) -> None:
    newer = name.replace("DiT", "").replace("STEP_CACHE_DIT", "STEP_CACHE")
    newer = newer.replace("step_cache_dit", "stepcache")
    older: Any = getattr(stepcache, name)
    spelled = newer.replace("CUSTOM_STEP_CACHE_", "CUSTOM_STEPCACHE_")
    assert older is getattr(stepcache, spelled)
    assert spelled != name
