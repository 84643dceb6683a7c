"""What calibration measures is what a look at the eager model gives, and it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers_models import CASES, ModelCase, sample
from eager_reference import capture_residual
from torch import Tensor, nn

import omni_cache
from omni_cache import UncachedWarning
from omni_cache.calibration import estimate_coefficients, estimate_mag_ratios
from omni_cache.calibration.observe import MagnitudeRatios, SignalAndOutput
from omni_cache.runtime.contexts import Observed, Run
from omni_cache.strategies import Time

STEPS = 5
PIXART, FLUX = CASES["pixart"], CASES["flux"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pixart() -> nn.Module:
    return PIXART.build()


def loop(model: nn.Module, case: ModelCase, steps: int = STEPS, **place: Any) -> None:
    for step in range(steps):
        model(**case.inputs(step, **place))


def eager_mag_ratios(model: nn.Module, case: ModelCase, **place: Any) -> list[float]:
    """1, then the mean over tokens of |r_t| / |r_{t-1}|."""
    norms = [
        capture_residual(model, case, case.inputs(step, **place))["hidden_states"].norm(dim=-1)
        for step in range(STEPS)
    ]
    return [1.0, *(float((now / before).mean()) for before, now in pairwise(norms))]


def relative_l1(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().mean() / before.abs().mean())


def test_ratios_of_a_bare_loop_are_those_of_the_eager_residuals(pixart: nn.Module) -> None:
    expected = eager_mag_ratios(pixart, PIXART)
    ratios = estimate_mag_ratios(pixart, lambda: loop(pixart, PIXART), STEPS, inner="eager")
    assert list(ratios) == ["branch 0"]
    assert ratios["branch 0"] == pytest.approx(expected, rel=1e-4)
    assert ratios["branch 0"][0] == 1.0
    assert max(abs(ratio - 1) for ratio in expected) > 1e-3  # there was something to measure


def test_ratios_are_averaged_over_generations_and_kept_apart_by_branch(pixart: nn.Module) -> None:
    seeds = {"cond": (0, 1), "uncond": (2, 3)}
    expected = {
        name: np.mean([eager_mag_ratios(pixart, PIXART, seed=seed) for seed in pair], axis=0)
        for name, pair in seeds.items()
    }

    def generate() -> None:
        for run in range(2):
            with omni_cache.generation(num_inference_steps=STEPS):
                for step in range(STEPS):
                    for name, pair in seeds.items():
                        with omni_cache.branch(name):
                            pixart(**PIXART.inputs(step, seed=pair[run]))
        with omni_cache.generation(num_inference_steps=2):  # an incomplete one does not count
            for step in range(2):
                with omni_cache.branch("cond"):
                    pixart(**PIXART.inputs(step, seed=9))

    ratios = estimate_mag_ratios(pixart, generate, STEPS, inner="eager")
    assert list(ratios) == ["cond", "uncond"]
    for name in seeds:
        assert ratios[name] == pytest.approx(list(expected[name]), rel=1e-4)
    # They are what mag_ratios takes.
    assert omni_cache.MagCache(mag_ratios=ratios).mag_ratios == {
        name: tuple(values) for name, values in ratios.items()
    }


def test_a_float64_model_is_measured_in_float32() -> None:
    residual, run = torch.randn(1, 6, 8, dtype=torch.float64), cast("Run", object())
    observer = MagnitudeRatios()
    for step in range(2):
        made = (residual * (step + 1),)
        call = run, 0, "blocks", "cond", Time(step), "computed", None
        observer(Observed(*call, made, (), torch.tensor(True), [residual]))
    assert [each.value for each in observer.steps] == [1.0, pytest.approx(2)]


def test_ratios_are_measured_against_a_copy() -> None:
    residual, run = torch.ones(1, 6, 8), cast("Run", object())
    observer = MagnitudeRatios()
    for step in range(2):
        residual.fill_(step + 1.0)  # in place, as graphs that reuse their memory do
        call = run, 0, "blocks", "cond", Time(step), "computed", None
        observer(Observed(*call, (residual,), (), torch.tensor(True), [residual]))
    assert [each.value for each in observer.steps] == [1.0, 2.0]


def test_changes_are_measured_against_a_copy() -> None:
    signal, run = torch.ones(1, 6, 8), cast("Run", object())
    observer = SignalAndOutput()
    for step in range(2):
        signal.fill_(step + 1.0)
        call = run, 0, "blocks", "cond", Time(step), "computed", signal
        observer(Observed(*call, (signal,), (), torch.tensor(True), [signal]))
    assert observer.steps[-1].value == pytest.approx((1.0, 1.0), rel=1e-6)


def test_coefficients_fit_the_changes_of_signal_and_output() -> None:
    model: Any = FLUX.build()
    signals: list[Tensor] = []
    hook = model.transformer_blocks[0].norm1.register_forward_hook(
        lambda module, args, output: signals.append(output[0])
    )
    outputs = [sample(model(**FLUX.inputs(step))) for step in range(STEPS)]
    hook.remove()
    signal_changes = [relative_l1(now, before) for before, now in pairwise(signals)]
    output_changes = [relative_l1(now, before) for before, now in pairwise(outputs)]

    def generate() -> None:
        with omni_cache.generation(num_inference_steps=STEPS), omni_cache.branch("cond"):
            loop(model, FLUX)

    found = estimate_coefficients(model, generate, STEPS, degree=1, inner="eager")
    assert len(found) == 2
    expected = np.polyfit(signal_changes, output_changes, 1)
    at = np.array(signal_changes)
    assert np.polyval(found, at) == pytest.approx(np.polyval(expected, at), rel=1e-3)
    assert omni_cache.TeaCache(coefficients=found).coefficients == tuple(found)


ESTIMATORS: list[Callable[..., Any]] = [estimate_mag_ratios, estimate_coefficients]


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_the_target_is_left_as_it_was(pixart: nn.Module, estimate: Callable[..., Any]) -> None:
    output, before = sample(pixart(**PIXART.inputs())), dict(vars(pixart))

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate(pixart, fail, STEPS, inner="eager")
    assert dict(vars(pixart)) == before
    assert torch.equal(sample(pixart(**PIXART.inputs())), output)
    assert omni_cache.summary(pixart).trajectories == ()


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_an_enabled_target_is_refused_and_stays_enabled(
    pixart: nn.Module, estimate: Callable[..., Any]
) -> None:
    omni_cache.enable(pixart, inner="eager", coefficients=[1.0, 0.0])
    enabled = dict(vars(pixart))
    try:
        with pytest.raises(ValueError, match=r"enabled.*omni_cache.disable"):
            estimate(pixart, lambda: None, STEPS, inner="eager")
        assert dict(vars(pixart)) == enabled
    finally:
        omni_cache.disable(pixart)


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_nothing_measured_says_what_to_do(pixart: nn.Module, estimate: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match=rf"must run the target for {STEPS} steps, under torch"):
        estimate(pixart, lambda: None, STEPS, inner="eager")


def test_with_gradients_nothing_is_measured(pixart: nn.Module) -> None:
    def generate() -> None:
        with torch.enable_grad():
            loop(pixart, PIXART, 1)

    with (
        pytest.warns(UncachedWarning, match="gradients are enabled"),
        pytest.raises(RuntimeError, match=r"torch\.no_grad"),
    ):
        estimate_mag_ratios(pixart, generate, STEPS, inner="eager")


def test_a_loop_of_another_length_gives_no_ratios(pixart: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=f"for {STEPS} steps"):
        estimate_mag_ratios(pixart, lambda: loop(pixart, PIXART, 3), STEPS, inner="eager")


def test_too_few_steps_for_the_degree_are_counted(pixart: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"4 steps were measured, .*degree 4 needs more than 4"):
        estimate_coefficients(pixart, lambda: loop(pixart, PIXART), STEPS, inner="eager")


@pytest.mark.parametrize("degree", [-1, 1.5, "2", True])
def test_a_wrong_degree_is_refused(pixart: nn.Module, degree: Any) -> None:
    with pytest.raises(ValueError, match=r"degree=.* is not allowed; degree must be an integer"):
        estimate_coefficients(pixart, lambda: None, STEPS, degree=degree)


def test_a_wrong_flag_is_refused_before_anything_runs(pixart: nn.Module) -> None:
    def never() -> None:
        raise AssertionError("the flag is wrong")

    with pytest.raises(ValueError, match="did you mean 'inner'"):
        estimate_mag_ratios(pixart, never, STEPS, iner="eager")
