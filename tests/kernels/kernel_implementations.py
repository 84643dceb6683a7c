"""The ways to run each kernel that the numerics tests hold to the reference."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from omni_cache import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Implementation:
    """The kernels as one implementation has them, and the device they want tensors on."""

    device: torch.device
    rel_l1: Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]
    fingerprint: Callable[[Tensor], Tensor]
    rel_l1_gate: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    magnitude_gate: Callable[[Tensor, Tensor, float, int], Tensor]
    magnitude_stats: Callable[[Tensor, Tensor], Tensor]
    inner_products: Callable[[Tensor, Sequence[Tensor], int], Tensor]


def operators_on(device: str) -> Implementation:
    return Implementation(
        torch.device(device),
        kernels.rel_l1,
        kernels.fingerprint,
        kernels.rel_l1_gate,
        kernels.magnitude_gate,
        kernels.magnitude_stats,
        kernels.inner_products,
    )


def interpreted() -> Implementation:
    """Return the Triton kernels, run by the interpreter on a grid of at most three programs."""
    from omni_cache.kernels import contents, distance, magnitude, products, scratch

    device = torch.device("cpu")
    alone = {"scratch": scratch.new_scratch(device), "programs": 3}
    return Implementation(
        device,
        partial(distance.launch, **alone),
        partial(contents.launch, **alone),
        partial(distance.launch_gate, **alone),
        magnitude.launch_gate,
        partial(magnitude.launch_stats, **alone),
        partial(products.launch, programs=3),
    )
