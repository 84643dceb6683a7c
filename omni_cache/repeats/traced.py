"""A block's call that Dynamo has traced, kept for calls of blocks like it."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from omni_cache.repeats.given import (
    GivenItems,
    as_given,
    containers_in,
    given_back,
    may_tell,
    parts_of,
    tensors_in,
)
from omni_cache.repeats.state import (
    UnlikeError,
    guards_below,
    has_no_effect,
    is_below,
    names_below,
    path_of,
    say,
    surroundings,
    weights_below,
)

_amp: Any = torch.amp


@dataclass(frozen=True)
class TracedCall:
    """A block's call as Dynamo has traced it.

    Attributes:
        module: the block.
        source: where the block comes from.
        path: what Dynamo calls it.
        given: what it was called with.
        weights: inputs of the graph that come from the block.
        nodes: what the call computes.
        result: what it returns, made of nodes.
        guards: what must hold of the block, for what was traced to hold.
        read: the names under which the call has read anything of the block; None for any.
        ordered: the dictionaries of the block whose order counts.
        calls: how often each module was called, by the names that Dynamo counts by.
        surroundings: the line that called it, and the modes that it was called in.
    """

    module: nn.Module
    source: Any
    path: str
    given: GivenItems
    weights: list[Node]
    nodes: list[Node]
    result: Any
    guards: list[Any]
    read: set[str] | None
    ordered: list[Any]
    calls: dict[str, int]
    surroundings: tuple[Any, ...]


class Before:
    """Where tracing stands before a call."""

    def __init__(self, tx: Any, args: list[Any]) -> None:
        self._tx = tx
        self._args = args
        self._last = next(iter(reversed(tx.output.graph.nodes)), None)
        self._inputs = set(tx.output.graph.find_nodes(op="placeholder"))
        self._calls = dict(tx.num_calls)
        self._surroundings = surroundings(tx)
        self._lists = list(map(containers_in, args))

    def traced(self, block: Any, names: tuple[str, ...], result: Any) -> TracedCall | None:
        """The call that has been traced since; None where it cannot be copied."""
        tx = self._tx
        if not has_no_effect(tx) or list(map(containers_in, self._args)) != self._lists:
            return None
        try:
            path = path_of(block)
            given = GivenItems(tuple, names, tuple(map(as_given, self._args)))
            nodes = self._nodes()
            within = {*nodes, *(each.node for each in tensors_in(given))}
            check_nodes(nodes, within, self._inputs)
            if any(may_tell(part, block.value, tx) for part in parts_of(given)):
                raise UnlikeError
            calls = {name: count for name, count in tx.num_calls.items() if name.startswith(path)}
            if {**self._calls, **calls} != tx.num_calls or calls.keys() & self._calls:
                # It calls what others call, and Dynamo numbers the calls of a module.
                raise UnlikeError
            return TracedCall(
                module=block.value,
                source=block.source,
                path=path,
                given=given,
                weights=weights_below(block.source, tx),
                nodes=nodes,
                result=given_back(result, within, self._args),
                guards=guards_below(block.source, tx),
                read=names_below(block.source, tx),
                ordered=[
                    each for each in tx.output.guard_on_key_order if is_below(each, block.source)
                ],
                calls=calls,
                surroundings=self._surroundings,
            )
        except Exception as error:
            say(error, block)
            return None

    def _nodes(self) -> list[Node]:
        nodes: list[Node] = []
        for node in reversed(self._tx.output.graph.nodes):
            if node is self._last or node.op == "placeholder":
                break
            nodes.append(node)
        return nodes[::-1]


def check_nodes(nodes: Iterable[Node], within: Container[Node], before: Container[Node]) -> None:
    """Raise where a call makes more than tensors and sizes, or reads what may be another's.

    Args:
        nodes: what the call computes.
        within: those, and what it is given.
        before: the inputs that the graph had before.
    """
    for node in nodes:
        value = node.meta.get("example_value")
        values = value if isinstance(value, tuple | list) else [value]
        is_known = all(isinstance(each, torch.Tensor | torch.SymInt | int) for each in values)
        if not (is_known or node.target is operator.setitem or _is_closed_scope(node, within)):
            raise UnlikeError
        owner = getattr(node.target, "__self__", None)
        if node.op == "call_module" or not isinstance(owner, ModuleType | type | None):
            raise UnlikeError
        if _is_inplace_view(node):
            raise UnlikeError  # what is known of its input is no more what the call was given
        if node.meta.get("custom"):
            raise UnlikeError  # `torch.fx.traceback.annotate` may say of each block where it is
        if "unbacked_bindings" in node.meta:
            raise UnlikeError  # a size that depends on data is another one at each call
        for each in node.all_input_nodes:
            if each not in within and each not in before and not _is_tensor_from_outside(each):
                raise UnlikeError


def _is_closed_scope(node: Node, within: Container[Node]) -> bool:
    """Whether a node begins or ends a scope of autocast that lies within a call."""
    if node.target is _amp._enter_autocast:
        ends = [each.target is _amp._exit_autocast and each in within for each in node.users]
        return ends == [True]
    return node.target is _amp._exit_autocast and node.args[0] in within


def _is_inplace_view(node: Node) -> bool:
    """Whether a node gives its input another size or another memory, as `unsqueeze_` does."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    packet = getattr(torch.ops.aten, name, None) if name.endswith("_") else None
    return packet is not None and any(
        torch.Tag.inplace_view in getattr(packet, each).tags for each in packet.overloads()
    )


def _is_tensor_from_outside(node: Node) -> bool:
    """Whether a node is an input of the graph that is one; a Python number may be a drawn one."""
    argument = node.meta.get("grapharg")
    return argument is not None and argument.is_tensor and not argument.pass_arg_as_tensor
