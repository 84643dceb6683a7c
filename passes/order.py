"""The order that nodes must run in: data flow, writes in place, random draws, vmap spans and modes.

Knows what no edge of a graph shows; knows nothing of block loops, regions or caching.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from types import FunctionType
from typing import TypeAlias

import torch
from torch.fx import Graph, Node
from torch.fx.node import Target

from .names import CAST_OPS, VIEW_OPS, argument, nodes_in, op_name
from .values import is_size

_MAY_SHARE_MEMORY = VIEW_OPS | CAST_OPS | {"dropout", "view_as_real", "view_as_complex", "real"}


_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in "setitem delitem iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior "  # noqa: SIM905
    "ixor ilshift irshift iconcat".split()
)


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
    return [each for each in nodes_in(written) if not is_size(each)]


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
    while (owner := shares_memory_with(node)) is not None:
        node = owner
    return node


def is_written(node: Node) -> bool:
    """Whether others may write into a tensor: the caller into an input, or a node in place."""
    root = memory_root(node)
    written = (each for other in node.graph.nodes for each in written_nodes(other))
    return root.op == "placeholder" or any(memory_root(each) is root for each in written)


def shares_memory_with(node: Node) -> Node | None:
    """The input whose memory a node's tensor may lie in; None where it has memory of its own."""
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return None
    written = written_nodes(node)
    if written:
        return written[0]
    return node.all_input_nodes[0] if op_name(node) in _MAY_SHARE_MEMORY else None


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
    for earlier, later in pairwise([node for node in before if draws(node)]):
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


def draws(node: Node) -> bool:
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
    last mark of each kind of global switch before it, by name. ``nestings`` entered the function
    transforms that it lies in (vmap, grad, jvp), which are computation and no marks of their own.
    """

    scopes: tuple[Node, ...]
    switches: dict[str, Node]
    nestings: tuple[Node, ...] = ()


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
                now = replace(now, scopes=(*now.scopes, node))
            elif name in _SWITCHES:
                now = replace(now, switches={**now.switches, name: node})
            elif node.args[0] in now.scopes:
                rest = tuple(each for each in now.scopes if each is not node.args[0])
                now = replace(now, scopes=rest)
        elif node.op == "call_function" and op_name(node).endswith("_increment_nesting"):
            now = replace(now, nestings=(*now.nestings, node))
        elif node.op == "call_function" and op_name(node).endswith("_decrement_nesting"):
            now = replace(now, nestings=now.nestings[:-1])
        held[node] = now
    return held
