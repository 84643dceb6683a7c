"""Every forecast against the published rule, run on arrays, and against its peer, live."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import factorial, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from cache_dit.caching.cache_contexts.calibrators.dmd import DMDState
from cache_dit.caching.cache_contexts.calibrators.foca import FoCaState
from torch import Tensor

import omni_cache
from omni_cache.runtime.history import History
from omni_cache.strategies import Forecast, TeaCache, Time
from omni_cache.strategies.forecasts import (
    DMD,
    FORECASTS,
    Adams,
    Aligned,
    Chebyshev,
    Fitted,
    FoCa,
    Hermite,
    Hold,
    Newton,
    Taylor,
)
from omni_cache.strategies.forecasts.polynomial import combined

STEPS = 24
SCHEDULES = {
    "every step but the last": [step < STEPS - 1 for step in range(STEPS)],
    "every second": [step % 2 == 0 for step in range(STEPS)],
    "every fourth": [step % 4 == 0 for step in range(STEPS)],
    "warm-up, then every third": [step < 6 or step % 3 == 0 for step in range(STEPS)],
    "far apart": [step < 5 or step == 20 for step in range(STEPS)],
    **{
        f"random {seed}": [True, *(np.random.default_rng(seed).random(STEPS - 1) < 0.5).tolist()]
        for seed in range(12)
    },
}
SEVERAL = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def forecasts(
    forecast: Forecast, schedule: Sequence[bool], series: Tensor, total: int | None = None
) -> dict[int, Tensor]:
    """What a forecast says of each step that is not computed, as the runtime has it weigh.

    Args:
        forecast: the forecast.
        schedule: which steps are computed.
        series: the residuals, (steps, B, S, D).
        total: the number of steps, where somebody has said it.
    """
    history = History(forecast.depth, forecast, per_sample=True)
    found = {}
    for step, is_computed in enumerate(schedule):
        if is_computed:
            history.push(Time(step), (series[step],), torch.tensor(True))
            continue
        now = Time(step, total=total)
        rows = torch.tensor(history.rows(history.kept, now, forecast.depth), dtype=torch.float64)
        entries = torch.stack(history.operands(history.kept, forecast.depth), -1).double()
        found[step] = (entries * rows[:, None, None, :]).sum(-1)
    return found


def series_of(kind: str, batch: int = 2) -> Tensor:
    """Residuals in double precision, (STEPS, batch, 5, 7)."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(STEPS, dtype=torch.float64)[:, None, None, None]
    one, other, third = torch.randn(3, batch, 5, 7, generator=generator, dtype=torch.float64)
    if kind == "linear":
        return one + steps * other
    if kind == "constant":
        return one.expand(STEPS, -1, -1, -1)
    if kind == "decaying":  # of a linear map, another for each sample, as DMD takes it to be
        rates = torch.linspace(0.8, 0.95, batch, dtype=torch.float64)[:, None, None]
        turning = one * torch.cos(0.5 * steps) + third * torch.sin(0.5 * steps)
        return rates**steps * turning + other * (rates - 0.1) ** steps
    return torch.randn(STEPS, batch, 5, 7, generator=generator, dtype=torch.float64)


def assert_same(found: dict[int, Tensor], expected: dict[int, Tensor], digits: float) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 0
    for step, forecast in found.items():
        size = max(1.0, float(expected[step].abs().max()))
        torch.testing.assert_close(forecast, expected[step], rtol=0, atol=digits * size)


# --- against the published rules ------------------------------------------------------------------


def by_rule(
    rule: Callable[[list[tuple[int, np.ndarray]], int], np.ndarray],
    schedule: Sequence[bool],
    series: Tensor,
) -> dict[int, Tensor]:
    """What a rule over arrays says of each step that is not computed.

    ``rule`` is given steps and residuals of all computed steps, oldest first, and the step.
    """
    computed: list[tuple[int, np.ndarray]] = []
    found = {}
    for step, is_computed in enumerate(schedule):
        if is_computed:
            computed.append((step, series[step].numpy()))
        else:
            found[step] = torch.from_numpy(rule(computed, step))
    return found


def ladder(computed: list[tuple[int, np.ndarray]], order: int) -> list[np.ndarray]:
    """TaylorSeer's differences, carried from computed step to computed step."""
    before: list[np.ndarray] = []
    step_before = 0
    for step, residual in computed:
        now = [residual]
        for old in before[:order]:
            now.append((now[-1] - old) / (step - step_before))
        before, step_before = now, step
    return before


