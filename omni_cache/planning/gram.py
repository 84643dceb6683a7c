"""What a forecast from any kept set costs at any step, read off inner products of a calibration.

A forecast is a weighted sum of vectors, so that its squared error needs their inner products only:
no tensor, no model. Knows matrices of numbers; must not know how they were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Steps = npt.NDArray[np.intp]

RIDGE = 1e-8
"""What a fit adds to the squared norm of each regressor, as a share of it.

It stands for a relative noise of 1e-4 in what was kept, and so tells residuals that differ from
residuals that are parallel up to rounding.
"""


@dataclass(frozen=True, eq=False)
class Gram:
    """Mean inner products over the T steps of a loop: of residuals r, region inputs h, outputs v.

    Each is a mean over samples, where each sample is divided by its own mean of ``<r_t, r_t>``
    (for ``outputs`` by that of ``<v_t, v_t>``), so that samples count alike. Rows and columns of
    steps that another transformer ran are NaN.

    Attributes:
        residuals: (T, T) float64, ``<r_s, r_t>``.
        cross: (T, T) float64, ``<h_s, r_t>``: a row for each input, a column for each residual.
        inputs: (T, T) float64, ``<h_s, h_t>``.
        outputs: (T, T) float64, ``<v_s, v_t>``.

    Raises:
        ValueError: a field is not square, differs from ``residuals`` in size or in the steps that
            it lacks, is not finite, or cannot be a matrix of inner products.
    """

    residuals: Array
    cross: Array
    inputs: Array
    outputs: Array

    def __post_init__(self) -> None:
        for field in fields(self):
            matrix = np.array(getattr(self, field.name), dtype=np.float64)
            if matrix.ndim != 2 or not matrix.size or matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"{field.name} has to be (steps, steps), got {matrix.shape}")
            matrix.setflags(write=False)
            object.__setattr__(self, field.name, matrix)
        for field in fields(self):
            self._check(field.name)

    def _check(self, name: str) -> None:
        matrix: Array = getattr(self, name)
        if len(matrix) != len(self):
            raise ValueError(f"{name} has {len(matrix)} steps where residuals have {len(self)}")
        present = self.present
        if not (np.isnan(matrix[~present]).all() and np.isnan(matrix[:, ~present]).all()):
            raise ValueError(f"{name} has to be NaN where residuals lack a step")
        known = matrix[np.ix_(present, present)]
        if not np.isfinite(known).all():
            raise ValueError(f"{name} has to be finite at the steps that residuals have")
        if name == "cross" or not known.size:
            return
        rounding = 1e-6 * np.abs(known).max()
        if (np.diag(known) < -rounding).any():
            raise ValueError(f"{name} has a negative squared norm on its diagonal")
        if not np.allclose(known, known.T, rtol=0, atol=rounding):
            raise ValueError(f"{name} has to be symmetric")

    def __len__(self) -> int:
        return len(self.residuals)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Gram):
            return NotImplemented
        pairs = [(getattr(self, each.name), getattr(other, each.name)) for each in fields(self)]
        return all(np.array_equal(one, another, equal_nan=True) for one, another in pairs)

    def __hash__(self) -> int:
        return hash(self.residuals.tobytes())

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """(T,) bool: the steps that this transformer ran."""
        return ~np.isnan(np.diag(self.residuals))


class Fit(NamedTuple):
    """A forecast of one step from one kept set.

    Attributes:
        weights: of the kept residuals (or outputs), newest first.
        input_weight: of what the region's input has changed by since the newest kept step.
        error: the mean squared error, in units of the Gram.
    """

    weights: tuple[float, ...]
    input_weight: float
    error: float


class Fits(NamedTuple):
    """Forecasts of one step from K kept sets of m steps each; see `Fit`.

    Attributes:
        weights: (K, m) float64.
        input_weights: (K,) float64.
        errors: (K,) float64.
    """

    weights: Array
    input_weights: Array
    errors: Array


class Regression(NamedTuple):
    """The inner products that decide forecasts of one step from K kept sets.

    The p regressors are the m kept vectors, newest first, and last, where it is asked for, the
    change of the region's input since the newest of them.

    Attributes:
        products: (K, p, p) float64, of the regressors with each other.
        targets: (K, p) float64, of the regressors with the vector that is forecast.
        energy: the squared norm of that vector.
    """

    products: Array
    targets: Array
    energy: float

    def solved(self, ridge: float) -> Array:
        """(K, p): the least-squares weights, with a ridge as `equilibrated` adds it."""
        alike, norms = equilibrated(self.products, ridge)
        solved = np.linalg.solve(alike, (self.targets / norms)[..., None])[..., 0]
        return np.asarray(solved / norms, dtype=np.float64)

    def errors(self, weights: Array) -> Array:
        """(K,): mean squared errors of forecasts by ``weights`` (K, p)."""
        if weights.shape != self.targets.shape:
            raise ValueError(f"got weights {weights.shape} for regressors {self.targets.shape}")
        explained = 2 * (weights * self.targets).sum(axis=1)
        spent = ((weights[:, None, :] @ self.products)[:, 0, :] * weights).sum(axis=1)
        errors: Array = np.maximum(self.energy - explained + spent, 0.0)
        return errors


def equilibrated(products: Array, ridge: float) -> tuple[Array, Array]:
    """Products (..., p, p) of regressors scaled to norm 1, plus a ridge; their norms (..., p).

    Damped by a share of their own squared norm, regressors of different size are damped alike. A
    regressor that is zero gets an infinite norm, and so no weight.

    Raises:
        ValueError: ``ridge`` is not positive.
    """
    if not ridge > 0:
        raise ValueError(f"ridge has to be positive, got {ridge}")
    squares = np.diagonal(products, axis1=-2, axis2=-1)
    norms = np.where(squares > 0, np.sqrt(squares.clip(min=0)), np.inf)
    alike = products / norms[..., :, None] / norms[..., None, :]
    return alike + ridge * np.eye(products.shape[-1]), norms


def regression(gram: Gram, kepts: Steps, step: int, with_input: bool = False) -> Regression:
    """The inner products for forecasts of the residual of ``step``.

    Args:
        gram: what was calibrated.
        kepts: (K, m) kept sets, newest first.
        step: the step that is forecast.
        with_input: the change of the region's input is one more regressor.

    Raises:
        ValueError: a step lies outside of the Gram, was not run by this transformer, or is kept
            and forecast at once.
    """
    products, targets, energy = _regression(gram, gram.residuals, kepts, step)
    if not with_input:
        return Regression(products, targets, energy)
    newest = kepts[:, 0]
    with_kept = gram.cross[step, kepts] - gram.cross[newest[:, None], kepts]
    with_target = gram.cross[step, step] - gram.cross[newest, step]
    change = gram.inputs[step, step] - 2 * gram.inputs[step, newest] + gram.inputs[newest, newest]
    kept = kepts.shape[1]
    bordered = np.empty((len(kepts), kept + 1, kept + 1))
    bordered[:, :kept, :kept] = products
    bordered[:, :kept, kept] = bordered[:, kept, :kept] = with_kept
    bordered[:, kept, kept] = change
    return Regression(bordered, np.column_stack([targets, with_target]), energy)


def output_regression(gram: Gram, kepts: Steps, step: int) -> Regression:
    """The inner products for forecasts of the whole output of ``step``; see `regression`."""
    return _regression(gram, gram.outputs, kepts, step)


def among(gram: Gram, inner: Array, kepts: Steps) -> Array:
    """(K, m, m): the products within each kept set (K, m), out of ``inner``, one of the Gram's.

    Raises:
        ValueError: a step lies outside of the Gram, or was not run by this transformer.
    """
    if kepts.ndim != 2 or not kepts.shape[1]:
        raise ValueError(f"kept sets have to be (sets, steps of each), got shape {kepts.shape}")
    _check_steps(gram, kepts)
    products: Array = inner[kepts[:, :, None], kepts[:, None, :]]
    return products


def _regression(gram: Gram, inner: Array, kepts: Steps, step: int) -> Regression:
    products = among(gram, inner, kepts)
    _check_steps(gram, np.array([step]))
    if (kepts == step).any():
        raise ValueError(f"step {step} is kept and forecast at once")
    return Regression(products, inner[kepts, step], float(inner[step, step]))


def _check_steps(gram: Gram, steps: Steps) -> None:
    outside = steps[(steps < 0) | (steps >= len(gram))]
    if outside.size:
        raise ValueError(f"steps have to lie in 0..{len(gram) - 1}, got {int(outside[0])}")
    absent = steps[~gram.present[steps]]
    if absent.size:
        raise ValueError(f"this transformer did not run step {int(absent[0])}")


def fits(
    gram: Gram, kepts: Steps, step: int, with_input: bool = False, ridge: float = RIDGE
) -> Fits:
    """Least-squares forecasts of the residual of ``step`` from ``kepts`` (K, m), all at once.

    Raises:
        ValueError: as `regression`, or the ridge is not positive.
    """
    asked = regression(gram, kepts, step, with_input)
    weights = asked.solved(ridge)
    kept = kepts.shape[1]
    input_weights = weights[:, kept] if with_input else np.zeros(len(kepts))
    return Fits(weights[:, :kept], input_weights, asked.errors(weights))


def fits_outputs(gram: Gram, kepts: Steps, step: int, ridge: float = RIDGE) -> Fits:
    """Least-squares forecasts of the whole output of ``step``; see `fits`."""
    asked = output_regression(gram, kepts, step)
    weights = asked.solved(ridge)
    return Fits(weights, np.zeros(len(kepts)), asked.errors(weights))


def fit(
    gram: Gram, kept: Sequence[int], step: int, with_input: bool = False, ridge: float = RIDGE
) -> Fit:
    """The least-squares forecast of the residual of ``step`` from ``kept``, newest first."""
    return _only(fits(gram, np.array([kept], dtype=np.intp), step, with_input, ridge))


def fit_outputs(gram: Gram, kept: Sequence[int], step: int, ridge: float = RIDGE) -> Fit:
    """The least-squares forecast of the whole output of ``step`` from ``kept``, newest first."""
    return _only(fits_outputs(gram, np.array([kept], dtype=np.intp), step, ridge))


def _only(found: Fits) -> Fit:
    weights = tuple(found.weights[0].tolist())
    return Fit(weights, float(found.input_weights[0]), float(found.errors[0]))


def error_of(
    gram: Gram,
    kept: Sequence[int],
    step: int,
    weights: Sequence[float],
    input_weight: float = 0.0,
) -> float:
    """The mean squared error of the residual of ``step`` forecast by any weights, newest first."""
    asked = regression(gram, np.array([kept], dtype=np.intp), step, with_input=True)
    return float(asked.errors(np.array([[*weights, input_weight]]))[0])


def output_error_of(gram: Gram, kept: Sequence[int], step: int, weights: Sequence[float]) -> float:
    """The mean squared error of the whole output of ``step`` forecast by any weights."""
    asked = output_regression(gram, np.array([kept], dtype=np.intp), step)
    return float(asked.errors(np.array([weights], dtype=np.float64))[0])


@dataclass(frozen=True, eq=False)
class FittedCosts:
    """What fitted forecasts cost, in the form that the search for schedules reads.

    A step costs the sum, over the Grams that have it, of its importance there times the error of
    the least-squares forecast. Grams are those of guidance branches, which share actions, and of
    experts, each of which has steps of its own.

    Attributes:
        grams: what was calibrated, one Gram at least.
        importance: (T,), or (Grams, T): how much a squared error of a step counts.
        solve: the fit, such as `fits`, ``partial(fits, with_input=True)`` or `fits_outputs`.
    """

    grams: Sequence[Gram]
    importance: npt.ArrayLike
    solve: Callable[[Gram, Steps, int], Fits] = fits

    def many(self, kepts: Steps, step: int) -> Array:
        """(K,): what ``step`` costs from each of the kept sets (K, m).

        Raises:
            ValueError: no Gram has the step, or one that has it lacks a kept step.
        """
        if not any(gram.present[step] for gram in self.grams):
            raise ValueError(f"step {step} is in no Gram")
        shape = (len(self.grams), len(self.grams[0]))
        importance = np.broadcast_to(np.asarray(self.importance, dtype=np.float64), shape)
        costs = np.zeros(len(kepts))
        for gram, important in zip(self.grams, importance, strict=True):
            if gram.present[step]:
                costs += important[step] * self.solve(gram, kepts, step).errors
        return costs

    def __call__(self, kept: Sequence[int], step: int) -> float:
        """What ``step`` costs from one kept set."""
        return float(self.many(np.array([kept], dtype=np.intp), step)[0])


def resampled(gram: Gram, before: Sequence[float], after: Sequence[float]) -> Gram:
    """The Gram for a loop with other times: its vectors are interpolated along sigma.

    Each vector of the new loop is a weighted sum of calibrated ones, by the cubic through the four
    nearest of them, or by the line through two where there are no four, so that ``G' = L G L^T``
    is again a matrix of inner products. Up to one step beyond the calibrated range the line goes
    on. A new step belongs to this transformer where the nearest calibrated step does.

    Args:
        gram: of a loop of T steps.
        before: T sigmas (or timesteps) of that loop, strictly falling or strictly rising.
        after: the sigmas wanted, in the same unit.

    Raises:
        ValueError: times are not finite, do not fit the Gram, repeat or turn, or lie more than a
            step beyond the calibrated range.
    """
    known, wanted = np.array(before, dtype=np.float64), np.array(after, dtype=np.float64)
    for name, times in (("before", known), ("after", wanted)):
        if times.ndim != 1 or not times.size or not np.isfinite(times).all():
            raise ValueError(f"{name} has to be a list of finite numbers, got {times.tolist()}")
    if len(known) != len(gram):
        raise ValueError(f"before has {len(known)} times for {len(gram)} calibrated steps")
    if known[0] > known[-1]:
        known, wanted = -known, -wanted
    gaps = np.diff(known)
    if not (gaps > 0).all():
        raise ValueError(f"before has to fall or to rise strictly, got {list(before)}")
    first, last = (gaps[0], gaps[-1]) if gaps.size else (0.0, 0.0)
    beyond = (wanted < known[0] - first) | (wanted > known[-1] + last)
    if beyond.any():
        raise ValueError(
            f"after has {after[int(beyond.argmax())]}, more than a step beyond the calibrated "
            f"{before[0]} to {before[-1]}"
        )
    present = gram.present
    belongs = present[np.abs(wanted[:, None] - known).argmin(axis=1)]
    mixing = np.zeros((len(wanted), len(known)))
    for step in np.flatnonzero(belongs):
        mixing[step, present] = _interpolation(known[present], float(wanted[step]))
    absent = ~(belongs[:, None] & belongs)

    def mixed(matrix: Array) -> Array:
        product = mixing @ np.where(np.isnan(matrix), 0.0, matrix) @ mixing.T
        return np.where(absent, np.nan, product)

    return Gram(*(mixed(getattr(gram, field.name)) for field in fields(gram)))


def _interpolation(times: Array, time: float) -> Array:
    """(T,): the weights over rising ``times`` of the local polynomial at ``time``."""
    count = len(times)
    right = int(np.clip(np.searchsorted(times, time), 1, max(count - 1, 1)))
    start, end = right - 1, min(right + 1, count)
    if count >= 4 and times[0] <= time <= times[-1]:
        start = int(np.clip(right - 2, 0, count - 4))
        end = start + 4
    weights = np.zeros(count)
    for node in range(start, end):
        others = np.delete(times[start:end], node - start)
        weights[node] = np.prod((time - others) / (times[node] - others))
    return weights
