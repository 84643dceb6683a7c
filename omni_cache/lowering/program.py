"""A guarded model as a program: its parts, and where their values lie in one flat list.

    values: inputs | constants | modulations | the prologue's outputs
                   | the body's outputs, or the history, what entered, the weights

Graphs and extractors each make one. It knows nothing of strategies or calls, and holds no state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_cache.passes import FINITE, Entered

PartFunction = Callable[..., Any]
Values = list[Any]


@dataclass(frozen=True)
class CompiledPart:
    """A part of a guarded model as a callable over positional inputs; values go by their names."""

    run: PartFunction
    inputs: Sequence[str]
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class GuardedParts:
    """A guarded model, compiled.

    Attributes:
        prologue: what comes before the block loop.
        body: the block loop; it also makes the residuals, and `FINITE` says if they all were.
        epilogue: what comes after it.
        reuse: the epilogue on partners and forecast residuals instead of the body's outputs.
        residuals: names of those outputs of the body that a computed step leaves to reused ones.
        history: for each entry of the history, newest first, the names of its residuals in
            ``reuse``.
        entered: the partners that ``reuse`` weighs beside the history.
        weights: name of the row of weights in ``reuse``.
        weights_dtype: its dtype.
        per_sample: whether it has a row for each sample.
        signal: name of the prologue's output that the gate compares, None where it needs none.
        merges: whether ``reuse`` makes the first outputs of ``body``, and the epilogue follows it.
        rest: body and epilogue at once, for calls that have no residual; None where all have.
        supposed: names of the prologue's outputs that are numbers below 0 where a call has one.
        constants: what was hoisted out of all of these, and is the same for calls with the same
            inputs; None where nothing was.
        modulations: what was hoisted because the timestep alone changes it, likewise.
        rows: the same as a function that has many timesteps where that has one, and puts a
            dimension for them before those of its results.
        timestep: name of the timestep, None where no input is one.
    """

    prologue: CompiledPart
    body: CompiledPart
    epilogue: CompiledPart
    reuse: CompiledPart
    residuals: Sequence[str]
    history: Sequence[Sequence[str]]
    weights: str
    signal: str | None
    weights_dtype: torch.dtype = torch.float32
    per_sample: bool = False
    merges: bool = False
    rest: CompiledPart | None = None
    supposed: Sequence[str] = ()
    entered: Sequence[Entered] = ()
    constants: CompiledPart | None = None
    modulations: CompiledPart | None = None
    rows: PartFunction | None = None
    timestep: str | None = None


class Computed(NamedTuple):
    """What a computed step returns: the model's flat outputs, the residuals, if all are finite."""

    result: Any
    residuals: tuple[Tensor, ...]
    finite: Tensor


