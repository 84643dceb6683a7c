"""What tells that a module still computes what it computed, without reading its weights.

    module -> its modules and tensors: which objects, where their data lie, how often written to

It cannot see what leaves no trace in a tensor's version counter: a write through ``.data``, through
memory shared with NumPy or DLPack, or by a kernel that does not report it. Forward hooks are not
looked at: libraries register some of their own while a module runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from omni_cache.backends.plain import plain_or


class Evidence(NamedTuple):
    """What was found in a module.

    Attributes:
        weights: may be compared, and is not meant to be hashed or kept for long: addresses are
            given out again.
        adapters: which adapters act, and how strongly.
        unversioned: whether a tensor has no version counter, because it was made under
            ``torch.inference_mode``.
    """

    weights: tuple[Any, ...]
    adapters: Hashable
    unversioned: bool


# What peft's layers and vLLM-Omni's keep outside their tensors.
_SWITCHES = ("_active_adapter", "_disable_adapters", "scaling", "_diffusion_lora_active_slices")
_STACKED = ("lora_a_stacked", "lora_b_stacked")

# Hooks of accelerate and diffusers that load weights for a forward and put them away again.
_MOVERS = ("_hf_hook", "_diffusers_hook")


def evidence_of(module: nn.Module, may_move: bool = False) -> Evidence:
    """Look at a module.

    Args:
        module: any.
        may_move: whether it does not matter where the weights lie and which objects hold them, if
            a hook moves them between the calls.
    """
    children = list(module.modules())
    moved = may_move and any(name in vars(each) for each in children for name in _MOVERS)
    found: list[Any] = []
    switches: list[Hashable] = []
    unversioned = False
    for child in children:
        inside = vars(child)
        merged = tuple(inside.get("merged_adapters") or ())
        quantisation = identity(inside.get("quant_method"))
        found.append((identity(child), child.training, merged, quantisation))
        switches += [
            plain_or(inside[name], id(inside[name])) for name in _SWITCHES if name in inside
        ]
        stacked = (each for name in _STACKED for each in inside.get(name, ()))
        for tensor in _tensors([*child._parameters.values(), *child._buffers.values(), *stacked]):
            version = version_of(tensor)
            unversioned |= version is None
            kind = (version, tensor.shape, tensor.dtype)
            found.append(kind if moved else (identity(tensor), *kind, *_place(tensor)))
    return Evidence(tuple(found), tuple(switches), unversioned)


def tensor_evidence(tensor: Tensor) -> tuple[Any, ...]:
    """The same of a tensor that belongs to no module."""
    return identity(tensor), version_of(tensor), *_place(tensor)


def identity(value: Any) -> tuple[Any, ...]:
    """Equal for one object, and not for another one that has got its address.

    The address comes first, so that two objects that are alive are told apart before their weak
    references are compared, which would compare the objects themselves. Those of one object are
    one reference, and those of dead objects equal no other.
    """
    try:
        return id(value), weakref.ref(value)
    except TypeError:  # such as None
        return (id(value),)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def numerical_settings(device_type: str) -> tuple[Any, ...]:
    """The settings of torch that change results in their last digits."""
    matmul = torch.backends.cuda.matmul
    return (
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        matmul.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among them; of one that wraps others, such as a DTensor, those."""
    found: list[Tensor] = []
    for value in values:
        if type(value) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            found += _tensors(getattr(value, name) for name in names)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def _place(tensor: Tensor) -> tuple[Any, ...]:
    try:
        return tensor.device, tensor.data_ptr()
    except RuntimeError:  # it has no storage
        return (tensor.device,)
