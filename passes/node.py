"""Facts about single nodes of a Dynamo graph: where they come from, what they read and cost.

Knows FX nodes and fake tensors; knows nothing of block loops, regions or caching.
"""

from __future__ import annotations

import math
import operator
import re
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Graph, Node

ModulePath = tuple[str, ...]

# Attribute steps that Dynamo writes into module sources and that are no part of the module's name.
_SOURCE_NOISE = frozenset({"__dict__", "_modules", "_orig_mod", "getattr", "G", "L"})

VIEW_OPS = frozenset(
    "chunk split split_with_sizes tensor_split unbind narrow select getitem view view_as reshape "  # noqa: SIM905
    "flatten unflatten permute transpose movedim swapaxes t squeeze unsqueeze expand expand_as "
    "detach alias contiguous".split()
)
"""Operations whose result may share memory with their first argument."""

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
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def tensor_of(node: Node) -> torch.Tensor | None:
    """The fake tensor that a node produces, or None where it produces something else."""
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def is_static_input(node: Node) -> bool:
    """Whether a placeholder is a parameter or buffer of the model, the same on every call."""
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    described = node.meta.get("tensor_dict") or {}
    return "_dynamo_static_input_type" in described or isinstance(
        node.meta.get("example_value"), torch.nn.Parameter
    )


def argument_name(placeholder: Node) -> str:
    """The name that the caller knows a graph input by (``"timestep"``), indices left out.

    The innermost name where arguments lie in lists or dicts: ``kwargs["cond"]["t"][0]`` is ``"t"``.
    An input without a name of its own (``args[1]``, a size of another input) has its whole path.
    """
    steps = _source_steps(placeholder)
    if steps and "size" not in steps:
        named = [step for step in steps if not step.isdigit() and step != "args"]
        if named:
            return named[-1]
    return input_name(placeholder)


def input_name(placeholder: Node) -> str:
    """The whole path of a graph input as one identifier: ``cond_t_0``, ``args_1``, ``timestep``."""
    if tensor_of(placeholder) is None and not isinstance(placeholder.target, str):
        return str(placeholder.name)
    return "_".join(_source_steps(placeholder)) or str(placeholder.name)


def _source_steps(placeholder: Node) -> list[str]:
    """``L['kwargs']['cond'][0]`` -> ``["cond", "0"]``.

    Dynamo takes the source away when compilation ends; the node's target still spells it.
    """
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    if callable(name):
        name = name()
    if name:
        steps = [step for step in re.findall(r"\w+", name) if step not in _SOURCE_NOISE]
    else:
        steps = [re.sub(r"^[lLgG]_|_+$", "", str(placeholder.target)).removeprefix("kwargs_")]
    return steps[1:] if steps[:1] == ["kwargs"] else steps


def module_path(node: Node) -> ModulePath:
    """The path of the module that a node was traced in: ``("blocks", "7", "attn")``.

    Empty for the root module and for nodes that carry no ``nn_module_stack``.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ()
    source = next(reversed(stack.values()))[0]
    return parse_module_source(source)


def module_class(node: Node, path: ModulePath) -> str:
    """The class name of the module of that path, which a node was traced in."""
    for source, module_type in node.meta["nn_module_stack"].values():
        if parse_module_source(source) == path:
            return str(getattr(module_type, "__name__", module_type)).rpartition(".")[2]
    return "Module"


@lru_cache(maxsize=4096)
def parse_module_source(source: str) -> ModulePath:
    """``"L['self'].__dict__['_modules']['blocks'].0.attn"`` -> ``("blocks", "0", "attn")``."""
    steps = [step for step in re.findall(r"[\w-]+", source) if step not in _SOURCE_NOISE]
    # The first step is the local variable that holds the root module.
    return tuple(steps[1:])


def source_line(node: Node) -> str:
    """``file:line`` of the innermost frame that a node was traced from, or an empty string."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


def numel(value: torch.Tensor) -> int:
    """Number of elements; a symbolic size counts with its hint, without adding a guard."""
    return math.prod(size_hint(size) for size in value.shape)


def size_hint(size: int | torch.SymInt) -> int:
    """A concrete size, or the example that a symbolic one was traced with (1 if there is none)."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1


def nbytes(value: torch.Tensor) -> int:
    """Bytes that a tensor's elements take."""
    return numel(value) * value.element_size()


def arithmetic(node: Node) -> int:
    """Floating-point operations of a contraction (linear, attention, convolution, ...), else 0."""
    out = tensor_of(node)
    if out is None:
        return 0
    name = op_name(node)
    operands = [tensor_of(arg) for arg in node.all_input_nodes]
    tensors = [operand for operand in operands if operand is not None]
    if name in ("linear", "matmul", "bmm", "mm", "addmm", "baddbmm") and tensors:
        lhs = tensors[1] if name in ("addmm", "baddbmm") and len(tensors) > 2 else tensors[0]
        return 2 * numel(out) * (size_hint(lhs.shape[-1]) if lhs.dim() else 1)
    if name == "einsum" and len(tensors) == 2:
        # Every index occurs in two of (lhs, rhs, out), batch indices in all three.
        return 2 * math.isqrt(numel(tensors[0]) * numel(tensors[1]) * numel(out))
    if is_fused_attention(node):
        query, key = tensors[0], tensors[1]
        return 4 * numel(query) * size_hint(key.shape[-2])
    if name.startswith("conv") and len(tensors) > 1:
        return 2 * numel(out) * math.prod(size_hint(size) for size in tensors[1].shape[1:])
    return 0


