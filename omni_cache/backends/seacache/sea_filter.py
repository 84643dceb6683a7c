"""The parts of SeaCache's rule, for callers who have latents and residuals in hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from omni_cache.kernels import number_dtype, rel_l1
from omni_cache.kernels.spectrum import filtered
from omni_cache.strategies import Time
from omni_cache.strategies.forecasts import Newton
from omni_cache.strategies.signals import LEAST_SIGMA


def apply_sea_filter(hidden_states: Tensor, sigma: float, power_exp: float = 3.0) -> Tensor:
    """Latents without the noise that they have at a sigma, in their own dtype.

    Args:
        hidden_states: (T, H, W, C), filtered over all but the last.
        sigma: the noise in them; clamped to just within 0 and 1.
        power_exp: exponent of the power that clean latents have at a frequency.
    """
    noise = min(max(float(sigma), LEAST_SIGMA), 1.0 - LEAST_SIGMA)
    device = hidden_states.device
    sigmas = torch.tensor([noise], dtype=number_dtype(device), device=device)
    return filtered(hidden_states[None], sigmas, (1, 2, 3), power_exp)[0]


def relative_l1_distance(current: Tensor, previous: Tensor, eps: float = 1e-16) -> float:
    """``mean|current - previous| / (mean|previous| + eps)``; NaN for empty tensors."""
    moved, size, count = rel_l1(current.float(), previous.float()).tolist()
    return (moved / count) / (size / count + eps) if count else math.nan


def indicator_distance(
    current: Sequence[Tensor] | None, previous: Sequence[Tensor] | None
) -> float:
    """The mean of the distances of several tensors.

    Infinite where there are none or not as many, where two are of another shape, dtype or device,
    or where the mean is not finite.
    """
    if not current or not previous or len(current) != len(previous):
        return math.inf
    pairs = list(zip(current, previous, strict=True))
    if any(
        (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device)
        for new, old in pairs
    ):
        return math.inf
    distance = sum(relative_l1_distance(*pair) for pair in pairs) / len(pairs)
    return distance if math.isfinite(distance) else math.inf


def extrapolate_residual(history: Sequence[tuple[int, Tensor]], step: int, order: int) -> Tensor:
    """The polynomial through the last ``order + 1`` residuals, at a step.

    Args:
        history: steps and residuals, the newest last. Fewer of them give a lower order; where a
            step comes twice, the newest residual stays.
        step: where to evaluate.
        order: degree of the polynomial.

    Returns:
        A new tensor like the residuals; the sum is taken in float32 at least.

    Raises:
        ValueError: ``history`` is empty.
    """
    if not history:
        raise ValueError("history is empty; it must have a residual to extrapolate")
    newest = history[::-1][: max(0, order) + 1]
    if len({index for index, _ in newest}) < len(newest):
        newest = newest[:1]
    forecast = Newton(len(newest) - 1, "step")
    weights = forecast.weights([Time(index) for index, _ in newest], Time(step))
    dtype = newest[0][1].dtype
    wide = torch.promote_types(dtype, torch.float32)
    terms = [w * each.to(wide) for w, (_, each) in zip(weights, newest, strict=True)]
    return reduce(torch.add, terms).to(dtype)
