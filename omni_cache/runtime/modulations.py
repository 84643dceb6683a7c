"""Modulations: what a graph makes of inputs that stay and of the timestep, as a table of many.

Which row is a call's, its timestep tells. On a device the device picks it, so that the host need
not know; where none is the call's, it picks NaN, and the host hears of it later. What is put here
besides is whether a table serves a call at all. It knows nothing of graphs or places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from omni_cache.kernels import number_dtype
from omni_cache.runtime.constants import Constants
from omni_cache.runtime.counters import current_tally
from omni_cache.runtime.reading import Reading, on_host, read

ALIGNMENT = 16
"""Bytes of whose multiples compilers take the address of an input to be one."""


Kind = tuple[torch.Size, torch.dtype, torch.device]
"""What a timestep looks like, whatever its numbers."""


class Candidate(NamedTuple):
    """A list of timesteps that may be that of a call's loop.

    Attributes:
        timesteps: ``(N,)``, of the dtype and on the device of the call's.
        position: which of them is the call's if the list is the loop's; None where any may be.
    """

    timesteps: Tensor
    position: int | None = None


class Piece(NamedTuple):
    """Where one result lies in a row."""

    buffer: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


@dataclass(eq=False)
class Table:
    """Modulations, one row for each timestep of a list.

    Attributes:
        timesteps: ``(N,)``; none where no list is known, and then there are no rows.
        kind: what a timestep looks like as the model is given it, as one number or for each sample.
        held: what they were made of, and the rows: one tensor ``(N, width)`` for each dtype.
        pieces: where the results lie in a row.
        branch: whose memory the table counts for; None before a call has ended well.
    """

    timesteps: Tensor
    kind: Kind
    held: Constants
    pieces: Sequence[Piece] = ()
    branch: str | None = None
    _unheard: list[Reading] = field(default_factory=list)

    def is_for(self, timestep: Tensor) -> bool:
        """Whether timesteps look alike, whatever their numbers."""
        return self.kind == kind_of(timestep)

    def row(self, timestep: Tensor) -> list[Tensor] | None:
        """The results for a timestep; None where the host knows that it is not in the list.

        On a device they are NaN then.

        Raises:
            RuntimeError: the host has heard that they were, at an earlier call.
        """
        if not len(self.timesteps):
            return None
        self._listen()
        found = _are(self.timesteps, timestep)
        known = Reading(found.to(number_dtype(found.device))).numbers
        if known is not None:
            index = known.index(1.0) if 1.0 in known else None
            return None if index is None else self._apart([each[index] for each in self._rows])
        chosen, is_listed = found.to(torch.uint8).argmax()[None], found.any()
        rows = [each.index_select(0, chosen)[0] for each in self._rows]
        self._unheard.append(Reading(is_listed.to(number_dtype(found.device))[None]))
        self._unheard[-1].fetch()
        return self._apart([torch.where(is_listed, each, math.nan) for each in rows])

    @property
    def _rows(self) -> Sequence[Tensor]:
        return self.held.results

    def _apart(self, rows: Sequence[Tensor]) -> list[Tensor]:
        return [
            rows[each.buffer].as_strided(
                each.size, each.stride, rows[each.buffer].storage_offset() + each.offset
            )
            for each in self.pieces
        ]

    def _listen(self) -> None:
        while self._unheard and self._unheard[0].has_come:
            if self._unheard.pop(0).numbers != (1.0,):
                raise RuntimeError(
                    f"timestep: an earlier call's is none of the {len(self.timesteps)} timesteps "
                    "that modulations were computed for, and so its result is NaN; pass all "
                    "timesteps, as the model is given them, to omni_cache.generation(timesteps="
                    "...), or use hoist=True"
                )


def kind_of(timestep: Tensor) -> Kind:
    """What a timestep looks like."""
    return timestep.shape, timestep.dtype, timestep.device


def as_given(numbers: Sequence[float], timestep: Tensor) -> Tensor:
    """Numbers as timesteps like a call's."""
    listed = torch.tensor(numbers, dtype=torch.float64).to(timestep.dtype)
    return listed.to(timestep.device, non_blocking=True)


def of_schedule(
    timesteps: Reading, training: float, index: int | None, timestep: Tensor
) -> list[Candidate]:
    """What pipelines make of a scheduler's timesteps: these, or shares of the training's.

    A share is taken before or after numbers are rounded to the model's dtype.
    """
    if on_host(timestep):
        read([timesteps])
        listed = torch.tensor(timesteps.numbers, dtype=torch.float64)
    else:
        listed = timesteps.tensor.to(timestep.device, non_blocking=True)
    dtype = timestep.dtype
    ways = [listed.to(dtype)]
    if dtype.is_floating_point:
        ways += [listed.to(dtype) / training, (listed.to(torch.float32) / training).to(dtype)]
    return [Candidate(each, index) for each in ways]


def choose(candidates: Sequence[Candidate], timestep: Tensor) -> Tensor | None:
    """The first list that a call's timestep is in, in its place; on a device with one read."""
    possible = [each for each in candidates if (each.position or 0) < len(each.timesteps)]
    if not possible:
        return None
    found = [
        fits.any() if each.position is None else fits[each.position]
        for each in possible
        for fits in [_are(each.timesteps, timestep)]
    ]
    told = Reading(torch.stack(found).to(number_dtype(timestep.device)))
    read([told])
    fitting = (each for each, fits in zip(possible, told.numbers or (), strict=True) if fits)
    chosen = next(fitting, None)
    return None if chosen is None else _once(chosen.timesteps)


def spread(timesteps: Tensor, shape: torch.Size) -> Tensor:
    """Timesteps ``(N,)`` as a model is given them: ``(N, *shape)``."""
    count = len(timesteps)
    return timesteps.reshape(count, *[1] * len(shape)).expand(count, *shape).contiguous()


def pack(made: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[list[Tensor], list[Piece]]:
    """Put all results of a timestep into one row, each laid out as one call makes it.

    Args:
        made: the results of one call.
        rows: for each of them ``(N, *its shape)``.

    Returns:
        A tensor ``(N, width)`` for each dtype, and where in a row the results lie.
    """
    kinds = list(dict.fromkeys((each.dtype, each.device) for each in made))
    widths, pieces = [0] * len(kinds), []
    for each in made:
        buffer = kinds.index((each.dtype, each.device))
        stride = torch.empty_like(each).stride()
        pieces.append(Piece(buffer, widths[buffer], each.shape, stride))
        step = max(1, ALIGNMENT // each.element_size())
        widths[buffer] += -(-each.numel() // step) * step
    count = len(rows[0])
    buffers = [
        torch.empty(count, width, dtype=dtype, device=device)
        for width, (dtype, device) in zip(widths, kinds, strict=True)
    ]
    for piece, values in zip(pieces, rows, strict=True):
        width = widths[piece.buffer]
        place = (count, *piece.size), (width, *piece.stride), piece.offset
        buffers[piece.buffer].as_strided(*place).copy_(values)
    current_tally.get().modulated(tables=1)
    return buffers, pieces


def _are(timesteps: Tensor, timestep: Tensor) -> Tensor:
    """Which of ``(N,)`` timesteps a call's is, for all samples."""
    return (timesteps[:, None] == timestep.flatten()).all(1)


def _once(timesteps: Tensor) -> Tensor:
    """Timesteps without those that come again, where the host can look at them."""
    known = Reading(timesteps.to(number_dtype(timesteps.device))).numbers
    if known is None:
        return timesteps
    return torch.tensor(list(dict.fromkeys(known)), dtype=timesteps.dtype)
