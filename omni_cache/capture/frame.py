"""What Dynamo is compiling when it calls the backend: of which module, which piece of it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, takewhile
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.fx import GraphModule

from omni_cache.dynamo import Frame, break_of, callers, traced_frame
from omni_cache.passes import BlockLoop, timestep_name
from omni_cache.runtime.calls import bound_call


@dataclass(frozen=True)
class TracedFrame:
    """What Dynamo is compiling now.

    Attributes:
        name: what messages call it: the class of the module that is called, else the function.
        model: that module, None for a function that is not a module's method.
        variables: what the names in the traced function stand for.
        arguments: what the call is made with, by the names of the parameters.
        is_piece: whether the graph is only a piece of it, between graph breaks.
        is_resumed: whether it is a piece behind a graph break.
        is_block: whether it is a block of the model that is called, traced by itself.
        named: how many of the model's positional parameters the traced function names before its
            ``*args``; -1 where the model itself is the first of these, as a decorator may have it.
    """

    name: str = "a model"
    model: nn.Module | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    is_piece: bool = False
    is_resumed: bool = False
    is_block: bool = False
    named: int = 0

    @classmethod
    def current(cls, gm: GraphModule) -> TracedFrame:
        """The frame that a graph was traced in."""
        is_piece = break_of(gm) is not None
        frame = traced_frame()
        if frame is None:  # called by hand, not by Dynamo
            return cls(is_piece=is_piece)
        model = _module_of(frame)
        call = bound_call.get()
        # A module of the model that was called may be traced on its own behind a break.
        is_resumed = frame.is_resumed or (
            call is not None and model is not None and call.module is not model
        )
        around = None
        if call is not None:
            model = call.module
        else:
            around = outermost_module()
            if (
                model is None
                and around is not None
                and _decorates(frame.code, frame.values, around)
            ):
                model = around  # whose instance has a function for its forward
            # Within a model whose own code Dynamo has given up.
            is_piece = is_piece or around not in (None, model)
        return cls(
            name=f"{frame.code.co_name}()" if model is None else type(model).__name__,
            model=model,
            variables={**frame.global_values, **frame.values},
            arguments=_arguments(frame, model),
            is_piece=is_piece or is_resumed,
            is_resumed=is_resumed,
            is_block=around is not None and model is not None and _is_block(model, around),
            named=_named(frame, model),
        )

    @property
    def timestep(self) -> float | None:
        """The timestep of the call, where it is a Python number.

        The first graph is specialised on it, so that it is not an input.
        """
        name = timestep_name(name for name, value in self.arguments.items() if value is not None)
        value = None if name is None else self.arguments[name]
        return float(value) if isinstance(value, float | int) else None

    def owner(self, loop: BlockLoop) -> type[nn.Module] | None:
        """The class of the module whose call runs a block loop; None where nothing tells.

        It is the innermost one that is called around the largest list.
        """
        main = max(loop.lists, key=lambda each: each.arithmetic)
        block = main.blocks[0]
        called = list(block.nodes[0].meta["nn_module_stack"].values())
        in_block = re.compile(rf"\b{main.path.rpartition('.')[2]}\W+{block.index}\b")
        around = list(takewhile(lambda each: in_block.search(each[0]) is None, called))
        if around:
            kind = around[-1][1]
        else:
            # The module whose own code is traced is not among those that this code calls.
            root = re.match(r"[LG]\['(\w+)'\]", called[0][0])
            kind = type(self.variables.get(root[1]) if root else self.model)
        return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None

    def parameters(self, owner: type[nn.Module] | None) -> tuple[str, ...]:
        """Names of the positional parameters of the call, for inputs that come as ``*args``.

        Args:
            owner: whose call runs the blocks; a module that takes ``*args`` hands them on to it.
        """
        if self.model is None:
            return ()
        own = positional_parameters(self.model.forward)
        if len(own) <= self.named and owner is not None:
            own = positional_parameters(owner.forward)[1:]
        return own[self.named :] if self.named >= 0 else ("self", *own)


def outermost_module() -> nn.Module | None:
    """The module whose call is the first one within the compiled function that runs now."""
    found = None
    for frame in callers():
        found = _method_of(frame.f_code, frame.f_locals) or found
    return found


def _method_of(code: CodeType, values: Mapping[str, Any]) -> nn.Module | None:
    """The module whose method some code is, or decorates; None where it is none's, or a graph's."""
    if code.co_argcount:
        first = values.get(code.co_varnames[0])
    else:
        first = next(iter(_listed(code, values)), None)
    if not isinstance(first, nn.Module) or isinstance(first, GraphModule):
        return None
    is_own = hasattr(type(first), code.co_name) or _decorates(code, values, first)
    return first if is_own else None


def _listed(code: CodeType, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a function was called with as ``*args``, under whatever name."""
    if not code.co_flags & inspect.CO_VARARGS:
        return ()
    listed: tuple[Any, ...] = values.get(
        code.co_varnames[code.co_argcount + code.co_kwonlyargcount], ()
    )
    return listed


