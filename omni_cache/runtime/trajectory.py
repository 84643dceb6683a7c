"""A trajectory: one guidance branch of one generation of one model.

It owns what must never be mixed up: the gate's state, the residuals of the last computed step, and
the record of what was decided. Dropping the trajectory drops them all.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from omni_cache.strategies import Gate


@dataclass(frozen=True)
class StepRecord:
    """What happened in one call.

    Attributes:
        computed: whether the block loop ran.
        distance: this step's change as the strategy measures it, None where it did not.
        accumulated: the change since the last computed step, before any reset.
        timestep: the timestep argument (its mean, if there are several), None where it lies on a
            device and placing the call did not need it.
        reason: why, in a few words ("first step", "below threshold", "max_skip_steps", ...).
        measured: what a calibrating strategy measured, by name.
    """

    computed: bool
    distance: float | None
    accumulated: float | None
    timestep: float | None
    reason: str
    measured: dict[str, float] = field(default_factory=dict)


class Progress(Enum):
    """Where a timestep lies, seen from the one before."""

    START = "nothing came before"
    SAME = "the same again"
    ONWARD = "further along"
    BACK = "against the direction so far"


class Course:
    """How a timestep has moved. Whether it falls or rises is learned from its first change.

    A timestep that comes twice in a row is one step or two. Where a pipeline is heard, its
    schedulers tell: they move between steps, and between steps alone.
    """

    def __init__(self) -> None:
        self.timestep: float | None = None
        self.direction = 0
        self.schedulers: tuple[int | None, ...] = ()

    def compare(self, timestep: float, schedulers: tuple[int | None, ...] = ()) -> Progress:
        """Where a timestep lies; changes nothing."""
        if self.timestep is None:
            return Progress.START
        if timestep == self.timestep:
            return Progress.SAME if schedulers == self.schedulers else Progress.ONWARD
        onward = self.direction in (0, self._direction(timestep))
        return Progress.ONWARD if onward else Progress.BACK

    def advance(self, timestep: float, schedulers: tuple[int | None, ...] = ()) -> None:
        """Move on to a timestep."""
        if self.timestep is not None and timestep != self.timestep:
            self.direction = self._direction(timestep)
        self.timestep, self.schedulers = timestep, schedulers

    def _direction(self, timestep: float) -> int:
        return 1 if self.timestep is not None and timestep > self.timestep else -1


class Layout(NamedTuple):
    """What one call's residuals and signal need another call to be like, to fit it.

    Attributes:
        shape: of the tensors that the blocks and the signal are made of.
        dtype: theirs.
        device: theirs.
        inference_mode: whether it is on; what is made in it cannot be written to outside of it.
        graph: the compiled graph, up to equality.
    """

    shape: Sequence[torch.Size]
    dtype: Sequence[torch.dtype]
    device: Sequence[torch.device]
    inference_mode: bool
    graph: object

    def change_from(self, before: Layout) -> str | None:
        """The name of the first difference; None where there is none."""
        pairs = zip(self._fields, self, before, strict=True)
        return next((name for name, new, old in pairs if new != old), None)


class Trajectory:
    """State of one guidance branch of one generation.

    Attributes:
        branch: the branch's name.
        step_index: how many calls went before the next one.
        gate: the gate, made when the first call arrives.
        residuals: what the last computed step left, or None.
        finite: bool tensor, whether all of ``residuals`` were finite when they were made.
        steps: one record for each call.
    """

    def __init__(self, branch: str, position: int, step_index: int = 0) -> None:
        self.branch = branch
        self.position = position
        self.step_index = step_index
        self.gate: Gate | None = None
        self.residuals: tuple[Tensor, ...] | None = None
        self.finite: Tensor | None = None
        self.layout: Layout | None = None
        self.steps: list[StepRecord] = []
        self.memory_bytes = 0
        self.conditioning = Conditioning()
        self.course = Course()

    def skip_to(self, step_index: int) -> None:
        """Count on from a step; one that was left out made what is held older than it seems."""
        if step_index > self.step_index:
            self.release()
        self.step_index = step_index

    def enter_layout(self, layout: Layout) -> str | None:
        """Start afresh when the tensors of this call do not fit those of the call before.

        Returns:
            What had changed, so that the state had to be dropped; None where nothing had.
        """
        changed = None if self.layout is None else layout.change_from(self.layout)
        if changed is not None:
            self.release()
        self.layout = layout
        return changed

    def keep(self, residuals: tuple[Tensor, ...], finite: Tensor) -> None:
        """Take over the residuals of a computed step, by reference."""
        self.residuals, self.finite = residuals, finite

    def drop_residuals(self) -> None:
        """Have the next call computed; what the gate has measured stays."""
        self.residuals = self.finite = None

    def measure_memory(self) -> None:
        """Raise ``memory_bytes`` to what the trajectory holds now."""
        held = sum(each.nbytes for each in self.residuals or ())
        held += self.gate.memory_bytes if self.gate is not None else 0
        self.memory_bytes = max(self.memory_bytes, held)

    def release(self) -> None:
        """Free all tensors; the records and the step count stay."""
        self.gate = self.residuals = self.finite = self.layout = None


class Conditioning:
    """Which input objects a trajectory is called with again and again (prompt embeddings, ids).

    Pipelines pass the same tensor objects on every step of one generation. That one of them is
    gone tells another generation or another branch where the timestep alone cannot.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.last: tuple[weakref.ref[Tensor], ...] = ()
        self.stable: tuple[weakref.ref[Tensor], ...] = ()
        self.shapes: list[torch.Size] = []
        self.predicted: set[torch.Size] = set()
        self.is_proven = False

    def saw(self, inputs: Sequence[Tensor]) -> None:
        """Remember a call's inputs; those of the last call that came again are stable."""
        if self.calls:
            before = self.stable if self.is_proven else ()
            self.stable = self._among(before or self.last, inputs)
            self.is_proven = self.is_proven or not self._misses(inputs)
        self.last = tuple(weakref.ref(each) for each in inputs)
        self.shapes = [each.shape for each in inputs]
        self.calls += 1

    def shared(self, inputs: Sequence[Tensor]) -> int:
        """How many inputs of the last call are there again."""
        return len(self._among(self.last, inputs))

    def contradicts(self, inputs: Sequence[Tensor]) -> bool:
        """Whether an input that had come every time is gone."""
        return len(self._among(self.stable, inputs)) < len(self.stable)

    def confirms(self, inputs: Sequence[Tensor]) -> bool:
        """Whether a call goes on with the last one, as long as none has been seen to do so.

        It must bring every input of the last call. A caller that makes some anew for every call is
        believed from the third on, unless it keeps those that it made before.

        Latents do not count. They have the shape of the prediction.
        """
        if self.calls == 0 or self.is_proven:
            return True
        awaited = sum(shape not in self.predicted for shape in self.shapes)
        came = [each for ref in self._among(self.last, inputs) if (each := ref()) is not None]
        return 0 < sum(each.shape not in self.predicted for each in came) == awaited

    def _misses(self, inputs: Sequence[Tensor]) -> bool:
        """Whether an input of the last call is not among these although the caller keeps it."""
        kept = [each for ref in self.last if (each := ref()) is not None]
        present = {id(each) for each in inputs}
        # Multistep schedulers keep latents.
        return any(each.shape not in self.predicted and id(each) not in present for each in kept)

    @staticmethod
    def _among(
        references: Sequence[weakref.ref[Tensor]], inputs: Sequence[Tensor]
    ) -> tuple[weakref.ref[Tensor], ...]:
        present = {id(each) for each in inputs}
        return tuple(ref for ref in references if (it := ref()) is not None and id(it) in present)