def hicache(order: int, scale: float, sign: int = 1) -> Any:
    def rule(computed: list[tuple[int, np.ndarray]], step: int) -> np.ndarray:
        k = sign * (step - computed[-1][0])
        hermite = [np.polynomial.hermite.Hermite.basis(i)(scale * k) for i in range(order + 1)]
        terms = enumerate(ladder(computed, order))
        return sum(d * scale**i * hermite[i] / factorial(i) for i, d in terms)

    return rule


@SEVERAL
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [0.5, 0.8])
def test_hermite_is_taylor_with_scaled_hermite_polynomials(
    scale: float, order: int, schedule: list[bool]
) -> None:
    series = series_of("random")
    found = forecasts(Hermite(order, scale), schedule, series)
    assert_same(found, by_rule(hicache(order, scale), schedule, series), 1e-9)
    backwards = by_rule(hicache(order, scale, sign=-1), schedule, series)
    with pytest.raises(AssertionError):
        assert_same(found, backwards, 1e-3)


@SEVERAL
def test_hermite_goes_the_way_that_a_series_goes(schedule: list[bool]) -> None:
    """At the default scale half of a slope, at another all of it, and never back."""
    series = series_of("linear")
    for step, forecast in forecasts(Hermite(), schedule, series).items():
        last = max(each for each in range(step) if schedule[each])
        if last > 0:
            half = (series[last] + series[step]) / 2
            torch.testing.assert_close(forecast, half, rtol=1e-10, atol=1e-10)
    for order in (1, 2, 3):
        found = forecasts(Hermite(order, sqrt(0.5)), schedule, series)
        known = {step: each for step, each in found.items() if sum(schedule[:step]) > 1}
        assert_same(known, {step: series[step] for step in known}, 1e-10)


@SEVERAL
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_is_bashforth_s_rule_with_differences_for_slopes(
    order: int, schedule: list[bool]
) -> None:
    def rule(computed: list[tuple[int, np.ndarray]], step: int) -> np.ndarray:
        (last, newest), pairs = computed[-1], list(itertools.pairwise(computed))[::-1][:order]
        slopes = [(r - before) / (t - s) for (s, before), (t, r) in pairs]
        # Integrate the polynomial through slopes at 0, -1, ... from 0 to 1.
        moved = 0.0
        for i, slope in enumerate(slopes):
            others = [-j for j in range(len(slopes)) if j != i]
            basis = np.polynomial.Polynomial.fromroots(others) if others else 1.0
            basis = basis / (basis(-i) if others else 1.0)
            area = basis.integ()(1.0) if others else 1.0
            moved = moved + area * slope
        return newest + (step - last) * moved

    series = series_of("random")
    assert_same(forecasts(Adams(order), schedule, series), by_rule(rule, schedule, series), 1e-10)


@SEVERAL
@pytest.mark.parametrize("total", [STEPS, 50, None])
@pytest.mark.parametrize(("degree", "share"), [(4, 0.5), (4, 1.0), (2, 0.7), (1, 0.0)])
def test_chebyshev_is_ridge_regression_mixed_with_a_line(
    degree: int, share: float, total: int | None, schedule: list[bool]
) -> None:
    forecast = Chebyshev(degree, share=share)

    def rule(computed: list[tuple[int, np.ndarray]], step: int) -> np.ndarray:
        computed = computed[-forecast.depth :]
        basis = [np.polynomial.chebyshev.Chebyshev.basis(i) for i in range(degree + 1)]
        steps = np.array([each for each, _ in computed])
        x, target = (2.0 * np.array(each) / (total or 50) - 1 for each in (steps, step))
        design = np.stack([each(x) for each in basis], 1)
        # Least squares with a ridge, as more rows that should be zero.
        known = np.stack([each.ravel() for _, each in computed])
        padded = np.concatenate([design, sqrt(0.1) * np.eye(degree + 1)])
        wanted = np.concatenate([known, np.zeros((degree + 1, known.shape[1]))])
        coefficients = np.linalg.lstsq(padded, wanted, rcond=None)[0]
        fitted = np.stack([each(target) for each in basis]) @ coefficients
        line = known[-1]
        if len(computed) > 1:
            line = line + (step - steps[-1]) * (line - known[-2]) / (steps[-1] - steps[-2])
        return (share * fitted + (1 - share) * line).reshape(series.shape[1:])

    series = series_of("random")
    found = forecasts(forecast, schedule, series, total)
    assert_same(found, by_rule(rule, schedule, series), 1e-9)


