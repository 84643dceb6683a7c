"""By what a branch is known: the inputs that stay from call to call.

Pipelines pass the same prompt tensors at every step, and other latents. A branch therefore learns
from its first calls which of its inputs change. It is known by the others: by the objects that they
are, or by their contents where the caller makes them anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_cache.kernels import fingerprint
from omni_cache.runtime.agreement import local
from omni_cache.runtime.reading import Reading, on_host

LEARNED = 2
"""After so many calls, what has always changed is taken to change, and is compared no more."""


class Content(Reading):
    """The contents of a tensor, by a fingerprint.

    Args:
        tensor: whose contents.
        is_shared: whether its ranks add up their fingerprints, so that none may look at its own.
    """

    def __init__(self, tensor: Tensor, is_shared: bool) -> None:
        super().__init__(fingerprint(local(tensor)))
        self.like = (tensor.shape, tensor.dtype)
        self.numbers = None if is_shared else self.numbers

    def differs(self, other: Content) -> bool:
        """Whether two contents are known to differ; what has to be read first is not."""
        unread = self.numbers is None or other.numbers is None
        return self.like != other.like or (not unread and self.numbers != other.numbers)


class Inputs:
    """The tensors of one call, other than weights and timestep.

    Args:
        tensors: in an order that is the same for every call.
        by_identity: whether the caller's objects may tell. They may not on one of several ranks,
            which would not agree.
        is_shared: whether the ranks add up all fingerprints, at every call.
        timestep: the timestep, whose shape other numbers of a step may have.
    """

    def __init__(
        self, tensors: Sequence[Tensor], by_identity: bool, is_shared: bool, timestep: Any
    ) -> None:
        self.tensors = tensors
        self.shapes = tuple([each.shape for each in tensors])
        self.time = timestep.shape if isinstance(timestep, Tensor) else None
        self.by_identity, self.is_shared = by_identity, is_shared
        self._contents: dict[int, Content] = {}
        if is_shared:  # as many on every rank, in the same order
            for place in range(len(tensors)):
                self.content(place)

    def content(self, place: int) -> Content:
        """The contents of one of them, fingerprinted once."""
        if place not in self._contents:
            self._contents[place] = Content(self.tensors[place], self.is_shared)
        return self._contents[place]

    def content_of(self, tensor: Tensor) -> Content | None:
        """The contents of a tensor, if it is one of them and fingerprinted for this process alone.

        Of ranks that add up their fingerprints none knows its own.
        """
        if self.is_shared or not self.by_identity:
            return None
        places = (place for place, each in enumerate(self.tensors) if each is tensor)
        return self._contents.get(next(places, -1))

    @property
    def on_device(self) -> bool:
        """Whether the contents of some have to be read."""
        return not all(map(on_host, self.tensors))

    @property
    def unread(self) -> list[Content]:
        """Fingerprints that lie on a device."""
        return [each for each in self._contents.values() if each.numbers is None]


class Seen(NamedTuple):
    """An input as the last call brought it.

    ``changes`` says whether it has changed every time, ``is_kept`` whether the last call brought
    the object of the one before.
    """

    reference: Callable[[], Tensor | None]
    version: int | None
    content: Content | None
    changes: bool
    is_kept: bool = False

    def is_again(self, tensor: Tensor) -> bool:
        """Whether a tensor is the same object, and known not to have been written into."""
        return self.reference() is tensor and self.version == version(tensor) is not None


_MOVES = Seen(lambda: None, None, None, changes=True)
"""An input that has always changed, and is compared no more."""


class Change(NamedTuple):
    """How a call differs from the last one of a branch.

    ``inputs`` are the places of those that have changed, None where the call has others altogether;
    ``fits`` says whether the call may go on with what is held.
    """

    inputs: frozenset[int] | None = None
    fits: bool = False


class Conditioning(NamedTuple):
    """What a branch's calls have brought, as its last one left it.

    Attributes:
        seen: the inputs.
        predicted: the shapes of what the last call returned.
        calls: how many calls there were, counted as long as they teach something.
        moves: the places of the inputs that have changed every time.
    """

    seen: tuple[Seen, ...] = ()
    predicted: frozenset[torch.Size] = frozenset()
    calls: int = 0
    moves: frozenset[int] = frozenset()

    @property
    def flags(self) -> tuple[bool, ...]:
        """What inputs may change: equal on ranks that take the same calls for a branch's."""
        return (self.calls > LEARNED, *(each.changes for each in self.seen))

    def change(self, inputs: Inputs) -> Change:
        """How a call differs from the last one; what has to be read first counts as unchanged."""
        if len(inputs.tensors) != len(self.seen):
            return Change()
        changed = frozenset(
            [
                place
                for place, (tensor, seen) in enumerate(zip(inputs.tensors, self.seen, strict=True))
                if seen is _MOVES
                or (
                    not (inputs.by_identity and seen.is_again(tensor))
                    and (seen.content is None or seen.content.differs(inputs.content(place)))
                )
            ]
        )
        kinds = inputs.shapes, inputs.time, self.predicted
        return Change(changed, not changed or _fits(changed, self.moves, *kinds))

    def doubts(self, inputs: Inputs) -> tuple[bool, int]:
        """How little the objects of a call speak for it, whatever they contain.

        Returns:
            Whether none is an object that the branch knows; how many of those that it has learned
            to stay are others.
        """
        known = [
            inputs.by_identity and seen.is_again(tensor)
            for tensor, seen in zip(inputs.tensors, self.seen, strict=False)
            if self.calls == 1 or not seen.changes
        ]
        return not any(known), 0 if self.calls == 1 else known.count(False)

    def after(
        self, inputs: Inputs, changed: frozenset[int] | None, predicted: frozenset[torch.Size]
    ) -> Conditioning:
        """The conditioning that a call leaves."""
        if self._stays(inputs, changed, predicted):
            return self
        begins = changed is None or not self.calls
        calls = 1 if begins else self.calls + 1
        seen, moves = [], []
        for place, tensor in enumerate(inputs.tensors):
            before = None if begins else self.seen[place]
            stays = before is not None and place not in (changed or ())
            changes = before is None or (before.changes and not stays)
            if changes:
                moves.append(place)
            if changes and calls > LEARNED:
                seen.append(_MOVES)
            elif before is not None and stays and before.reference() is tensor:
                kept = before.is_kept and not before.changes
                seen.append(before if kept else before._replace(changes=False, is_kept=True))
            else:
                content = inputs.content(place)
                seen.append(Seen(weakref.ref(tensor), version(tensor), content, changes))
        return Conditioning(tuple(seen), predicted, calls, frozenset(moves))

    def _stays(
        self, inputs: Inputs, changed: frozenset[int] | None, predicted: frozenset[torch.Size]
    ) -> bool:
        """Whether a call teaches nothing: what moves has moved, the rest are the same objects."""
        return (
            self.calls > LEARNED
            and changed == self.moves
            and predicted == self.predicted
            and all(
                seen is _MOVES or (seen.is_kept and seen.reference() is tensor)
                for tensor, seen in zip(inputs.tensors, self.seen, strict=True)
            )
        )

    @property
    def is_gone(self) -> bool:
        """Whether the caller has dropped all inputs that it had kept from call to call."""
        kept = [each.reference() for each in self.seen if each.is_kept]
        return bool(kept) and all(each is None for each in kept)

    @property
    def unread(self) -> list[Content]:
        """Fingerprints of the last call that lie on a device."""
        contents = [each.content for each in self.seen if each.content is not None]
        return [each for each in contents if each.numbers is None]


