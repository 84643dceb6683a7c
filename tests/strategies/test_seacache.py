"""SeaCache as published: its filter, its distance, its decisions, and the hooks of diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import hooks as peer
from diffusers_models import CASES, HEIGHT, WIDTH
from driving import computed, drive
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_same, of_diffusers, ours
from torch import Tensor

from omni_cache.strategies.base import Around
from omni_cache.strategies.seacache import SeaCache
from omni_cache.strategies.signals import FilteredL1


def filtered(latents: np.ndarray[Any, Any], sigma: float, power: float) -> np.ndarray[Any, Any]:
    """One sample, (T, H, W, C) or (H, W, C), without the noise of its sigma."""
    axes = tuple(range(latents.ndim - 1))
    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    response = np.ones([1] * latents.ndim)
    for axis in axes:
        spectrum = 1 / (np.abs(np.fft.fftfreq(latents.shape[axis])) ** power + 1e-16)
        gain = (1 - sigma) * spectrum / ((1 - sigma) ** 2 * spectrum + sigma**2 + 1e-16)
        response = response * np.expand_dims(
            gain, [each for each in range(latents.ndim) if each != axis]
        )
    response /= response.mean()
    kept: np.ndarray[Any, Any] = np.fft.ifftn(
        np.fft.fftn(latents, axes=axes) * response, axes=axes
    ).real
    return kept


def published_distance(now: Tensor, before: Tensor, sigmas: list[float], power: float) -> float:
    """The mean over the samples of two batches with channels last."""
    total = 0.0
    for one, other in zip(now.double().numpy(), before.double().numpy(), strict=True):
        y, last = filtered(one, sigmas[0], power), filtered(other, sigmas[1], power)
        total += np.abs(y - last).mean() / (np.abs(last).mean() + 1e-16)
    return total / len(now)


SIZES = st.integers(1, 6)
SIGMAS = st.floats(0, 1)


@settings(max_examples=250)
@given(
    shape=st.one_of(st.tuples(SIZES, SIZES), st.tuples(SIZES, SIZES, SIZES), st.tuples(SIZES)),
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    sigmas=st.tuples(SIGMAS, SIGMAS),
    power=st.sampled_from([1.0, 2.0, 3.0]),
    scale=st.sampled_from([1.0, 1000.0]),
    seed=st.integers(0, 2**16),
)
def test_the_distance_is_the_published_one(
    shape: tuple[int, ...],
    batch: int,
    channels: int,
    sigmas: tuple[float, float],
    power: float,
    scale: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(batch, *shape, channels, generator=generator)
    now = before + 0.3 * torch.randn(before.shape, generator=generator)
    low, high = sorted(sigmas)
    if scale > 1 >= scale * high:
        scale = 1.0  # timesteps up to 1 are taken for sigmas
    signal = FilteredL1(power, shape if len(shape) > 1 and seed % 2 else None)
    places = (now, before)
    if signal.grid is not None:  # as tokens
        places = (now.flatten(1, -2), before.flatten(1, -2))
    elif len(shape) > 1:  # as pictures, with channels second
        places = (now.movedim(-1, 1), before.movedim(-1, 1))
    times = Around(torch.tensor([low * scale, high * scale], dtype=torch.float64))
    found = signal.distance(signal.measure(*places, (), times).tolist())
    assert found == pytest.approx(published_distance(now, before, [low, high], power), rel=2e-4)
    # Timesteps that rise are what is missing to 1.
    if 1 - low > 1 - high and scale == 1:
        risen = Around(torch.tensor([1 - low, 1 - high], dtype=torch.float64))
        again = signal.distance(signal.measure(*places, (), risen).tolist())
        assert again == pytest.approx(found, rel=1e-4)


def test_without_a_timestep_nothing_is_known() -> None:
    times = Around(torch.tensor([float("nan"), 0.5], dtype=torch.float64))
    measured = FilteredL1(3.0).measure(torch.ones(1, 4, 2), torch.ones(1, 4, 2), (), times)
    assert measured[0].isnan()


def test_a_grid_that_does_not_fit_is_refused() -> None:
    times = Around(torch.tensor([0.4, 0.5], dtype=torch.float64))
    tokens = torch.ones(1, 6, 2)
    with pytest.raises(ValueError, match=r"grid=\(2, 2\) is not allowed; .* 6 tokens"):
        FilteredL1(3.0, (2, 2)).measure(tokens, tokens, (), times)


DISTANCES = st.one_of(st.floats(0, 0.3), st.just(float("nan")), st.just(float("inf")))


@settings(max_examples=400)
@given(
    distances=st.lists(DISTANCES, min_size=1, max_size=30),
    threshold=st.sampled_from([0.0, 0.1, 0.25, 1.0]),
    most=st.integers(0, 4),
    first=st.integers(0, 4),
    last=st.integers(0, 3),
    data=st.data(),
)
def test_decisions_are_the_published_ones(
    distances: list[float], threshold: float, most: int, first: int, last: int, data: Any
) -> None:
    """The pseudo-code of the hooks, which diffusers and vLLM-Omni have in common."""
    steps = len(distances)
    strategy = SeaCache(
        threshold=threshold,
        max_consecutive_cached=most,
        retention_steps=first,
        cache_end_steps=last,
    )
    accumulated, cached, expected = 0.0, 0, []
    for step, distance in enumerate(distances):
        forced = step < first or step >= steps - last or step == 0
        if forced or (most and cached >= most):
            compute = True
        else:
            compute = not np.isfinite(distance) or accumulated + distance >= threshold
        accumulated = 0.0 if compute else accumulated + distance
        cached = 0 if compute else cached + 1
        expected.append(compute)
    gate = strategy.policy(None).gate("cond", 0)
    assert computed(drive(gate, distances, steps)) == expected


STEPS = 20


def as_video(model: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents that the hooks filter, each (C, T, H, W), where a model takes them as tokens."""
    tokens = kwargs["hidden_states"]
    return [each.movedim(-1, 0).reshape(-1, 1, HEIGHT, WIDTH) for each in tokens]


@pytest.mark.parametrize(
    ("model", "order", "most", "threshold"),
    # A video and tokens, held and extrapolated, with a limit to skips in a row and without one.
    [
        ("wan", 1, 0, 0.08),
        pytest.param("wan", 1, 3, 0.1, marks=pytest.mark.exhaustive),
        pytest.param("wan", 0, 2, 0.25, marks=pytest.mark.exhaustive),
        ("flux", 0, 2, 0.25),
        pytest.param("flux", 1, 3, 0.1, marks=pytest.mark.exhaustive),
        pytest.param("flux", 1, 0, 0.08, marks=pytest.mark.exhaustive),
    ],
)
def test_it_is_that_of_diffusers(model: str, order: int, most: int, threshold: float) -> None:
    case = CASES[model].deep
    limits = {"threshold": threshold, "max_consecutive_cached": most}
    grid, latents = ((HEIGHT, WIDTH), as_video) if model == "flux" else (None, None)
    mine = ours(case, STEPS, cache="seacache", forecast_order=order, grid=grid, **limits)
    hooks = peer.SeaCacheConfig(residual_order=order, raw_vision_callback=latents, **limits)
    assert_same(mine, of_diffusers(case, STEPS, hooks), atol=1e-5)
