"""Forecasts against their peers live, and at work in a model against what hooks say of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState
from float8 import rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_transformer import CHANNELS, TEACACHE, TOKENS, WIDTH, ToyTransformer, compiled, gaussian

import omni_cache
from omni_cache.strategies import Forecast, Time
from omni_cache.strategies.forecasts import Hold, Newton, Taylor

ORDERS = st.integers(0, 4)


@st.composite
def schedules(draw: st.DrawFn, longest: int = 24) -> list[bool]:
    """Which steps of a loop are computed: evenly or unevenly many, the first always."""
    if draw(st.booleans()):
        every = draw(st.integers(1, 5))
        return [step % every == 0 for step in range(draw(st.integers(2, longest)))]
    return [True, *draw(st.lists(st.booleans(), min_size=1, max_size=longest - 1))]


def times(steps: int, seed: int) -> list[Time]:
    """Steps whose sigmas fall from about 1 to about 0 at uneven gaps."""
    gaps = np.random.default_rng(seed).uniform(0.2, 1, steps)
    values = 1 - np.cumsum(gaps) / gaps.sum()
    return [Time(index, float(value)) for index, value in enumerate(values)]


def forecast_all(
    forecast: Forecast, schedule: list[bool], at: list[Time], series: Tensor
) -> dict[int, tuple[Tensor, float]]:
    """For each step that is not computed, the forecast and the size of its weights."""
    kept: list[int] = []
    found = {}
    for step, is_computed in enumerate(schedule):
        if is_computed:
            kept = [step, *kept][: forecast.depth]
            continue
        weights = torch.tensor(
            forecast.weights([at[each] for each in kept], at[step]), dtype=torch.float64
        )
        assert len(weights) == len(kept)
        found[step] = weights @ series[kept], max(1.0, float(weights.abs().sum()))
    return found


def random_series(steps: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 5, generator=generator, dtype=torch.float64)


# --- against the peers ----------------------------------------------------------------------------


@settings(max_examples=300)
@given(schedule=schedules(), order=st.integers(1, 4), seed=st.integers(0, 999))
def test_taylor_is_the_calibrator_of_cache_dit(schedule: list[bool], order: int, seed: int) -> None:
    series = random_series(len(schedule), seed)
    found = forecast_all(Taylor(order), schedule, times(len(schedule), seed), series)
    theirs = TaylorSeerState(n_derivatives=order)
    for step, is_computed in enumerate(schedule):
        theirs.mark_step_begin()
        if is_computed:
            theirs.update(series[step])
        else:
            forecast, size = found[step]
            torch.testing.assert_close(forecast, theirs.approximate(), rtol=0, atol=1e-10 * size)


@settings(max_examples=300)
@given(
    schedule=schedules(),
    order=ORDERS,
    axis=st.sampled_from(["sigma", "step"]),
    seed=st.integers(0, 999),
)
def test_newton_is_the_polynomial_of_numpy(
    schedule: list[bool], order: int, axis: str, seed: int
) -> None:
    series, at = random_series(len(schedule), seed), times(len(schedule), seed)
    found = forecast_all(Newton(order, axis), schedule, at, series)
    xs = np.array([each.value if axis == "sigma" else each.index for each in at], dtype=float)
    kept: list[int] = []
    for step, is_computed in enumerate(schedule):
        if is_computed:
            kept = [step, *kept][: order + 1]
            continue
        degree, domain = len(kept) - 1, [xs.min(), xs.max()]
        columns = series[kept].numpy().T
        fits = (np.polynomial.Polynomial.fit(xs[kept], each, degree, domain) for each in columns)
        expected = torch.tensor([float(fit(xs[step])) for fit in fits], dtype=torch.float64)
        forecast, size = found[step]
        torch.testing.assert_close(forecast, expected, rtol=0, atol=1e-10 * size)


# --- what every forecast keeps --------------------------------------------------------------------

FORECASTS = st.one_of(
    st.just(Hold()),
    st.builds(Newton, ORDERS, st.sampled_from(["sigma", "step"])),
    st.builds(Taylor, st.integers(1, 4)),
)


@given(forecast=FORECASTS, schedule=schedules(), seed=st.integers(0, 999))
def test_weights_sum_to_one(forecast: Forecast, schedule: list[bool], seed: int) -> None:
    """A residual that stands still is forecast as it is."""
    still = torch.ones(len(schedule), 1, dtype=torch.float64)
    at = times(len(schedule), seed)
    for forecast_, size in forecast_all(forecast, schedule, at, still).values():
        torch.testing.assert_close(forecast_, still[0], rtol=0, atol=1e-12 * size)


@given(
    order=st.integers(1, 4),
    degree=st.integers(1, 4),
    axis=st.sampled_from(["sigma", "step"]),
    schedule=schedules(),
    seed=st.integers(0, 999),
)
def test_a_polynomial_is_forecast_exactly_by_an_order_of_its_degree(
    order: int, degree: int, axis: str, schedule: list[bool], seed: int
) -> None:
    order = max(order, degree)
    at = times(len(schedule), seed)
    xs = [(each.value or 0) if axis == "sigma" else each.index / len(at) for each in at]
    powers = torch.tensor(xs, dtype=torch.float64)[:, None] ** torch.arange(degree + 1)
    series = powers @ torch.randn(degree + 1, 3, dtype=torch.float64)
    for step, (forecast, size) in forecast_all(Newton(order, axis), schedule, at, series).items():
        if sum(schedule[:step]) > degree:
            torch.testing.assert_close(forecast, series[step], rtol=0, atol=1e-9 * size)


@given(order=st.integers(1, 4), every=st.integers(1, 4), behind=st.integers(1, 5))
def test_a_linear_series_is_forecast_exactly_by_taylor(order: int, every: int, behind: int) -> None:
    """From the second difference on; steps 0 and 1 have none."""
    computed = [0, *range(2, 2 + 3 * every, every)]
    series = torch.arange(40, dtype=torch.float64)[:, None] * 3 - 7
    schedule = [step in computed for step in range(computed[-1] + behind + 1)]
    found = forecast_all(Taylor(order), schedule, [Time(step) for step in range(40)], series)
    for step in range(computed[-1] + 1, len(schedule)):
        torch.testing.assert_close(found[step][0], series[step], rtol=1e-12, atol=0)


# --- case by case ---------------------------------------------------------------------------------


def test_hold_takes_the_newest() -> None:
    kept = [Time(7, 3.0), Time(5, 4.0), Time(2, 5.0)]
    assert Hold().weights(kept, Time(9, 1.0)) == (1.0, 0.0, 0.0)
    assert Hold().weights(kept[:1], Time(8)) == (1.0,)
    assert (Hold().depth, Hold().reads_values) == (1, False)


def test_order_zero_holds() -> None:
    assert Newton(0).weights([Time(3, 0.5)], Time(6, 0.1)) == (1.0,)
    assert (Newton(0).depth, Newton(0).reads_values) == (1, False)


@pytest.mark.parametrize("axis", ["sigma", "step"])
def test_fewer_residuals_give_a_lower_order(axis: str) -> None:
    at = times(12, 0)
    for count in range(1, 6):
        kept = [at[step] for step in (9, 7, 6, 3, 1)[:count]]
        now = at[11]
        assert Newton(4, axis).weights(kept, now) == Newton(count - 1, axis).weights(kept, now)
        lower = Taylor(max(1, count - 1)).weights(kept, now)
        assert Taylor(4).weights(kept, now) == lower


def test_depth_is_one_more_than_the_order() -> None:
    assert [Newton(order).depth for order in range(5)] == [1, 2, 3, 4, 5]
    assert [Taylor(order).depth for order in range(1, 5)] == [2, 3, 4, 5]


def test_only_a_forecast_in_sigma_needs_timesteps() -> None:
    assert [Newton(1, axis).reads_values for axis in ("sigma", "step")] == [True, False]
    assert not Taylor(3).reads_values


IN_STEPS = (2.0, -1.0)
"""Of Newton's first order at step 6, with residuals of steps 4 and 2."""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.5, 0.6, 0.2), (4.0, -3.0)),
        ((0.5, 0.6, None), IN_STEPS),
        ((None, 0.6, 0.2), IN_STEPS),
        ((0.5, None, 0.2), IN_STEPS),
        ((None, None, None), IN_STEPS),
        ((0.5, 0.5, 0.2), IN_STEPS),
        ((0.5, 0.6, 0.5), (1.0, 0.0)),
    ],
    ids=["known", "now unknown", "newest unknown", "oldest unknown", "unknown", "twice", "back"],
)
def test_repeated_or_unknown_timesteps_give_the_step_index(
    values: tuple[float | None, ...], expected: tuple[float, float]
) -> None:
    newest, oldest, now = values
    kept = [Time(4, newest), Time(2, oldest)]
    assert Newton(1).weights(kept, Time(6, now)) == pytest.approx(expected)
    assert Newton(1, "step").weights(kept, Time(6, now)) == IN_STEPS


