"""What a residual is stored as: in some floating dtype, or in 8 bits with a scale for each row.

A row is what lies along the last dimension: a token, so that none is lost beside a far larger one.
Knows tensors only. ``call`` says how a function is applied: at once, or as a node of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .values import numel, size_hint

FLOAT8 = torch.float8_e4m3fn
"""Three bits of mantissa and no infinity: the one dtype that residuals have scales beside."""

LARGEST = torch.finfo(FLOAT8).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def _at_once(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def can_store(dtype: torch.dtype) -> bool:
    """Whether residuals may be stored in a dtype."""
    return dtype is FLOAT8 or (dtype.is_floating_point and dtype.itemsize >= 2)


def unscaled(dtype: torch.dtype) -> torch.dtype:
    """What a residual is cast to in which it is tested, and scaled if it needs a scale."""
    return torch.float32 if dtype is FLOAT8 else dtype


def of_partners(dtype: torch.dtype | None) -> torch.dtype | None:
    """What partners are kept in beside residuals of a dtype.

    Only their changes are weighed, which are small beside them: 8 bits would leave little of those.
    """
    return torch.bfloat16 if dtype is FLOAT8 else dtype


def scaled(value: Any, call: Callable[..., Any] = _at_once) -> tuple[Any, Any]:
    """A finite float32 tensor ``(..., C)`` in 8 bits, and its scales, ``(..., 1)`` in float32.

    The largest element of a row becomes the largest that 8 bits hold, so that nothing overflows.
    """
    largest = call(torch.amax, call(torch.abs, value), -1, True)
    scale = call(torch.clamp_min, call(torch.div, largest, LARGEST), SMALLEST_SCALE)
    return call(torch.ops.aten.to.dtype, call(torch.div, value, scale), FLOAT8), scale


def restored(stored: Any, scale: Any, call: Callable[..., Any] = _at_once) -> Any:
    """What :func:`scaled` was given, up to rounding."""
    return call(torch.mul, call(torch.ops.aten.to.dtype, stored, torch.float32), scale)


def store(residuals: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The residuals of a step, stored as those of another one are."""
    pairs = [
        scaled(value.float()) if each.dtype is FLOAT8 else (value.to(each.dtype), None)
        for value, each in zip(residuals, like, strict=False)  # scales follow
    ]
    return (*(value for value, _ in pairs), *(each for _, each in pairs if each is not None))


def restore(stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The residuals of a step as numbers; the scales of those of 8 bits come last."""
    count = len(stored) - sum(each.dtype is FLOAT8 for each in stored)
    scales = iter(stored[count:])
    return tuple(
        restored(each, next(scales)) if each.dtype is FLOAT8 else each for each in stored[:count]
    )


def stored_bytes(value: Tensor, dtype: torch.dtype) -> int:
    """Bytes of a floating residual in a dtype, its scales included."""
    elements = numel(value)
    rows = elements // size_hint(value.shape[-1]) if elements and value.dim() else 1
    scales = rows * torch.float32.itemsize if dtype is FLOAT8 else 0
    return elements * dtype.itemsize + scales
