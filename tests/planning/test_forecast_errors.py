"""Forecasts priced by inner products: the same as with the vectors at hand."""

from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from omni_cache.planning.gram import (
    FittedCosts,
    Gram,
    error_of,
    fit,
    fit_outputs,
    fits,
    fits_outputs,
    output_error_of,
    resampled,
)

Array = npt.NDArray[np.float64]
STEPS, SIZE = 8, 40


def gram_of(residuals: Array, inputs: Array, outputs: Array) -> Gram:
    """The inner products of one sample's vectors, (T, n) each."""
    scale, output_scale = (residuals**2).sum(1).mean(), (outputs**2).sum(1).mean()
    return Gram(
        residuals @ residuals.T / scale,
        inputs @ residuals.T / scale,
        inputs @ inputs.T / scale,
        outputs @ outputs.T / output_scale,
    )


@pytest.fixture
def vectors() -> tuple[Array, Array, Array]:
    generator = np.random.default_rng(0)
    residuals, inputs, outputs = generator.standard_normal((3, STEPS, SIZE))
    return residuals, inputs, outputs


@pytest.mark.parametrize("kept", [(3,), (3, 1), (4, 3, 0)])
@pytest.mark.parametrize("with_input", [False, True])
def test_a_fit_is_that_of_least_squares_on_the_vectors(
    vectors: tuple[Array, Array, Array], kept: tuple[int, ...], with_input: bool
) -> None:
    residuals, inputs, _ = vectors
    gram, step = gram_of(*vectors), 6
    regressors = [residuals[each] for each in kept]
    if with_input:
        regressors.append(inputs[step] - inputs[kept[0]])
    stacked = np.stack(regressors, axis=1)
    expected, (squares,), *_ = np.linalg.lstsq(stacked, residuals[step])
    found = fit(gram, kept, step, with_input, ridge=1e-14)
    weights = [*found.weights, found.input_weight] if with_input else found.weights
    assert weights == pytest.approx(expected, rel=1e-9)
    assert with_input or found.input_weight == 0.0
    assert found.error == pytest.approx(squares / (residuals**2).sum(1).mean(), rel=1e-9)


def test_a_fit_of_outputs_is_that_of_least_squares_on_the_outputs(
    vectors: tuple[Array, Array, Array],
) -> None:
    outputs = vectors[2]
    expected, (squares,), *_ = np.linalg.lstsq(outputs[[5, 4]].T, outputs[7])
    found = fit_outputs(gram_of(*vectors), (5, 4), 7, ridge=1e-14)
    assert found.weights == pytest.approx(expected, rel=1e-9)
    assert found.error == pytest.approx(squares / (outputs**2).sum(1).mean(), rel=1e-9)


@pytest.mark.parametrize("input_weight", [0.0, -0.7])
def test_any_weights_cost_what_the_vectors_say(
    vectors: tuple[Array, Array, Array], input_weight: float
) -> None:
    residuals, inputs, outputs = vectors
    gram, kept, step, weights = gram_of(*vectors), (4, 2, 1), 6, (2.5, -2.0, 0.5)
    forecast = weights @ residuals[list(kept)] + input_weight * (inputs[step] - inputs[kept[0]])
    expected = ((residuals[step] - forecast) ** 2).sum() / (residuals**2).sum(1).mean()
    assert error_of(gram, kept, step, weights, input_weight) == pytest.approx(expected)
    forecast = weights @ outputs[list(kept)]
    expected = ((outputs[step] - forecast) ** 2).sum() / (outputs**2).sum(1).mean()
    assert output_error_of(gram, kept, step, weights) == pytest.approx(expected)


def test_the_ridge_is_a_share_of_each_regressor(vectors: tuple[Array, Array, Array]) -> None:
    residuals, inputs, _ = vectors
    residuals = residuals * np.geomspace(1, 1e-3, STEPS)[:, None]
    ridge, step = 0.05, 5
    regressors = np.stack([residuals[3], residuals[0], inputs[step] - inputs[3]], axis=1)
    noise = np.diag(np.sqrt(ridge * (regressors**2).sum(0)))
    target = np.append(residuals[step], np.zeros(3))
    expected = np.linalg.lstsq(np.concatenate([regressors, noise]), target)[0]
    found = fit(gram_of(residuals, inputs, vectors[2]), (3, 0), step, True, ridge=ridge)
    assert [*found.weights, found.input_weight] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("difference", [0.0, 1e-12, 1e-9, 1e-7, 1e-5])
