"""The estimator fits what the formula says to what the blocks of a pipeline really do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from fake_pipeline import FakePipeline, FakeTransformer, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_transformer import Loop

from omni_cache.backends.teacache import coefficient_estimator as estimator
from omni_cache.backends.teacache.coefficient_estimator import (
    DataCollectionHook,
    DefaultAdapter,
    TeaCacheCoefficientEstimator,
    calculate_relative_l1,
    estimate_teacache_coefficients,
)

STEPS = st.lists(
    st.tuples(*[st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3)] * 2), max_size=6
)


@settings(max_examples=500)
@given(st.lists(STEPS, max_size=4), st.integers(1, 4))
def test_the_fit_is_least_squares_over_consecutive_pairs(data: Any, order: int) -> None:
    data = [[tuple(np.float32(each) for each in pair) for pair in steps] for steps in data]
    points = [
        [np.abs(a - b).sum() / (np.abs(a).sum() + 1e-6) for a, b in zip(now, after, strict=True)]
        for steps in data
        for now, after in pairwise(steps)
    ]
    if not points:
        with pytest.raises(RuntimeError, match="collect"):
            estimate_teacache_coefficients(data, order)
        return
    x, y = np.array(points, dtype=np.float64).T
    scale = 1 + np.abs(x).max()
    if scale > 50 or len(set(np.round(x, 3))) <= order:
        return  # no well-conditioned fit, which nothing tells from another
    got = estimate_teacache_coefficients(data, order)
    assert len(got) == order + 1
    # At the minimum the error is orthogonal to every power.
    error = np.polyval(got, x) - y
    powers = np.vander(x / np.abs(x).max(), order + 1)
    np.testing.assert_allclose(powers.T @ error, 0, atol=1e-6 * (1 + np.abs(y).sum()))


def test_the_distance_is_relative_to_the_current_one() -> None:
    assert calculate_relative_l1(np.float32([1, -3]), np.float32([2, -1])) == pytest.approx(3 / 4)
    assert calculate_relative_l1(np.float32([0]), np.float32([1])) == pytest.approx(1e6)


@torch.no_grad()
def test_it_collects_what_leaves_the_blocks() -> None:
    model, left = FakeTransformer(), []
    model.blocks[-1].register_forward_hook(lambda module, given, result: left.append(result))
    Loop().run(model)
    model.blocks[-1]._forward_hooks.clear()
    hook = DataCollectionHook("Nothing registered", inner="eager")
    hook.initialize_hook(model)
    hook.start_collection()
    Loop().run(model)
    pairs = hook.stop_collection()
    Loop().run(model)
    assert len(hook.stop_collection()) == len(pairs) == 8
    for (signal, result), expected in zip(pairs, left, strict=True):
        assert signal.dtype == result.dtype == np.float32
        np.testing.assert_allclose(result, expected.numpy(), rtol=1e-5, atol=1e-6)
    hook.remove_hook(model)
    assert "_compiled_call_impl" not in vars(model)


@torch.no_grad()
def test_it_collects_of_its_own_module_alone() -> None:
    model, other = FakeTransformer(), FakeTransformer(1)
    hooks = [DataCollectionHook("Nothing registered", inner="eager") for _ in range(2)]
    for hook, module in zip(hooks, (model, other), strict=True):
        hook.initialize_hook(module)
    hooks[0].start_collection()
    Loop().run(model)
    Loop().run(other)
    assert len(hooks[0].stop_collection()) == 8
    assert len(hooks[0].branches) == 1


class Own(DefaultAdapter):
    @staticmethod
    def load_pipeline(model_path: str, device: str, dtype: torch.dtype) -> Any:
        pipeline = FakePipeline()

        def call(prompt: str, num_inference_steps: int, generator: torch.Generator) -> Any:
            return pipeline.forward(Request(prompt, ("blurry",), num_inference_steps))

        call.transformer = pipeline.transformer  # type: ignore[attr-defined]
        return call


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> TeaCacheCoefficientEstimator:
    monkeypatch.setitem(estimator._MODEL_ADAPTERS, "Own", Own)
    return TeaCacheCoefficientEstimator("", "Own", "cpu", torch.float32, inner="eager")


def test_branches_are_paired_apart(own: TeaCacheCoefficientEstimator) -> None:
    own.collect_from_prompt("a fox", num_inference_steps=9)
    own.collect_from_prompt("a hare", num_inference_steps=9)
    assert [len(each) for each in own.collected_data] == [9] * 4
    assert own.estimate(2) == estimate_teacache_coefficients(own.collected_data, 2)
    assert len(own.estimate()) == 5


def test_nothing_is_fitted_to_nothing(own: TeaCacheCoefficientEstimator) -> None:
    with pytest.raises(RuntimeError, match="No data was collected"):
        own.estimate()


def test_an_unknown_model_type_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match="Bagel, StableAudio, Flux2, LongCat"):
        TeaCacheCoefficientEstimator("", "Unheard")
