"""How Dynamo is asked for a model's graphs: for one of the whole, or for the pieces between breaks.

One graph is asked for first, because Dynamo then follows sizes and numbers that depend on data
(``x[mask]``, ``n.item()``) where it would break otherwise.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import CellType, FunctionType
from typing import Any

from torch import nn
from torch.fx import GraphModule

from omni_cache.dynamo import LimitError, NoGraphError, compiled, find_vectors
from omni_cache.options import CompileOptions
from omni_cache.passes import RegionError
from omni_cache.repeats import traced_once
from omni_cache.runtime.calls import bound_call


class CapturedFunction:
    """A function compiled as one graph, or in pieces from the first call on that has breaks.

    A call that needs more graphs than Dynamo makes runs the function as it is; those that have one
    go on with it.

    Args:
        function: what to compile.
        backend: as for :func:`omni_cache.dynamo.compiled`.
        fullgraph: True to raise at a break, False to ask for pieces from the start.
        dynamic: as in ``torch.compile``.
        around: makes what is entered around the trace of one graph.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        backend: Callable[[GraphModule, list[Any]], Any],
        fullgraph: bool | None = None,
        dynamic: bool | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._function = function
        self._fullgraph = fullgraph
        self._limits: list[str] = []
        self._breaks = fullgraph is False
        say = self._limits.append
        self._whole = compiled(function, backend, True, dynamic, say, around)
        # A break makes Dynamo give up code, which others have to be captured whole from.
        pieces = with_own_code(function, "in_pieces")
        self._pieces = compiled(pieces, backend, False, dynamic, say)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; as one graph, or from now on in pieces."""
        call = bound_call.get()
        if not self._breaks:
            try:
                return self._whole(*args, **kwargs)
            except (LimitError, *NoGraphError) as error:
                if self._fullgraph:
                    raise
                at_limit = isinstance(error, LimitError)
            if at_limit:
                result = self._function(*args, **kwargs)
                if call is not None:
                    call.refusals.append(RegionError(self._limits[-1]))
                return result
            # The attempt leaves cycles that hold the call's tensors. Who keeps which inputs tells
            # one generation from another.
            gc.collect()
        if call is not None:
            call.in_pieces = True
        result = self._pieces(*args, **kwargs)
        # Only now, because what a mistaken call raises looks like a break to Dynamo.
        self._breaks = True
        if call is not None and self._limits and not call.is_cached:
            call.refusals.insert(0, RegionError(self._limits[-1]))
        return result


@contextmanager
def tracing(flags: CompileOptions) -> Iterator[None]:
    """Trace the called model: what repeats once, while its compiler is made ready.

    Args:
        flags: what the model is compiled with.
    """
    call = bound_call.get()
    model = None if call is None else call.module
    devices = {each.device.type for each in model.parameters()} if model is not None else set()
    if flags.inner == "inductor" and devices == {"cpu"}:
        find_vectors()
    with traced_once(model if flags.blocks == "rolled" else None):
        yield


def with_own_code(
    function: Callable[..., Any],
    purpose: str | type[nn.Module],
    flags: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A copy of a function with a code object of its own for a purpose.

    Dynamo keeps what it compiles with the code object, whatever the backend: it compiles one only
    so many times, and gives it up for good at a graph break in a loop, of whichever module.

    Args:
        function: what to copy, with what it wraps. Given back as it is where that is not a
            plain function, or is one that a decorator of ``torch.compiler`` marks.
        purpose: what the copy is for, such as the modules of a class.
        flags: what it is compiled with. Copies for equal ones are one and the same.
    """
    if not isinstance(function, FunctionType) or _is_marked(function):
        return function
    key = (function, purpose, repr(sorted((flags or {}).items(), key=lambda item: item[0])))
    copy = _copies.get(key)
    if copy is None:
        # Dynamo's logs name functions. A method keeps its name, by which tracebacks know it.
        is_method = "." in function.__qualname__
        purpose_name = purpose if isinstance(purpose, str) else purpose.__name__
        named = f"{function.__name__.strip('_')}_{purpose_name}_{next(_numbers)}"
        copy = _copies[key] = _copy(function, function.__name__ if is_method else named)
    return copy


def _copy(function: FunctionType, name: str) -> FunctionType:
    inner = getattr(function, "__wrapped__", None)
    closure = function.__closure__
    if isinstance(inner, FunctionType) and closure:
        own = _copy(inner, inner.__name__)
        closure = tuple(CellType(own) if _holds(cell, inner) else cell for cell in closure)
    code = function.__code__.replace(co_name=name)
    copy = FunctionType(code, function.__globals__, name, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    vars(copy).update(vars(function))
    return copy


def _holds(cell: CellType, function: FunctionType) -> bool:
    try:
        return cell.cell_contents is function
    except ValueError:  # empty
        return False


def _is_marked(function: Callable[..., Any]) -> bool:
    """Whether a decorator of ``torch.compiler`` is on a function, or on what it wraps."""
    if any(name.startswith("_torchdynamo") for name in getattr(function, "__dict__", ())):
        return True
    inner = getattr(function, "__wrapped__", None)
    return inner is not None and _is_marked(inner)


_numbers = itertools.count()
_copies: weakref.WeakValueDictionary[Any, FunctionType] = weakref.WeakValueDictionary()
