"""MagCache's bookkeeping and the statistics it is calibrated with.

Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache", 2025,
https://arxiv.org/abs/2506.09045: the mean over tokens of ||r_t|| / ||r_{t-1}||, the magnitude
ratio, tells how far a residual held since an earlier step has drifted from the true one.
"""

import math

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


@triton.jit(do_not_specialize=["max_skip_steps"])  # type: ignore[untyped-decorator]
def magnitude_gate_kernel(
    state_ptr: tl.tensor,
    ratio_ptr: tl.tensor,
    verdict_ptr: tl.tensor,
    threshold: tl.float64,
    max_skip_steps: tl.tensor,
) -> None:
    """Decide in one program, in fp64.

    acc *= ratio;  skipped += 1;  err += |1 - acc|
    reuse while err <= threshold and skipped <= max_skip_steps; a computed step starts again from
    acc, err, skipped = 1, 0, 0
    """
    accumulated = tl.load(state_ptr) * tl.load(ratio_ptr)
    error = tl.load(state_ptr + 1) + tl.abs(1.0 - accumulated)
    skipped = tl.load(state_ptr + 2) + 1.0
    # A comparison with NaN is false, so whatever is not finite computes.
    reuse = (error < float("inf")) & (error <= threshold) & (skipped <= max_skip_steps)

    tl.store(verdict_ptr, tl.where(reuse, 0.0, 1.0).to(tl.float64))
    tl.store(verdict_ptr + 1, accumulated)
    tl.store(verdict_ptr + 2, error)
    tl.store(verdict_ptr + 3, skipped)


def launch_gate(state: Tensor, ratio: Tensor, threshold: float, max_skip_steps: int) -> Tensor:
    """Launch the gate; arguments as `ops.magnitude_gate` has them."""
    verdict = torch.empty(4, dtype=state.dtype, device=state.device)
    magnitude_gate_kernel[(1,)](
        state, ratio, verdict, threshold, max_skip_steps, num_warps=1, enable_fp_fusion=False
    )
    return verdict


