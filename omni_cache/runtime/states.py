"""Which model instance a call is for.

One compiled graph may serve several instances, so state hangs on an instance: on the one that
``enable`` bound, else on the identity of a parameter that the graph is called with.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from omni_cache.passes import RegionError, timestep_name
from omni_cache.runtime.generation import ModelState


@dataclass
class Call:
    """A call of an enabled module, which may run several graphs.

    Attributes:
        module: the module.
        state: its state.
        arguments: what its ``forward`` is called with, by name.
        in_pieces: whether Dynamo was asked for the pieces between graph breaks.
        refusals: why those of the pieces that have run uncached are not cached.
        is_cached: whether a guarded graph has run.
    """

    module: nn.Module
    state: ModelState
    arguments: Mapping[str, Any]
    in_pieces: bool = False
    refusals: list[RegionError] = field(default_factory=list)
    is_cached: bool = False

    @property
    def timestep(self) -> Any:
        """The timestep: a tensor, a number, or None where no argument is one."""
        name = timestep_name(self.arguments)
        return None if name is None else self.arguments[name]

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors other than the timestep."""
        time = self.timestep
        leaves = tree_leaves(list(self.arguments.values()))
        return [each for each in leaves if isinstance(each, Tensor) and each is not time]


_call: ContextVar[Call | None] = ContextVar("omni_cache_call", default=None)
_by_parameter: dict[int, ModelState] = {}
_lock = threading.Lock()


@contextmanager
def bind(call: Call) -> Iterator[None]:
    """Say which call of which instance the graphs in this context run for."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def bound_call() -> Call | None:
    """The call that the current context is bound to."""
    return _call.get()


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