def test_almost_parallel_residuals_are_fitted_by_moderate_weights(difference: float) -> None:
    generator = np.random.default_rng(1)
    base, other, noise = generator.standard_normal((3, SIZE))
    # What distinguishes the kept ones tells nothing about the step that is forecast.
    residuals = np.stack([base, base + difference * other, base + 0.01 * noise])
    gram = gram_of(residuals, residuals, residuals)
    found = fit(gram, (1, 0), 2)
    held = error_of(gram, (1, 0), 2, (1.0, 0.0))
    assert np.isfinite(found.weights).all()
    assert sum(found.weights) == pytest.approx(1.0, abs=0.01)
    assert max(map(abs, found.weights)) < 100
    assert 0 < found.error <= held * 1.001


def test_a_linear_series_is_fitted_exactly_with_two_residuals() -> None:
    start, slope = np.random.default_rng(2).standard_normal((2, SIZE))
    residuals = start + np.arange(STEPS)[:, None] * slope / STEPS
    gram = gram_of(residuals, residuals, residuals)
    found = fit(gram, (4, 2), 7, ridge=1e-14)
    assert found.weights == pytest.approx((2.5, -1.5), rel=1e-6)
    assert found.error == pytest.approx(0, abs=1e-12)
    assert fit(gram, (4, 2), 7).error < 1e-6
    assert fit(gram, (4,), 7).error > 1e-3


def test_the_input_helps_where_the_residual_depends_on_it(
    vectors: tuple[Array, Array, Array],
) -> None:
    inputs = vectors[1]
    constant = 3 * vectors[0][0]
    residuals = constant + 0.3 * inputs
    gram = gram_of(residuals, inputs, vectors[2])
    without, found = fit(gram, (4,), 6), fit(gram, (4,), 6, with_input=True)
    assert found.weights == pytest.approx((1.0,), abs=1e-6)
    assert found.input_weight == pytest.approx(0.3, abs=1e-6)
    assert found.error < 1e-9 < 0.01 < without.error


def test_an_input_that_does_not_change_gets_no_weight(
    vectors: tuple[Array, Array, Array],
) -> None:
    still = np.zeros_like(vectors[1])
    gram = gram_of(vectors[0], still, vectors[2])
    found = fit(gram, (4, 3), 6, with_input=True)
    assert found.input_weight == 0.0
    assert found.weights == pytest.approx(fit(gram, (4, 3), 6).weights)


@pytest.mark.parametrize("with_input", [False, True])
def test_many_kept_sets_are_fitted_as_one_by_one(
    vectors: tuple[Array, Array, Array], with_input: bool
) -> None:
    gram, step = gram_of(*vectors), 7
    kepts = np.array([(6, 5), (6, 0), (3, 2), (1, 0)])
    found = fits(gram, kepts, step, with_input)
    found_outputs = fits_outputs(gram, kepts, step)
    for index, kept in enumerate(kepts.tolist()):
        one = fit(gram, kept, step, with_input)
        assert found.weights[index] == pytest.approx(one.weights)
        assert found.input_weights[index] == pytest.approx(one.input_weight)
        assert found.errors[index] == pytest.approx(one.error)
        assert found_outputs.errors[index] == pytest.approx(fit_outputs(gram, kept, step).error)


def without_steps(gram: Gram, absent: list[int]) -> Gram:
    def holed(matrix: Array) -> Array:
        matrix = matrix.copy()
        matrix[absent], matrix[:, absent] = np.nan, np.nan
        return matrix

    return Gram(holed(gram.residuals), holed(gram.cross), holed(gram.inputs), holed(gram.outputs))


