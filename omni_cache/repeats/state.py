"""What Dynamo keeps while it traces: what was changed, what was read, and by which line."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch.fx import Node

logger = logging.getLogger(__name__)


class UnlikeError(Exception):
    """A call is no copy of another one, or none can be made of it."""


def say(error: Exception, block: Any) -> None:
    """Leave a word where something else is amiss; the block is traced then."""
    if not isinstance(error, UnlikeError):
        logger.info("%s is traced: %s: %s", path_of(block), type(error).__name__, error)


def has_no_effect(tx: Any) -> bool:
    """Whether nothing that lives outside of what is traced has been changed."""
    from torch._dynamo.variables.tensor import TensorVariable

    effects = tx.output.side_effects
    changed = getattr(effects, "mutated_sources", True)  # not every version tells
    # An attribute of a tensor that is made meanwhile is no change of anything outside.
    has_marks = any(type(each) is TensorVariable for each in effects.store_attr_mutations)
    return not (changed or has_marks or effects.tensor_hooks or effects.save_for_backward)


def surroundings(tx: Any) -> tuple[Any, ...]:
    """The line that calls, and those that call it, and the modes that they run in."""
    state: dict[str, tuple[Any, Any]] = {}
    tx.output.save_global_state(state)
    modes = [value for _, value in state.values()]
    places = []
    while tx is not None:
        places.append((tx.f_code, tx.instruction_pointer))
        tx = getattr(tx, "parent", None)
    return (places, modes, torch.get_default_dtype())


def path_of(block: Any) -> str:
    """What Dynamo calls a module where it counts calls, and names those around a node."""
    name: str = block.get_nn_module_stack_source().name
    return re.sub(r"\._(?:modules|parameters|buffers)\[(['\"])([^'\"\]]+)\1\]", r".\2", name)


def weights_below(source: Any, tx: Any) -> list[Node]:
    """The inputs of the graph that come from a block."""
    arguments = [
        (node, node.meta.get("grapharg")) for node in tx.output.graph.find_nodes(op="placeholder")
    ]
    return [
        node
        for node, argument in arguments
        if argument is not None and is_below(argument.source, source)
    ]


def guards_below(source: Any, tx: Any) -> list[Any]:
    """What must hold of a block for what was traced of it to hold.

    Not of its tensors, which are guarded where they are read, and not of the classes in it, which
    are those of every block like it.
    """
    tensors = {node.meta["grapharg"].source for node in weights_below(source, tx)}
    guards = []
    for guard in tx.output.guards:
        kind = guard.inner_create_fn().__name__
        if kind == "DUPLICATE_INPUT":
            other = guard.create_fn.keywords["source_b"]
            if is_below(other, source) or is_below(guard.originating_source, source):
                raise UnlikeError
        elif is_below(guard.originating_source, source):
            if guard.originating_source in tensors or _is_by_class(guard.originating_source):
                continue
            if kind == "ID_MATCH":
                raise UnlikeError  # its code has asked which object it is
            if isinstance(guard.create_fn, functools.partial) and kind.startswith("TENSOR"):
                raise UnlikeError
            guards.append(guard)
    return guards


def names_below(source: Any, tx: Any) -> set[str] | None:
    """The names of attributes and items of a block on which any guard stands: what was read.

    None where a guard compares something as a whole that has names of its own.
    """
    names: set[str] = set()
    for guard in tx.output.guards:
        if not is_below(guard.originating_source, source):
            continue
        if guard.inner_create_fn().__name__ in ("CONSTANT_MATCH", "EQUALS_MATCH"):
            compared = tx.output.resolve_source_value(guard.originating_source)
            if isinstance(compared, Mapping) or getattr(compared, "__dict__", None):
                return None
        for each in _chain(guard.originating_source):
            for part in (getattr(each, part.name) for part in fields(each)):
                key = tx.output.resolve_source_value(part) if is_key(part) else part
                names.update([key] if isinstance(key, str) else [])
    return names


def is_key(source: Any) -> bool:
    """Whether something is known as the key of a dictionary, which tells it from all others."""
    from torch._dynamo.source import ConstDictKeySource

    return any(isinstance(each, ConstDictKeySource) for each in _chain(source))


def is_below(source: Any, block: Any) -> bool:
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
