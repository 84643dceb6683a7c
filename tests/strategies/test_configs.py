"""What users may write into a strategy, and what is looked up for them."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from toy_transformer import Loop, ToyTransformer

import omni_cache
from omni_cache import MagCache, TeaCache
from omni_cache.strategies import (
    STRATEGIES,
    DBCache,
    DiCache,
    EasyCache,
    FirstBlockCache,
    Gate,
    SeaCache,
    StepCache,
    Strategy,
    TaylorSeer,
    Time,
)
from omni_cache.strategies.forecasts import FORECASTS, Hold, Newton, Taylor

NUMBER = "a finite number >= 0"
SHARE = "a number from 0 to 1"
STEPS = "an integer >= 1 or None"
BOOL = "True or False"
NAME = "a string or None"
COEFFICIENTS = (
    "a sequence of at least one finite number, highest power first, or a mapping of branch names "
    "to such"
)
RATIOS = "a sequence of at least one finite number, or a mapping of branch names to such"
MASK = "one of 'slow', 'medium', 'fast', 'ultra', a sequence of zeros and ones, or None"
OF_TAYLOR = "an integer from 1 to 4 for forecast='taylor', or None"
FORECAST = f"one of {', '.join(map(repr, FORECASTS))}, weights by steps, or a Forecast"
FILE = "the path of a file that `omni-cache calibrate` wrote"

Wrong = list[tuple[str, list[Any], str]]

OF_ALL: Wrong = [
    ("num_inference_steps", [0, -1, 2.0, "28", True], STEPS),
    ("start", [-0.1, 1.1, float("nan"), "0.1", None, True], SHARE),
    ("end", [-0.1, 1.1, float("nan"), "0.1", None, True], SHARE),
    ("forecast", ["newtn", "", None, 2, object(), Newton, np.float64(1), np.eye(2)], FORECAST),
    ("forecast_order", [-1, 1, 1.0, "1", True], "0 for forecast='hold', or None"),
    ("forecast_axis", ["time", "", None, 1], "'sigma' or 'step'"),
]
OF_CALIBRATED: Wrong = [
    ("variant", [1, ["FLUX.1-dev"]], NAME),
    ("calibration", [1, ["file.json"]], FILE),
]

WRONG: dict[type[Strategy], Wrong] = {
    TeaCache: [
        *OF_ALL,
        *OF_CALIBRATED,
        ("rel_l1_thresh", [-0.1, float("nan"), float("inf"), "0.2", None, True], NUMBER),
        ("coefficients", [[], "12", 3.0, [1.0, float("nan")], [None], [[1.0]]], COEFFICIENTS),
        ("force_last_step", ["yes", 1, None], BOOL),
    ],
    MagCache: [
        *OF_ALL,
        *OF_CALIBRATED,
        ("threshold", [-0.1, float("nan"), float("inf"), "0.2", None, True], NUMBER),
        ("max_skip_steps", [-1, 1.5, "5", None, True], "an integer >= 0"),
        ("retention_ratio", [-0.1, 1.1, float("nan"), "0.1", True], SHARE),
        (
            "mag_ratios",
            [[], "12", 1.0, [float("inf")], [None], {}, {0: [1.0]}],
            RATIOS,
        ),
    ],
    FirstBlockCache: [
        *OF_ALL,
        ("threshold", [-0.1, float("nan"), float("inf"), "0.2", None, True], NUMBER),
    ],
    DBCache: [
        *OF_ALL,
        ("fn_compute_blocks", [0, -1, 1.5, "8", None, True], "an integer >= 1"),
        ("bn_compute_blocks", [-1, 1.5, "8", None, True], "an integer >= 0"),
        ("residual_diff_threshold", [-0.1, float("nan"), "0.2", None, True], NUMBER),
        (
            "max_accumulated_residual_diff_threshold",
            [0, -0.1, float("inf"), "1", True],
            "a finite number > 0 or None",
        ),
        ("max_warmup_steps", [-1, 1.5, "8", None, True], "an integer >= 0"),
        ("warmup_interval", [0, 1.5, "1", None, True], "an integer >= 1"),
        ("max_cached_steps", [-1, 1.5, "8", True], "an integer >= 0 or None"),
        ("max_continuous_cached_steps", [-1, 1.5, "8", True], "an integer >= 0 or None"),
        ("steps_computation_mask", ["quick", "", [], [2], [1, 0.0], ["1"], 1, {}], MASK),
        ("steps_computation_policy", ["both", None, True], "'dynamic' or 'static'"),
        ("force_refresh_step_hint", [0, -1, 1.5, "8", True], "an integer >= 1 or None"),
        ("force_refresh_step_policy", ["twice", None, True], "'once' or 'repeat'"),
    ],
    TaylorSeer: [
        *OF_ALL[:4],
        ("forecast_order", [-1, 0, 5, 1.0, "1", True], OF_TAYLOR),
        *OF_ALL[5:],
        ("cache_interval", [0, 1.5, "8", None, True], "an integer >= 1"),
        ("disable_cache_before_step", [-1, 1.5, "8", None, True], "an integer >= 0"),
        ("disable_cache_after_step", [-1, 1.5, "8", True], "an integer >= 0 or None"),
    ],
    SeaCache: [
        *OF_ALL[:4],
        (
            "forecast_order",
            [-1, 5, 1.0, "1", True],
            "an integer from 0 to 4 for forecast='newton', or None",
        ),
        OF_ALL[-1],
        ("threshold", [-0.1, float("nan"), float("inf"), "0.2", None, True], NUMBER),
        ("power_exp", [0, -1, float("nan"), "3", None, True], "a finite number > 0"),
        ("max_consecutive_cached", [-1, 1.5, "2", None, True], "an integer >= 0"),
        ("retention_steps", [-1, 1.5, "2", None, True], "an integer >= 0"),
        ("cache_end_steps", [-1, 1.5, "2", None, True], "an integer >= 0"),
        ("grid", [3, [], [0], [1.5], "ab", [True]], "a sequence of integers >= 1, or None"),
    ],
}

WRONG[StepCache] = [
    *OF_ALL,
    (
        "sim_thresholds",
        [[], "12", 0.9, [float("nan")], [None]],
        "a sequence of at least one finite number",
    ),
    ("skip_countdowns", [[], 4, [4], [4, 0], [4, 1.5], "42"], "a sequence of 2 integers >= 1"),
]
WRONG[EasyCache] = [
    *OF_ALL,
    ("threshold", [-0.1, float("nan"), float("inf"), "0.2", None, True], NUMBER),
    ("retention_steps", [-1, 1.5, "2", None, True], "an integer >= 0"),
    ("force_last_step", ["yes", 1, None], BOOL),
]
WRONG[DiCache] = [
    *OF_ALL[:4],
    ("forecast_order", [-1, 1, 1.0, "1", True], "0 for forecast='aligned', or None"),
    OF_ALL[-1],
    ("threshold", [-0.1, float("nan"), float("inf"), "0.2", None, True], NUMBER),
    ("probe_depth", [0, -1, 1.5, "1", None, True], "an integer >= 1"),
    ("retention_ratio", [-0.1, 1.1, float("nan"), "0.1", None, True], SHARE),
    ("force_last_step", ["yes", 1, None], BOOL),
]

OWN: dict[type[Strategy], dict[str, Any]] = {
    TeaCache: {"coefficients": [1.0]},
    MagCache: {"mag_ratios": [1.0]},
    FirstBlockCache: {},
    DBCache: {},
    TaylorSeer: {},
    SeaCache: {},
    StepCache: {},
    EasyCache: {},
    DiCache: {},
}
"""What makes each independent of a model's class."""

