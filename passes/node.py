"""Facts about single nodes of a Dynamo graph: where they come from, what they read, write and cost.

Knows FX nodes and fake tensors; knows nothing of block loops, regions or caching.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node
from torch.fx.node import Target, map_arg

ModulePath = tuple[str, ...]

# Attribute steps that Dynamo writes into module sources and that are no part of the module's name.
_SOURCE_NOISE = frozenset({"__dict__", "_modules", "_orig_mod", "getattr", "G", "L"})

VIEW_OPS = frozenset(
    "chunk split split_with_sizes tensor_split unbind narrow select getitem view view_as reshape "  # noqa: SIM905
    "flatten unflatten permute transpose movedim moveaxis swapaxes swapdims t squeeze unsqueeze "
    "expand expand_as broadcast_to detach alias contiguous".split()
)
"""Operations whose result is made of elements of their first argument and may share its memory."""

CAST_OPS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double"})
"""Operations that change at most dtype or device, element by element."""

_MAY_SHARE_MEMORY = VIEW_OPS | CAST_OPS | {"dropout", "view_as_real", "view_as_complex", "real"}

ELEMENTWISE_OPS = CAST_OPS | frozenset(
    "add sub mul div truediv neg pos addcmul clamp clip dropout contiguous clone radd rsub rmul "  # noqa: SIM905
    "iadd isub imul itruediv".split()
)
"""Arithmetic of one output element from the elements at the same place."""

_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in "setitem delitem iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior "  # noqa: SIM905
    "ixor ilshift irshift iconcat".split()
)


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


def argument(node: Node, place: int, *names: str, default: Any = None) -> Any:
    """A node's argument by its place or by one of its names."""
    if len(node.args) > place:
        return node.args[place]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


# --- values --------------------------------------------------------------------------------------


def tensor_of(node: Node) -> torch.Tensor | None:
    """The fake tensor that a node produces, or None where it produces something else."""
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def is_tuple(node: Node) -> bool:
    """Whether a node produces several values at once."""
    return isinstance(node.meta.get("example_value"), (tuple, list))


def is_size(node: Node) -> bool:
    """Whether a node produces a number, concrete or symbolic, and no tensor."""
    value = node.meta.get("example_value")
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_shape(node: Node) -> bool:
    """Whether a node produces the shape of a tensor, for which any part can ask the tensor."""
    return isinstance(node.meta.get("example_value"), torch.Size)


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


def numel(value: torch.Tensor) -> int:
    """Number of elements; a symbolic size counts with its hint, without adding a guard."""
    return math.prod(map(size_hint, value.shape))


UNKNOWN_SIZE = 128
"""What a size that depends on data, and so has no example, counts for in an estimate of work."""


def size_hint(size: int | torch.SymInt) -> int:
    """A concrete size, or the example that a symbolic one was traced with.

    In a size that depends on data, each unknown counts as `UNKNOWN_SIZE`.
    """
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, UNKNOWN_SIZE)))


def nbytes(value: torch.Tensor) -> int:
    """Bytes that a tensor's elements take."""
    return numel(value) * value.element_size()


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard on a symbolic one."""
    return is_known(one == other)


def is_known(fact: bool | torch.SymBool) -> bool:
    """Whether a fact about sizes holds for all sizes that the graph was traced for."""
    if isinstance(fact, bool):
        return fact
    # Brings in sympy, which takes longer to import than all of this package.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(fact))


def is_unknown(size: int | torch.SymInt) -> bool:
    """Whether a size is only known when the graph runs: a single number that depends on data."""
    if isinstance(size, int) or size.node.hint is not None:
        return False
    return bool(size.node.expr.is_Symbol)


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal, without adding a guard."""
    return len(one) == len(other) and all(map(same_size, one, other))