class Program:
    """The parts of a guarded model over one flat list of values.

    Args:
        parts: the parts, compiled.
        inputs: names of the whole model's inputs, in order.
        static: which of them are parameters or buffers.
        reuses_memory: whether a part's outputs are overwritten by its next call.
        copies_signal: whether the signal is memory that somebody else may write into.
    """

    def __init__(
        self,
        parts: GuardedParts,
        inputs: Sequence[str],
        static: Sequence[bool],
        reuses_memory: bool = False,
        copies_signal: bool = False,
    ) -> None:
        self._parts = parts
        self._reuses_memory = reuses_memory
        self._copies_signal = copies_signal or reuses_memory
        body = parts.body
        constants, modulations = parts.constants or _NONE, parts.modulations or _NONE
        hoisted = {*constants.outputs, *modulations.outputs}
        made = [*constants.outputs, *modulations.outputs, *parts.prologue.outputs]
        slots = {name: slot for slot, name in enumerate([*inputs, *made])}
        self.slots = slots
        after_body = {**slots, **_numbered(body.outputs, len(slots))}
        held = [name for names in parts.history for name in names]
        held += [*(each.kept for each in parts.entered), parts.weights]
        self._constants_inputs = _picker(constants, slots)
        self._modulations_inputs = _picker(modulations, slots)
        self._prologue_inputs = _picker(parts.prologue, slots)
        self._body_inputs = _picker(body, slots)
        self._epilogue_inputs = _picker(parts.epilogue, after_body)
        self._reuse_inputs = _picker(parts.reuse, {**slots, **_numbered(held, len(slots))})
        self._rest_inputs = None if parts.rest is None else _picker(parts.rest, slots)
        self._supposed = [slots[name] for name in parts.supposed]
        self._residuals = [body.outputs.index(name) for name in parts.residuals]
        self._entered = [
            (slots[each.name], each._replace(copies=each.copies or reuses_memory))
            for each in parts.entered
        ]
        self._finite = body.outputs.index(FINITE)
        self._signal = None if parts.signal is None else slots[parts.signal]
        # What the body reads decides the shape of what it returns, held values included.
        # What is hoisted has the shapes that its inputs give it.
        read = {
            slots[name]
            for part in (body, parts.reuse, constants, modulations)
            for name in part.inputs
            if name in slots and name not in hoisted
        }
        if self._signal is not None:
            read.add(self._signal)
        self._shaped = sorted(slot for slot in read if slot >= len(static) or not static[slot])
        # The last weight, because a signal may have moved the first ones out of the body.
        weights = [slot for slot in read if slot < len(static) and static[slot]]
        self.identity = max(weights, default=None)
        asked = (slots[name] for name in constants.inputs)
        self.constant_inputs = [slot for slot in asked if not static[slot]]
        own = [slots[name] for name in modulations.inputs if name in inputs]
        time = None if parts.timestep is None else slots[parts.timestep]
        of_constants = [] if hoisted.isdisjoint(modulations.inputs) else self.constant_inputs
        self.modulation_inputs = [
            *(slot for slot in own if not static[slot] and slot != time),
            *of_constants,
        ]
        self._time = [name == parts.timestep for name in modulations.inputs]

    gate = None
    """No gate is in the parts: the host decides."""

    @property
    def per_sample(self) -> bool:
        """Whether a reused step takes weights for each sample."""
        return self._parts.per_sample

    @property
    def has_constants(self) -> bool:
        """Whether something was hoisted that nothing changes."""
        return self._parts.constants is not None

    @property
    def has_modulations(self) -> bool:
        """Whether something was hoisted that the timestep changes."""
        return self._parts.modulations is not None

    def constants(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """What the model makes of inputs that stay; nothing where nothing was hoisted."""
        part = self._parts.constants
        if part is None:
            return ()
        made = part.run(*self._constants_inputs(args))
        return tuple([each.clone() for each in made] if self._reuses_memory else made)

    def modulations(self, args: Sequence[Any], constants: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the model makes of the timestep besides; nothing where nothing was hoisted."""
        part = self._parts.modulations
        if part is None:
            return ()
        made = part.run(*self._modulations_inputs([*args, *constants]))
        return tuple([each.clone() for each in made] if self._reuses_memory else made)

    def rows(
        self, args: Sequence[Any], constants: Sequence[Tensor], timesteps: Tensor
    ) -> Sequence[Tensor]:
        """The same for many timesteps, which come first in its shape and in those of results."""
        assert self._parts.rows is not None
        inputs = self._modulations_inputs([*args, *constants])
        given = zip(self._time, inputs, strict=True)
        found: Sequence[Tensor] = self._parts.rows(
            *(timesteps if is_time else each for is_time, each in given)
        )
        return found

    def begin(self, args: Sequence[Any], hoisted: Sequence[Tensor]) -> Values:
        """Run what comes before the block loop, given the constants and then the modulations."""
        values = [*args, *hoisted]
        values += self._parts.prologue.run(*self._prologue_inputs(values))
        return values

    def signal(self, values: Values) -> Tensor | None:
        """The signal, as it may be kept until the next call."""
        if self._signal is None:
            return None
        signal: Tensor = values[self._signal]
        return signal.clone() if self._copies_signal else signal

    def entered(self, values: Values) -> tuple[Tensor, ...]:
        """The partners that are weighed, as they may be kept; asked for before the blocks run."""
        return tuple([each.of(values[slot]) for slot, each in self._entered])

    def shaped(self, values: Values) -> list[Tensor]:
        """The tensors whose shapes decide the residuals'."""
        return [each for slot in self._shaped if isinstance(each := values[slot], Tensor)]

    def compute(self, values: Values) -> Computed:
        """Run the block loop, and what comes after it.

        A call that has no residual leaves none.
        """
        if not self.has_residual(values):
            assert self._parts.rest is not None
            assert self._rest_inputs is not None
            rest = self._parts.rest.run(*self._rest_inputs(values))
            return Computed(rest, (), torch.tensor(False))
        made = self._parts.body.run(*self._body_inputs(values))
        result = self._parts.epilogue.run(*self._epilogue_inputs([*values, *made]))
        residuals, finite = [made[slot] for slot in self._residuals], made[self._finite]
        if self._reuses_memory:
            residuals, finite = [each.clone() for each in residuals], finite.clone()
        return Computed(result, tuple(residuals), finite)

    def reuse(
        self, values: Values, history: Sequence[Tensor], rows: Sequence[tuple[float, ...]]
    ) -> Any:
        """Run what comes after the block loop, on residuals that are forecast from earlier ones.

        Args:
            values: as `begin` left them.
            history: the residuals of each entry of the history, newest first, and what `entered` at
                the newest one.
            rows: one weight for each entry, for every sample or for all of them at once.
        """
        samples = _samples(history) if self._parts.per_sample and len(rows) == 1 else 1
        weights = constant((*rows,) * samples, self._parts.weights_dtype, history[0].device)
        result = self._parts.reuse.run(*self._reuse_inputs([*values, *history, weights]))
        if not self._parts.merges:
            return result
        return self._parts.epilogue.run(*self._epilogue_inputs([*values, *result]))

    def has_residual(self, values: Values) -> bool:
        """Whether the blocks' outputs are of the shapes that their partners have."""
        return all(values[slot] < 0 for slot in self._supposed)


_NONE = CompiledPart(lambda: (), ())
"""A part that makes nothing."""


def _samples(history: Sequence[Tensor]) -> int:
    """The size of the batch that residuals share; integers may have another."""
    return next(each.shape[0] for each in history if each.is_floating_point() or each.is_complex())


@lru_cache(maxsize=256)
def constant(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, or tuples of them, as a tensor; the few that a schedule repeats are copied once."""
    with torch.inference_mode(False):
        # Made on the device, it would have the host wait for all work that the device has before.
        return torch.tensor(value, dtype=dtype).to(device, non_blocking=True)


def _numbered(names: Sequence[str], first: int) -> dict[str, int]:
    return {name: first + offset for offset, name in enumerate(names)}


def _picker(
    part: CompiledPart, slots: dict[str, int]
) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes a part's inputs out of the list of values."""
    wanted = [slots[name] for name in part.inputs]
    if len(wanted) > 1:
        return itemgetter(*wanted)
    return lambda values: tuple(values[slot] for slot in wanted)
