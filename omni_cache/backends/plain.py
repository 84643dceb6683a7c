"""Plain data as keys: equal keys for data that are equal in kind and value, and for no others.

It knows values only, neither calls nor pipelines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MAX_HASHED_BYTES = 1 << 20
"""The largest tensor of token ids that is read to know its content: 131,072 ids in int64."""


class NotPlainError(TypeError):
    """A value has no key: it is no plain data."""


def plain(value: Any) -> Hashable:
    """A key for a value.

    ``True``, ``1`` and ``1.0`` have three keys. A list has the key of the tuple of its items, and a
    NumPy scalar that of the Python number. A dict's key knows no order.

    A strided tensor of integers or bools is known by its content, shape, dtype and device if it has
    at most `MAX_HASHED_BYTES`. Reading one that lies on an accelerator waits for the device.

    Raises:
        NotPlainError: the value, or one inside it, is none of None, str, bytes, a number,
            ``torch.device``, ``torch.dtype``, a list, tuple or dict, and no such tensor; or it
            contains itself.
    """
    try:
        return _plain(value)
    except RecursionError:
        raise NotPlainError("a value that contains itself is no plain data") from None


def plain_or(value: Any, other: Hashable) -> Hashable:
    """A key for a value, or the other key where `plain` has none."""
    try:
        return plain(value)
    except NotPlainError:
        return other


def _plain(value: Any) -> Hashable:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bytes, int, torch.dtype)):
        return type(value), value
    if isinstance(value, float):
        return type(value), value.hex()  # NaN equals itself, and -0.0 is not 0.0
    if isinstance(value, torch.device):
        return device_key(value)
    if isinstance(value, (list, tuple)):
        return "items", tuple(map(_plain, value))
    if isinstance(value, dict):
        pairs = sorted(value.items(), key=lambda pair: repr(pair[0]))
        return "pairs", tuple((_plain(key), _plain(each)) for key, each in pairs)
    if isinstance(value, Tensor):
        return _content(value)
    raise NotPlainError(f"a value of {type(value).__name__} is no plain data")


def device_key(value: torch.device) -> Hashable:
    """A device with its index: ``cuda`` is the current one of its kind, and ``cpu`` is number 0."""
    index = value.index
    if str(value) == value.type:  # it has none
        current = torch.accelerator.current_accelerator()
        is_there = current is not None and current.type == value.type
        index = torch.accelerator.current_device_index() if is_there else 0
    return torch.device, value.type, index


def _content(tensor: Tensor) -> Hashable:
    counts = not tensor.is_floating_point() and not tensor.is_complex()
    is_strided = tensor.layout is torch.strided and not tensor.is_quantized
    has_data = tensor.device.type != "meta" and not is_traceable_wrapper_subclass(tensor)
    if not (counts and is_strided and has_data):
        raise NotPlainError("only a strided tensor of integers is known by its content")
    if tensor.numel() * tensor.element_size() > MAX_HASHED_BYTES:
        raise NotPlainError(f"a tensor of more than {MAX_HASHED_BYTES} bytes is not read")
    device = device_key(tensor.device)
    return Tensor, tuple(tensor.shape), tensor.dtype, device, digest(tensor)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in the order of its elements, after a copy to the host."""
    on_host = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(on_host.view(torch.uint8).numpy().tobytes()).hexdigest()