def is_fused_attention(node: Node) -> bool:
    """Whether a node is one call that does a whole attention (SDPA, flash and the like)."""
    operands = [tensor_of(arg) for arg in node.all_input_nodes]
    wide = [operand for operand in operands if operand is not None and operand.dim() >= 3]
    return "attention" in op_name(node) and len(wide) >= 3


def is_contraction(node: Node) -> bool:
    """Whether a node sums products over a dimension, which is where a model's arithmetic goes."""
    return arithmetic(node) > 0


def is_inplace(node: Node) -> bool:
    """Whether a node writes into its first argument (``add_``, ``+=``, ``x[i] = y``, ``out=``)."""
    name = op_name(node)
    if node.op == "call_function" and node.target in (operator.setitem,):
        return True
    if node.op == "call_function" and name in ("iadd", "isub", "imul", "itruediv", "ipow"):
        return isinstance(node.args[0], Node) and tensor_of(node.args[0]) is not None
    if "out" in node.kwargs and node.kwargs["out"] is not None:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return (
        node.op in ("call_method", "call_function")
        and name.endswith("_")
        and not name.startswith("_")
        and not name.endswith("__")
    )


def written_node(node: Node) -> Node:
    """The node whose tensor an in-place node writes into."""
    out = node.kwargs.get("out")
    target = out if isinstance(out, Node) else node.args[0]
    if not isinstance(target, Node):
        raise TypeError(f"in-place node {node.name} writes into {target!r}, which is no node")
    return target


def computation(graph: Graph) -> list[Node]:
    """The nodes that compute something: no placeholders, attributes, autocast marks, no output."""
    return [
        node
        for node in graph.nodes
        if node.op not in ("placeholder", "get_attr", "output") and not is_autocast_mark(node)
    ]


def is_autocast_mark(node: Node) -> bool:
    """Whether a node opens or closes an autocast scope."""
    return node.op == "call_function" and op_name(node) in ("_enter_autocast", "_exit_autocast")


def autocast_scopes(graph: Graph) -> dict[Node, tuple[Node, ...]]:
    """For every node the ``_enter_autocast`` nodes whose scope it lies in, outermost first.

    A scope is no data flow, so whoever moves a node out of one must take the scope along.
    """
    open_scopes: list[Node] = []
    scopes: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes:
        if is_autocast_mark(node):
            if op_name(node) == "_enter_autocast":
                open_scopes.append(node)
            else:
                open_scopes.remove(node.args[0])
        scopes[node] = tuple(open_scopes)
    return scopes


def dependencies(graph: Graph) -> dict[Node, list[Node]]:
    """For every node the nodes that must run before it, data flow through in-place writes included.

    A reader of a tensor that was written in place depends on the write, and a write on the earlier
    readers, though no edge of the graph says so.
    """
    root: dict[Node, Node] = {}
    last_write: dict[Node, Node] = {}
    readers: dict[Node, list[Node]] = {}
    before: dict[Node, list[Node]] = {}
    has_writes = any(is_inplace(node) for node in computation(graph))
    for node in graph.nodes:
        inputs = list(node.all_input_nodes)
        before[node] = inputs
        if not has_writes:
            continue
        writes = node.op in ("call_function", "call_method") and is_inplace(node)
        roots = list(dict.fromkeys(root[each] for each in inputs))
        extra = [last_write[each] for each in roots if each in last_write]
        root[node] = node
        if inputs and (writes or op_name(node) in VIEW_OPS | CAST_OPS):
            root[node] = root[written_node(node) if writes else inputs[0]]
        if writes:
            target = root[node]
            extra += readers.pop(target, [])
            last_write[target] = node
        for each in roots:
            readers.setdefault(each, []).append(node)
        before[node] = list(dict.fromkeys([*inputs, *(one for one in extra if one is not node)]))
    return before


def memory_root(node: Node) -> Node:
    """The node that allocated (or received) the memory that a node's tensor lies in."""
    while node.op in ("call_function", "call_method") and node.all_input_nodes:
        if is_inplace(node):
            node = written_node(node)
        elif op_name(node) in VIEW_OPS | CAST_OPS:
            node = node.all_input_nodes[0]
        else:
            break
    return node


def describe_value(value: Any) -> str:
    """``f32[1, 24, 64]`` for a tensor, the value itself for anything else."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    dtype = str(value.dtype).removeprefix("torch.")
    short = dtype.replace("bfloat", "bf").replace("float", "f").replace("int", "i")
    return f"{short}[{', '.join(str(size) for size in value.shape)}]"
