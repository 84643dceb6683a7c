"""What the reduction kernels share: strided rows, a persistent grid, and who finishes last.

A reduction over a whole tensor takes two steps: every program reduces its share, then one program
adds up the shares. Both fit into one launch when the program that happens to finish last does the
second step, and the result stays deterministic as long as it adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from omni_cache.kernels.scratch import HEADER_BYTES, MAX_PROGRAMS

_HEADER = tl.constexpr(HEADER_BYTES // torch.int32.itemsize)

WARPS = 8
TILE_BYTES = 4096
"""What a program reads of a tensor at a time: one 16-byte load for each thread of 8 warps.

Many light programs hide the latency of memory, not many loads of one program.
"""
PROGRAMS_PER_MULTIPROCESSOR = 6
"""As many programs of 8 warps as find room on a multiprocessor with 40 registers a thread."""


@cache
def programs_on(device: torch.device) -> int:
    """Return how many programs fill a CUDA or ROCm `device` once."""
    multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, MAX_PROGRAMS)


def merge_dimensions(
    sizes: Sequence[int], *strides: Sequence[int]
) -> tuple[list[int], list[list[int]]]:
    """Fold neighbouring dimensions that every tensor steps through evenly into one.

    Args:
        sizes: the shape that the tensors share.
        strides: each tensor's strides, in elements.

    Returns:
        The sizes of the dimensions that remain, without those of size 1, and each tensor's strides
        along them. A contiguous tensor keeps at most one dimension.
    """
    merged_sizes: list[int] = []
    merged_strides: list[list[int]] = [[] for _ in strides]
    for size, *steps in zip(sizes, *strides, strict=True):
        if size == 1:
            continue
        if merged_sizes and all(
            kept[-1] == size * step for kept, step in zip(merged_strides, steps, strict=True)
        ):
            merged_sizes[-1] *= size
            for kept, step in zip(merged_strides, steps, strict=True):
                kept[-1] = step
        else:
            merged_sizes.append(size)
            for kept, step in zip(merged_strides, steps, strict=True):
                kept.append(step)
    return merged_sizes, merged_strides


def pad_left(values: Sequence[int], length: int, value: int) -> list[int]:
    """Return `values` with as many `value` before them as make `length`."""
    return [value] * (length - len(values)) + list(values)


def tile_shape(rows: int, columns: int, column_stride: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the rows and columns of the tile that suits a tensor, both powers of two.

    Contiguous columns want long rows; strided ones want a square tile, in which threads can walk
    down the rows and still touch neighbouring addresses.
    """
    tile = TILE_BYTES // dtype.itemsize
    if rows == 1:
        return 1, tile
    widest = 512 if column_stride == 1 else 32
    tile_columns = min(triton.next_power_of_2(max(columns, 1)), widest)
    return tile // tile_columns, tile_columns


@triton.jit  # type: ignore[untyped-decorator]
def partials_in(scratch_ptr: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Point at the partial sums, of `dtype`, in the int32 memory that `scratch_on` returns."""
    return (scratch_ptr + _HEADER).to(tl.pointer_type(dtype))


@triton.jit  # type: ignore[untyped-decorator]
def last_to_arrive(counter_ptr: tl.tensor) -> tl.tensor:
    """Count this program in at an int32 counter that started at 0; true for the last program.

    The release half publishes what this program stored, the acquire half makes what the others
    stored visible here. The barrier puts the stores of all threads before the one that counts.
    The last program has to set the counter back to 0 for the next launch.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    return arrived == tl.num_programs(0) - 1


@triton.jit  # type: ignore[untyped-decorator]
def total(
    partials_ptr: tl.tensor, PARTIALS: tl.constexpr, dtype: tl.constexpr = tl.float64
) -> tl.tensor:
    """Add up in `dtype`, in a fixed order, the partial sums that the programs stored, one each.

    Only the last to arrive may. `.cg` reads from L2, where the other programs' stores are; L1 may
    still hold an older launch's.
    """
    program = tl.arange(0, PARTIALS)
    stored = program < tl.num_programs(0)
    partials = tl.load(partials_ptr + program, mask=stored, other=0, cache_modifier=".cg")
    return tl.sum(partials.to(dtype))
