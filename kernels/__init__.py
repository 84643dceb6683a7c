"""Gate and statistics kernels behind `torch.library` operators `omni_cache::...`.

Knows tensors only: imports torch and triton and nothing else of ours.
"""

from omni_cache.kernels.ops import (
    fingerprint,
    inner_products,
    magnitude_gate,
    magnitude_stats,
    number_dtype,
    rel_l1,
    rel_l1_gate,
    sea_distance,
)

__all__ = [
    "fingerprint",
    "inner_products",
    "magnitude_gate",
    "magnitude_stats",
    "number_dtype",
    "rel_l1",
    "rel_l1_gate",
    "sea_distance",
]
