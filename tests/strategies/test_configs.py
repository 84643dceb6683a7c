"""What users may write into a strategy's config, and what is looked up for them."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from omni_cache import MagCacheConfig, TeaCacheConfig
from omni_cache.strategies import STRATEGIES, BoundStrategy, Strategy

NUMBER = "a finite number >= 0"
STEPS = "an integer >= 1 or None"
BOOL = "True or False"
NAME = "a string or None"
COEFFICIENTS = "a sequence of at least one finite number, highest power first"
RATIOS = "a sequence of at least one finite number, or a mapping of branch names to such"

WRONG: dict[type[Strategy], list[tuple[str, list[Any], str]]] = {
    TeaCacheConfig: [
        ("rel_l1_thresh", [-0.1, float("nan"), float("inf"), "0.2", None, True], NUMBER),
        ("coefficients", [[], "12", 3.0, [1.0, float("nan")], [None], [[1.0]]], COEFFICIENTS),
        ("variant", [1, ["FLUX.1-dev"]], NAME),
        ("num_inference_steps", [0, -1, 2.0, "28", True], STEPS),
        ("force_last_step", ["yes", 1, None], BOOL),
        ("calibrate", ["yes", 1, None], BOOL),
    ],
    MagCacheConfig: [
        ("threshold", [-0.1, float("nan"), float("inf"), "0.2", None, True], NUMBER),
        ("max_skip_steps", [-1, 1.5, "5", None, True], "an integer >= 0"),
        ("retention_ratio", [-0.1, 1.1, float("nan"), "0.1", True], "a number from 0 to 1"),
        ("num_inference_steps", [0, -1, 2.0, "28", True], STEPS),
        (
            "mag_ratios",
            [[], "12", 1.0, [float("inf")], [None], {}, {0: [1.0]}],
            RATIOS,
        ),
        ("variant", [1, ["FLUX.1-dev"]], NAME),
        ("calibrate", ["yes", 1, None], BOOL),
    ],
}


@pytest.mark.parametrize("config", WRONG)
def test_every_field_is_covered_here(config: type[Strategy]) -> None:
    assert [field for field, _, _ in WRONG[config]] == list(config.field_names())


@pytest.mark.parametrize(
    ("config", "field", "given", "allowed"),
    [
        pytest.param(config, field, given, allowed, id=f"{field}={given!r}")
        for config, fields in WRONG.items()
        for field, values, allowed in fields
        for given in values
    ],
)
def test_a_wrong_value_names_the_field_what_was_given_and_what_is_allowed(
    config: type[Strategy], field: str, given: Any, allowed: str
) -> None:
    message = f"{field}={given!r} is not allowed; {field} must be {allowed}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config(**{field: given})


def test_wrong_ratios_of_a_branch_name_the_branch() -> None:
    message = "mag_ratios['uncond']=[] is not allowed; mag_ratios['uncond'] must be a sequence"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        MagCacheConfig(mag_ratios={"cond": [1.0], "uncond": []})


def test_defaults_are_the_documented_ones() -> None:
    assert TeaCacheConfig() == TeaCacheConfig(
        rel_l1_thresh=0.2,
        coefficients=None,
        variant=None,
        num_inference_steps=None,
        force_last_step=False,
        calibrate=False,
    )
    assert MagCacheConfig() == MagCacheConfig(
        threshold=0.24,
        max_skip_steps=5,
        retention_ratio=0.1,
        num_inference_steps=None,
        mag_ratios=None,
        variant=None,
        calibrate=False,
    )


@pytest.mark.parametrize("kind", [list, tuple, np.array, np.float32, torch.tensor])
def test_numbers_may_come_in_any_kind_of_sequence(kind: Any) -> None:
    if kind is np.float32:
        kind = lambda values: np.array(values, dtype=np.float32)  # noqa: E731
    assert TeaCacheConfig(coefficients=kind([2.0, 0.5])).coefficients == (2.0, 0.5)
    assert MagCacheConfig(mag_ratios=kind([1.0, 1.5])).mag_ratios == (1.0, 1.5)
    by_branch = MagCacheConfig(mag_ratios={"cond": kind([1.0, 1.5])}).mag_ratios
    assert by_branch == {"cond": (1.0, 1.5)}


@pytest.mark.parametrize(
    "flags", [{"coefficients": [1.0, 0.0]}, {"mag_ratios": [1.0]}], ids=["teacache", "magcache"]
)
def test_own_numbers_and_a_published_variant_exclude_each_other(flags: dict[str, Any]) -> None:
    config = TeaCacheConfig if "coefficients" in flags else MagCacheConfig
    (field,) = flags
    with pytest.raises(ValueError, match=f"variant='x' is not allowed; .* None when {field} are"):
        config(**flags, variant="x")


# --- binding to a model class --------------------------------------------------------------------


def bound(config: Strategy, model_class: str | None) -> tuple[BoundStrategy, list[str]]:
    """A strategy bound to a class, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = config.bind(model_class)
    return strategy, [str(each.message) for each in caught]