def _decorates(code: CodeType, values: Mapping[str, Any], module: nn.Module) -> bool:
    """Whether some code is that of a decorator of one of a module's methods.

    It has a name of its own, as in ``def wrapper(self, *args)``, and may decorate other functions
    as well: what it has closed over tells them apart.
    """
    methods = chain.from_iterable(vars(each).values() for each in (module, *type(module).__mro__))
    functions = (each.func if isinstance(each, functools.partial) else each for each in methods)
    return any(
        _lines(function.__code__) == _lines(code)
        and all(
            values.get(name, cell) is cell
            for name, cell in inspect.getclosurevars(function).nonlocals.items()
        )
        for function in functions
        if isinstance(function, FunctionType | MethodType)
    )


def _lines(code: CodeType) -> tuple[str, str, int]:
    """Where code is written, which what Dynamo makes of it says too."""
    return code.co_name, code.co_filename, code.co_firstlineno


def _is_block(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module is an element of that list of a model which has the most weights."""
    return any(module is each for each in largest_list(model) or ())


def largest_list(model: nn.Module) -> nn.ModuleList | None:
    """That list of a model which has the most weights; None where it has no list."""
    lists = (each for each in model.modules() if isinstance(each, nn.ModuleList))
    return max(lists, key=weights_of, default=None)


def weights_of(module: nn.Module) -> int:
    """The number of elements of a module's parameters."""
    return sum(each.numel() for each in module.parameters())


def positional_parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's positional parameters, in order; without ``*args``."""
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(each.name for each in parameters if each.kind in positional)


def _module_of(frame: Frame) -> nn.Module | None:
    """The module whose method a frame runs, or whose call an enabled one makes."""
    code, values = frame.code, frame.values
    if frame.is_resumed:
        given: Iterator[Any] = iter([values.get("self"), *values.values()])
        return next((each for each in given if isinstance(each, nn.Module)), None)
    call = bound_call.get()
    if call is not None and any(value is call.module for value in values.values()):
        return call.module
    return _method_of(code, values)


def _named(frame: Frame, model: nn.Module | None) -> int:
    """How many of a model's parameters a function names before its ``*args``, see `TracedFrame`."""
    code, values = frame.code, frame.values
    if model is None or frame.is_resumed or not code.co_flags & inspect.CO_VARARGS:
        return 0
    if not code.co_argcount:
        return -1 if any(each is model for each in _listed(code, values)[:1]) else 0
    takes_model = values.get(code.co_varnames[0]) is model
    return code.co_argcount - takes_model


def _arguments(frame: Frame, model: nn.Module | None) -> dict[str, Any]:
    """A call's arguments by name, those that come as ``*args`` and ``**kwargs`` included."""
    code, given = frame.code, dict(frame.values)
    rest = iter(code.co_varnames[code.co_argcount + code.co_kwonlyargcount :])
    if code.co_flags & inspect.CO_VARARGS:
        named = _named(frame, model)
        parameters = () if model is None else positional_parameters(model.forward)[max(named, 0) :]
        listed = given.pop(next(rest), ())
        given.update(zip(parameters, listed[named < 0 :], strict=False))
    if code.co_flags & inspect.CO_VARKEYWORDS:
        given.update(given.pop(next(rest), {}))
    return given
