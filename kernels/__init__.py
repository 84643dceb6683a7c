"""Gate and statistics kernels behind `torch.library` operators `omni_cache::...`.

Knows tensors only: imports torch and triton and nothing else of ours.
"""

from omni_cache.kernels.ops import magnitude_gate, magnitude_stats, rel_l1_gate
from omni_cache.kernels.workspace import rel_l1_workspace

__all__ = ["magnitude_gate", "magnitude_stats", "rel_l1_gate", "rel_l1_workspace"]
