"""A trajectory: one region's part in one guidance branch of one generation of one model.

It owns all that lives from call to call and must never be mixed up: the gate's state, the signal of
the call before, the residuals, the records. Dropping the trajectory drops them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from omni_cache.lowering.cond import verdict_on
from omni_cache.lowering.deciding import Within
from omni_cache.runtime.constants import Constants
from omni_cache.runtime.history import History
from omni_cache.runtime.modulations import Table
from omni_cache.runtime.reading import Reading, read
from omni_cache.strategies import Gate, Time
from omni_cache.strategies.base import Errors

Action = Literal["computed", "reused", "skipped"]
"""The block loop ran; only what is around it did; nothing of the model did."""


class StepRecord(NamedTuple):
    """What happened in one call.

    Attributes:
        action: what ran of the model.
        distance: this step's change as the strategy measures it, None where it did not.
        accumulated: the change since the last computed step, before any reset.
        timestep: the timestep argument (its mean, if there are several), None where it lies on a
            device and placing the call did not need it.
        reason: why, in a few words ("first step", "below threshold", "max_skip_steps", ...).
        index: the step, counted over the whole schedule.
        errors: of a computed step, how far off a forecast of it would have been, for a strategy
            that checks its forecasts; None where the host has not heard of it.
    """

    action: Action
    distance: float | None
    accumulated: float | None
    timestep: float | None
    reason: str
    index: int  # type: ignore[assignment]  # hides a method that nobody needs here
    errors: Errors | None = None

    @property
    def computed(self) -> bool:
        """Whether the block loop ran."""
        return self.action == "computed"


class Layout(NamedTuple):
    """What one call's residuals and signal need another call to be like, to fit it.

    Attributes:
        shape: of the tensors that the blocks and the signal are made of.
        dtype: theirs.
        device: theirs.
        inference_mode: whether it is on; what is made in it cannot be written to outside of it.
        computation: what the blocks compute, up to sizes: Dynamo's graphs for one prompt length and
            for any are alike.
    """

    shape: Sequence[torch.Size]
    dtype: Sequence[torch.dtype]
    device: Sequence[torch.device]
    inference_mode: bool
    computation: object

    @classmethod
    def of(cls, tensors: Sequence[Tensor], computation: object) -> Layout:
        """The layout of a call, from the tensors that the blocks and the signal are made of."""
        return cls(
            [each.shape for each in tensors],
            [each.dtype for each in tensors],
            [each.device for each in tensors],
            torch.is_inference_mode_enabled(),
            computation,
        )

    def change_from(self, before: Layout) -> str | None:
        """What has changed first, in words; None where nothing has."""
        if self == before:
            return None
        pairs = zip(self._fields, self, before, strict=True)
        name = next(name for name, new, old in pairs if new != old)
        return f"{name.replace('_', ' ')} changed"


class Told(NamedTuple):
    """What a graph has told of a step that it decided, which may be on its way to the host.

    Attributes:
        reading: the gate's state before the step, and how much the signal has changed.
        at: where the step lies.
        total: the number of steps.
        place: which of the records is the step's.
    """

    reading: Reading
    at: Time
    total: int | None
    place: int


class Trajectory:
    """What a region of a model keeps for one guidance branch of one generation.

    Attributes:
        branch: the branch's name.
        gate: the gate, and ``state`` its state.
        signal: of the call that the next one is compared with, by reference.
        history: residuals of the last computed steps.
        within: what a graph that decides by itself finds, None where there is nothing.
        constants: what was hoisted and is held, None where nothing is; ``modulations`` likewise.
        layout: of the last call that was not skipped.
        arrived: the layout of the last call's inputs, where calls may be skipped.
        numbers: those that the last computed call was given, such as sizes and counts.
        last: the time of the last call.
        steps: one record for each call.
        memory_bytes: the most that it held at a time.
        size: shape of the model's first result, without the batch, and ``dtype`` its dtype, for a
            strategy that refuses others; None before the first call has ended.
    """

    def __init__(self, branch: str, gate: Gate, history: History) -> None:
        self.branch = branch
        self.gate = gate
        self.state: Any = gate.begin()
        self.signal: Tensor | None = None
        self.history = history
        self.within: Within | None = None
        self.constants: Constants | None = None
        self.modulations: Table | None = None
        self.layout: Layout | None = None
        self.arrived: Layout | None = None
        self.numbers: Sequence[Any] = ()
        self.last: Time | None = None
        self.steps: list[StepRecord] = []
        self._told: list[Told] = []
        self.memory_bytes = 0
        self.size: tuple[int, ...] | None = None
        self.dtype: str | None = None

    def release(self) -> None:
        """Free all tensors and begin anew; the records and the time stay."""
        self.signal = self.layout = self.arrived = self.within = None
        self.constants = self.modulations = None
        self.history.kept = []
        self.state = self.gate.begin()

    def record(self, step: StepRecord) -> None:
        """Note a call, and what is known by now of the forecast of the last computed one."""
        self.steps.append(step)
        errors = self.history.errors
        if errors is not None:
            places = reversed(range(len(self.steps)))
            last = next(place for place in places if self.steps[place].computed)
            if self.steps[last].errors is not errors:
                self.steps[last] = self.steps[last]._replace(errors=errors)

    def tell(self, told: Tensor, at: Time, total: int | None) -> None:
        """Fill in the last record once what its graph has told has come; it waits for nothing."""
        reading = Reading(told)
        reading.fetch()
        self._told.append(Told(reading, at, total, len(self.steps) - 1))
        self.hear()

    def hear(self, waits: bool = False) -> None:
        """Fill in the records of which more is known by now, or of all."""
        if waits:
            read([each.reading for each in self._told])
        told, self._told = self._told, []
        for each in told:
            if not each.reading.has_come:
                self._told.append(each)
                continue
            record = self.steps[each.place]
            verdict = verdict_on(self.gate, each.reading.numbers or (), each.at, each.total)
            # Of what was not finite nothing is reused, whatever the gate says.
            fits = verdict.reuse != record.computed
            self.steps[each.place] = record._replace(
                distance=verdict.distance,
                accumulated=verdict.accumulated,
                reason=verdict.reason if fits else "non-finite residual",
            )

    def measure_memory(self) -> None:
        """Raise ``memory_bytes`` to what the trajectory holds now."""
        tensors = [*self.history.tensors, *([] if self.signal is None else [self.signal])]
        tensors += () if self.constants is None else self.constants.results
        if self.modulations is not None and self.modulations.branch == self.branch:
            tensors += self.modulations.held.results  # which other branches may share
        tensors += self.within or ()
        held = {id(each): each.nbytes for each in tensors}
        self.memory_bytes = max(self.memory_bytes, sum(held.values()))
