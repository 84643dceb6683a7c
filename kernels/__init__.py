"""Gate, statistics and forecast kernels behind torch.library operators.

Knows tensors only: imports torch and triton and nothing else of ours.
"""
