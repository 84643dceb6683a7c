"""The relative L1 distance of two signals in one launch: measured, or measured and decided.

    moved, size = sum|current - previous|, sum|previous|
    d = (moved / count) / (size / count + 1e-8)

TeaCache's gate decides from it:

    acc = acc + |poly(d)|
    compute unless acc < threshold; a computed step starts again from acc = 0

Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", 2024,
https://arxiv.org/abs/2411.19108, section 3.

Both tensors are read once: the least traffic the formula allows. Each program leaves its two fp32
partial sums in scratch memory, and the last to arrive adds them up in fp64.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from omni_cache.kernels.grid import (
    WARPS,
    last_to_arrive,
    merge_dimensions,
    pad_left,
    partials_in,
    tile_shape,
    total,
)
from torch import Tensor

_RIDER_BLOCK = tl.constexpr(256)


@triton.jit  # type: ignore[untyped-decorator]
def signals_summed(
    current_ptr: tl.tensor,
    previous_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    rows: tl.tensor,
    inner_rows: tl.tensor,
    columns: tl.tensor,
    current_outer: tl.tensor,
    current_inner: tl.tensor,
    current_column: tl.tensor,
    previous_outer: tl.tensor,
    previous_inner: tl.tensor,
    previous_column: tl.tensor,
    PARTIALS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Store this program's share of `moved` and `size`; true for the program that stores last.

    Element (row, column) lies at (row // inner_rows) * outer + (row % inner_rows) * inner + column
    * column stride, with each tensor's own strides; the grid has at most PARTIALS programs.
    """
    row_tiles = tl.cdiv(rows, TILE_ROWS)
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    moved = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    size = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row = (tile // column_tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        column = (tile % column_tiles).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        outer = row // inner_rows
        inner = row % inner_rows
        current_at = current_ptr + (outer * current_outer + inner * current_inner)[:, None]
        previous_at = previous_ptr + (outer * previous_outer + inner * previous_inner)[:, None]
        current_at += (column * current_column)[None, :]
        previous_at += (column * previous_column)[None, :]

        current = tl.load(current_at, mask=inside, other=0.0).to(tl.float32)
        previous = tl.load(previous_at, mask=inside, other=0.0).to(tl.float32)
        moved += tl.abs(current - previous)
        size += tl.abs(previous)

    partial_ptr = partials_in(scratch_ptr, tl.float32) + tl.program_id(0)
    tl.store(partial_ptr, tl.sum(moved))
    tl.store(partial_ptr + PARTIALS, tl.sum(size))
    return last_to_arrive(scratch_ptr)


@triton.jit  # type: ignore[untyped-decorator]
def mean_of(rider_ptr: tl.tensor, count: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Return in fp64 the mean of `count` elements that lie `step` apart; NaN if there are none."""
    values = tl.zeros([_RIDER_BLOCK], tl.float64)
    for start in range(0, count, _RIDER_BLOCK):
        index = start + tl.arange(0, _RIDER_BLOCK)
        rider_at = rider_ptr + index.to(tl.int64) * step
        values += tl.load(rider_at, mask=index < count, other=0).to(tl.float64)
    return tl.sum(values) / count.to(tl.float64)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[f"along_{i}_{what}" for i in range(4) for what in ("ptr", "count", "step")]
)
def rel_l1_kernel(
    current_ptr: tl.tensor,
    previous_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    count: tl.float64,
    rows: tl.tensor,
    inner_rows: tl.tensor,
    columns: tl.tensor,
    current_outer: tl.tensor,
    current_inner: tl.tensor,
    current_column: tl.tensor,
    previous_outer: tl.tensor,
    previous_inner: tl.tensor,
    previous_column: tl.tensor,
    along_0_ptr: tl.tensor,
    along_0_count: tl.tensor,
    along_0_step: tl.tensor,
    along_1_ptr: tl.tensor,
    along_1_count: tl.tensor,
    along_1_step: tl.tensor,
    along_2_ptr: tl.tensor,
    along_2_count: tl.tensor,
    along_2_step: tl.tensor,
    along_3_ptr: tl.tensor,
    along_3_count: tl.tensor,
    along_3_step: tl.tensor,
    PARTIALS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Store moved, size, count and the mean of each rider whose pointer is given, in fp64.

    Layouts as `signals_summed` and `mean_of` have them. Where and how long a rider is changes from
    step to step, so the kernel is not compiled anew for it, but for a rider's dtype it is.
    """
    if tl.program_id(0) == 0:
        if along_0_ptr is not None:
            tl.store(numbers_ptr + 3, mean_of(along_0_ptr, along_0_count, along_0_step))
        if along_1_ptr is not None:
            tl.store(numbers_ptr + 4, mean_of(along_1_ptr, along_1_count, along_1_step))
        if along_2_ptr is not None:
            tl.store(numbers_ptr + 5, mean_of(along_2_ptr, along_2_count, along_2_step))
        if along_3_ptr is not None:
            tl.store(numbers_ptr + 6, mean_of(along_3_ptr, along_3_count, along_3_step))
    summed = signals_summed(
        current_ptr,
        previous_ptr,
        scratch_ptr,
        rows,
        inner_rows,
        columns,
        current_outer,
        current_inner,
        current_column,
        previous_outer,
        previous_inner,
        previous_column,
        PARTIALS,
        TILE_ROWS,
        TILE_COLUMNS,
    )
    if summed:
        tl.store(scratch_ptr, 0)
        partials_ptr = partials_in(scratch_ptr, tl.float32)
        tl.store(numbers_ptr, total(partials_ptr, PARTIALS))
        tl.store(numbers_ptr + 1, total(partials_ptr + PARTIALS, PARTIALS))
        tl.store(numbers_ptr + 2, count)


@triton.jit  # type: ignore[untyped-decorator]
def rel_l1_gate_kernel(
    current_ptr: tl.tensor,
    previous_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    accumulated_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    verdict_ptr: tl.tensor,
    threshold: tl.float64,
    count: tl.float64,
    rows: tl.tensor,
    inner_rows: tl.tensor,
    columns: tl.tensor,
    current_outer: tl.tensor,
    current_inner: tl.tensor,
    current_column: tl.tensor,
    previous_outer: tl.tensor,
    previous_inner: tl.tensor,
    previous_column: tl.tensor,
    COEFFICIENTS: tl.constexpr,
    PARTIALS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Decide; the module states the formula. Layouts as `signals_summed` has them."""
    summed = signals_summed(
        current_ptr,
        previous_ptr,
        scratch_ptr,
        rows,
        inner_rows,
        columns,
        current_outer,
        current_inner,
        current_column,
        previous_outer,
        previous_inner,
        previous_column,
        PARTIALS,
        TILE_ROWS,
        TILE_COLUMNS,
    )
    if summed:
        tl.store(scratch_ptr, 0)
        partials_ptr = partials_in(scratch_ptr, tl.float32)
        mean_moved = total(partials_ptr, PARTIALS) / count
        mean_size = total(partials_ptr + PARTIALS, PARTIALS) / count
        distance = mean_moved / (mean_size + 1e-8)

        rescaled = tl.load(coefficients_ptr)
        for i in tl.static_range(1, COEFFICIENTS):
            rescaled = rescaled * distance + tl.load(coefficients_ptr + i)
        accumulated = tl.load(accumulated_ptr) + tl.abs(rescaled)
        # A comparison with NaN is false, so whatever is not finite computes.
        reuse = (distance < float("inf")) & (accumulated < threshold)

        tl.store(verdict_ptr, tl.where(reuse, 0.0, 1.0).to(tl.float64))
        tl.store(verdict_ptr + 1, distance)
        tl.store(verdict_ptr + 2, accumulated)


def launch(
    current: Tensor, previous: Tensor, along: Sequence[Tensor], *, scratch: Tensor, programs: int
) -> Tensor:
    """Launch the measurement with at most `programs` programs; arguments as in `ops` and `scratch`.

    Signals whose layouts need more than three strides, even with dimensions merged, and riders that
    need more than one, are copied first, which costs a launch each; any other layout is read in
    place.
    """
    current, previous, sizes, strides = _in_three_dimensions(current, previous)
    tiles, tile = _tiling(sizes, strides, current.dtype)
    numbers = torch.empty(3 + len(along), dtype=torch.float64, device=current.device)
    riders: list[Tensor | int | None] = []
    for rider in along:
        riders += _in_one_dimension(rider)
    riders += [None, 0, 0] * (4 - len(along))
    rel_l1_kernel[(max(1, min(programs, tiles)),)](
        current,
        previous,
        scratch,
        numbers,
        float(current.numel()),
        sizes[0] * sizes[1],
        *sizes[1:],
        *strides[0],
        *strides[1],
        *riders,
        PARTIALS=triton.next_power_of_2(programs),
        num_warps=WARPS,
        enable_fp_fusion=False,
        **tile,
    )
    return numbers


def launch_gate(
    current: Tensor,
    previous: Tensor,
    accumulated: Tensor,
    coefficients: Tensor,
    threshold: float,
    *,
    scratch: Tensor,
    programs: int,
) -> Tensor:
    """Launch the gate; arguments as in `ops` and `scratch`, copies as `launch` makes them."""
    current, previous, sizes, strides = _in_three_dimensions(current, previous)
    tiles, tile = _tiling(sizes, strides, current.dtype)
    verdict = torch.empty(3, dtype=torch.float64, device=current.device)
    rel_l1_gate_kernel[(max(1, min(programs, tiles)),)](
        current,
        previous,
        scratch,
        accumulated,
        coefficients,
        verdict,
        threshold,
        float(current.numel()),
        sizes[0] * sizes[1],
        *sizes[1:],
        *strides[0],
        *strides[1],
        COEFFICIENTS=coefficients.numel(),
        PARTIALS=triton.next_power_of_2(programs),
        num_warps=WARPS,
        enable_fp_fusion=False,
        **tile,
    )
    return verdict


def _in_three_dimensions(
    current: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor, list[int], list[list[int]]]:
    """Return two signals, copied if they must be, their sizes in three dimensions and strides."""
    sizes, strides = [current.numel()], [[1], [1]]
    if not (current.is_contiguous() and previous.is_contiguous()):
        merged = merge_dimensions(current.shape, current.stride(), previous.stride())
        if len(merged[0]) <= 3:
            sizes, strides = merged
        else:
            current, previous = current.contiguous(), previous.contiguous()
    return current, previous, pad_left(sizes, 3, 1), [pad_left(each, 3, 0) for each in strides]


def _tiling(
    sizes: list[int], strides: list[list[int]], dtype: torch.dtype
) -> tuple[int, dict[str, int]]:
    """Return how many tiles cover signals of three dimensions, and the tile's constants."""
    rows, columns = sizes[0] * sizes[1], sizes[2]
    tile_rows, tile_columns = tile_shape(rows, columns, max(each[2] for each in strides), dtype)
    tiles = triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns)
    return tiles, {"TILE_ROWS": tile_rows, "TILE_COLUMNS": tile_columns}


def _in_one_dimension(rider: Tensor) -> tuple[Tensor, int, int]:
    """Return a rider, copied if it must be, and how many of its elements lie how far apart.

    Of a dimension that was expanded one element is read: the mean is the same.
    """
    if rider.numel() == 0:
        return rider, 0, 0
    own = [(size, step) for size, step in zip(rider.shape, rider.stride(), strict=True) if step]
    sizes, (steps,) = merge_dimensions([size for size, _ in own], [step for _, step in own])
    if len(sizes) > 1:
        rider = rider.contiguous()
        sizes, steps = [rider.numel()], [1]
    return (rider, sizes[0], steps[0]) if sizes else (rider, 1, 0)
