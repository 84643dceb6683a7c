"""Blocks that repeat are traced once: Dynamo follows the first one and copies what it found.

    blocks.0(x)     traced: its nodes, its guards and what it returns are kept
    blocks.1(x)     the same nodes on its own weights, the same guards on its own attributes

Everything else of a compilation is done once for all blocks of one structure; tracing would grow
with depth. A copy is made only of a block that is like the traced one in everything that its
code could tell them apart by, that is called alike and in the same line, and that had no effect but
its result. Any other block is traced. Like `omni_cache.dynamo`, this leans on private names of
PyTorch: where one of them is missing, every block is traced.
"""

from __future__ import annotations

import functools
import logging
import operator
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from itertools import dropwhile
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx import Node, Proxy
from torch.fx.node import map_arg

from omni_cache.likeness import kind_of_tensor, twins

logger = logging.getLogger(__name__)

_amp: Any = torch.amp


@contextmanager
def traced_once(model: nn.Module | None) -> Iterator[None]:
    """Have Dynamo trace the blocks of a model once for all that are alike.

    Args:
        model: whose blocks, the elements of its lists, are meant; None for no blocks at all.
    """
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)] if model else []
    blocks = {id(block): block for each in lists if len(each) > 1 for block in each}
    token = _tracing.set(_Tracing(blocks) if blocks and _dynamo_asks() else None)
    try:
        yield
    finally:
        _tracing.reset(token)


