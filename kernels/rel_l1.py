"""The relative-L1 gate of TeaCache in one launch.

    d   = mean|current - previous| / (mean|previous| + 1e-8)
    acc = acc + |poly(d)|
    compute unless acc < threshold; on compute acc = 0;  previous = current

Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", 2024,
https://arxiv.org/abs/2411.19108, section 3.

Both tensors are read once and one is written: the least traffic the formula allows. Each program
leaves its two fp32 partial sums in the workspace, and the last to arrive decides.
"""

import torch
import triton
import triton.language as tl
from omni_cache.kernels.grid import (
    WARPS,
    last_to_arrive,
    merge_dimensions,
    pad_left,
    tile_shape,
    total,
)
from omni_cache.kernels.workspace import HEADER_BYTES
from torch import Tensor

_HEADER = tl.constexpr(HEADER_BYTES // torch.float32.itemsize)


@triton.jit  # type: ignore[untyped-decorator]
def rel_l1_gate_kernel(
    current_ptr: tl.tensor,
    previous_ptr: tl.tensor,
    accumulated_ptr: tl.tensor,
    workspace_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    verdict_ptr: tl.tensor,
    threshold: tl.float64,
    count: tl.float64,
    rows: tl.tensor,
    inner_rows: tl.tensor,
    columns: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    column_stride: tl.tensor,
    COEFFICIENTS: tl.constexpr,
    PARTIALS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Decide; the module states the formula.

    Element (row, column) lies at row * columns + column in `previous`, and at
    (row // inner_rows) * outer_stride + (row % inner_rows) * inner_stride + column * column_stride
    in `current`. `count` is the number of elements. The grid has at most PARTIALS programs.
    """
    row_tiles = tl.cdiv(rows, TILE_ROWS)
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    moved = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    size = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row = (tile // column_tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        column = (tile % column_tiles).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        current_row = (row // inner_rows) * outer_stride + (row % inner_rows) * inner_stride
        current_at = current_ptr + current_row[:, None] + (column * column_stride)[None, :]
        previous_at = previous_ptr + (row * columns)[:, None] + column[None, :]

        current = tl.load(current_at, mask=inside, other=0.0)
        previous = tl.load(previous_at, mask=inside, other=0.0).to(tl.float32)
        moved += tl.abs(current.to(tl.float32) - previous)
        size += tl.abs(previous)
        tl.store(previous_at, current, mask=inside)

    partials_ptr = workspace_ptr + _HEADER
    tl.store(partials_ptr + tl.program_id(0), tl.sum(moved))
    tl.store(partials_ptr + PARTIALS + tl.program_id(0), tl.sum(size))
    counter_ptr = workspace_ptr.to(tl.pointer_type(tl.int32))
    if last_to_arrive(counter_ptr):
        mean_moved = total(partials_ptr, PARTIALS) / count
        mean_size = total(partials_ptr + PARTIALS, PARTIALS) / count
        distance = mean_moved / (mean_size + 1e-8)

        rescaled = tl.load(coefficients_ptr)
        for i in tl.static_range(1, COEFFICIENTS):
            rescaled = rescaled * distance + tl.load(coefficients_ptr + i)
        accumulated = tl.load(accumulated_ptr) + tl.abs(rescaled)
        # A comparison with NaN is false, so whatever is not finite computes.
        reuse = (distance < float("inf")) & (accumulated < threshold)

        tl.store(accumulated_ptr, tl.where(reuse, accumulated, 0.0))
        tl.store(verdict_ptr, tl.where(reuse, 0.0, 1.0).to(tl.float64))
        tl.store(verdict_ptr + 1, distance)
        tl.store(verdict_ptr + 2, accumulated)
        tl.store(counter_ptr, 0)


def launch(
    current: Tensor,
    previous: Tensor,
    accumulated: Tensor,
    workspace: Tensor,
    coefficients: Tensor,
    threshold: float,
    *,
    programs: int,
) -> Tensor:
    """Launch the gate with at most `programs` programs; arguments as `ops.rel_l1_gate` has them.

    A `current` whose layout needs more than three strides, even with dimensions merged, is copied
    first, which costs a second launch; any other layout is read in place.
    """
    count = current.numel()
    sizes, strides = [count], [1]
    if not current.is_contiguous():
        merged_sizes, (merged_strides,) = merge_dimensions(current.shape, current.stride())
        if len(merged_sizes) <= 3:
            sizes, strides = merged_sizes, merged_strides
        else:
            current = current.contiguous()
    outer_rows, inner_rows, columns = pad_left(sizes, 3, 1)
    outer_stride, inner_stride, column_stride = pad_left(strides, 3, 0)
    rows = outer_rows * inner_rows
    tile_rows, tile_columns = tile_shape(rows, columns, column_stride, current.dtype)
    tiles = triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns)
    verdict = torch.empty(3, dtype=torch.float64, device=current.device)
    rel_l1_gate_kernel[(max(1, min(programs, tiles)),)](
        current,
        previous,
        accumulated,
        workspace,
        coefficients,
        verdict,
        threshold,
        float(count),
        rows,
        inner_rows,
        columns,
        outer_stride,
        inner_stride,
        column_stride,
        COEFFICIENTS=coefficients.numel(),
        PARTIALS=triton.next_power_of_2(programs),
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return verdict
