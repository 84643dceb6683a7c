"""What a model's calls have cost besides their arithmetic, counted where it happens.

Nothing is counted, and no lock taken, on a call that compiles, reads and moves nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable
from contextvars import ContextVar
from typing import NamedTuple


class Counters(NamedTuple):
    """Counts of one model, from when it was enabled or, in bare use, first called.

    They add up over models, and the difference of two of them is what lies between.

    Attributes:
        compiles: guarded graphs that were compiled for the model's calls. Instances of one class
            share graphs, which count for the one whose call ran first.
        recompiles: those among them of a region that the model had a graph of, because of another
            size, dtype, or whatever else Dynamo guards on.
        reads: times that the host waited for numbers that lie on a device.
        copied_bytes: bytes that went from one device to another: numbers that were read or fetched,
            and what a history keeps elsewhere, both ways.
        tables: times that modulations were computed for a list of timesteps.
        unlisted: calls that computed them for their own timestep, because it was in no list.
    """

    compiles: int = 0
    recompiles: int = 0
    reads: int = 0
    copied_bytes: int = 0
    tables: int = 0
    unlisted: int = 0

    def __add__(self, other: tuple[int, ...], /) -> Counters:  # type: ignore[override]
        """Both together."""
        return Counters(*(one + two for one, two in zip(self, other, strict=True)))

    def __sub__(self, earlier: Counters, /) -> Counters:
        """What has happened since."""
        return Counters(*(one - two for one, two in zip(self, earlier, strict=True)))


class Tally:
    """The counts of one model as they grow, on whichever threads it is called."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graphs: Counter[Hashable] = Counter()
        self._reads = self._copied_bytes = 0
        self._tables = self._unlisted = 0

    def compiled(self, region: Hashable) -> None:
        """A graph was compiled for a region."""
        with self._lock:
            self._graphs[region] += 1

    def copied(self, count: int, waited: bool = False) -> None:
        """Bytes were copied between devices; whether the host waited for them."""
        with self._lock:
            self._copied_bytes += count
            self._reads += waited

    def modulated(self, tables: int = 0, unlisted: int = 0) -> None:
        """Modulations were computed for a list of timesteps, or for one that is in none."""
        with self._lock:
            self._tables += tables
            self._unlisted += unlisted

    @property
    def counters(self) -> Counters:
        """The counts as they are now."""
        with self._lock:
            compiles = self._graphs.total()
            recompiles = compiles - len(self._graphs)
            counts = self._reads, self._copied_bytes, self._tables, self._unlisted
            return Counters(compiles, recompiles, *counts)


current_tally: ContextVar[Tally] = ContextVar("tally", default=Tally())  # noqa: B039
"""That of the model that this context has called last; of one that no model knows before that."""
