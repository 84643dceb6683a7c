"""What a pipeline's ``encode_prompt`` goes by besides its arguments.

    code of encode_prompt -> names of attributes it reads -> encoders, tokenizers, plain settings
    other weights or another object -> everything encoded before is stale

It knows pipelines as objects with attributes, and nothing of what is kept for them.
"""

from __future__ import annotations

import dis
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from omni_cache.backends.evidence import (
    evidence_of,
    identity,
    numerical_settings,
    tensor_evidence,
)
from omni_cache.backends.plain import plain, plain_or

ENCODER_NAMES = ("text_encoder", "tokenizer", "processor")
"""Attributes whose names begin so count, whether or not the code names them."""

DENOISER_NAMES = ("transformer", "unet", "vae", "denoising_transformer")
"""Of modules whose names begin so the dtype counts alone: they may be trained or offloaded."""

_TOKENIZER_STATE = (
    "padding_side",
    "truncation_side",
    "model_max_length",
    "chat_template",
    "special_tokens_map",
)


class Encoders:
    """What of a pipeline decides what its prompts are encoded to.

    Covered are the attributes that the code of ``encode_prompt`` reads from ``self``, through the
    pipeline's own methods too, and those in `ENCODER_NAMES`. Of a module: its submodules, weights
    (see `evidence`), training mode and adapters. Of a tokenizer or processor: the object,
    the size of its vocabulary, its sides, length, template and special tokens. Of plain data and
    properties that give plain data, such as ``_execution_device``: the value. Of other objects:
    which ones they are. And torch's grad mode, inference mode, autocast, default dtype, settings of
    matmul and CUDA stream.
    """

    def __init__(self, pipeline: Any, encode_prompt: Callable[..., Any]) -> None:
        self._pipeline = pipeline
        self._names = _names_read(encode_prompt, type(pipeline))
        self._lock = threading.Lock()
        self._seen: list[Any] | None = None

    def look(self, forget: Callable[[], None]) -> Hashable:
        """What may change to and fro, as a key.

        Args:
            forget: is called if anything else is not as it was the last time.
        """
        with self._lock:
            objects: list[Any] = []
            key: list[Hashable] = [_modes()]
            for name, value in self._parts():
                described = plain_or(value, None)
                if described is None:
                    _look_at(name, value, objects, key)
                else:
                    key.append((name, described))
            if self._seen is not None and self._seen != objects:
                forget()
            self._seen = objects
        return tuple(key)

    def _parts(self) -> Iterator[tuple[str, Any]]:
        pipeline, kind = self._pipeline, type(self._pipeline)
        owned = dict(vars(pipeline))
        if isinstance(pipeline, nn.Module):
            owned |= {**pipeline._modules, **pipeline._parameters, **pipeline._buffers}
        for name in sorted(self._names | {name for name in owned if _begins(name, ENCODER_NAMES)}):
            if name in owned:
                yield name, owned[name]
            elif hasattr(kind, name):
                try:
                    value = getattr(pipeline, name)
                    plain(value)
                except Exception:  # a method, or a property that has nothing to give yet
                    continue
                yield name, value


def _look_at(name: str, value: Any, objects: list[Any], key: list[Hashable]) -> None:
    """Add what is seen of a value that is no plain data."""
    if isinstance(value, nn.Module):
        if _begins(name, DENOISER_NAMES):
            key.append((name, str(getattr(value, "dtype", None))))
            return
        evidence = evidence_of(value, may_move=True)
        objects.append(evidence.weights)
        key.append((name, evidence.adapters))
    elif isinstance(value, Tensor):
        objects.append(tensor_evidence(value))
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            _look_at(name, each, objects, key)
    else:
        objects.append(identity(value))
        both = (value, getattr(value, "tokenizer", None))  # a processor has one
        key.append((name, *map(_tokenizer_state, both)))


def _tokenizer_state(tokenizer: Any) -> Hashable:
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    state = (getattr(tokenizer, name, None) for name in _TOKENIZER_STATE)
    return size, *(plain_or(each, None) for each in state)


def _modes() -> Hashable:
    # What one stream has written another one may read too early.
    stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        *map(numerical_settings, ("cpu", "cuda")),
        stream,
    )


def _begins(name: str, beginnings: tuple[str, ...]) -> bool:
    return name.startswith(beginnings)


def _names_read(function: Callable[..., Any], kind: type) -> set[str]:
    """The attributes of ``self`` that a method reads, and those that its methods read in turn."""
    names: set[str] = set()
    todo, done = [function], set[CodeType]()
    while todo:
        code = getattr(inspect.unwrap(todo.pop()), "__code__", None)
        if code is None or code in done or not code.co_varnames:
            continue
        done.add(code)
        read = _attributes_of(code.co_varnames[0], code)
        names |= read
        found = (inspect.getattr_static(kind, name, None) for name in read)
        todo += [each for each in found if inspect.isfunction(each)]
    return names


def _attributes_of(variable: str, code: CodeType) -> set[str]:
    """The attributes that code, and the functions made in it, load from a variable."""
    names, loaded = set(), False
    for step in dis.get_instructions(code):
        if loaded and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names.add(step.argval)
        # Newer Pythons load two variables at once: the attribute is of the second.
        last = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
        loaded = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and last == variable
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names |= _attributes_of(variable, inner)
    return names