def test_a_class_with_published_coefficients_gets_them_without_a_word() -> None:
    strategy, messages = bound(TeaCacheConfig(), "LTXVideoTransformer3DModel")
    assert (strategy.coefficients[0], strategy.signal) == (2.14700694e01, "auto")
    assert messages == []


@pytest.mark.parametrize("model_class", ["PixArtTransformer2DModel", None])
def test_a_class_without_coefficients_gets_the_identity_and_one_warning(
    model_class: str | None,
) -> None:
    strategy, messages = bound(TeaCacheConfig(), model_class)
    assert (strategy.coefficients, strategy.signal) == ((1.0, 0.0), "auto")
    (message,) = messages
    assert (model_class or "this model") in message
    assert "estimate_coefficients" in message


def test_the_identity_is_warned_of_once_per_class() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            TeaCacheConfig().bind("PixArtTransformer2DModel")
        TeaCacheConfig().bind("SanaTransformer2DModel")
    assert len(caught) == 2


def test_own_coefficients_are_compared_on_the_modulated_input() -> None:
    strategy, messages = bound(TeaCacheConfig(coefficients=[3.0]), "WanTransformer3DModel")
    assert (strategy.coefficients, strategy.signal) == ((3.0,), "auto")
    assert messages == []


def test_calibration_measures_the_signal_that_its_coefficients_are_used_with() -> None:
    strategy, messages = bound(TeaCacheConfig(calibrate=True), "WanTransformer3DModel")
    assert strategy.signal == bound(TeaCacheConfig(coefficients=[3.0]), None)[0].signal
    assert messages == []


def test_a_published_signal_comes_with_its_coefficients() -> None:
    config = TeaCacheConfig(variant="CogVideoX-5b")
    strategy, messages = bound(config, "CogVideoXTransformer3DModel")
    assert strategy.signal == "timestep_embedding"
    assert messages == []


def test_magcache_without_ratios_says_how_to_get_some() -> None:
    with pytest.raises(ValueError, match="PixArtTransformer2DModel") as raised:
        MagCacheConfig().bind("PixArtTransformer2DModel")
    assert "1. ratios = omni_cache.calibration.estimate_mag_ratios" in str(raised.value)
    assert "2. pass mag_ratios=ratios" in str(raised.value)


@pytest.mark.parametrize("config", STRATEGIES.values(), ids=STRATEGIES)
def test_an_unknown_variant_lists_the_published_ones(config: type[Any]) -> None:
    with pytest.raises(ValueError, match="variant='Wan9'") as raised:
        config(variant="Wan9").bind("WanTransformer3DModel")
    for published in ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P"):
        assert repr(published) in str(raised.value)


@pytest.mark.parametrize("config", STRATEGIES.values(), ids=STRATEGIES)
def test_a_class_with_several_tables_warns_and_takes_the_first(config: type[Any]) -> None:
    strategy, messages = bound(config(), "WanTransformer3DModel")
    (message,) = messages
    first = message.split("; ")[1].split(" is used")[0].strip("'")
    assert "variant=" in message
    chosen, quiet = bound(config(variant=first), "WanTransformer3DModel")
    assert quiet == []
    assert vars(chosen) | {"config": None} == vars(strategy) | {"config": None}
    other, _ = bound(config(variant="Wan2.1-I2V-14B-480P"), "WanTransformer3DModel")
    assert vars(other) | {"config": None} != vars(strategy) | {"config": None}


def test_tables_that_are_all_the_same_need_no_choice() -> None:
    assert bound(TeaCacheConfig(), "FluxTransformer2DModel")[1] == []