def test_costs_add_up_the_grams_that_have_the_step(vectors: tuple[Array, Array, Array]) -> None:
    gram = gram_of(*vectors)
    other = gram_of(*(each[::-1] for each in vectors))
    first, second = without_steps(gram, [6, 7]), other
    importance = np.stack([np.arange(STEPS), np.full(STEPS, 10.0)])
    costs = FittedCosts([first, second], importance, partial(fits, with_input=True))
    one, two = fit(first, (3, 1), 5, True).error, fit(second, (3, 1), 5, True).error
    assert costs((3, 1), 5) == pytest.approx(5 * one + 10 * two)
    assert costs((3, 1), 7) == pytest.approx(10 * fit(second, (3, 1), 7, True).error)
    with pytest.raises(ValueError, match="step 7 is in no Gram"):
        FittedCosts([first], 1.0)((3, 1), 7)
    assert FittedCosts([second], 1.0)((3, 1), 7) == pytest.approx(fit(second, (3, 1), 7).error)


@pytest.mark.parametrize(
    ("kept", "step", "message"),
    [
        ((), 5, "kept sets"),
        ((8,), 5, r"0\.\.7, got 8"),
        ((-1,), 5, r"0\.\.7, got -1"),
        ((3,), 8, r"0\.\.7, got 8"),
        ((3, 1), 3, "kept and forecast at once"),
        ((2,), 5, "did not run step 2"),
        ((3,), 2, "did not run step 2"),
    ],
)
def test_steps_that_do_not_fit_the_gram_are_refused(
    vectors: tuple[Array, Array, Array], kept: tuple[int, ...], step: int, message: str
) -> None:
    gram = without_steps(gram_of(*vectors), [2])
    for attempt in (fit, fit_outputs):
        with pytest.raises(ValueError, match=message):
            attempt(gram, kept, step)


def test_weights_that_do_not_fit_the_kept_set_are_refused(
    vectors: tuple[Array, Array, Array],
) -> None:
    gram = gram_of(*vectors)
    with pytest.raises(ValueError, match="weights"):
        error_of(gram, (3, 2), 5, (1.0,))
    with pytest.raises(ValueError, match="weights"):
        output_error_of(gram, (3, 2), 5, (1.0,))
    with pytest.raises(ValueError, match="ridge"):
        fit(gram, (3, 2), 5, ridge=0.0)


@pytest.mark.parametrize("name", ["residuals", "cross", "inputs", "outputs"])
def test_what_cannot_be_inner_products_is_refused_by_name(
    vectors: tuple[Array, Array, Array], name: str
) -> None:
    gram = gram_of(*vectors)
    good = getattr(gram, name)

    def with_entry(where: tuple[int, int], value: float) -> Array:
        changed = good.copy()
        changed[where] = value
        return changed

    wrong = [good[:3], good[0], np.zeros((0, 0)), with_entry((1, 2), np.nan)]
    wrong += [with_entry((1, 2), np.inf)]
    if name != "cross":
        wrong += [with_entry((1, 2), 99.0), with_entry((1, 1), -1.0)]
    if name != "residuals":
        wrong += [good[:3, :3], getattr(without_steps(gram, [4]), name)]
    for matrix in wrong:
        with pytest.raises(ValueError, match=name):
            replace(gram, **{name: matrix})


# --- other times -------------------------------------------------------------------------------


def smooth(sigmas: Array) -> tuple[Array, Array, Array]:
    """Vectors that turn smoothly along sigma: residuals, inputs, outputs."""
    generator = np.random.default_rng(3)
    rates, phases = generator.uniform(0, 3, (3, 1, SIZE)), generator.uniform(0, 6, (3, 1, SIZE))
    residuals, inputs, outputs = np.cos(sigmas[:, None] * rates + phases)
    return residuals, inputs, outputs


def raw_gram(vectors: tuple[Array, Array, Array]) -> Gram:
    residuals, inputs, outputs = vectors
    return Gram(
        residuals @ residuals.T, inputs @ residuals.T, inputs @ inputs.T, outputs @ outputs.T
    )


def shifted(steps: int, shift: float = 3.0) -> Array:
    """Sigmas as flow matching has them, falling from 1."""
    straight = np.linspace(1, 1 / steps, steps)
    return shift * straight / (1 + (shift - 1) * straight)


FIELDS = ("residuals", "cross", "inputs", "outputs")


