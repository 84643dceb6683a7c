"""How Dynamo is asked for a model's graphs: for one of the whole, or for the pieces between breaks.

One graph is asked for first, because Dynamo then follows sizes and numbers that depend on data
(``x[mask]``, ``n.item()``) where it would break otherwise.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported, UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from omni_cache.runtime import bound_call

UNCAPTURED = (Unsupported, UserError, GuardOnDataDependentSymNode, FailOnRecompileLimitHit)
"""What Dynamo raises when it is asked for one graph and has none; nothing of the call has run."""


def in_pieces() -> AbstractContextManager[None]:
    """Where a model with graph breaks is compiled and called.

    Tensors whose size depends on data do not break it further. Where such a break lies in a loop,
    Dynamo captures nothing of the function around it, which is often the one with the blocks.
    """
    capturing: AbstractContextManager[None] = torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True
    )
    return capturing


class CapturedFunction:
    """A function compiled as one graph, or in pieces from the first call on that has breaks.

    Args:
        function: what to compile.
        fullgraph: True to raise at a break, False to ask for pieces from the start.
        flags: of ``torch.compile``.
    """

    def __init__(
        self, function: Callable[..., Any], fullgraph: bool | None = None, **flags: Any
    ) -> None:
        self._function = function
        self._whole: Callable[..., Any] | None = None
        if fullgraph is not False:
            self._whole = torch.compile(function, fullgraph=True, **flags)
        self._pieces: Callable[..., Any] | None = None
        if not fullgraph:
            self._pieces = torch.compile(function, **flags)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; as one graph, or from now on in pieces."""
        known_to_break = self._pieces is not None and self._function in _broken
        if self._whole is not None and not known_to_break:
            try:
                return self._whole(*args, **kwargs)
            except UNCAPTURED:
                if self._pieces is None:
                    raise
            # The attempt leaves cycles that hold the call's tensors. Who keeps which inputs tells
            # one generation from another.
            gc.collect()
        assert self._pieces is not None  # there is the one or the other
        call = bound_call()
        if call is not None:
            call.in_pieces = True
        with in_pieces():
            result = self._pieces(*args, **kwargs)
        # Only now, because what a mistaken call raises looks like a break to Dynamo.
        _broken.add(self._function)
        return result


_broken: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
"""Functions known to have breaks. Asked for one graph again, Dynamo would run some as they are."""


def with_own_code(
    function: Callable[..., Any], module_class: type[nn.Module], flags: Mapping[str, Any]
) -> Callable[..., Any]:
    """A copy of a function with a code object of its own for a class of modules and its flags.

    Dynamo compiles one code object only so many times, whatever the backend, and would leave what
    is compiled after that as it is.

    Args:
        function: one of the module level, without closure.
        module_class: whose modules the copy is for.
        flags: what they are compiled with. Copies for equal ones are one and the same.
    """
    assert isinstance(function, FunctionType)
    key = (function, module_class, repr(sorted(flags.items(), key=lambda item: item[0])))
    copy = _copies.get(key)
    if copy is None:
        name = f"{function.__name__.strip('_')}_{module_class.__name__}_{next(_numbers)}"
        code = function.__code__.replace(co_name=name)
        copy = _copies[key] = FunctionType(code, function.__globals__)
    return copy


_numbers = itertools.count()
_copies: weakref.WeakValueDictionary[Any, FunctionType] = weakref.WeakValueDictionary()
