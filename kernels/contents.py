"""Two numbers that tell the contents of tensors apart, in one launch.

    total = sum over elements of mix(bits of the element + (its position + 1) * GOLDEN)  mod 2**64
    fingerprint = bits 0 to 23 and bits 24 to 47 of mix(total)

`mix` is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
Generators", 2014, https://doi.org/10.1145/2660193.2660195), a bijection: one changed element always
changes the total, and other changes leave it alone once in 2**64. The position is that in row-major
order, so strides make no difference; addition is exact in any order.
"""

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

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit  # type: ignore[untyped-decorator]
def mix(value: tl.tensor) -> tl.tensor:
    """Scramble uint64, one to one."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit  # type: ignore[untyped-decorator]
def fingerprint_kernel(
    bits_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    numbers_ptr: tl.tensor,
    rows: tl.tensor,
    inner_rows: tl.tensor,
    columns: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    column_stride: tl.tensor,
    PARTIALS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Store the fingerprint in fp64; the module states the formula.

    Element (row, column) lies at (row // inner_rows) * outer_stride + (row % inner_rows) *
    inner_stride + column * column_stride. The grid has at most PARTIALS programs.
    """
    row_tiles = tl.cdiv(rows, TILE_ROWS)
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    mixed = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.uint64)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row = (tile // column_tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        column = (tile % column_tiles).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        row_at = (row // inner_rows) * outer_stride + (row % inner_rows) * inner_stride
        bits_at = bits_ptr + row_at[:, None] + (column * column_stride)[None, :]
        bits = tl.load(bits_at, mask=inside, other=0).to(tl.uint64)
        position = (row * columns)[:, None] + column[None, :] + 1
        mixed += tl.where(inside, mix(bits + position.to(tl.uint64) * _GOLDEN), 0)

    partials_ptr = partials_in(scratch_ptr, tl.uint64)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(mixed))
    if last_to_arrive(scratch_ptr):
        tl.store(scratch_ptr, 0)
        whole = mix(total(partials_ptr, PARTIALS, tl.uint64))
        tl.store(numbers_ptr, (whole & 0xFFFFFF).to(tl.float64))
        tl.store(numbers_ptr + 1, ((whole >> 24) & 0xFFFFFF).to(tl.float64))


def launch(tensor: Tensor, *, scratch: Tensor, programs: int) -> Tensor:
    """Launch the fingerprint with at most `programs` programs; arguments as in `ops` and `scratch`.

    A tensor whose layout needs more than three strides, even with dimensions merged, is copied
    first, which costs a second launch; any other layout is read in place.
    """
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    bits = real.resolve_neg().view(_BITS[real.itemsize])
    sizes, (strides,) = merge_dimensions(bits.shape, bits.stride())
    if len(sizes) > 3:
        bits, sizes, strides = bits.contiguous(), [bits.numel()], [1]
    outer_rows, inner_rows, columns = pad_left(sizes, 3, 1)
    outer_stride, inner_stride, column_stride = pad_left(strides, 3, 0)
    rows = outer_rows * inner_rows
    tile_rows, tile_columns = tile_shape(rows, columns, column_stride, bits.dtype)
    tiles = triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns)
    numbers = torch.empty(2, dtype=torch.float64, device=tensor.device)
    fingerprint_kernel[(max(1, min(programs, tiles)),)](
        bits,
        scratch,
        numbers,
        rows,
        inner_rows,
        columns,
        outer_stride,
        inner_stride,
        column_stride,
        PARTIALS=triton.next_power_of_2(programs),
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return numbers
