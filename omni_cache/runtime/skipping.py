"""Skipped calls of an enabled model, known by their arguments before Dynamo is asked.

Dynamo looks at all of a model before it runs a graph, and hands it every weight: where nothing of
the model runs, that is most of the time. So a call that is like an earlier one, all of which one
graph has served, is placed by its arguments. Wherever something of the model runs, Dynamo is asked
as ever: a change of the model counts from the next step on that is no skipped one.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from omni_cache.dynamo import Surroundings
from omni_cache.runtime.calls import Call, Served
from omni_cache.runtime.placement import Placement
from omni_cache.runtime.reading import on_host

MAX_KINDS = 64
"""So many kinds of calls are known. Calls whose timestep is a number are of a kind each."""


class _Known(NamedTuple):
    """How a graph serves all of a call.

    Attributes:
        placement: of the graph.
        surroundings: in which it was called.
        arguments: slots of the graph's inputs, each with the place of a tensor among the call's.
        others: slots of tensors of the model's own, by weak reference.
        numbers: slots of numbers, which are sizes or the model's own; Dynamo makes tensors of some.
        leaves: places of the call's results among the graph's; a leaf that is no tensor as it is.
        spec: how the leaves make what the call returns.
    """

    placement: Placement
    surroundings: Surroundings
    arguments: Sequence[tuple[int, int]]
    others: Sequence[tuple[int, weakref.ref[Tensor]]]
    numbers: Mapping[int, Any]
    leaves: Sequence[int | str | None]
    spec: TreeSpec

    def holds(self, served: Served) -> bool:
        """Whether the same is true of another call that was like the first."""
        args = served.args
        return (
            served.placement is self.placement
            and all(args[slot] is other() for slot, other in self.others)
            and all(args[slot] == number for slot, number in self.numbers.items())
            and self.surroundings.are_back()
        )


@dataclass
class SkippedCalls:
    """What is known of an enabled model's calls, so that those of which nothing runs are told."""

    _known: dict[Hashable, _Known] = field(default_factory=dict)

    def skip(self, call: Call) -> Any:
        """What a call returns of which nothing runs; None where the model has to be asked."""
        if not self._known:
            return None
        tensors: list[Tensor] = []
        known = self._known.get(_kind_of(call.arguments, tensors))
        if known is None or not known.surroundings.are_back():
            return None
        inputs: dict[int, Any] = {slot: tensors[place] for slot, place in known.arguments}
        inputs.update(known.numbers)
        for slot, other in known.others:
            inputs[slot] = given = other()
            if given is None:  # the model has another one by now
                return None
        step = known.placement.place(inputs)
        skipped = step.skip()
        if skipped is None:
            # The graph places the call itself.
            call.is_cached = False
            call.ran.clear()
            return None
        step.commit(skipped)
        made = [skipped[each] if type(each) is int else each for each in known.leaves]
        return tree_unflatten(made, known.spec)

    def learn(self, call: Call, result: Any) -> None:
        """Take in a call that the model was asked for, and what it has returned."""
        served, call.served = call.served, []
        if not served and not self._known:
            return
        tensors: list[Tensor] = []
        kind = _kind_of(call.arguments, tensors)
        known = self._known.get(kind)
        if known is not None and len(served) == 1 and known.holds(served[0]):
            return
        self._known.pop(kind, None)
        known = _known_by(served[0], tensors, result) if len(served) == 1 else None
        if kind is None or known is None or call.in_pieces:
            return
        if len(self._known) >= MAX_KINDS:
            self._known.clear()
        self._known[kind] = known


def _known_by(served: Served, tensors: Sequence[Tensor], result: Any) -> _Known | None:
    """How a graph has served a call; None where its results are not all that the call has made."""
    placement, surroundings = served.placement, Surroundings()
    if not placement.guarded.only_returns or not surroundings.are_back():
        return None
    places = {id(each): place for place, each in enumerate(tensors)}
    arguments, others, numbers = [], [], {}
    for slot in placement.asked_for:
        given = served.args[slot]
        if id(given) in places:
            arguments.append((slot, places[id(given)]))
        elif isinstance(given, Tensor) and not (given.dim() == 0 and on_host(given)):
            others.append((slot, weakref.ref(given)))
        else:
            numbers[slot] = given
    made, spec = tree_flatten(result)
    found = {id(each): place for place, each in enumerate(served.result)}
    leaves = [found.get(id(each)) if isinstance(each, Tensor) else each for each in made]
    is_all = all(
        isinstance(leaf, int) and not vars(each)
        if isinstance(each, Tensor)
        else isinstance(each, _CONSTANT)
        for leaf, each in zip(leaves, made, strict=True)
    )
    # Of classes of their own there may be more than the leaves.
    if not is_all or _names_on(result) != _names_on(tree_unflatten(made, spec)):
        return None
    return _Known(placement, surroundings, arguments, others, numbers, leaves, spec)


def _kind_of(arguments: Any, tensors: list[Tensor]) -> Hashable | None:
    """What Dynamo's guards may ask of arguments; None for those of which equality tells too little.

    Args:
        arguments: the arguments.
        tensors: receives the tensors among them.
    """
    try:
        kind = _described(arguments, tensors)
    except _UnknownTypeError:
        return None
    is_each_once = len({id(each) for each in tensors}) == len(tensors)
    return kind if is_each_once else None


def _names_on(value: Any) -> list[set[str]]:
    """What is set on each object that a value is made of."""
    found: list[set[str]] = []

    def note(each: Any) -> bool:
        found.append({*getattr(each, "__dict__", ())})
        return False

    tree_flatten(value, is_leaf=note)
    return found


class _UnknownTypeError(Exception):
    """Of a type of whose values equality tells too little."""


def _described(value: Any, tensors: list[Tensor]) -> Hashable:
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        # Dynamo may have looked at what somebody has set on a tensor.
        if value.layout is not torch.strided or value.is_nested or vars(value):
            raise _UnknownTypeError
        tensors.append(value)
        size = value.shape, value.stride()
        return kind, *size, value.dtype, value.device, value.requires_grad
    if kind in _PLAIN:
        return kind, value
    if kind is dict and all(type(name) is str for name in value):
        return kind, *[(name, _described(each, tensors)) for name, each in value.items()]
    if kind is list or kind is tuple:
        return kind, *[_described(each, tensors) for each in value]
    raise _UnknownTypeError


_PLAIN = frozenset({type(None), bool, int, float, str})
_CONSTANT = (type(None), str)