OTHERS: dict[type[Strategy], dict[str, Any]] = {
    TeaCache: {"rel_l1_thresh": 0.7},
    MagCache: {"threshold": 0.7},
    FirstBlockCache: {"threshold": 0.7},
    DBCache: {"residual_diff_threshold": 0.7, "steps_computation_mask": "fast"},
    TaylorSeer: {"cache_interval": 2},
    SeaCache: {"threshold": 0.7},
    StepCache: {"end": 0.7},
    EasyCache: {"threshold": 0.7},
    DiCache: {"threshold": 0.7},
}
"""Flags that compile nothing."""
PUBLISHED = {each.name: each for each in (TeaCache, MagCache)}
"""Those that have tables of classes."""


@pytest.mark.parametrize("strategy", WRONG)
def test_every_field_is_covered_here(strategy: type[Strategy]) -> None:
    assert [field for field, _, _ in WRONG[strategy]] == list(strategy.field_names())


@pytest.mark.parametrize(
    ("strategy", "field", "given", "allowed"),
    [
        pytest.param(strategy, field, given, allowed, id=f"{field}-{number}")
        for strategy, fields in WRONG.items()
        for field, values, allowed in fields
        for number, given in enumerate(values)
    ],
)
def test_a_wrong_value_names_the_field_what_was_given_and_what_is_allowed(
    strategy: type[Strategy], field: str, given: Any, allowed: str
) -> None:
    message = f"{field}={given!r} is not allowed; {field} must be {allowed}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        strategy(**{field: given})


