"""Scratch memory of a reduction that finishes in its own launch.

An int32 counter of arrived programs, alone in the first HEADER_BYTES, then one partial sum per
program and kind of sum. The counter is 0 between launches; the partials need no initial value.
Knows streams and memory pools, and nothing of Triton or of what is summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEADER_BYTES = 128
"""A cache line, so that counting programs in does not disturb the partial sums."""

MAX_PROGRAMS = 2048
"""Bound on the grid, and so on the partial sums of each kind."""

MAX_SUMS = 4
"""Bound on the kinds of sums; each partial sum takes at most 8 bytes."""

SCRATCH_BYTES = HEADER_BYTES + MAX_SUMS * MAX_PROGRAMS * 8

_KEPT: dict[tuple[torch.device, int], Tensor] = {}
"""One scratch per device and stream. No state: between launches all of them are alike."""


def scratch_on(device: torch.device) -> Tensor:
    """Return scratch memory for the next launch on the current stream of a CUDA or ROCm `device`.

    Launches on one stream take turns, so they share a scratch, which is cleared once. Two kinds of
    launches get a scratch of their own, cleared by a memset before the launch: those that a CUDA
    graph captures, because graphs replay on any stream, and those within a private memory pool,
    because its owner may free or unmap the pool while the stream lives on.

    Returns:
        int32 (SCRATCH_BYTES / 4,), counter 0.
    """
    if torch.cuda.is_current_stream_capturing():
        return new_scratch(device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    scratch = _KEPT.get(key)
    if scratch is None:
        scratch = new_scratch(device)
        if _outlives_the_call(scratch):
            _KEPT[key] = scratch
    return scratch


def new_scratch(device: torch.device) -> Tensor:
    """Allocate scratch memory that nobody shares, counter 0."""
    return torch.zeros(SCRATCH_BYTES // 4, dtype=torch.int32, device=device)


def _outlives_the_call(tensor: Tensor) -> bool:
    """Whether `tensor` is known to lie in the common pool of PyTorch's own allocator."""
    if torch.cuda.get_allocator_backend() != "native":
        return False
    address = tensor.data_ptr()
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return any(
        tuple(segment["segment_pool_id"]) == (0, 0)
        and 0 <= address - segment["address"] < segment["total_size"]
        for segment in segments
    )
