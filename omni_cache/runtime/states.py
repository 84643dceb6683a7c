"""Which model instance a call is for.

One compiled graph may serve several instances, so state hangs on an instance: on the one that
``enable`` bound, else on the identity of a parameter that the graph is called with.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from omni_cache.runtime.generation import ModelState

_bound: ContextVar[ModelState | None] = ContextVar("omni_cache_model_state", default=None)
_by_parameter: dict[int, ModelState] = {}
_lock = threading.Lock()


@contextmanager
def bind(state: ModelState) -> Iterator[None]:
    """Say which instance the calls in this context are for."""
    token = _bound.set(state)
    try:
        yield
    finally:
        _bound.reset(token)


def bound_state() -> ModelState | None:
    """The instance that the current context is bound to."""
    return _bound.get()


def state_of_parameter(parameter: Tensor) -> ModelState:
    """The state of the instance that owns a parameter; it lives as long as the parameter."""
    key = id(parameter)
    state = _by_parameter.get(key)
    if state is None:
        with _lock:
            state = _by_parameter.get(key)
            if state is None:
                state = _by_parameter[key] = ModelState()
                weakref.finalize(parameter, _by_parameter.pop, key, None)
    return state


def expected_state(module: nn.Module) -> ModelState:
    """The state that the first cached call of a module will find, whichever weight it looks by."""
    state = ModelState()
    for parameter in module.parameters():
        if _by_parameter.setdefault(id(parameter), state) is state:
            weakref.finalize(parameter, _by_parameter.pop, id(parameter), None)
    return state


def states_of_module(module: nn.Module) -> list[ModelState]:
    """The states that calls of a module have left, for bare use; empty if it never ran cached."""
    found = (_by_parameter.get(id(each)) for each in module.parameters())
    return list(dict.fromkeys(each for each in found if each is not None))
