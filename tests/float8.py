"""What 8 bits with a scale for each row leave of a tensor, written down anew."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(tensor: Tensor) -> Tensor:
    """Each row as multiples of a 448th of its largest element, as float8_e4m3fn rounds them."""
    scale = tensor.float().abs().max(dim=-1, keepdim=True).values / 448
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (tensor.float() / scale).to(torch.float8_e4m3fn).float() * scale
