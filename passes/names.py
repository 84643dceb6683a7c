"""Names of a node: of its operation and arguments, its module, its source line, its graph input.

Knows how Dynamo and FX write names down; knows nothing of what an operation does to its values.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Target, map_arg

from .values import is_size

ModulePath = tuple[str, ...]


# Steps that Dynamo writes into module sources and that do not belong to the module's name.
_SOURCE_NOISE = frozenset({"__dict__", "_modules", "_orig_mod", "getattr", "G", "L"})


VIEW_OPS = frozenset(
    "chunk split split_with_sizes tensor_split unbind narrow select getitem view view_as reshape "  # noqa: SIM905
    "flatten unflatten permute transpose movedim moveaxis swapaxes swapdims t squeeze unsqueeze "
    "expand expand_as broadcast_to detach alias contiguous".split()
)
"""Operations whose result is made of elements of their first argument and may share its memory."""


CAST_OPS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double"})
"""Operations that change at most dtype or device, element by element."""


ELEMENTWISE_OPS = CAST_OPS | frozenset(
    "add sub mul div truediv neg pos addcmul clamp clip dropout contiguous clone radd rsub rmul "  # noqa: SIM905
    "iadd isub imul itruediv".split()
)
"""Arithmetic of one output element from the elements at the same place."""


def op_name(node: Node) -> str:
    """The plain name of a node's operation: ``"linear"``, ``"getitem"``, ``"add"``, ...

    A function, a method and an ``OpOverload`` of one operation have one name.
    """
    return _target_name(node.target)


@lru_cache(maxsize=4096)
def _target_name(target: Target) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def full_name(node: Node) -> str:
    """The name that tells a node's operation from every other: ``"aten.add.Tensor"``.

    A function without a name that others could not have too (a local one) is told by its identity.
    """
    target = node.target
    if isinstance(target, str):
        return f"method {target}" if node.op == "call_method" else node.op
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target)
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
    return f"{name} {id(target)}" if "<" in name else name


def argument(node: Node, place: int, *names: str, default: Any = None) -> Any:
    """A node's argument by its place or by one of its names."""
    if len(node.args) > place:
        return node.args[place]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def nodes_in(value: Any) -> list[Node]:
    """The nodes in an argument, as often as they occur."""
    found: list[Node] = []

    def collect(node: Node) -> Node:
        found.append(node)
        return node

    map_arg(value, collect)
    return found


def argument_name(placeholder: Node) -> str:
    """The name that the caller knows a graph input by (``"timestep"``), indices left out.

    The innermost name where arguments lie in lists or dicts: ``kwargs["cond"]["t"][0]`` is ``"t"``.
    An input without a name of its own (``args[1]``, a size of another input) has its whole path.
    """
    steps = _source_steps(placeholder)
    named = [step for step in steps if not step.isdigit() and step != "args"]
    return named[-1] if named and "size" not in steps else "_".join(steps)


def input_name(placeholder: Node) -> str:
    """The whole path of a graph input as one identifier: ``timestep``, ``cond_t_0``, ``args_1``."""
    if is_size(placeholder) and "size" in _source_steps(placeholder):
        return str(placeholder.meta["example_value"])
    return "_".join(_source_steps(placeholder))


def position(placeholder: Node) -> int | None:
    """The index of a graph input in the caller's ``*args``, where it has no other name."""
    steps = _source_steps(placeholder)
    return int(steps[1]) if len(steps) == 2 and steps[0] == "args" else None


def _source_steps(placeholder: Node) -> list[str]:
    """``L['kwargs']['cond'][0]`` -> ``["cond", "0"]``.

    Dynamo takes the source away when compilation ends; the node's target still spells it.
    """
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    if callable(name):  # a method until torch 2.11
        name = name()
    if name:
        steps = [step for step in re.findall(r"\w+", name) if step not in _SOURCE_NOISE]
    else:
        target = re.sub(r"^[lLgG]_|_+$", "", str(placeholder.target)).removeprefix("kwargs_")
        steps = re.findall(r"args(?=_\d)|(?<=args_)\d+", target) or [target]
    return steps[1:] if steps[0] == "kwargs" else steps


def module_path(node: Node) -> ModulePath:
    """The path of the module that a node was traced in: ``("blocks", "7", "attn")``.

    Empty for the root module and for nodes that carry no ``nn_module_stack``.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ()
    return parse_module_source(next(reversed(stack.values()))[0])


def module_class(node: Node, path: ModulePath) -> str:
    """The class name of the module of that path, which a node was traced in."""
    for source, module_type in node.meta["nn_module_stack"].values():
        if parse_module_source(source) == path:
            return str(getattr(module_type, "__name__", module_type)).rpartition(".")[2]
    return "Module"


@lru_cache(maxsize=65536)
def parse_module_source(source: str) -> ModulePath:
    """``"L['self'].__dict__['_modules']['blocks'].0.attn"`` -> ``("blocks", "0", "attn")``."""
    steps = [step for step in re.findall(r"[\w-]+", source) if step not in _SOURCE_NOISE]
    # The first step is the local variable that holds the root module.
    return tuple(steps[1:])


def source_line(node: Node) -> str:
    """``file:line`` of the innermost frame that a node was traced from, or an empty string."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""
