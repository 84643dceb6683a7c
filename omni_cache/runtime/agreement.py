"""Ranks that compute one call together decide alike: what each of them finds is added up first.

    sums of the signal | fingerprints of the inputs | entries that cannot be reused | digest
    -> one all_reduce -> the same numbers on every rank

Every call of a gate that measures takes part once, whatever its rank finds, so that no rank ever
waits for a partner. It knows tensors and process groups, neither gates nor trajectories.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from omni_cache.kernels import number_dtype


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, made of whole values; any other tensor as it is."""
    if not hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(tensor, DTensor)
    if any(each.is_partial() for each in tensor.placements):
        # The parts of a sum say nothing of its size.
        whole = [Replicate() if each.is_partial() else each for each in tensor.placements]
        tensor = tensor.redistribute(placements=whole)
    return tensor.to_local()


def digest(state: object) -> int:
    """A number below 2**20 for what a rank goes by, the same in every process."""
    return zlib.crc32(repr(state).encode()) >> 12


def add_up(
    found: Sequence[Tensor], lacking: Tensor, going_by: int, groups: Sequence[Any]
) -> Tensor:
    """Add up what the ranks have found.

    Args:
        found: numbers that may be added up; as many on every rank, zeros where one found nothing.
        lacking: for each entry of the history, 1 where this rank cannot reuse it: (depth,).
        going_by: `digest` of what the decision depends on besides.
        groups: the ``ProcessGroup``s, to add up over one after the other.

    Returns:
        The sums of ``found``, of `number_dtype` and on the device of ``lacking``, and then depth +
        3 numbers for `common`.
    """
    device, dtype = lacking.device, number_dtype(lacking.device)
    tail = torch.tensor([going_by, going_by**2, 1], dtype=dtype, device=device)
    shared = torch.cat([each.to(device, dtype) for each in (*found, lacking, tail)])
    for group in groups:
        dist.all_reduce(shared, group=group)
    return shared


def common(numbers: Sequence[float]) -> int:
    """How many entries of the history, newest first, all ranks may reuse.

    None where the ranks do not go by the same: sum(d)^2 = n * sum(d^2) for equal d alone.

    Args:
        numbers: the last depth + 3 of what `add_up` returned.
    """
    *lacking, total, squares, ranks = map(int, numbers)
    if total**2 != ranks * squares:
        return 0
    return next((age for age, count in enumerate(lacking) if count), len(lacking))