@pytest.mark.parametrize("steps", [20, 28, 40])
@pytest.mark.parametrize("sign", [1, -1], ids=["falling", "rising"])
def test_other_sigmas_give_the_gram_of_the_trajectory_there(steps: int, sign: int) -> None:
    before, after = shifted(28), shifted(steps, 2.5)
    gram = resampled(raw_gram(smooth(before)), (sign * before).tolist(), (sign * after).tolist())
    expected = raw_gram(smooth(after))
    inside = after >= before[-1]
    for name in FIELDS:
        found, wanted = getattr(gram, name), getattr(expected, name)
        within = np.ix_(inside, inside)
        assert np.abs(found - wanted)[within].max() < 1e-4 * np.abs(wanted).max()
    for name in ("residuals", "inputs", "outputs"):
        lowest = np.linalg.eigvalsh(getattr(gram, name)).min()
        assert lowest > -1e-12 * steps * SIZE


def test_forecasts_are_priced_alike_at_other_sigmas() -> None:
    before, after = shifted(28), shifted(20, 2.5)
    gram, expected = (
        resampled(raw_gram(smooth(before)), before.tolist(), after.tolist()),
        raw_gram(smooth(after)),
    )
    for kept, step in (((4, 2), 6), ((9, 7, 3), 12)):
        found, wanted = fit(gram, kept, step), fit(expected, kept, step)
        assert found.weights == pytest.approx(wanted.weights, rel=0.02)
        assert found.error == pytest.approx(wanted.error, rel=0.1)


def test_the_same_sigmas_change_nothing() -> None:
    before = shifted(12).tolist()
    gram = raw_gram(smooth(shifted(12)))
    again = resampled(gram, before, before)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(gram, name))


def test_the_cubic_goes_through_two_steps_on_either_side() -> None:
    apart = Gram(*[np.eye(6)] * 4)
    (found,) = resampled(apart, range(6), [2.5]).residuals
    assert found == pytest.approx(2 * (9 / 16) ** 2 + 2 * (1 / 16) ** 2)


def test_two_calibrated_steps_are_joined_by_a_line() -> None:
    start, end = smooth(np.array([1.0, 0.5]))[0]
    gram = raw_gram((np.stack([start, end]),) * 3)
    found = resampled(gram, [1.0, 0.5], [1.0, 0.75, 0.25])
    line = np.stack([start, (start + end) / 2, 1.5 * end - 0.5 * start])
    np.testing.assert_allclose(found.residuals, line @ line.T, rtol=1e-12)


def test_new_steps_belong_to_the_transformer_of_the_nearest_one() -> None:
    before, after = shifted(28), shifted(20)
    high = without_steps(raw_gram(smooth(before)), list(range(10, 28)))
    low = without_steps(raw_gram(smooth(before)), list(range(10)))
    found = [resampled(each, before.tolist(), after.tolist()) for each in (high, low)]
    boundary = (before[9] + before[10]) / 2
    assert found[0].present.tolist() == (after > boundary).tolist()
    assert found[1].present.tolist() == (after < boundary).tolist()
    expected = raw_gram(smooth(after)).residuals
    present = found[0].present
    within = np.ix_(present, present)
    np.testing.assert_allclose(found[0].residuals[within], expected[within], rtol=1e-3, atol=1e-2)
    none = resampled(low, before.tolist(), [1.0])
    assert not none.present.any()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0, 0.5], [1.0], "2 times for 3"),
        ([1.0, 0.5, 0.5], [1.0], "strictly"),
        ([1.0, 0.5, 0.7], [1.0], "strictly"),
        ([1.0, 0.5, np.nan], [1.0], "before"),
        ([1.0, 0.5, 0.2], [], "after"),
        ([1.0, 0.5, 0.2], [1.0, np.inf], "after"),
        ([1.0, 0.5, 0.2], [1.0, -0.2], r"-0\.2, more than a step"),
        ([1.0, 0.5, 0.2], [1.6, 0.5], r"1\.6, more than a step"),
    ],
)
def test_times_that_cannot_be_interpolated_are_refused(
    before: list[float], after: list[float], message: str
) -> None:
    gram = raw_gram(smooth(np.array([1.0, 0.5, 0.2])))
    with pytest.raises(ValueError, match=message):
        resampled(gram, before, after)
