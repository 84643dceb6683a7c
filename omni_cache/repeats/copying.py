"""The traced call of one block, made the call of another one."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import dropwhile
from typing import Any

import torch
from torch.fx import Node, Proxy
from torch.fx.node import map_arg

from omni_cache.repeats.given import (
    GivenConstant,
    GivenItems,
    as_given,
    nodes_in_one_place,
    tensors_in,
)
from omni_cache.repeats.likeness import twins
from omni_cache.repeats.state import UnlikeError, path_of, say, surroundings
from omni_cache.repeats.traced import TracedCall

_amp: Any = torch.amp


def copy_of(
    traced: TracedCall, block: Any, tx: Any, args: list[Any], names: tuple[str, ...]
) -> Any | None:
    """What the call of another block returns, once the graph has what it computes.

    None where that block has to be traced; the graph is as before then.
    """
    if (names, len(args)) != (traced.given.keys, len(traced.given.items)):
        return None
    if traced.surroundings != surroundings(tx):
        return None
    others = twins(traced.module, block.value, traced.read)
    if others is None:
        return None
    graph = tx.output.graph
    last = next(iter(reversed(graph.nodes)))
    try:
        given = GivenItems(tuple, names, tuple(map(as_given, args, traced.given.items)))
        return _Copy(traced, block, tx, others).made(given)
    except Exception as error:
        say(error, block)
        while (newest := next(iter(reversed(graph.nodes)))) is not last:
            graph.erase_node(newest)
        return None


class _Copy:
    """A traced call of one block, made the call of another one."""

    def __init__(self, traced: TracedCall, block: Any, tx: Any, others: Mapping[int, Any]) -> None:
        self._traced = traced
        self._block = block
        self._tx = tx
        self._others = others
        self._tracer = tx.output.current_tracer
        self._path = path_of(block)
        self._nodes: dict[Node, Node] = {}
        self._sources = {traced.source: block.source}
        self._scopes: dict[Node, Any] = {}

    def made(self, given: GivenItems) -> Any:
        """What the call returns, given what it is called with."""
        traced, tx = self._traced, self._tx
        if any(self._its_path(name) in tx.num_calls for name in traced.calls):
            raise UnlikeError  # called before: Dynamo numbers the calls of a module
        pairs = list(nodes_in_one_place(traced.given, given))
        self._nodes.update(pairs)
        if any(self._nodes[own] is not its for own, its in pairs):
            raise UnlikeError  # two of its tensors are one in the other call
        if len(set(self._nodes.values())) < len(self._nodes):
            raise UnlikeError  # or the other way round
        if any(node in self._nodes for node in traced.weights):
            raise UnlikeError  # the traced block was given a weight of its own
        self._read_weights()
        with _left_at_the_end(self._scopes):
            for node in traced.nodes:
                self._nodes[node] = self._copied(node)
        for guard in traced.guards:
            self._guard(guard)
        tx.output.guard_on_key_order.update(map(self._its_source, traced.ordered))
        for name, count in traced.calls.items():
            tx.num_calls[self._its_path(name)] = count
        return self._returned(
            traced.result, {each.node: each.variable for each in tensors_in(given)}
        )

    def _its_source(self, source: Any) -> Any:
        its = self._sources.get(source)
        if its is None:
            read = ((each.name, getattr(source, each.name)) for each in fields(source))
            parts = {name: self._its_source(part) for name, part in read if _is_source(part)}
            its = self._sources[source] = replace(source, **parts)
        return its

    def _its_path(self, name: str) -> str:
        return self._path + name.removeprefix(self._traced.path)

    def _read_weights(self) -> None:
        """Make inputs of the graph of what the traced block has read of its own."""
        from torch._dynamo.variables.builder import VariableBuilder
        from torch._dynamo.variables.tensor import TensorVariable

        inputs = set(self._tx.output.graph.find_nodes(op="placeholder"))
        for node in self._traced.weights:
            argument = node.meta["grapharg"]
            value = self._others.get(id(argument.example))
            if value is None:
                raise UnlikeError
            read = VariableBuilder(self._tx, self._its_source(argument.source))(value)
            if type(read) is not TensorVariable:
                raise UnlikeError
            made = self._nodes[node] = read.as_proxy().node
            if made not in inputs:
                self._describe(made, node)

    def _copied(self, node: Node) -> Node:
        from torch._dynamo.utils import get_fake_value, set_example_value

        args, kwargs = map_arg((node.args, node.kwargs), lambda each: self._nodes.get(each, each))
        name = re.sub(r"_\d+$", "", node.name)
        made: Node = self._tracer.create_node(node.op, node.target, args, kwargs, name)
        self._describe(made, node)
        if node.op == "get_attr":
            made.meta["example_value"] = node.meta["example_value"]
        elif node.target == _amp._enter_autocast:
            self._scopes[made] = _amp._enter_autocast(*node.args)
        elif node.target == _amp._exit_autocast:
            [begin] = made.all_input_nodes
            _amp._exit_autocast(self._scopes.pop(begin))
        else:
            value = get_fake_value(made, self._tx, allow_non_graph_fake=True)
            if node.target is not operator.setitem:
                set_example_value(made, value)
        return made

    def _describe(self, made: Node, node: Node) -> None:
        """Say of a node in which code it was traced, and in which modules."""
        made.stack_trace = node.stack_trace
        if "nn_module_stack" in node.meta:
            made.meta["nn_module_stack"] = self._modules_around(node.meta["nn_module_stack"])
        if "source_fn_stack" in node.meta:
            *outer, (_, function) = node.meta["source_fn_stack"]
            made.meta["source_fn_stack"] = [*outer, (made.name, function)]

    def _modules_around(self, stack: Mapping[str, Any]) -> dict[str, Any]:
        around = dict(self._tx.nn_module_stack)
        inner = dropwhile(lambda each: each[1][0] != self._traced.path, stack.items())
        for key, (path, kind) in inner:
            identity, at, number = key.partition("@")
            other = self._others[int(identity)]
            around[f"{id(other)}{at}{number}"] = (self._its_path(path), kind)
        return around

    def _guard(self, guard: Any) -> None:
        source = self._its_source(guard.originating_source)
        self._note_number(source, guard)
        its = source.make_guard(guard.create_fn)
        its.user_stack = guard.user_stack
        self._tx.output.guards.add(its, collect_debug_stack=False)

    def _note_number(self, source: Any, guard: Any) -> None:
        """Have Dynamo remember a number of the block, as it does of one that it has read.

        One that is another at a later call may change from then on. Of those that Dynamo does not
        know, each would cost a graph of its own.
        """
        from torch._dynamo.pgo import FrameStateSizeEntry, auto_dynamic, get_code_state

        if guard.inner_create_fn().__name__ not in ("CONSTANT_MATCH", "EQUALS_MATCH"):
            return
        value = self._tx.output.resolve_source_value(source)
        if type(value) not in (int, float):
            return
        own = guard.originating_source.name
        for state in get_code_state().values():  # of all code that has read the first block's
            if own in state.automatic_dynamic:
                noted = state.automatic_dynamic[source.name]
                noted |= FrameStateSizeEntry.make_scalar(value)
                if noted.scalar is auto_dynamic:
                    raise UnlikeError  # a trace would not take it for a constant

    def _returned(self, result: Any, seen: dict[Node, Any]) -> Any:
        from torch._dynamo.variables.base import ValueMutationNew
        from torch._dynamo.variables.builder import handle_traced_output
        from torch._dynamo.variables.constant import ConstantVariable
        from torch._dynamo.variables.lists import ListVariable
        from torch._dynamo.variables.tensor import TensorVariable

        if isinstance(result, GivenConstant):
            return ConstantVariable.create(result.value)
        if isinstance(result, GivenItems):
            items = [self._returned(each, seen) for each in result.items]
            if result.kind is ListVariable:
                return ListVariable(items, mutation_type=ValueMutationNew())
            return result.kind(items)
        node = self._nodes[result.node]
        if node not in seen:
            value = node.meta["example_value"]
            proxy = Proxy(node, self._tracer)
            seen[node] = handle_traced_output(value, self._tx, proxy, {}, None, TensorVariable)
        return seen[node]


@contextmanager
def _left_at_the_end(scopes: dict[Node, Any]) -> Iterator[None]:
    """Leave scopes of autocast that an error has kept open."""
    try:
        yield
    finally:
        for scope in reversed(list(scopes.values())):
            _amp._exit_autocast(scope)


def _is_source(value: Any) -> bool:
    from torch._guards import Source

    return isinstance(value, Source)
