"""By what a branch is known: the inputs that stay from call to call.

Pipelines pass the same prompt tensors at every step, and other latents. A branch therefore learns
from its first calls which of its inputs change. It is known by the others: by the objects that they
are, or by their contents where the caller makes them anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_cache.kernels import fingerprint
from omni_cache.runtime.agreement import local

LEARNED = 2
"""After so many calls, what has always changed is taken to change, and is compared no more."""


class Content:
    """The contents of a tensor, by a fingerprint; off the host, known once it has been read.

    Args:
        tensor: whose contents.
        is_shared: whether its ranks add up their fingerprints, so that none may look at its own.
    """

    def __init__(self, tensor: Tensor, is_shared: bool = False) -> None:
        self.like = (tensor.shape, tensor.dtype)
        self.tensor = fingerprint(local(tensor))
        self.numbers: tuple[float, ...] | None = None
        if self.tensor.device.type == "cpu" and not is_shared:
            self.numbers = tuple(self.tensor.tolist())

    def differs(self, other: Content) -> bool | None:
        """Whether two contents differ; None where that has to be read first."""
        if self.like != other.like:
            return True
        unread = self.numbers is None or other.numbers is None
        return None if unread else self.numbers != other.numbers


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
        self,
        tensors: Sequence[Tensor],
        by_identity: bool = True,
        is_shared: bool = False,
        timestep: Any = None,
    ) -> None:
        self.tensors = tensors
        self._time = timestep.shape if isinstance(timestep, Tensor) else None
        self.by_identity = by_identity
        self.is_shared = is_shared
        self._contents: dict[int, Content] = {}
        if is_shared:  # as many on every rank, in the same order
            for place in range(len(tensors)):
                self.content(place)

    def content(self, place: int) -> Content:
        """The contents of one of them, fingerprinted once."""
        if place not in self._contents:
            self._contents[place] = Content(self.tensors[place], self.is_shared)
        return self._contents[place]

    def is_number(self, place: int) -> bool:
        """Whether an input is a number, or one for each sample or token, such as a timestep is."""
        tensor = self.tensors[place]
        return tensor.dim() < 2 or tensor.shape == self._time

    @property
    def on_device(self) -> bool:
        """Whether the contents of some have to be read."""
        return any(each.device.type != "cpu" for each in self.tensors)

    @property
    def unread(self) -> list[Content]:
        """Fingerprints that lie on a device."""
        return [each for each in self._contents.values() if each.numbers is None]


class Seen(NamedTuple):
    """An input as the last call brought it.

    ``changes`` says whether it has changed every time, ``is_kept`` whether the last call brought
    the object of the one before.
    """

    reference: weakref.ref[Tensor]
    version: int
    content: Content | None
    changes: bool
    is_kept: bool = False


@dataclass(frozen=True)
class Conditioning:
    """What a branch's calls have brought, as its last one left it.

    Attributes:
        seen: the inputs.
        predicted: the shapes of what the last call returned.
        calls: how many calls there were.
    """

    seen: tuple[Seen, ...] = ()
    predicted: frozenset[torch.Size] = frozenset()
    calls: int = 0

    @property
    def flags(self) -> tuple[bool, ...]:
        """What inputs may change: equal on ranks that take the same calls for a branch's."""
        return (self.calls > LEARNED, *(each.changes for each in self.seen))

    def changed(self, inputs: Inputs) -> frozenset[int] | None:
        """Which inputs differ from the last call's; None for a call with other inputs altogether.

        What has to be read first counts as unchanged.
        """
        if len(inputs.tensors) != len(self.seen):
            return None
        return frozenset(
            place
            for place, (tensor, seen) in enumerate(zip(inputs.tensors, self.seen, strict=True))
            if not (inputs.by_identity and _is_same(tensor, seen))
            and (seen.content is None or seen.content.differs(inputs.content(place)))
        )

    def doubts(self, inputs: Inputs) -> tuple[bool, int]:
        """How little the objects of a call speak for it, whatever they contain.

        Returns:
            Whether none is an object that the branch knows; how many of those that it has learned
            to stay are others.
        """
        known = [
            inputs.by_identity and _is_same(tensor, seen)
            for tensor, seen in zip(inputs.tensors, self.seen, strict=False)
            if self.calls == 1 or not seen.changes
        ]
        return not any(known), 0 if self.calls == 1 else known.count(False)

    def allows(self, changed: frozenset[int] | None, inputs: Inputs) -> bool:
        """Whether a call that changes these inputs may go on with what is held.

        Latents may change, and numbers such as a second timestep. Latents are the inputs that have
        the shape of a prediction, and those that do but for their channels (a control image beside
        them, a variance beside the prediction) if they have never stayed. Where there are none of
        either kind, any one input may be that has never stayed.
        """
        if changed is None:
            return False
        large = [place for place in changed if not inputs.is_number(place)]
        if any(self._is_like_a_prediction(each) for each in inputs.tensors):
            return all(self._may_be_latents(place, inputs.tensors[place]) for place in large)
        return len(large) <= 1 and all(self.seen[place].changes for place in large)

    def _may_be_latents(self, place: int, tensor: Tensor) -> bool:
        if tensor.shape in self.predicted:
            return True
        return self.seen[place].changes and self._is_like_a_prediction(tensor)

    def _is_like_a_prediction(self, tensor: Tensor) -> bool:
        """Whether a tensor has the shape of a prediction, whatever its channels are."""
        return tensor.dim() > 1 and any(
            _without_channels(tensor.shape) & _without_channels(each) for each in self.predicted
        )

    def after(
        self, inputs: Inputs, changed: frozenset[int] | None, predicted: frozenset[torch.Size]
    ) -> Conditioning:
        """The conditioning that a call leaves."""
        begins = changed is None or not self.calls
        calls = 1 if begins else self.calls + 1
        seen = []
        for place, tensor in enumerate(inputs.tensors):
            before = None if begins else self.seen[place]
            changes = before is None or (before.changes and place in (changed or ()))
            if before is not None and before.reference() is tensor and place not in (changed or ()):
                seen.append(before._replace(changes=changes, is_kept=True))
                continue
            learned = changes and calls > LEARNED
            content = None if learned else inputs.content(place)
            seen.append(Seen(weakref.ref(tensor), _version(tensor), content, changes))
        return Conditioning(tuple(seen), predicted, calls)

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


@lru_cache(maxsize=1024)
def _without_channels(shape: torch.Size) -> frozenset[tuple[object, ...]]:
    """A shape without its last size, and without its second one where it is of a picture."""
    last = (len(shape), "last", *shape[:-1])
    second = (len(shape), "second", shape[0], *shape[2:]) if len(shape) > 3 else last
    return frozenset((last, second))


def _is_same(tensor: Tensor, seen: Seen) -> bool:
    return seen.reference() is tensor and seen.version == _version(tensor)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; tensors of inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def known_by_nothing(inputs: Inputs, changed: frozenset[int] | None) -> bool:
    """Whether a call has no input that stays, so that nothing tells whose it is."""
    return changed is None or len(changed) == len(inputs.tensors)


def host_value(timestep: object) -> float | None:
    """A timestep as a number, the mean of several; None where that needs a device read."""
    if isinstance(timestep, Tensor):
        if timestep.device.type != "cpu" or timestep.numel() == 0:
            return None
        if timestep.numel() == 1:
            return float(timestep.item())
        return float(timestep.to(torch.float64).mean())
    return None if timestep is None else float(timestep)  # type: ignore[arg-type]