@triton.jit  # type: ignore[untyped-decorator]
def magnitude_stats_kernel(
    residual_ptr: tl.tensor,
    previous_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    tokens: tl.tensor,
    inner_tokens: tl.tensor,
    width: tl.tensor,
    residual_outer: tl.tensor,
    residual_inner: tl.tensor,
    residual_column: tl.tensor,
    previous_outer: tl.tensor,
    previous_inner: tl.tensor,
    previous_column: tl.tensor,
    PARTIALS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Mean and unbiased std of ||r|| / ||p|| and mean of 1 - r.p / (||r|| ||p||) over tokens.

    Element (token, column) lies at (token // inner_tokens) * outer + (token % inner_tokens) * inner
    + column * column stride, with each tensor's own strides; the grid has at most PARTIALS
    programs. Squares are summed in fp32 along a token and everything after that in fp64, so that
    the variance survives being the difference of two almost equal sums.
    """
    counts = tl.zeros([TILE_TOKENS], tl.float64)
    ratios = tl.zeros([TILE_TOKENS], tl.float64)
    squares = tl.zeros([TILE_TOKENS], tl.float64)
    distances = tl.zeros([TILE_TOKENS], tl.float64)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, TILE_TOKENS), tl.num_programs(0)):
        token = tl.cast(tile, tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
        outer = token // inner_tokens
        inner = token % inner_tokens
        residual_at = residual_ptr + (outer * residual_outer + inner * residual_inner)[:, None]
        previous_at = previous_ptr + (outer * previous_outer + inner * previous_inner)[:, None]
        residual_squared = tl.zeros([TILE_TOKENS, TILE_COLUMNS], tl.float32)
        previous_squared = tl.zeros([TILE_TOKENS, TILE_COLUMNS], tl.float32)
        product = tl.zeros([TILE_TOKENS, TILE_COLUMNS], tl.float32)
        for start in range(0, width, TILE_COLUMNS):
            column = (start + tl.arange(0, TILE_COLUMNS)).to(tl.int64)[None, :]
            inside = (token < tokens)[:, None] & (column < width)
            r = tl.load(residual_at + column * residual_column, mask=inside, other=0.0)
            p = tl.load(previous_at + column * previous_column, mask=inside, other=0.0)
            r = r.to(tl.float32)
            p = p.to(tl.float32)
            residual_squared += r * r
            previous_squared += p * p
            product += r * p

        residual_norm = tl.sqrt(tl.sum(residual_squared, axis=1).to(tl.float64))
        previous_norm = tl.sqrt(tl.sum(previous_squared, axis=1).to(tl.float64))
        counted = (token < tokens) & (previous_norm != 0.0)
        ratio = tl.where(counted, residual_norm / tl.where(counted, previous_norm, 1.0), 0.0)
        norms = residual_norm * previous_norm
        cosine = tl.sum(product, axis=1).to(tl.float64) / tl.where(norms == 0.0, 1.0, norms)
        counts += tl.where(counted, 1.0, 0.0)
        ratios += ratio
        squares += ratio * ratio
        distances += tl.where(counted, 1.0 - cosine, 0.0)

    partials_ptr = partials_in(scratch_ptr, tl.float64)
    partial_ptr = partials_ptr + tl.program_id(0)
    tl.store(partial_ptr, tl.sum(counts))
    tl.store(partial_ptr + PARTIALS, tl.sum(ratios))
    tl.store(partial_ptr + 2 * PARTIALS, tl.sum(squares))
    tl.store(partial_ptr + 3 * PARTIALS, tl.sum(distances))
    if last_to_arrive(scratch_ptr):
        tl.store(scratch_ptr, 0)
        count = total(partials_ptr, PARTIALS)
        ratio_sum = total(partials_ptr + PARTIALS, PARTIALS)
        square_sum = total(partials_ptr + 2 * PARTIALS, PARTIALS)
        distance_sum = total(partials_ptr + 3 * PARTIALS, PARTIALS)
        divisor = tl.where(count == 0.0, 1.0, count)
        mean = ratio_sum / divisor
        variance = (square_sum - ratio_sum * mean) / tl.where(count < 2.0, 1.0, count - 1.0)
        # Not tl.maximum, which would turn a NaN into 0.
        variance = tl.where((variance < 0.0) | (count < 2.0), 0.0, variance)
        tl.store(stats_ptr, tl.where(count == 0.0, 1.0, mean).to(tl.float32))
        tl.store(stats_ptr + 1, tl.sqrt(variance).to(tl.float32))
        tl.store(stats_ptr + 2, (distance_sum / divisor).to(tl.float32))


def launch_stats(residual: Tensor, previous: Tensor, *, scratch: Tensor, programs: int) -> Tensor:
    """Launch the statistics with at most `programs` programs; arguments as in `ops` and `scratch`.

    Tensors whose layouts need more than two strides to tell tokens apart, even with dimensions
    merged, are copied first; any other layout is read in place.
    """
    sizes, strides = merge_dimensions(
        residual.shape[:-1], residual.stride()[:-1], previous.stride()[:-1]
    )
    width = residual.shape[-1]
    if len(sizes) > 2:
        residual, previous = residual.contiguous(), previous.contiguous()
        sizes, strides = [math.prod(residual.shape[:-1])], [[width], [width]]
    outer_tokens, inner_tokens = pad_left(sizes, 2, 1)
    tokens = outer_tokens * inner_tokens
    columns = [residual.stride(-1), previous.stride(-1)]
    tile_tokens, tile_columns = tile_shape(tokens, width, max(columns), residual.dtype)
    stats = torch.empty(3, dtype=torch.float32, device=residual.device)
    magnitude_stats_kernel[(max(1, min(programs, triton.cdiv(tokens, tile_tokens))),)](
        residual,
        previous,
        scratch,
        stats,
        tokens,
        inner_tokens,
        width,
        *pad_left(strides[0], 2, 0),
        columns[0],
        *pad_left(strides[1], 2, 0),
        columns[1],
        PARTIALS=triton.next_power_of_2(programs),
        TILE_TOKENS=tile_tokens,
        TILE_COLUMNS=tile_columns,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return stats