NEW = Conditioning()
"""The conditioning of a branch before its first call."""


@lru_cache(maxsize=1024)
def _fits(
    changed: frozenset[int],
    moves: frozenset[int],
    shapes: tuple[torch.Size, ...],
    time: torch.Size | None,
    predicted: frozenset[torch.Size],
) -> bool:
    """Whether a call may go on where these of its inputs differ from the last call's.

    An input that has stayed once is conditioning. Of the others, numbers may change (one, or one
    for each sample or token, as a timestep is), and inputs of a prediction's shape or of one with
    other channels (latents, with a control image beside them or not). Without any of these shapes,
    any one input may. If none of a prediction's shape has always changed, two calls have shared
    their latents.
    """
    places = list(enumerate(shapes))
    numbers = {place for place, size in places if len(size) < 2 or size == time}
    exact = {place for place, size in places if size in predicted}
    like = {each for shape in predicted for each in _without_channels(shape)}
    alike = {
        place
        for place, size in places
        if len(size) > 1 and not like.isdisjoint(_without_channels(size))
    }
    others = changed - ((numbers | exact) & moves)
    if exact.isdisjoint(moves):  # latents that two calls have shared
        others -= exact
    return (len(alike) > 0 or len(others) <= 1) and all(
        place in moves and (place in alike or not alike) for place in others
    )


def _without_channels(shape: torch.Size) -> frozenset[tuple[object, ...]]:
    """A shape without its last size, and without its second one where it is of a picture."""
    last = (len(shape), "last", *shape[:-1])
    second = (len(shape), "second", shape[0], *shape[2:]) if len(shape) > 3 else last
    return frozenset((last, second))


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written into; None for those of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


def host_value(timestep: object) -> float | None:
    """A timestep as a number, the mean of several; None where that needs a device read."""
    if isinstance(timestep, Tensor):
        count = timestep.numel()
        if count == 0 or not on_host(timestep):
            return None
        return float(timestep.item() if count == 1 else timestep.to(torch.float64).mean())
    return None if timestep is None else float(timestep)  # type: ignore[arg-type]
