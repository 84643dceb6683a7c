"""What each kernel computes, in float64 and as plainly as it can be said; tests hold to these.

No function changes its arguments: what an operator writes in place is returned beside the verdict.
"""

from __future__ import annotations

from functools import reduce
from math import isfinite

import torch
from torch import Tensor


def rel_l1_gate(
    current: Tensor, previous: Tensor, accumulated: Tensor, coefficients: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return verdict, next `previous` and next `accumulated`; formula and source: rel_l1.py."""
    moved = float((current.double() - previous.double()).abs().mean())
    distance = moved / (float(previous.double().abs().mean()) + 1e-8)
    rescaled = reduce(lambda value, c: value * distance + c, coefficients.tolist())
    total = float(accumulated) + abs(rescaled)
    reuse = isfinite(distance) and total < threshold
    verdict = accumulated.new_tensor([float(not reuse), distance, total])
    return verdict, current.contiguous(), accumulated.new_tensor([total if reuse else 0.0])


def magnitude_gate(
    state: Tensor, ratio: Tensor, threshold: float, max_skip_steps: int
) -> tuple[Tensor, Tensor]:
    """Return verdict and next `state`; formula and source: magnitude.py."""
    accumulated = float(state[0]) * float(ratio)
    error = float(state[1]) + abs(1.0 - accumulated)
    skipped = float(state[2]) + 1.0
    reuse = isfinite(error) and error <= threshold and skipped <= max_skip_steps
    next_state = [accumulated, error, skipped] if reuse else [1.0, 0.0, 0.0]
    verdict = [float(not reuse), accumulated, error]
    return state.new_tensor(verdict), state.new_tensor(next_state)


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