@pytest.mark.parametrize(
    ("forecast", "orders"),
    [("newton", [-1, 5, 1.0, "1", True]), ("taylor", [0, 5, 2.0, "1", True])],
)
def test_a_wrong_order_is_told_the_range_of_its_forecast(forecast: str, orders: list[Any]) -> None:
    _, least, most = FORECASTS[forecast]
    for order in orders:
        message = (
            f"forecast_order={order!r} is not allowed; forecast_order must be an integer from "
            f"{least} to {most} for forecast={forecast!r}, or None"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            TeaCache(forecast=forecast, forecast_order=order)


def test_an_order_beside_a_forecast_object_is_refused() -> None:
    with pytest.raises(ValueError, match=r"forecast_order=2 .* None when forecast is an object"):
        MagCache(forecast=Newton(3), forecast_order=2)


def test_a_start_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^start=0.6 is not allowed; start must be at most end"):
        TeaCache(start=0.6, end=0.5)
    assert TeaCache(start=0.5, end=0.5).start == 0.5


def test_the_flags_of_a_forecast_name_it_and_its_depth() -> None:
    found = {
        ("hold", None, "sigma"): Hold(),
        ("hold", 0, "sigma"): Hold(),
        ("newton", None, "sigma"): Newton(1, "sigma"),
        ("newton", 0, "step"): Newton(0, "step"),
        ("newton", np.int64(4), "step"): Newton(4, "step"),
        ("taylor", None, "sigma"): Taylor(1),
        ("taylor", 4, "step"): Taylor(4),
        (Newton(2), None, "sigma"): Newton(2),
    }
    for (name, order, axis), named in found.items():
        for kind in STRATEGIES.values():
            # Its own takes differences from the first step on, as its peer does.
            own = kind is TaylorSeer and name == "taylor"
            forecast = Taylor(named.depth - 1, first=0) if own else named
            flags = {"forecast": name, "forecast_order": order, "forecast_axis": axis}
            strategy = kind(**flags, **OWN[kind])
            assert strategy.forecasting() == strategy.policy(None).forecast == forecast
            compared = strategy.policy(None).signal
            looks_back = 0 if compared is None else compared.looks_back
            assert strategy.guard().depth == max(forecast.depth, looks_back)


def test_a_static_policy_without_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"policy='static' .* without a steps_computation_mask"):
        DBCache(steps_computation_policy="static")


def test_wrong_ratios_of_a_branch_name_the_branch() -> None:
    message = "mag_ratios['uncond']=[] is not allowed; mag_ratios['uncond'] must be a sequence"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        MagCache(mag_ratios={"cond": [1.0], "uncond": []})


def test_defaults_are_the_documented_ones() -> None:
    of_all: dict[str, Any] = {
        "num_inference_steps": None,
        "start": 0.0,
        "end": 1.0,
        "forecast": "hold",
        "forecast_order": None,
        "forecast_axis": "sigma",
    }
    assert TeaCache() == TeaCache(
        rel_l1_thresh=0.2,
        coefficients=None,
        variant=None,
        force_last_step=False,
        **of_all,
    )
    assert MagCache() == MagCache(
        threshold=0.24,
        max_skip_steps=5,
        retention_ratio=0.1,
        mag_ratios=None,
        variant=None,
        calibration=None,
        **of_all,
    )


@pytest.mark.parametrize("kind", [list, tuple, np.array, np.float32, torch.tensor])
def test_numbers_may_come_in_any_kind_of_sequence(kind: Any) -> None:
    if kind is np.float32:
        kind = lambda values: np.array(values, dtype=np.float32)  # noqa: E731
    assert TeaCache(coefficients=kind([2.0, 0.5])).coefficients == (2.0, 0.5)
    assert MagCache(mag_ratios=kind([1.0, 1.5])).mag_ratios == (1.0, 1.5)
    by_branch = MagCache(mag_ratios={"cond": kind([1.0, 1.5])}).mag_ratios
    assert by_branch == {"cond": (1.0, 1.5)}


@pytest.mark.parametrize(
    "flags", [{"coefficients": [1.0, 0.0]}, {"mag_ratios": [1.0]}], ids=["teacache", "magcache"]
)
def test_own_numbers_and_a_published_variant_exclude_each_other(flags: dict[str, Any]) -> None:
    strategy = TeaCache if "coefficients" in flags else MagCache
    (field,) = flags
    with pytest.raises(ValueError, match=f"variant='x' is not allowed; .* None when {field} are"):
        strategy(**flags, variant="x")


# --- what a model class gets ----------------------------------------------------------------------