def describe_value(value: Any) -> str:
    """``f32[1, 24, 64]`` for a tensor, the value itself for anything else."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    dtype = str(value.dtype).removeprefix("torch.")
    short = dtype.replace("bfloat", "bf").replace("float", "f").replace("int", "i")
    return f"{short}[{', '.join(map(str, value.shape))}]"


# --- origin --------------------------------------------------------------------------------------


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


# --- cost ----------------------------------------------------------------------------------------


def arithmetic(node: Node) -> int:
    """Floating-point operations of a contraction (linear, attention, convolution, ...), else 0."""
    name = op_name(node)
    if name not in _CONTRACTIONS and not name.startswith("conv") and not _names_attention(name):
        return 0
    out, tensors = tensor_of(node), _operands(node)
    if out is None or not tensors:
        return 0
    if name == "einsum":
        return 2 * numel(out) * _contracted(str(node.args[0]), tensors) if len(tensors) > 1 else 0
    if name in _CONTRACTIONS:
        lhs = tensors[1] if name in ("addmm", "baddbmm") and len(tensors) > 2 else tensors[0]
        return 2 * numel(out) * (size_hint(lhs.shape[-1]) if lhs.dim() else 1)
    if is_fused_attention(node):
        query, key = tensors[0], tensors[1]
        return 4 * numel(query) * size_hint(key.shape[-2])
    if name.startswith("conv") and len(tensors) > 1:
        return 2 * numel(out) * math.prod(map(size_hint, tensors[1].shape[1:]))
    return 0


_CONTRACTIONS = frozenset({"linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum"})


def _contracted(equation: str, operands: Sequence[torch.Tensor]) -> int:
    """The number of products that each element of an einsum's result sums."""
    terms, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms.split(","), operands, strict=False):
        for place, index in enumerate(term):
            if index not in result:
                from_the_right = "." in term[:place]
                size = operand.shape[place - len(term) if from_the_right else place]
                sizes[index] = size_hint(size)
    return math.prod(sizes.values())


def is_fused_attention(node: Node) -> bool:
    """Whether a node is one call that does a whole attention (SDPA, flash and the like)."""
    return _names_attention(op_name(node)) and sum(x.dim() >= 3 for x in _operands(node)) >= 3


def _names_attention(name: str) -> bool:
    return "attention" in name or "attn" in name


def _operands(node: Node) -> list[torch.Tensor]:
    """The tensors that a node is called with; one that is passed twice counts twice."""
    values = map(tensor_of, _nodes_in((node.args, node.kwargs)))
    return [value for value in values if value is not None]


def _nodes_in(value: Any) -> list[Node]:
    """The nodes in an argument, as often as they occur."""
    found: list[Node] = []

    def collect(node: Node) -> Node:
        found.append(node)
        return node

    map_arg(value, collect)
    return found


# --- memory --------------------------------------------------------------------------------------


def written_nodes(node: Node) -> list[Node]:
    """The nodes whose tensors a node writes into; empty for nearly all nodes.

    Found are ``x.add_(y)``, ``x += y``, ``x[i] = y``, ``out=x``, ``inplace=True``, operators whose
    schema says so, and Triton kernels, which may write into any of their arguments.
    """
    if "out" not in node.kwargs and not _may_write(node.target):
        return []
    written = [argument(node, place, name) for place, name in _written_arguments(node.target)]
    if "out" in node.kwargs:
        written.append(node.kwargs["out"])
    parameters = _parameters(node.target)
    if "inplace" in parameters and argument(node, parameters.index("inplace"), "inplace"):
        written.append(argument(node, 0, parameters[0]))
    # ``+=`` on a size only rebinds a name.
    return [each for each in _nodes_in(written) if not is_size(each)]


@lru_cache(maxsize=4096)
def _may_write(target: Target) -> bool:
    return bool(_written_arguments(target)) or "inplace" in _parameters(target)


@lru_cache(maxsize=4096)
def _written_arguments(target: Target) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that a function or method always writes into."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target._overload_names[0])
    if isinstance(target, torch._ops.OpOverload):
        return tuple(
            (place, each.name)
            for place, each in enumerate(target._schema.arguments)
            if each.alias_info is not None and each.alias_info.is_write
        )
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name == "triton_kernel_wrapper_mutation":
        return ((0, "kwargs"),)
    if name in ("and_", "or_", "not_"):  # Python's own names for operators that write nothing
        return ()
    if target in _INPLACE_OPERATORS or re.fullmatch(r"[a-z]\w*[a-z0-9]_|__i[a-z]+__", name):
        return ((0, "input"),)
    return ()


@lru_cache(maxsize=4096)
def _parameters(target: Target) -> tuple[str, ...]:
    """The names of a Python function's parameters; none of a built-in's."""
    return tuple(inspect.signature(target).parameters) if isinstance(target, FunctionType) else ()


def memory_root(node: Node) -> Node:
    """The node that allocated (or received) the memory that a node's tensor lies in."""
    while node.op in ("call_function", "call_method") and node.all_input_nodes:
        written = written_nodes(node)
        if written:
            node = written[0]
        elif op_name(node) in _MAY_SHARE_MEMORY:
            node = node.all_input_nodes[0]
        else:
            break
    return node


# --- order ---------------------------------------------------------------------------------------


def computation(graph: Graph) -> list[Node]:
    """The nodes that compute something: no placeholders, attributes, mode marks, no output."""
    return [
        node
        for node in graph.nodes
        if node.op not in ("placeholder", "get_attr", "output") and not is_mode_mark(node)
    ]


Dependencies: TypeAlias = Mapping[Node, Sequence[Node]]
"""For every node the nodes that must run before it."""


