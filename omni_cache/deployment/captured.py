"""One call of a module as one graph, and how a call's arguments and results go with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from omni_cache.capture.frame import TracedFrame
from omni_cache.deployment.loader import leaves
from omni_cache.dynamo import NoGraphError, compiled, forget_compiled, traced_frame
from omni_cache.passes import RegionError, is_static_input, timestep_name
from omni_cache.runtime.calls import Call, bind
from omni_cache.runtime.model_state import ModelState

Constant = bool | int | float | str | None


@dataclass(frozen=True)
class Calling:
    """How a module is called, and what of it enters and leaves its graph.

    Attributes:
        parameters: names of the positional parameters, in order.
        inputs: for each input of the graph by name the path of the argument that it is.
        tensors: all tensors among the arguments, by path.
        constants: all other arguments, by path, defaults included.
        result: of what the module's result is built, see the loader.
    """

    parameters: Sequence[str]
    inputs: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Constant]
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Captured:
    """A call as a graph.

    Attributes:
        found: what was made of the graph while it was traced.
        weights: parameters and buffers by the names of the graph's inputs.
        values: the other inputs by name.
        flat: what the graph returned.
        calling: how the module is called.
    """

    found: Any
    weights: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    flat: Sequence[Tensor]
    calling: Calling


def capture(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    look: Callable[[GraphModule, TracedFrame], Any],
) -> Captured:
    """Run a module once, as one graph of fixed sizes.

    Args:
        module: what is called.
        args: example arguments, by position.
        kwargs: by name.
        look: makes something of the graph, while Dynamo still knows what it was traced from.

    Raises:
        TypeError: the arguments do not fit the module, or one is neither a tensor nor a number, a
            string or None.
        RegionError: the module is no single graph, or not one that a package can hold.
    """
    arguments = _by_name(module, args, kwargs)
    # What is one and the same tensor twice would be one input, and nothing says so to callers.
    arguments = tree_map_only(Tensor, _Distinct(), arguments)
    paths = dict(leaves(arguments))
    tensors = {path: each for path, each in paths.items() if isinstance(each, Tensor)}
    constants = {path: each for path, each in paths.items() if path not in tensors}
    for path, value in constants.items():
        if not isinstance(value, Constant) and value not in ((), [], {}):
            raise TypeError(
                f"example_inputs: {path} is a {type(value).__name__}; an exported module takes "
                "tensors, numbers, strings and None, in dicts, lists and tuples"
            )
    timestep = timestep_name(name for name, value in arguments.items() if value is not None)
    if timestep in constants:
        raise TypeError(
            f"example_inputs: {timestep}={constants[timestep]!r} is a number, and would be a "
            "constant of the package; pass it as a tensor"
        )
    seen: list[Any] = []

    def trace(gm: GraphModule, example_inputs: list[Any]) -> Any:
        frame = traced_frame()
        assert frame is not None  # Dynamo calls
        codes.append(frame.code)
        piece = TracedFrame(type(module).__name__, module, frame.values, arguments)
        static = {
            node.name: is_static_input(node) for node in gm.graph.find_nodes(op="placeholder")
        }

        def run(*values: Any) -> Any:
            flat = gm.forward(*values)
            seen.extend((found, dict(zip(static, values, strict=True)), static, flat))
            return flat

        try:
            found: Any = look(gm, piece)
        except Exception as error:
            found = error
        return run

    def forward() -> Any:
        return module.forward(**arguments)

    codes = [forward.__code__]
    try:
        with torch.no_grad(), bind(Call(module, ModelState(), arguments)):
            result = compiled(forward, trace, fullgraph=True, dynamic=False)()
    except NoGraphError as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise RegionError(
            f"{type(module).__name__} cannot be exported: Dynamo cannot capture it as one graph "
            f"({first}). omni_cache.explain(model, ...) says where, and what to change; "
            "omni_cache.enable caches such a model in this process"
        ) from error
    finally:
        for code in codes:
            forget_compiled(code)
    if not seen:
        raise RegionError(f"{type(module).__name__} cannot be exported: it computes no tensor")
    found, values, static, flat = seen
    if isinstance(found, Exception):
        raise found
    weights = {name: each for name, each in values.items() if static[name]}
    values = {name: each for name, each in values.items() if not static[name]}
    by_id = {id(each): path for path, each in tensors.items()}
    strange = [name for name, each in values.items() if id(each) not in by_id]
    if strange:
        raise RegionError(
            f"{type(module).__name__} cannot be exported: {strange[0]} is an input of its graph "
            "and no argument of its call; pass it as an argument, or register it as a buffer"
        )
    inputs = {name: by_id[id(each)] for name, each in values.items()}
    outputs = {id(each): place for place, each in enumerate(flat)}
    places = {id(each): place for place, each in enumerate(values.values())}
    spec = _spec(result, outputs, places)
    used = {each for kind, each in _leaves_of(spec) if kind == "output"}
    if len(used) < len(flat):
        raise RegionError(
            f"{type(module).__name__} cannot be exported: a call leaves tensors in attributes of "
            "the module, which a package has not; return them"
        )
    calling = Calling(_positional(module), inputs, tensors, constants, spec)
    return Captured(found, weights, values, flat, calling)


class _Distinct:
    """Makes tensors contiguous, and copies one that came before."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __call__(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._seen:
            return tensor.clone(memory_format=torch.contiguous_format)
        self._seen.add(id(tensor))
        return tensor.contiguous()


def _by_name(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"example_inputs do not fit {type(module).__name__}.forward: {error}"
        ) from None
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL and not value:
            pass
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise TypeError(
                f"{type(module).__name__}.forward takes {name} by position alone; a package is "
                "called by names"
            )
        else:
            found[name] = value
    return found


def _positional(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]


def _spec(value: Any, outputs: Mapping[int, int], inputs: Mapping[int, int]) -> dict[str, Any]:
    """How a result is built; one of a class of its own becomes a dict."""
    if id(value) in outputs:
        return {"output": outputs[id(value)]}
    if id(value) in inputs:
        return {"input": inputs[id(value)]}
    if isinstance(value, Constant):
        return {"constant": value}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _spec(each, outputs, inputs) for key, each in value.items()}}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_spec(each, outputs, inputs) for each in value]}
    raise RegionError(
        f"the module returns a {type(value).__name__}, which a package cannot; it may return "
        "tensors and constants, in dicts, lists and tuples"
    )


def _leaves_of(spec: Mapping[str, Any]) -> list[tuple[str, Any]]:
    ((kind, value),) = spec.items()
    if kind in ("dict", "tuple", "list"):
        inner = value.values() if kind == "dict" else value
        return [leaf for each in inner for leaf in _leaves_of(each)]
    return [(kind, value)]
