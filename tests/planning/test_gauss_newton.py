"""Gauss-Newton steps: they converge, samples count alike, and directions are of one size."""

import numpy as np
import numpy.typing as npt
import pytest

from omni_cache.planning import newton
from omni_cache.planning.gram import Gram
from omni_cache.planning.newton import Normal, directions, gauss_newton_step, output_directions

Array = npt.NDArray[np.float64]


def test_steps_converge_on_a_nonlinear_problem() -> None:
    times = np.linspace(0, 2, 30)
    wanted = np.array([1.3, -0.8, 0.4])
    samples = [0.5, 1.0, 2.0]

    def result(weights: Array, sample: float) -> Array:
        scale, rate, shift = weights
        return sample * (scale * np.exp(rate * times * sample) + shift * np.sin(times))

    def jacobian(weights: Array, sample: float) -> Array:
        moved = [weights + 1e-6 * unit for unit in np.eye(3)]
        base = result(weights, sample)
        return np.stack([(result(each, sample) - base) / 1e-6 for each in moved], axis=1)

    weights = np.array([0.7, -0.2, 0.0])
    distances = [np.abs(weights - wanted).max()]
    while distances[-1] > 1e-8 and len(distances) < 9:
        errors = [result(weights, each) - result(wanted, each) for each in samples]
        jacobians = (jacobian(weights, each) for each in samples)
        weights = weights + gauss_newton_step(jacobians, errors, damping=1e-6)
        distances.append(np.abs(weights - wanted).max())
    assert distances[-1] < 1e-8
    assert len(distances) < 9


def test_a_sample_with_a_large_error_does_not_decide_alone() -> None:
    jacobians = [np.eye(2), np.eye(2)]
    # The first sample asks for (-1, 0), the second, a thousand times as far off, for (0, -1000).
    errors = [np.array([1.0, 0.0]), np.array([0.0, 1000.0])]
    step = gauss_newton_step(jacobians, errors, damping=0.0)
    together = np.linalg.lstsq(np.concatenate(jacobians), -np.concatenate(errors))[0]
    scaled = [jacobian / np.linalg.norm(e) for jacobian, e in zip(jacobians, errors, strict=True)]
    expected = np.linalg.lstsq(
        np.concatenate(scaled), -np.concatenate([e / np.linalg.norm(e) for e in errors])
    )[0]
    np.testing.assert_allclose(step, expected, rtol=1e-9)
    assert abs(together[1]) > 100
    assert abs(step[1]) < 0.01
    assert step[0] == pytest.approx(-1, rel=1e-3)


def test_samples_are_read_one_by_one() -> None:
    alive = []

    def jacobians() -> object:
        for seed in range(3):
            alive.append(seed)
            yield np.random.default_rng(seed).standard_normal((5, 2))

    def errors() -> object:
        for seed in range(3):
            assert alive == list(range(seed + 1))
            yield np.ones(5)

    gauss_newton_step(jacobians(), errors(), damping=0.1)


def test_columns_of_any_shape_and_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    error = generator.standard_normal((2, 3, 5)).astype(np.float32)
    columns = list(generator.standard_normal((4, 2, 3, 5)).astype(np.float32))
    whole = Normal(4)
    whole.add(error, columns)
    jacobian = np.stack([each.ravel() for each in columns], axis=1).astype(np.float64)
    flat = error.ravel().astype(np.float64)
    np.testing.assert_allclose(whole.matrix, jacobian.T @ jacobian / (flat @ flat))
    np.testing.assert_allclose(whole.vector, jacobian.T @ flat / (flat @ flat))
    monkeypatch.setattr(newton, "_SLICE", 7)
    sliced = Normal(4)
    sliced.add(error, columns)
    np.testing.assert_allclose(sliced.matrix, whole.matrix)
    np.testing.assert_allclose(sliced.vector, whole.vector)