def dependencies(graph: Graph) -> Dependencies:
    """For every node the nodes that must run before it, data flow through in-place writes included.

    A reader of a tensor that was written in place depends on the write, and a write on the earlier
    readers, though no edge of the graph says so. Random draws keep their order, because each moves
    the generator on. A span of vmap runs as a whole: after all that it reads, before all that reads
    any of it.
    """
    before = _data_flow(graph)
    for earlier, later in pairwise([node for node in before if _draws(node)]):
        before[later] = [*before[later], earlier]
    for span in vmap_spans(graph):
        inner = set(span)
        read = dict.fromkeys(each for node in span for each in before[node] if each not in inner)
        before[span[0]] = list(read)
        for earlier, later in pairwise(span):
            before[later] = [*before[later], earlier]
        for user in dict.fromkeys(user for node in span for user in node.users):
            if user not in inner:
                before[user] = [*before[user], span[-1]]
    return before


def vmap_spans(graph: Graph) -> list[list[Node]]:
    """The runs of nodes from where vmap is entered to where it is left, the outermost ones."""
    spans: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        if name == "_vmap_increment_nesting":
            if depth == 0:
                spans.append([])
            depth += 1
        if depth and node.op not in ("placeholder", "get_attr"):
            spans[-1].append(node)
        if name == "_vmap_decrement_nesting":
            depth -= 1
    return spans


def _data_flow(graph: Graph) -> dict[Node, list[Node]]:
    before = {node: list(node.all_input_nodes) for node in graph.nodes}
    written = {node: nodes for node in before if (nodes := written_nodes(node))}
    if not written:
        return before
    root: dict[Node, Node] = {}
    last_write: dict[Node, Node] = {}
    readers: dict[Node, list[Node]] = {}
    for node, inputs in before.items():
        targets = [root[each] for each in written.get(node, ())]
        roots = list(dict.fromkeys(root[each] for each in inputs))
        if targets:
            root[node] = targets[0]
        elif inputs and op_name(node) in _MAY_SHARE_MEMORY:
            root[node] = root[inputs[0]]
        else:
            root[node] = node
        extra = [last_write[each] for each in roots if each in last_write]
        for target in targets:
            extra += readers.pop(target, [])
            last_write[target] = node
        for each in roots:
            readers.setdefault(each, []).append(node)
        before[node] = list(dict.fromkeys([*inputs, *(each for each in extra if each != node)]))
    return before


def _draws(node: Node) -> bool:
    """Whether a node draws random numbers."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = op_name(node)
    if "dropout" in name:
        return bool(argument(node, 2, "training", default="alpha" not in name))
    return name.startswith("rand") or name.rstrip("_") in _DISTRIBUTIONS


_DISTRIBUTIONS = frozenset(
    "bernoulli binomial cauchy exponential geometric log_normal multinomial normal poisson "  # noqa: SIM905
    "uniform".split()
)


# Autocast, grad mode and the choice of attention kernels are no data flow: a mark in the graph
# holds for the nodes listed after it, so whoever moves a node must take its modes along.

SCOPE_ENDS = {
    "_enter_autocast": torch.amp.autocast_mode._exit_autocast,
    "_enter_inference_mode": torch.autograd.grad_mode._exit_inference_mode,
}
"""What closes the scope that a mark of that name opens; it takes the mark as its argument."""

_SWITCHES = frozenset({"_set_grad_enabled", "_sdpa_kernel", "_set_deterministic_algorithms"})
_MARKS = frozenset(
    {*SCOPE_ENDS, *_SWITCHES, "_exit_autocast", "_exit_inference_mode", "_backend_from_string"}
)


@dataclass(frozen=True, eq=False)
class Modes:
    """The marks that hold for a node.

    ``scopes`` opened the context managers that it lies in, outermost first; ``switches`` holds the
    last mark of each kind of global switch before it, by name.
    """

    scopes: tuple[Node, ...]
    switches: dict[str, Node]


def is_mode_mark(node: Node) -> bool:
    """Whether a node only sets a mode for the nodes after it."""
    return node.op == "call_function" and op_name(node) in _MARKS


def modes(graph: Graph) -> dict[Node, Modes]:
    """The modes that every node runs in."""
    now = Modes((), {})
    held: dict[Node, Modes] = {}
    for node in graph.nodes:
        if is_mode_mark(node):
            name = op_name(node)
            if name in SCOPE_ENDS:
                now = Modes((*now.scopes, node), now.switches)
            elif name in _SWITCHES:
                now = Modes(now.scopes, {**now.switches, name: node})
            elif node.args[0] in now.scopes:
                now = Modes(tuple(x for x in now.scopes if x is not node.args[0]), now.switches)
        held[node] = now
    return held
