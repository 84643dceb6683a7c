"""What a pipeline's ``encode_prompt`` goes by besides its arguments.

    code of encode_prompt -> names of attributes it reads -> encoders, tokenizers, plain settings
    other weights or another object -> everything encoded before is stale

It knows pipelines as objects with attributes, and nothing of what is kept for them.
"""

from __future__ import annotations

import dis
import functools
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
from omni_cache.backends.plain import plain_or

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

    Covered are the attributes that the code of ``encode_prompt`` reads from ``self`` and from
    ``super()``, through the methods of the pipeline's class and its bases too, and those in
    `ENCODER_NAMES`; properties count by what they give. Of a module: its submodules, weights (see
    `evidence`), training mode and adapters. Of a tokenizer or processor: the object, the size of
    its vocabulary, its sides, length, template and special tokens. Of plain data, such as what
    ``_execution_device`` gives: the value. Of other objects: which ones they are, and the modules
    that are attributes of them. And torch's grad mode, inference mode, autocast, default dtype,
    settings of matmul and CUDA stream.
    """

    def __init__(self, pipeline: Any, encode_prompt: Callable[..., Any]) -> None:
        self._pipeline = pipeline
        kind = type(pipeline)
        self._names = _names_read(encode_prompt, kind)
        self._names |= {name for name in dir(kind) if _begins(name, ENCODER_NAMES)}
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
        pipeline = self._pipeline
        owned = dict(vars(pipeline))
        if isinstance(pipeline, nn.Module):
            owned |= {**pipeline._modules, **pipeline._parameters, **pipeline._buffers}
        for name in sorted(self._names | {name for name in owned if _begins(name, ENCODER_NAMES)}):
            try:
                value = getattr(pipeline, name)
            except Exception:  # an attribute or a property that has nothing to give yet
                continue
            # A method is read as code, and is another object each time.
            is_method = inspect.isroutine(value) or isinstance(value, functools.partial)
            if name in owned or not is_method:
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
        for each in list(getattr(value, "__dict__", {}).values()):
            if _has_modules(each):
                _look_at(name, each, objects, key)


def _has_modules(value: Any) -> bool:
    """Whether it is a module, or a container that has one among its items."""
    items = value.values() if isinstance(value, dict) else value
    is_container = isinstance(value, (list, tuple, dict))
    return isinstance(value, nn.Module) or (
        is_container and any(isinstance(each, nn.Module) for each in items)
    )


def _tokenizer_state(tokenizer: Any) -> Hashable:
    try:
        size = len(tokenizer)
    except Exception:  # it has none, such as a class
        size = None
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
    todo, done = [function, *_code_of("encode_prompt", kind)], set[CodeType]()
    while todo:
        code = getattr(inspect.unwrap(todo.pop()), "__code__", None)
        if code is None or code in done or not code.co_varnames:
            continue
        done.add(code)
        read = _attributes_of(code.co_varnames[0], code)
        names |= read
        todo += [each for name in read for each in _code_of(name, kind)]
    return names


def _code_of(name: str, kind: type) -> Iterator[Callable[..., Any]]:
    """The methods that a class and its bases, which ``super()`` may reach, have for a name.

    What a property reads does not matter: what it gives is looked at.
    """
    for each in kind.__mro__:
        found = vars(each).get(name)
        if isinstance(found, functools.partialmethod):
            found = found.func
        if isinstance(found, (classmethod, staticmethod)):
            found = found.__func__
        if inspect.isfunction(found):
            yield found


def _attributes_of(variable: str, code: CodeType) -> set[str]:
    """The attributes that code, and the functions made in it, load from a variable or super()."""
    names, loaded, is_super = set(), False, False
    for step in dis.get_instructions(code):
        is_read = loaded and step.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if is_read or step.opname == "LOAD_SUPER_ATTR":
            names.add(step.argval)
        # Newer Pythons load two variables at once: the attribute is of the second.
        last = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        loaded = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and last == variable
        # Older ones call super() like any function.
        calls = step.opname.startswith("CALL")
        loaded |= is_super and calls
        is_super = last == "super" or (is_super and not calls)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names |= _attributes_of(variable, inner)
    return names
