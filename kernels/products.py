"""Inner products of one residual with itself and with earlier ones, for each sample.

    products[b, 0] = sum r[b]^2
    products[b, j] = sum r[b] * p_j[b]

A step's row of a Gram matrix, whose other rows earlier steps have left. Each program goes over its
share of a sample once for every product, so that from the second time on the residual comes out of
the cache, and leaves its sums in fp64; their sum over programs is a launch of its own.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from omni_cache.kernels.grid import TILE_BYTES, WARPS
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def inner_products_kernel(
    residual_ptrs: tl.tensor,
    partials_ptr: tl.tensor,
    size: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Store this program's share of each product of a sample, in fp64.

    The tensors are contiguous, `size` elements a sample. Program (p, b) has every so many tiles of
    sample b, from the p-th on.
    """
    begin = tl.program_id(1).to(tl.int64) * size
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    for j in tl.static_range(len(residual_ptrs)):
        products = tl.zeros([TILE], tl.float64)
        for tile in range(tl.program_id(0), tl.cdiv(size, TILE), tl.num_programs(0)):
            element = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
            inside = element < size
            left = tl.load(residual_ptrs[0] + begin + element, mask=inside, other=0.0)
            right = tl.load(residual_ptrs[j] + begin + element, mask=inside, other=0.0)
            products += left.to(tl.float64) * right.to(tl.float64)
        tl.store(partials_ptr + program * len(residual_ptrs) + j, tl.sum(products))


def launch(residual: Tensor, previous: Sequence[Tensor], samples: int, *, programs: int) -> Tensor:
    """Launch with at most about `programs` programs; arguments as `ops.inner_products` has them.

    A tensor that is not contiguous is copied first.
    """
    tensors = tuple(each.contiguous() for each in (residual, *previous))
    size = residual.numel() // max(samples, 1)
    tile = TILE_BYTES // residual.itemsize
    shares = max(1, min(triton.cdiv(programs, max(samples, 1)), triton.cdiv(size, tile)))
    partials = torch.empty(
        samples, shares, len(tensors), dtype=torch.float64, device=residual.device
    )
    if samples:
        inner_products_kernel[(shares, samples)](
            tensors, partials, size, TILE=tile, num_warps=WARPS, enable_fp_fusion=False
        )
    return partials.sum(1).reshape(-1)