def looked_up(strategy: Strategy, model_class: str | None) -> tuple[str | None, Gate, list[str]]:
    """The signal and the gate that a class gets, and what was warned of on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = strategy.guard().source_of(model_class)
        gate = strategy.policy(model_class).gate("cond", 0)
    return source, gate, [str(each.message) for each in caught]


def coefficients_of(strategy: Strategy, model_class: str | None) -> tuple[float, ...]:
    gate: Any = looked_up(strategy, model_class)[1]
    found: tuple[float, ...] = gate.gate.coefficients
    return found


def test_a_class_with_published_coefficients_gets_them_without_a_word() -> None:
    name = "LTXVideoTransformer3DModel"
    signal, _, messages = looked_up(TeaCache(), name)
    assert (coefficients_of(TeaCache(), name)[0], signal) == (2.14700694e01, "auto")
    assert messages == []


@pytest.mark.parametrize("model_class", ["PixArtTransformer2DModel", None])
def test_a_class_without_coefficients_gets_the_identity_and_one_warning(
    model_class: str | None,
) -> None:
    signal, _, messages = looked_up(TeaCache(), model_class)
    assert (coefficients_of(TeaCache(), model_class), signal) == ((1.0, 0.0), "auto")
    (message,) = messages
    assert (model_class or "this model") in message
    assert "estimate_coefficients" in message


def test_the_identity_is_warned_of_once_per_class() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            TeaCache().policy("PixArtTransformer2DModel")
        TeaCache().policy("SanaTransformer2DModel")
    assert len(caught) == 2


def test_own_coefficients_are_compared_on_the_modulated_input() -> None:
    own = TeaCache(coefficients=[3.0])
    signal, _, messages = looked_up(own, "WanTransformer3DModel")
    assert (coefficients_of(own, "WanTransformer3DModel"), signal) == ((3.0,), "auto")
    assert messages == []


def test_a_published_signal_comes_with_its_coefficients() -> None:
    published = TeaCache(variant="CogVideoX-5b")
    signal, _, messages = looked_up(published, "CogVideoXTransformer3DModel")
    assert signal == "timestep_embedding"
    assert coefficients_of(published, "CogVideoXTransformer3DModel") != (1.0, 0.0)
    assert messages == []


def test_magcache_compares_no_signal() -> None:
    strategy = MagCache(mag_ratios=[1.0])
    assert strategy.guard().source is None
    assert strategy.policy(None).signal is None


def test_magcache_without_ratios_says_how_to_get_some() -> None:
    with pytest.raises(ValueError, match="PixArtTransformer2DModel") as raised:
        MagCache().policy("PixArtTransformer2DModel")
    assert "1. ratios = omni_cache.calibration.estimate_mag_ratios" in str(raised.value)
    assert "2. pass mag_ratios=ratios" in str(raised.value)


@pytest.mark.parametrize("kind", PUBLISHED.values(), ids=PUBLISHED)
def test_an_unknown_variant_lists_the_published_ones(kind: type[Any]) -> None:
    with pytest.raises(ValueError, match="variant='Wan9'") as raised:
        kind(variant="Wan9").policy("WanTransformer3DModel")
    for published in ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P"):
        assert repr(published) in str(raised.value)


@pytest.mark.parametrize("kind", PUBLISHED.values(), ids=PUBLISHED)
def test_a_class_with_several_tables_warns_and_takes_the_first(kind: type[Any]) -> None:
    *found, messages = looked_up(kind(), "WanTransformer3DModel")
    (message,) = messages
    first = message.split("; ")[1].split(" is used")[0].strip("'")
    assert "variant=" in message
    *chosen, quiet = looked_up(kind(variant=first), "WanTransformer3DModel")
    assert quiet == []
    assert chosen == found
    *other, _ = looked_up(kind(variant="Wan2.1-I2V-14B-480P"), "WanTransformer3DModel")
    assert other != found


def test_tables_that_are_all_the_same_need_no_choice() -> None:
    assert looked_up(TeaCache(), "FluxTransformer2DModel")[2] == []


@torch.no_grad()
def test_a_model_that_runs_is_told_once_that_several_tables_are_published() -> None:
    """Its graph is compiled for a signal and its calls follow a polynomial, of the same table."""

    class CogVideoXTransformer3DModel(ToyTransformer):
        pass

    model = CogVideoXTransformer3DModel()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        omni_cache.enable(model, inner="eager")
        Loop().run(model)
    assert len([each for each in caught if "several tables" in str(each.message)]) == 1


@pytest.mark.parametrize("kind", STRATEGIES.values(), ids=STRATEGIES)
def test_thresholds_compile_nothing(kind: type[Any]) -> None:
    own = OWN[kind]
    first, second = kind(**own), kind(**own, **OTHERS[kind], start=0.3)
    assert repr(first.guard()) == repr(second.guard())
    assert (
        first.guard() == second.guard() != kind(**own, forecast="taylor", forecast_order=3).guard()
    )


def test_a_gate_of_a_policy_decides() -> None:
    gate = MagCache(mag_ratios=[1.0], retention_ratio=0).policy(None).gate("cond", 0)
    assert gate.decide(gate.begin(), Time(1), 4, None).reuse