def test_steps_that_come_twice_hold() -> None:
    assert Newton(2).weights([Time(3), Time(3), Time(1)], Time(5)) == (1.0, 0.0, 0.0)


def test_taylor_has_no_differences_at_the_first_two_steps() -> None:
    """As cache-dit: what a loop begins with says nothing of where it goes."""
    assert Taylor(1).weights([Time(1), Time(0)], Time(2)) == (1.0, 0.0)
    assert Taylor(1).weights([Time(2), Time(0)], Time(3)) == (1.5, -0.5)
    assert Taylor(2).weights([Time(2), Time(1), Time(0)], Time(3)) == (2.0, -1.0, 0.0)


# --- at work --------------------------------------------------------------------------------------

TIMESTEPS = [1000.0, 960, 900, 800, 770, 640, 500, 480, 300, 150, 120, 40]


def entry_and_residual(model: ToyTransformer, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What enters the blocks, and what they add to it: (1, S, WIDTH) both."""
    ends: list[Tensor] = []
    hooks = [
        model.embed.register_forward_hook(lambda module, args, output: ends.append(output)),
        model.project.register_forward_pre_hook(lambda module, args: ends.append(args[0])),
    ]
    model(*arguments)
    for hook in hooks:
        hook.remove()
    return ends[0], ends[1] - ends[0]


def lagrange(xs: list[float], x: float) -> list[float]:
    """The weights of the polynomial through values at ``xs``, at ``x``: unit vectors, fitted."""
    degree = len(xs) - 1
    fits = (np.polynomial.Polynomial.fit(xs, unit, degree) for unit in np.eye(len(xs)))
    return [float(fit(x)) for fit in fits]


AT_WORK: dict[str, tuple[dict[str, Any], int]] = {
    "hold": ({}, 1),
    "newton 1": ({"forecast": "newton"}, 2),
    "newton 2": ({"forecast": "newton", "forecast_order": 2}, 3),
    "newton 2, bfloat16": (
        {"forecast": "newton", "forecast_order": 2, "history_dtype": "bfloat16"},
        3,
    ),
    "newton 2, float8": (
        {"forecast": "newton", "forecast_order": 2, "history_dtype": "float8_e4m3fn"},
        3,
    ),
    "newton 2, on the host": (
        {"forecast": "newton", "forecast_order": 2, "history_device": "cpu"},
        3,
    ),
    "newton 2, in steps": (
        {"forecast": "newton", "forecast_order": 2, "forecast_axis": "step"},
        3,
    ),
    "taylor 3": ({"forecast": "taylor", "forecast_order": 3}, 4),
}


@torch.no_grad()
@pytest.mark.parametrize("name", AT_WORK)
def test_a_reused_step_is_the_partner_and_the_weighted_residuals(name: str) -> None:
    flags, depth = AT_WORK[name]
    model = ToyTransformer()
    cached = compiled(model, **{**TEACACHE, "rel_l1_thresh": 0.14}, **flags)
    prompt, latents = gaussian("cond", 1, 5, CHANNELS), gaussian(0, 1, TOKENS, CHANNELS)
    calls, predictions = [], []
    with omni_cache.generation(), omni_cache.branch("cond"):
        for timestep in TIMESTEPS:
            calls.append((latents, torch.tensor([timestep]), prompt))
            predictions.append(cached(*calls[-1]))
            latents = latents - predictions[-1] / len(TIMESTEPS)
    (trajectory,) = omni_cache.summary(model).trajectories
    schedule = [step.computed for step in trajectory.steps]

    kept: list[int] = []
    residuals, forecasts = {}, []
    for step, call in enumerate(calls):
        entry, residual = entry_and_residual(model, *call)
        if schedule[step]:
            dtype = getattr(torch, flags.get("history_dtype", "float32"))
            is_float8 = dtype == torch.float8_e4m3fn
            residuals[step] = rounded(residual) if is_float8 else residual.to(dtype).float()
            kept = [step, *kept][:depth]
            continue
        if flags.get("forecast") == "taylor":
            theirs = TaylorSeerState(n_derivatives=flags["forecast_order"])
            for before in range(step):
                theirs.mark_step_begin()
                if schedule[before]:
                    theirs.update(residuals[before])
            theirs.mark_step_begin()
            expected = theirs.approximate()
        else:
            xs = TIMESTEPS if flags.get("forecast_axis") != "step" else list(range(len(calls)))
            weights = lagrange([xs[each] for each in kept], xs[step])
            expected = sum(w * residuals[k] for w, k in zip(weights, kept, strict=True))
        forecasts.append((step, len(kept), float((expected - residuals[kept[0]]).abs().max())))
        torch.testing.assert_close(
            predictions[step], model.project(entry + expected), rtol=0, atol=2e-5
        )
    # There was something to forecast, from as many residuals as are kept.
    assert max(count for _, count, _ in forecasts) == depth
    assert (max(moved for *_, moved in forecasts) > 1e-2) is (name != "hold")
    assert any(gap > 1 for gap in np.diff(list(residuals)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, "float8_e4m3fn", "bfloat16", "float16", "float64"])
def test_what_is_held_is_as_many_residuals_as_the_forecast_takes(dtype: str | None) -> None:
    flags = {"forecast": "newton", "forecast_order": 2, "history_dtype": dtype}
    model = ToyTransformer()
    cached = compiled(model, **{**TEACACHE, "rel_l1_thresh": 0.0}, **flags)
    prompt, held = gaussian("cond", 1, 5, CHANNELS), []
    with omni_cache.generation(), omni_cache.branch("cond"):
        for step in range(5):
            cached(gaussian(step, 1, TOKENS, CHANNELS), torch.tensor([9.0 - step]), prompt)
            held.append(omni_cache.summary(model).memory_bytes)
    signal = held[0] - (residual := held[1] - held[0])
    itemsize = getattr(torch, dtype or "float32").itemsize
    scales = TOKENS * 4 if itemsize == 1 else 0
    assert residual == TOKENS * WIDTH * itemsize + scales
    assert signal == TOKENS * WIDTH * 4
    assert [after - before for before, after in pairwise(held)] == [residual, residual, 0, 0]