def test_fitted_takes_the_row_of_a_step() -> None:
    kept = [Time(5), Time(3), Time(2)]
    fitted = Fitted({6: [1.5, -0.5], 7: [2.0, -1.5, 0.5], 8: [1.0, 0.0, 0.0, 0.0]})
    assert fitted.depth == 4
    assert fitted.weights(kept, Time(6)) == (1.5, -0.5, 0.0)
    assert fitted.weights(kept, Time(7)) == (2.0, -1.5, 0.5)
    assert fitted.weights(kept, Time(8)) == Hold().weights(kept, Time(8))  # one is not kept
    assert fitted.weights(kept, Time(9)) == Hold().weights(kept, Time(9))
    assert Fitted([None, None, [1.5, -0.5]]) == Fitted({2: np.array([1.5, -0.5])})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "forecast=[] is not allowed; forecast must be weights of at least one step"),
        ({-1: [1.0]}, "forecast={-1: [1.0]} is not allowed; forecast must be weights by steps"),
        ({2: []}, "forecast[2]=[] is not allowed; forecast[2] must be a sequence of at least one"),
        ({2: None}, "forecast[2]=None is not allowed"),
        ([[1.0], [float("nan")]], "forecast[1]=[nan] is not allowed"),
    ],
)
def test_wrong_rows_are_named(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}".replace("[", r"\[")):
        TeaCache(forecast=rows)


# --- against the peers ----------------------------------------------------------------------------


class OfCacheDit(DMD):
    """DMD with the first-order differences that cache-dit 1.5.3 has until a fit is possible.

    It updates the older of two sets of differences last, and so subtracts the residual before the
    last one, over the gap to the last one. Its TaylorSeer does not.
    """

    def weights(self, kept: Sequence[Time], now: Time) -> tuple[float, ...]:
        zeros = (0.0,) * (len(kept) - 3)
        if len(kept) < 3:
            return Hold().weights(kept, now)
        slope = (now.index - kept[0].index) / (kept[0].index - kept[1].index)
        return (1 + slope, 0.0, -slope, *zeros)


def of_peer(state: Any, schedule: Sequence[bool], series: Tensor) -> dict[int, Tensor]:
    found = {}
    for step, is_computed in enumerate(schedule):
        state.mark_step_begin()
        if is_computed:
            state.update(series[step])
        else:
            found[step] = state.approximate()
    return found


@SEVERAL
@pytest.mark.parametrize("kind", ["random", "linear", "decaying"])
def test_foca_is_the_calibrator_of_cache_dit(kind: str, schedule: list[bool]) -> None:
    """Its forecasts included that are made of forecasts from before the last computed step."""
    series = series_of(kind)
    found = forecasts(FoCa(), schedule, series)
    assert_same(found, of_peer(FoCaState(), schedule, series), 1e-12)


@SEVERAL
@pytest.mark.parametrize("kind", ["random", "linear", "decaying"])
@pytest.mark.parametrize("depth", [4, 6])
def test_dmd_is_the_calibrator_of_cache_dit(depth: int, kind: str, schedule: list[bool]) -> None:
    series = series_of(kind)
    found = forecasts(OfCacheDit(depth), schedule, series)
    assert_same(found, of_peer(DMDState(history=depth), schedule, series), 1e-6)


def test_until_a_fit_is_possible_cache_dit_subtracts_the_last_step_but_one() -> None:
    schedule = [True, True, True, False]
    series = series_of("linear")
    theirs = of_peer(DMDState(), schedule, series)[3]
    torch.testing.assert_close(theirs, series[2] + (series[2] - series[0]))  # the slope, twice
    torch.testing.assert_close(forecasts(DMD(), schedule, series)[3], series[3])


def test_foca_of_cache_dit_takes_slopes_without_the_gap_and_draws_back_what_is_far() -> None:
    slope = series_of("linear")[1] - series_of("linear")[0]
    apart = forecasts(FoCa(), SCHEDULES["every fourth"], series_of("linear"))
    assert torch.allclose(apart[5] - series_of("linear")[4], 4 * slope)
    near = forecasts(FoCa(), [True, True, *[False] * 8], series_of("linear"))
    for step in (2, 3, 4):
        torch.testing.assert_close(near[step], series_of("linear")[step])
    assert torch.allclose(near[5] - series_of("linear")[1], 9 / 4 * slope)


# --- a series that a rule is made for -------------------------------------------------------------

EXACT_ON_A_LINE = {
    "newton": Newton(1, "step"),
    "newton 3": Newton(3, "step"),
    "taylor": Taylor(1),
    "taylor 3": Taylor(3),
    "hermite": Hermite(2, sqrt(0.5)),
    "adams": Adams(2),
    "adams 4": Adams(4),
    "chebyshev, line alone": Chebyshev(share=0.0),
}


@SEVERAL
@pytest.mark.parametrize("name", EXACT_ON_A_LINE)
def test_a_line_is_forecast_exactly_at_any_gap(name: str, schedule: list[bool]) -> None:
    series = series_of("linear")
    for step, forecast in forecasts(EXACT_ON_A_LINE[name], schedule, series).items():
        kept = [each for each in range(step) if schedule[each]]
        # Taylor's differences begin after steps 0 and 1, so it takes two more to be sure of one.
        if len(kept) > 1 and ("taylor" not in name or len([each for each in kept if each > 1]) > 3):
            torch.testing.assert_close(forecast, series[step], rtol=1e-9, atol=1e-9)


@SEVERAL
@pytest.mark.parametrize("forecast", [Hermite(3), Adams(3), FoCa(), DMD()], ids=repr)
def test_what_stands_still_is_forecast_as_it_is(forecast: Forecast, schedule: list[bool]) -> None:
    series = series_of("constant")
    assert_same(
        found := forecasts(forecast, schedule, series), dict.fromkeys(found, series[0]), 1e-6
    )


def test_a_ridge_draws_forecasts_towards_zero_the_more_the_farther_they_are() -> None:
    kept = [Time(step) for step in (12, 9, 6, 3, 0)]
    sums = [sum(Chebyshev(share=1.0).weights(kept, Time(step, total=24))) for step in (12, 13, 14)]
    assert 1 > sums[0] > sums[1] > sums[2] > 0.8


@pytest.mark.parametrize("name", ["every second", "every fourth"])
def test_dmd_forecasts_what_a_linear_map_makes_exactly_and_each_sample_alone(name: str) -> None:
    schedule, series = SCHEDULES[name], series_of("decaying", batch=3)
    found = forecasts(DMD(), schedule, series)
    settled = {step: each for step, each in found.items() if sum(schedule[:step]) > 4}
    assert_same(settled, {step: series[step] for step in settled}, 1e-6)
    alone = forecasts(DMD(), schedule, series[:, 1:2])
    assert_same({s: each[1:2] for s, each in found.items()}, alone, 1e-9)
    polynomial = forecasts(Taylor(2), schedule, series)
    assert all(
        (polynomial[step] - series[step]).abs().max() > 1e-3 * series[step].abs().max()
        for step in settled
    )


# --- flags ----------------------------------------------------------------------------------------


def test_own_forecasts_are_named_in_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halfway(Forecast):
        def __init__(self, order: int | None, axis: str) -> None:
            self.order, self.axis = order, axis

        depth = 2

        def weights(self, kept: Sequence[Time], now: Time) -> tuple[float, ...]:
            return (0.5, 0.5)[: len(kept)]

    monkeypatch.setattr("omni_cache.strategies.forecasts.FORECASTS", FORECASTS)
    omni_cache.register_forecast("halfway", Halfway, orders=(1, 3))
    try:
        made = TeaCache(forecast="halfway", forecast_order=3, forecast_axis="step").forecasting()
        assert isinstance(made, Halfway)
        assert (made.order, made.axis) == (3, "step")
        with pytest.raises(ValueError, match="from 1 to 3 for forecast='halfway'"):
            TeaCache(forecast="halfway", forecast_order=4)
    finally:
        del FORECASTS["halfway"]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"name": ""}, "name='' is not allowed; name must be a string"),
        ({"make": 3}, "make=3 is not allowed; make must be callable"),
        ({"orders": (2, 1)}, r"orders=\(2, 1\) is not allowed"),
        ({"orders": (1,)}, r"orders=\(1,\) is not allowed"),
    ],
)
def test_what_is_registered_is_checked(replaced: dict[str, Any], message: str) -> None:
    given = {"name": "own", "make": lambda order, axis: Hold(), "orders": (0, 0), **replaced}
    with pytest.raises(ValueError, match=message):
        omni_cache.register_forecast(**given)
    assert "own" not in FORECASTS


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Hermite(scale=0.0), "scale"),
        (lambda: Chebyshev(degree=0), "degree"),
        (lambda: Chebyshev(ridge=0.0), "ridge"),
        (lambda: Chebyshev(share=1.5), "share"),
        (lambda: Chebyshev(depth=1), "depth"),
        (lambda: Aligned(most=0.5), "most"),
        (lambda: DMD(depth=3), "depth"),
        (lambda: DMD(ridge=-1.0), "ridge"),
    ],
)
def test_a_wrong_field_is_named(make: Callable[[], Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}=.* is not allowed; {field} must be"):
        make()


def test_rows_are_combined_element_by_element() -> None:
    assert combined((2.0, -1.0), [(1.0, 0.0), (0.5, 3.0)]) == (1.5, -3.0)