def test_damping_shortens_the_step_and_what_it_promises() -> None:
    generator = np.random.default_rng(0)
    normal = Normal(3)
    for _ in range(4):
        normal.add(generator.standard_normal(20), list(generator.standard_normal((3, 20))))
    steps = [normal.step(damping) for damping in (0.0, 0.1, 1.0, 100.0)]
    lengths = [float(np.linalg.norm(step)) for step in steps]
    promised = [normal.decrease(step) for step in steps]
    assert lengths == sorted(lengths, reverse=True)
    assert promised == sorted(promised, reverse=True)
    assert 0 < promised[-1] < promised[0] < 1
    assert normal.decrease(2 * steps[0]) == pytest.approx(0, abs=1e-12)


def test_the_promised_decrease_is_that_of_a_linear_model() -> None:
    generator = np.random.default_rng(1)
    jacobians, errors = generator.standard_normal((3, 12, 2)), generator.standard_normal((3, 12))
    normal = Normal(2)
    for jacobian, error in zip(jacobians, errors, strict=True):
        normal.add(error, list(jacobian.T))
    step = np.array([0.2, -0.1])
    left = [
        np.sum((error + jacobian @ step) ** 2) / np.sum(error**2)
        for jacobian, error in zip(jacobians, errors, strict=True)
    ]
    assert normal.decrease(step) == pytest.approx(1 - np.mean(left))


def test_weights_that_move_nothing_stay() -> None:
    normal = Normal(3)
    normal.add(np.array([1.0, 2.0]), [np.array([1.0, 0.0]), np.zeros(2), np.array([0.0, 1.0])])
    for damping in (0.0, 0.5):
        assert normal.step(damping)[1] == 0.0
    np.testing.assert_allclose(normal.step(0.0), [-1.0, 0.0, -2.0], atol=1e-12)


@pytest.mark.parametrize(
    ("error", "columns", "message"),
    [
        ([1.0, 2.0], [[1.0, 0.0]], "1 entries for 2 weights"),
        ([1.0, 2.0], [[1.0, 0.0], [1.0]], "differ in size"),
        ([1.0, np.nan], [[1.0, 0.0], [0.0, 1.0]], "finite"),
        ([1.0, 1.0], [[1.0, 0.0], [0.0, np.inf]], "finite"),
        ([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], "error is zero"),
    ],
)
def test_what_no_step_can_be_made_of_is_refused(
    error: list[float], columns: list[list[float]], message: str
) -> None:
    normal = Normal(2)
    with pytest.raises(ValueError, match=message):
        normal.add(error, columns)
    with pytest.raises(ValueError, match="no sample"):
        normal.step(0.1)
    normal.add([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="damping"):
        normal.step(-0.1)


def test_directions_move_the_forecast_by_orthogonal_vectors_of_one_size() -> None:
    generator = np.random.default_rng(0)
    base = generator.standard_normal(50)
    residuals = base + 0.05 * np.cumsum(generator.standard_normal((6, 50)), axis=0)
    inputs = np.cumsum(generator.standard_normal((6, 50)), axis=0)
    gram = Gram(residuals @ residuals.T, inputs @ residuals.T, inputs @ inputs.T, inputs @ inputs.T)
    kept = [4, 3, 1]
    found = directions(gram, kept)
    moved = residuals[kept].T @ found
    np.testing.assert_allclose(moved.T @ moved, np.eye(3), atol=1e-4)
    np.testing.assert_array_equal(found, np.triu(found))

    with_input = np.column_stack([residuals[kept].T, inputs[5] - inputs[4]]) @ directions(
        gram, kept, 5
    )
    np.testing.assert_allclose(with_input.T @ with_input, np.eye(4), atol=1e-4)

    outputs = inputs[kept].T @ output_directions(gram, kept)
    np.testing.assert_allclose(outputs.T @ outputs, np.eye(3), atol=1e-4)


def test_directions_stay_bounded_where_residuals_are_parallel() -> None:
    base = np.random.default_rng(0).standard_normal(50)
    vectors = np.stack([base, base, base])
    inner = vectors @ vectors.T / (base @ base)
    gram = Gram(inner, inner, inner, inner)
    found = directions(gram, (1, 0), 2, ridge=1e-4)
    assert np.abs(found).max() <= 100
    # The input has not changed: its weight would move nothing.
    assert (found[2] == 0).all()
    with pytest.raises(ValueError, match=r"0\.\.2, got 3"):
        directions(gram, (3, 0))
