"""What each kernel computes, in float64 and as plainly as it can be said; tests hold to these."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import isfinite

import torch
from torch import Tensor


def rel_l1(current: Tensor, previous: Tensor, along: Sequence[Tensor] = ()) -> Tensor:
    """Return [sum|current - previous|, sum|previous|, number of elements, *means of `along`]."""
    moved = (current.double() - previous.double()).abs().sum()
    sums = [float(moved), float(previous.double().abs().sum()), float(current.numel())]
    return torch.tensor(sums + [float(rider.double().mean()) for rider in along], dtype=moved.dtype)


def rel_l1_gate(
    current: Tensor, previous: Tensor, accumulated: Tensor, coefficients: Tensor, threshold: float
) -> Tensor:
    """Return [compute, distance, accumulated]; formula and source: distance.py."""
    moved = float((current.double() - previous.double()).abs().mean())
    distance = moved / (float(previous.double().abs().mean()) + 1e-8)
    rescaled = reduce(lambda value, c: value * distance + c, coefficients.tolist())
    total = float(accumulated) + abs(rescaled)
    reuse = isfinite(distance) and total < threshold
    return accumulated.new_tensor([float(not reuse), distance, total])


def magnitude_gate(state: Tensor, ratio: Tensor, threshold: float, max_skip_steps: int) -> Tensor:
    """Return [compute, ratio, error, skipped]; formula and source: magnitude.py."""
    accumulated = float(state[0]) * float(ratio)
    error = float(state[1]) + abs(1.0 - accumulated)
    skipped = float(state[2]) + 1.0
    reuse = isfinite(error) and error <= threshold and skipped <= max_skip_steps
    return state.new_tensor([float(not reuse), accumulated, error, skipped])


def magnitude_stats(residual: Tensor, previous: Tensor) -> Tensor:
    """Return [mean ratio, std of the ratio, mean cosine distance]; formula: magnitude.py."""
    r, p = residual.double(), previous.double()
    r_norm, p_norm = r.norm(dim=-1), p.norm(dim=-1)
    counted = p_norm != 0
    if not counted.any():
        return torch.tensor([1.0, 0.0, 0.0], device=r.device)
    ratio = (r_norm / p_norm)[counted]
    cosine = torch.where(r_norm == 0, 0.0, (r * p).sum(dim=-1) / (r_norm * p_norm))[counted]
    std = ratio.std() if ratio.numel() > 1 else torch.zeros_like(ratio[0])
    return torch.stack([ratio.mean(), std, (1 - cosine).mean()]).float()


def inner_products(residual: Tensor, previous: Sequence[Tensor], samples: int) -> Tensor:
    """Return for each sample [residual . residual, *(residual . p for p in previous)]."""
    all_ = [
        each.double().reshape(samples, residual.numel() // samples)
        for each in (residual, *previous)
    ]
    return torch.stack([(all_[0] * each).sum(1) for each in all_], dim=1).reshape(-1)
