"""Damped Gauss-Newton steps on a plan's weights, from how each of them moves the final result.

Knows arrays of numbers; must not know how they were rolled out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from omni_cache.planning.gram import RIDGE, Array, Gram, among, equilibrated, regression

_SLICE = 1 << 16
"""Elements of a result that are multiplied at a time, so that no float64 copy of it is made."""


class Normal:
    """The normal equations of p weights, summed over samples as they come.

    Each sample is divided by the norm of its own error, so that all count alike: what falls is
    the relative error, and the sample that is worst off does not decide alone.

    Attributes:
        matrix: (p, p) float64, the sum of ``J^T J / |e|^2``.
        vector: (p,) float64, the sum of ``J^T e / |e|^2``.
        samples: how many were added.
    """

    def __init__(self, weights: int) -> None:
        self.matrix: Array = np.zeros((weights, weights))
        self.vector: Array = np.zeros(weights)
        self.samples = 0

    def add(self, error: npt.ArrayLike, columns: Sequence[npt.ArrayLike]) -> None:
        """Add one sample.

        Args:
            error: its result less the one that is wanted, of any shape.
            columns: for each of the p weights, the derivative of the result, of the same shape.

        Raises:
            ValueError: numbers or shapes do not fit, something is not finite, or the error is
                zero and so nothing can be divided by it.
        """
        if len(columns) != len(self.vector):
            raise ValueError(f"columns has {len(columns)} entries for {len(self.vector)} weights")
        flat = [np.asarray(each).ravel() for each in (error, *columns)]
        if len({len(each) for each in flat}) > 1:
            raise ValueError(f"error and columns differ in size: {[len(each) for each in flat]}")
        products = np.zeros((len(flat), len(flat)))
        for start in range(0, len(flat[0]), _SLICE):
            rows = np.stack([each[start : start + _SLICE].astype(np.float64) for each in flat])
            if not np.isfinite(rows).all():
                raise ValueError("error and columns have to be finite")
            products += rows @ rows.T
        if products[0, 0] == 0:
            raise ValueError("error is zero, so there is nothing to improve in this sample")
        products /= products[0, 0]
        self.matrix += products[1:, 1:]
        self.vector += products[1:, 0]
        self.samples += 1

    def step(self, damping: float) -> Array:
        """(p,): the change of the weights that the linear model asks for.

        Args:
            damping: Levenberg's, as a share of the mean of ``matrix``'s diagonal. With 0 the step
                is the whole one, and directions that move nothing are left alone.

        Raises:
            ValueError: ``damping`` is negative, or no sample was added.
        """
        if not damping >= 0:
            raise ValueError(f"damping has to be at least 0, got {damping}")
        if not self.samples:
            raise ValueError("no sample was added")
        shift = damping * float(np.diag(self.matrix).mean())
        damped = self.matrix + shift * np.eye(len(self.vector))
        step = np.linalg.lstsq(damped, -self.vector, rcond=None)[0]
        return np.asarray(step, dtype=np.float64)

    def decrease(self, step: Array) -> float:
        """The share of their squared error that samples lose by ``step``, if all is linear: a mean.

        To be compared with what a rollout loses, before a step is believed.
        """
        return -float((2 * self.vector + self.matrix @ step) @ step) / self.samples


def gauss_newton_step(jacobians: Iterable[Array], errors: Iterable[Array], damping: float) -> Array:
    """(p,): the step for samples with Jacobians (m, p) and errors (m,), which are read one by one.

    Raises:
        ValueError: as `Normal.add` and `Normal.step`.
    """
    normal = Normal(0)
    for jacobian, error in zip(jacobians, errors, strict=True):
        if not normal.samples:
            normal = Normal(jacobian.shape[1])
        normal.add(error, list(jacobian.T))
    return normal.step(damping)


def directions(
    gram: Gram, kept: Sequence[int], step: int | None = None, *, ridge: float = RIDGE
) -> Array:
    """Directions in which a row's weights move the forecast by one unit of the Gram each.

    In calibration, moves along two of them change the forecast by orthogonal vectors, so that one
    step size serves all finite differences: 0.01 moves it by a hundredth of a mean residual.

    Args:
        gram: what was calibrated.
        kept: the kept set, newest first.
        step: the step that the row forecasts, if the row has an input weight, which comes last.
        ridge: bounds how far weights move along a direction in which the kept hardly differ.

    Returns:
        (p, p): W with ``W^T G W = 1``, a direction in each column. The first moves the newest
        weight alone, the second the two newest, and so on.

    Raises:
        ValueError: steps do not fit the Gram, or the ridge is not positive.
    """
    kepts = np.array([kept], dtype=np.intp)
    if step is None:
        return _orthonormal(among(gram, gram.residuals, kepts)[0], ridge)
    return _orthonormal(regression(gram, kepts, step, with_input=True).products[0], ridge)


def output_directions(gram: Gram, kept: Sequence[int], *, ridge: float = RIDGE) -> Array:
    """(m, m): as `directions`, for the weights of a skipped step, in units of the outputs."""
    return _orthonormal(among(gram, gram.outputs, np.array([kept], dtype=np.intp))[0], ridge)


def _orthonormal(products: Array, ridge: float) -> Array:
    alike, norms = equilibrated(products, ridge)
    inverse: Array = np.linalg.inv(np.linalg.cholesky(alike))
    return inverse.T / norms[:, None]
