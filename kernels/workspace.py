"""Scratch memory of a reduction that finishes in its own launch.

An int32 counter of arrived programs, alone in the first HEADER_BYTES, then one partial sum per
program and kind of sum. The counter is 0 between launches; the partials need no initial value.
Knows nothing of Triton, so that a workspace can be made where Triton is not installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEADER_BYTES = 128
"""A cache line, so that counting programs in does not disturb the partial sums."""

MAX_PROGRAMS = 2048
"""Bound on the grid, and so on the partial sums of each kind."""


def workspace_size(sums: int, dtype: torch.dtype) -> int:
    """Return how many elements of `dtype` hold the counter and `sums` kinds of partial sums."""
    return HEADER_BYTES // dtype.itemsize + sums * MAX_PROGRAMS


REL_L1_WORKSPACE_SIZE = workspace_size(2, torch.float32)


def rel_l1_workspace(device: torch.device | str) -> Tensor:
    """Allocate what `rel_l1_gate` keeps on `device` between its programs.

    One workspace serves any number of gates one after the other, of any size, but not at the same
    time: calls that may overlap (on two CUDA streams, say) need a workspace each.

    Returns:
        float32 zeros of shape (REL_L1_WORKSPACE_SIZE,).
    """
    return torch.zeros(REL_L1_WORKSPACE_SIZE, dtype=torch.float32, device=device)
