"""The history: what the last computed steps left, newest first. Knows its bytes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_cache.kernels import inner_products
from omni_cache.passes.storage import restore, store
from omni_cache.runtime.agreement import local
from omni_cache.runtime.counters import current_tally
from omni_cache.runtime.reading import Reading, on_host, read
from omni_cache.strategies import Forecast, Time
from omni_cache.strategies.base import Errors, Matrix, Row


@dataclass
class Kept:
    """The residuals of one computed step, or forecasts that stand in for them.

    Attributes:
        at: when they were made.
        stored: the program's residuals, in its order, as they lie in memory.
        finite: bool tensor, whether all of them were finite when they were made.
        products: for each sample its inner products with itself and with those that were kept when
            it came, newest first; None where nobody wants them.
        is_finite: ``finite`` on the host; None until somebody has read it.
        signal: of that step, for what looks back at it.
        past: what a signal has found in it and in those before it; None until it has looked back.
        entered: the partners of that step, while it is the newest; none where nobody weighs them.
        results: what the model returned, None where it is not kept.
    """

    at: Time
    stored: tuple[Tensor, ...]
    finite: Tensor
    products: Reading | None = None
    is_finite: bool | None = None
    signal: Tensor | None = None
    past: Tensor | None = None
    entered: tuple[Tensor, ...] = ()
    results: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if on_host(self.finite):
            self.is_finite = bool(self.finite)

    @property
    def residuals(self) -> tuple[Tensor, ...]:
        """The residuals as numbers."""
        return restore(self.stored)


class _Compared(NamedTuple):
    """When a residual was computed, and its inner products with those before it."""

    at: Time
    products: Reading | None

    @classmethod
    def of(cls, kept: Kept) -> _Compared:
        """Of an entry, without its tensors."""
        return cls(kept.at, kept.products)


class History:
    """A ring of the last ``depth`` computed steps.

    Args:
        depth: how many there are at most.
        forecast: what weighs them.
        device: where they are kept; None where they are made. Copies to the host are asynchronous:
            the device's own order of work has them done before they are used.
        per_sample: whether each sample may have weights of its own.
        measures: whether inner products are taken for a forecast that reads them.
    """

    def __init__(
        self,
        depth: int,
        forecast: Forecast,
        device: torch.device | None = None,
        per_sample: bool = False,
        measures: bool = True,
    ) -> None:
        self.depth = depth
        self.forecast = forecast
        self.device = self.home = device
        self.kept: list[Kept] = []
        self._per_sample = per_sample
        self._measures = measures and (forecast.reads_products or forecast.checks)
        # A forecast is checked by all that it would have weighed, the entry that goes included.
        self._width = depth + 1 if forecast.checks else depth
        self._compared: list[_Compared] = []
        self._errors: Errors | None = None  # of these, once they are known

    def push(
        self,
        at: Time,
        residuals: Sequence[Tensor],
        finite: Tensor,
        signal: Tensor | None = None,
        entered: Sequence[Tensor] = (),
        results: Sequence[Any] | None = None,
    ) -> None:
        """Take over what a computed step leaves, by reference unless it moves.

        Results are copied, because they are the caller's, and stay where they are. A step without
        residuals ends the history.
        """
        if not residuals:
            self.kept = []
            return
        self.home = residuals[0].device
        older = self.kept[: self.depth - 1]
        if self.forecast.feeds_back and older:
            older = [older[0], self._forecast(at._replace(index=at.index - 1, value=None))]
        compared = older if self._width == self.depth else self.kept
        products = self._products(restore(residuals), compared) if self._measures else None
        if products is not None and self.forecast.checks:
            products.fetch()
            self._compared = [_Compared(at, products), *map(_Compared.of, compared)]
            self._errors = None
        device = self.device or self.home
        moved, came = (
            tuple([_moved(each, device) for each in tensors]) for tensors in (residuals, entered)
        )
        copies = None if results is None else [_copied(each) for each in results]
        for each in older:
            each.entered = ()
        made = Kept(at, moved, finite, products, None, signal, None, came, copies)
        self.kept = [made, *older][: self.depth]

    @property
    def usable(self) -> list[Kept]:
        """The newest ones, up to the first that is known not to have been finite."""
        finite = [each.is_finite is not False for each in self.kept]
        return self.kept if all(finite) else self.kept[: finite.index(False)]

    def operands(self, kept: Sequence[Kept], count: int) -> list[Tensor]:
        """``count`` sets of residuals where they were made; the newest stands in for missing ones.

        The weight of what stands in is 0. The partners of the newest one follow.
        """
        assert self.home is not None  # something was kept
        entered = [_moved(each, self.home) for each in kept[0].entered]
        sets = [self._at_home(each) for each in kept]
        sets += [sets[0]] * (count - len(sets))
        return [*(each for residuals in sets for each in residuals), *entered]

    def at_home(self, kept: Kept) -> tuple[Tensor, ...]:
        """The residuals of an entry as numbers, where they were made."""
        return restore(self._at_home(kept))

    def rows(self, kept: Sequence[Kept], now: Time, count: int) -> list[Row]:
        """The weights of ``count`` sets of residuals: a row for each sample, or one for all."""
        times = [each.at for each in kept]
        readings = [each.products for each in kept if each.products is not None]
        if self.forecast.reads_products and len(readings) == len(kept):
            read(readings)
            rows = self.forecast.rows(times, now, _matrices(readings, self._width))
        else:
            rows = [self.forecast.weights(times, now)]
        return [(*row, *[0.0] * (count - len(kept))) for row in rows]

    def forget_results(self) -> None:
        """Free what the model returned: what it returns from now on may be of another kind."""
        for each in self.kept:
            each.results = None

    def results(self, kept: Sequence[Kept], now: Time) -> list[Any]:
        """What stands in for the model's results, as new tensors."""
        row = self.forecast.skip_weights([each.at for each in kept], now)
        known = [each.results or () for each in kept]
        if _holds(row):
            return [_copied(each) for each in known[0]]
        return [
            _weighed(row, entries)
            if isinstance(entries[0], Tensor) and _is_weighed(entries[0])
            else _copied(entries[0])
            for entries in zip(*known, strict=True)
        ]

    @property
    def errors(self) -> Errors | None:
        """How far off the newest entry was from its forecast, of the sample that is worst.

        None where nothing tells, or where the host does not know it yet.
        """
        compared = self._compared
        if not compared or not self.kept:
            return None
        if self._errors is not None:  # every step up to the next computed one asks
            return self._errors
        readings = [each.products for each in compared if each.products is not None]
        if len(readings) < len(compared):
            return None
        if not all(each.has_come for each in readings):
            return None
        times = [each.at for each in compared]
        checked = (self.forecast.check(times, each) for each in _matrices(readings, self._width))
        known = [each for each in checked if each is not None]
        self._errors = max(known, key=lambda each: each.excess, default=None)
        return self._errors

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept, each once: a forecast of a computed step is its residual."""
        signals = [each.signal for each in self.kept if each.signal is not None]
        others = (
            tensor
            for each in self.kept
            for tensor in (*each.stored, *each.entered, *(each.results or ()))
            if isinstance(tensor, Tensor)
        )
        return list({id(each): each for each in (*signals, *others)}.values())

    def _forecast(self, now: Time) -> Kept:
        """What the forecast says of a step, kept as a residual is."""
        assert self.home is not None  # something was made
        usable = self.usable or self.kept
        (row,) = self.rows(usable, now, len(usable))
        if _holds(row):
            return usable[0]
        entries = zip(*map(self.at_home, usable), strict=True)
        made = [_weighed(row, each) for each in entries]
        finite = torch.stack([local(each).isfinite().all() for each in made]).all()
        numbers = [each.nan_to_num(0.0, 0.0, 0.0) for each in made]
        stored = store(numbers, usable[0].stored)
        return Kept(now, tuple(_moved(each, self.device or self.home) for each in stored), finite)

    def _products(self, residuals: Sequence[Tensor], older: Sequence[Kept]) -> Reading:
        """For each sample a row of numbers: the newest's products with itself and older ones.

        Streams add up: a sample is one vector, whatever its streams.
        """
        places = [place for place, each in enumerate(residuals) if _is_weighed(each)]
        new = [local(residuals[place]) for place in places]
        sizes = {each.shape[0] if each.dim() > 2 else 1 for each in new}
        samples = sizes.pop() if len(sizes) == 1 and self._per_sample else 1
        others = [self.at_home(kept) for kept in older]
        found = [
            inner_products(each, [local(other[place]) for other in others], samples)
            for place, each in zip(places, new, strict=True)
        ]
        total = reduce(torch.add, (_moved(each, found[0].device) for each in found))
        missing = self._width - 1 - len(older)
        return Reading(torch.nn.functional.pad(total.view(samples, -1), (0, missing)).view(-1))

    def _at_home(self, kept: Kept) -> tuple[Tensor, ...]:
        """The residuals of an entry as they are stored, where they were made."""
        assert self.home is not None  # something was made
        return tuple(_moved(each, self.home) for each in kept.stored)


def _matrices(readings: Sequence[Reading], depth: int) -> list[Matrix]:
    """For each sample the inner products of all entries, of what each was measured with."""
    found = [each.numbers or () for each in readings]
    ages = range(len(found))
    return [
        tuple(tuple(found[min(i, j)][first + abs(i - j)] for j in ages) for i in ages)
        for first in range(0, len(found[0]), depth)
    ]


def _is_weighed(residual: Tensor) -> bool:
    """Whether a residual is of numbers that a sum can weigh, and has any."""
    weighed = residual.is_floating_point() or residual.is_complex()
    return weighed and residual.numel() > 0


def _holds(row: Row) -> bool:
    """Whether a row takes the newest entry as it is."""
    return row[0] == 1.0 and not any(row[1:])


def _weighed(row: Row, entries: Sequence[Tensor]) -> Tensor:
    """``sum_i row[i] * entries[i]``, summed in float32 at least; the newest of what has no sum."""
    newest = entries[0]
    if not _is_weighed(newest):
        return newest
    precise = torch.promote_types(newest.dtype, torch.float32)
    if newest.dtype != precise:
        entries = [each.to(precise) for each in entries]
    # In place, since terms are nobody else's. Fused with the product, a sum would be rounded once.
    total: Tensor = reduce(Tensor.add_, map(operator.mul, entries, row))
    return total if newest.dtype == precise else total.to(newest.dtype)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    current_tally.get().copied(tensor.nbytes)
    if device.type != "cpu":
        return tensor.to(device, non_blocking=True)
    pinned = torch.empty_like(tensor, device=device, pin_memory=tensor.is_cuda)
    return pinned.copy_(tensor, non_blocking=True)