@functools.cache
def _dynamo_asks() -> bool:
    """Have Dynamo ask `_tracing` at each call of a module; False where this PyTorch is another.

    For good, since of two threads that each put the method back one could put back the other's.
    """
    try:
        from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable as Module
    except ImportError:
        logger.info("torch %s traces every block", torch.__version__)
        return False
    call: Any = Module.call_function

    @functools.wraps(call)
    def call_once(self: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tracing = _tracing.get()
        trace = functools.partial(call, self, tx, args, kwargs)
        if tracing is None or tracing.blocks.get(id(self.value)) is not self.value:
            return trace()
        return tracing.call(trace, self, tx, [*args, *kwargs.values()], tuple(kwargs))

    Module.call_function = call_once  # type: ignore[method-assign]
    return True


@dataclass
class _Tracing:
    """What has been traced of the blocks that may repeat."""

    blocks: Mapping[int, nn.Module]
    output: Any = None
    traced: list[_Traced] = field(default_factory=list)
    is_within_block: bool = False

    def call(
        self, trace: Callable[[], Any], block: Any, tx: Any, args: list[Any], names: tuple[str, ...]
    ) -> Any:
        """What a call that is being traced returns: by a copy where one will do."""
        is_nested = self.is_within_block or tx.output.current_tracer.parent is not None
        if is_nested or block.source is None or _is_key(block.source):
            return trace()
        if not _has_no_effect(tx):
            return trace()
        if self.output is not tx.output:  # Dynamo has begun anew
            self.output, self.traced = tx.output, []
        for each in self.traced:
            result = each.copy_for(block, tx, args, names)
            if result is not None:
                return result
        self.is_within_block = True
        before = _Before(tx, args)
        try:
            result = trace()
        finally:
            self.is_within_block = False
        traced = before.traced(block, names, result)
        if traced is not None:
            self.traced.append(traced)
        return result


_tracing: ContextVar[_Tracing | None] = ContextVar("blocks_being_traced", default=None)


class _UnlikeError(Exception):
    """A call is no copy of another one, or none can be made of it."""


def _say(error: Exception, block: Any) -> None:
    """Leave a word where something else is amiss; the block is traced then."""
    if not isinstance(error, _UnlikeError):
        logger.info("%s is traced: %s: %s", _path(block), type(error).__name__, error)


# --- what a call is given -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A tensor, by the node that makes it."""

    node: Node
    facts: tuple[Any, ...]
    variable: Any = field(compare=False)


@dataclass(frozen=True)
class _Constant:
    """A Python value."""

    value: Any

    def __eq__(self, other: object) -> bool:
        own, its = self.value, getattr(other, "value", None)
        return type(own) is type(its) and own == its and repr(own) == repr(its)


@dataclass(frozen=True)
class _Items:
    """A tuple, list or dictionary."""

    kind: type
    keys: tuple[Any, ...]
    items: tuple[Any, ...]


@dataclass(frozen=True)
class _Same:
    """Anything else that comes from outside, by where it comes from."""

    source: Any


class _Unused:
    """What no code has looked at."""


def _given(value: Any, like: Any = None) -> Any:
    """What a variable of Dynamo's stands for.

    Args:
        value: the variable.
        like: what stood in its place in another call. What that one has looked at is looked at.
    """
    from torch._dynamo.variables.constant import ConstantVariable
    from torch._dynamo.variables.dicts import ConstDictVariable
    from torch._dynamo.variables.lazy import LazyVariableTracker
    from torch._dynamo.variables.lists import ListVariable, TupleVariable
    from torch._dynamo.variables.tensor import TensorVariable

    if isinstance(like, _Unused):
        return like
    if type.__instancecheck__(LazyVariableTracker, value):
        if like is None and not value.is_realized():
            return _Unused()
        value = value.realize()
    kind = type(value)
    if kind is TensorVariable:
        node = value.as_proxy().node
        return _Tensor(node, _facts(node), value)
    if kind is ConstantVariable:
        return _Constant(value.value)
    if kind in (TupleVariable, ListVariable, ConstDictVariable):
        is_dict = kind is ConstDictVariable
        keys = tuple(key.vt.as_python_constant() for key in value.items) if is_dict else ()
        items = list(value.items.values()) if is_dict else value.items
        likes = like.items if isinstance(like, _Items) and len(like.items) == len(items) else ()
        parts = (_given(*each) for each in zip(items, likes or [None] * len(items), strict=True))
        return _Items(kind, keys, tuple(parts))
    if value.source is None:
        raise _UnlikeError
    return _Same(value.source)


def _facts(node: Node) -> tuple[Any, ...]:
    """What tracing may depend on of the tensor that a node makes."""
    value = node.meta["example_value"]
    return (type(value), *_sizes(value), *kind_of_tensor(value))


def _sizes(value: torch.Tensor) -> tuple[Any, ...]:
    """The sizes and strides of a tensor; of one that may change, the expression that it is."""
    sizes = (*value.size(), *value.stride())
    # Comparing the sizes themselves would be a guard.
    return tuple(each.node.expr if isinstance(each, torch.SymInt) else each for each in sizes)


def _parts(given: Any) -> Iterator[Any]:
    yield given
    for each in given.items if isinstance(given, _Items) else ():
        yield from _parts(each)


def _tensors(given: Any) -> Iterator[_Tensor]:
    return (each for each in _parts(given) if isinstance(each, _Tensor))


def _may_tell(part: Any, block: nn.Module, tx: Any) -> bool:
    """Whether a block could find itself in what it is given, and so learn its place."""
    if not isinstance(part, _Same):
        return False
    value = tx.output.resolve_source_value(part.source)
    return isinstance(value, nn.Module) and any(each is block for each in value.modules())


def _pairs(given: Any, other: Any) -> Iterator[tuple[Node, Node]]:
    """The nodes of two calls that stand in one place."""
    if isinstance(given, _Tensor):
        if not isinstance(other, _Tensor) or given.facts != other.facts:
            raise _UnlikeError
        yield given.node, other.node
    elif isinstance(given, _Items):
        if not isinstance(other, _Items):
            raise _UnlikeError
        if (given.kind, given.keys, len(given.items)) != (other.kind, other.keys, len(other.items)):
            raise _UnlikeError
        for each, its in zip(given.items, other.items, strict=True):
            yield from _pairs(each, its)
    elif not isinstance(given, _Unused) and given != other:
        raise _UnlikeError


# --- what a traced call leaves --------------------------------------------------------------------


class _Before:
    """Where tracing stands before a call."""

    def __init__(self, tx: Any, args: list[Any]) -> None:
        self._tx = tx
        self._args = args
        self._last = next(iter(reversed(tx.output.graph.nodes)), None)
        self._inputs = set(tx.output.graph.find_nodes(op="placeholder"))
        self._calls = dict(tx.num_calls)
        self._surroundings = _surroundings(tx)
        self._lists = list(map(_containers, args))

    def traced(self, block: Any, names: tuple[str, ...], result: Any) -> _Traced | None:
        """The call that has been traced since; None where it cannot be copied."""
        tx = self._tx
        if not _has_no_effect(tx) or list(map(_containers, self._args)) != self._lists:
            return None
        try:
            path = _path(block)
            given = _Items(tuple, names, tuple(map(_given, self._args)))
            nodes = self._nodes()
            within = {*nodes, *(each.node for each in _tensors(given))}
            _check_nodes(nodes, within, self._inputs)
            if any(_may_tell(part, block.value, tx) for part in _parts(given)):
                raise _UnlikeError
            calls = {name: count for name, count in tx.num_calls.items() if name.startswith(path)}
            if {**self._calls, **calls} != tx.num_calls or calls.keys() & self._calls:
                # It calls what others call, and Dynamo numbers the calls of a module.
                raise _UnlikeError
            return _Traced(
                module=block.value,
                source=block.source,
                path=path,
                given=given,
                weights=_weights_below(block.source, tx),
                nodes=nodes,
                result=_given_back(result, within, self._args),
                guards=_guards_below(block.source, tx),
                read=_names_below(block.source, tx),
                ordered=[
                    each for each in tx.output.guard_on_key_order if _is_below(each, block.source)
                ],
                calls=calls,
                surroundings=self._surroundings,
            )
        except Exception as error:
            _say(error, block)
            return None

    def _nodes(self) -> list[Node]:
        nodes: list[Node] = []
        for node in reversed(self._tx.output.graph.nodes):
            if node is self._last or node.op == "placeholder":
                break
            nodes.append(node)
        return nodes[::-1]


@dataclass(frozen=True)
class _Traced:
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
    given: _Items
    weights: list[Node]
    nodes: list[Node]
    result: Any
    guards: list[Any]
    read: set[str] | None
    ordered: list[Any]
    calls: dict[str, int]
    surroundings: tuple[Any, ...]

    def copy_for(self, block: Any, tx: Any, args: list[Any], names: tuple[str, ...]) -> Any | None:
        """What the call of another block returns, once the graph has what it computes.

        None where that block has to be traced; the graph is as before then.
        """
        if (names, len(args)) != (self.given.keys, len(self.given.items)):
            return None
        if self.surroundings != _surroundings(tx):
            return None
        others = twins(self.module, block.value, self.read)
        if others is None:
            return None
        graph = tx.output.graph
        last = next(iter(reversed(graph.nodes)))
        try:
            given = _Items(tuple, names, tuple(map(_given, args, self.given.items)))
            return _Copy(self, block, tx, others).made(given)
        except Exception as error:
            _say(error, block)
            while (newest := next(iter(reversed(graph.nodes)))) is not last:
                graph.erase_node(newest)
            return None


class _Copy:
    """A traced call of one block, made the call of another one."""

    def __init__(self, traced: _Traced, block: Any, tx: Any, others: Mapping[int, Any]) -> None:
        self._traced = traced
        self._block = block
        self._tx = tx
        self._others = others
        self._tracer = tx.output.current_tracer
        self._path = _path(block)
        self._nodes: dict[Node, Node] = {}
        self._sources = {traced.source: block.source}
        self._scopes: dict[Node, Any] = {}

    def made(self, given: _Items) -> Any:
        """What the call returns, given what it is called with."""
        traced, tx = self._traced, self._tx
        if any(self._its_path(name) in tx.num_calls for name in traced.calls):
            raise _UnlikeError  # called before: Dynamo numbers the calls of a module
        pairs = list(_pairs(traced.given, given))
        self._nodes.update(pairs)
        if any(self._nodes[own] is not its for own, its in pairs):
            raise _UnlikeError  # two of its tensors are one in the other call
        if len(set(self._nodes.values())) < len(self._nodes):
            raise _UnlikeError  # or the other way round
        if any(node in self._nodes for node in traced.weights):
            raise _UnlikeError  # the traced block was given a weight of its own
        self._read_weights()
        with _left_at_the_end(self._scopes):
            for node in traced.nodes:
                self._nodes[node] = self._copied(node)
        for guard in traced.guards:
            self._guard(guard)
        tx.output.guard_on_key_order.update(map(self._its_source, traced.ordered))
        for name, count in traced.calls.items():
            tx.num_calls[self._its_path(name)] = count
        return self._returned(traced.result, {each.node: each.variable for each in _tensors(given)})

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
                raise _UnlikeError
            read = VariableBuilder(self._tx, self._its_source(argument.source))(value)
            if type(read) is not TensorVariable:
                raise _UnlikeError
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
                    raise _UnlikeError  # a trace would not take it for a constant

    def _returned(self, result: Any, seen: dict[Node, Any]) -> Any:
        from torch._dynamo.variables.base import ValueMutationNew
        from torch._dynamo.variables.builder import handle_traced_output
        from torch._dynamo.variables.constant import ConstantVariable
        from torch._dynamo.variables.lists import ListVariable
        from torch._dynamo.variables.tensor import TensorVariable

        if isinstance(result, _Constant):
            return ConstantVariable.create(result.value)
        if isinstance(result, _Items):
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


# --- what is asked of Dynamo ----------------------------------------------------------------------


def _has_no_effect(tx: Any) -> bool:
    """Whether nothing that lives outside of what is traced has been changed."""
    from torch._dynamo.variables.tensor import TensorVariable

    effects = tx.output.side_effects
    changed = getattr(effects, "mutated_sources", True)  # not every version tells
    # An attribute of a tensor that is made meanwhile is no change of anything outside.
    has_marks = any(type(each) is TensorVariable for each in effects.store_attr_mutations)
    return not (changed or has_marks or effects.tensor_hooks or effects.save_for_backward)


def _surroundings(tx: Any) -> tuple[Any, ...]:
    """The line that calls, and those that call it, and the modes that they run in."""
    state: dict[str, tuple[Any, Any]] = {}
    tx.output.save_global_state(state)
    modes = [value for _, value in state.values()]
    places = []
    while tx is not None:
        places.append((tx.f_code, tx.instruction_pointer))
        tx = getattr(tx, "parent", None)
    return (places, modes, torch.get_default_dtype())


def _path(block: Any) -> str:
    """What Dynamo calls a module where it counts calls, and names those around a node."""
    name: str = block.get_nn_module_stack_source().name
    return re.sub(r"\._(?:modules|parameters|buffers)\[(['\"])([^'\"\]]+)\1\]", r".\2", name)


def _containers(value: Any) -> dict[int, list[int]]:
    """What lies in a variable's lists, tuples and dictionaries, all by identity."""
    from torch._dynamo.variables.dicts import ConstDictVariable
    from torch._dynamo.variables.lazy import LazyVariableTracker
    from torch._dynamo.variables.lists import BaseListVariable

    found: dict[int, list[int]] = {}
    values: list[Any] = [value]
    for each in values:
        if type.__instancecheck__(LazyVariableTracker, each):
            continue  # it comes from outside, so that a change of it would be an effect
        if isinstance(each, ConstDictVariable | BaseListVariable):
            items = each.items
            items = [*items.values()] if isinstance(items, dict) else items
            found[id(each)] = [*map(id, items)]
            values += items
    return found


def _check_nodes(nodes: Iterable[Node], within: Container[Node], before: Container[Node]) -> None:
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
            raise _UnlikeError
        owner = getattr(node.target, "__self__", None)
        if node.op == "call_module" or not isinstance(owner, ModuleType | type | None):
            raise _UnlikeError
        if _is_inplace_view(node):
            raise _UnlikeError  # what is known of its input is no more what the call was given
        if "unbacked_bindings" in node.meta:
            raise _UnlikeError  # a size that depends on data is another one at each call
        for each in node.all_input_nodes:
            if each not in within and each not in before and not _is_tensor_from_outside(each):
                raise _UnlikeError


def _is_closed_scope(node: Node, within: Container[Node]) -> bool:
    """Whether a node begins or ends a scope of autocast that lies within a call."""
    if node.target is _amp._enter_autocast:
        ends = [each.target is _amp._exit_autocast and each in within for each in node.users]
        return ends == [True]
    return node.target is _amp._exit_autocast and node.args[0] in within


@contextmanager
def _left_at_the_end(scopes: dict[Node, Any]) -> Iterator[None]:
    """Leave scopes of autocast that an error has kept open."""
    try:
        yield
    finally:
        for scope in reversed(list(scopes.values())):
            _amp._exit_autocast(scope)


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


def _given_back(result: Any, within: Container[Node], args: Sequence[Any]) -> Any:
    """What a call returns, of nodes of its own or of what it was given."""
    if not _has_own_lists(result):
        raise _UnlikeError
    given = _given(result)
    parts = [given]
    for part in parts:
        if isinstance(part, _Items):
            parts += part.items
        elif not isinstance(part, _Constant) and not (
            isinstance(part, _Tensor) and part.node in within
        ):
            raise _UnlikeError
    # A list that somebody else has too could be changed by either.
    own, its = set(_containers(result)), {each for arg in args for each in _containers(arg)}
    if own & its or any(isinstance(part, _Items) and part.keys for part in parts):
        raise _UnlikeError
    return given


def _has_own_lists(result: Any) -> bool:
    """Whether each list in a result was made by the call, and is in one place of it."""
    from torch._dynamo.variables.lazy import LazyVariableTracker
    from torch._dynamo.variables.lists import ListVariable, TupleVariable

    lists: set[int] = set()
    values = [result]
    for each in values:
        if type.__instancecheck__(LazyVariableTracker, each):
            each = each.realize()
        if type(each) is ListVariable:
            if each.source is not None or id(each) in lists:
                return False
            lists.add(id(each))
        if type(each) in (ListVariable, TupleVariable):
            values += each.items
    return True


def _weights_below(source: Any, tx: Any) -> list[Node]:
    """The inputs of the graph that come from a block."""
    arguments = [
        (node, node.meta.get("grapharg")) for node in tx.output.graph.find_nodes(op="placeholder")
    ]
    return [
        node
        for node, argument in arguments
        if argument is not None and _is_below(argument.source, source)
    ]


def _guards_below(source: Any, tx: Any) -> list[Any]:
    """What must hold of a block for what was traced of it to hold.

    Not of its tensors, which are guarded where they are read, and not of the classes in it, which
    are those of every block like it.
    """
    tensors = {node.meta["grapharg"].source for node in _weights_below(source, tx)}
    guards = []
    for guard in tx.output.guards:
        kind = guard.inner_create_fn().__name__
        if kind == "DUPLICATE_INPUT":
            other = guard.create_fn.keywords["source_b"]
            if _is_below(other, source) or _is_below(guard.originating_source, source):
                raise _UnlikeError
        elif _is_below(guard.originating_source, source):
            if guard.originating_source in tensors or _is_by_class(guard.originating_source):
                continue
            if kind == "ID_MATCH":
                raise _UnlikeError  # its code has asked which object it is
            if isinstance(guard.create_fn, functools.partial) and kind.startswith("TENSOR"):
                raise _UnlikeError
            guards.append(guard)
    return guards


def _names_below(source: Any, tx: Any) -> set[str] | None:
    """The names of attributes and items of a block on which any guard stands: what was read.

    None where a guard compares something as a whole that has names of its own.
    """
    names: set[str] = set()
    for guard in tx.output.guards:
        if not _is_below(guard.originating_source, source):
            continue
        if guard.inner_create_fn().__name__ in ("CONSTANT_MATCH", "EQUALS_MATCH"):
            compared = tx.output.resolve_source_value(guard.originating_source)
            if isinstance(compared, Mapping) or getattr(compared, "__dict__", None):
                return None
        for each in _chain(guard.originating_source):
            for part in (getattr(each, part.name) for part in fields(each)):
                key = tx.output.resolve_source_value(part) if _is_key(part) else part
                names.update([key] if isinstance(key, str) else [])
    return names


def _is_source(value: Any) -> bool:
    from torch._guards import Source

    return isinstance(value, Source)


def _is_key(source: Any) -> bool:
    """Whether something is known as the key of a dictionary, which tells it from all others."""
    from torch._dynamo.source import ConstDictKeySource

    return any(isinstance(each, ConstDictKeySource) for each in _chain(source))


def _is_below(source: Any, block: Any) -> bool:
    """Whether something comes from a block, as its attributes do."""
    return block in _chain(source)


def _is_by_class(source: Any) -> bool:
    """Whether something is reached by the class of an object, as its methods are."""
    from torch._dynamo.source import TypeSource

    return any(isinstance(each, TypeSource) for each in _chain(source))


def _chain(source: Any) -> Iterator[Any]:
    """A source, and what it is an attribute or item of."""
    while source is not None:
        yield source
        source = getattr(source, "base", None)
