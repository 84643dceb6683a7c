"""The dispatch executor: runs a guarded model, and lets the host decide which compiled part runs.

    prologue -> place the call -> gate -> compute: body -> epilogue      keeps the residuals
                                       -> reuse:   partners + residuals -> epilogue

It costs at most one device-to-host read per call: everything that the host wants to know (the
gate's verdict, whether the residuals are finite, the timestep) comes over in one copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from omni_cache.passes import FINITE
from omni_cache.runtime.generation import ModelState
from omni_cache.runtime.states import bound_call, state_of_parameter
from omni_cache.runtime.trajectory import Layout, StepRecord, Trajectory
from omni_cache.strategies import BoundStrategy, Decision, Gate, Step

PartFunction = Callable[..., Any]


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
        reuse: the epilogue on the residuals instead of the body's outputs.
        residuals: names of those outputs of the body that a computed step leaves to reused ones.
        signal: name of the prologue's output that the gate compares, None where it needs none.
    """

    prologue: CompiledPart
    body: CompiledPart
    epilogue: CompiledPart
    reuse: CompiledPart
    residuals: Sequence[str]
    signal: str | None


class Executor:
    """A guarded model, compiled. It holds no state of any call, so threads and models may share it.

    Args:
        parts: the parts, compiled.
        strategy: makes a gate for each trajectory.
        inputs: names of the whole model's inputs, in order.
        static: which of them are parameters or buffers.
        copy_residuals: whether the body's outputs are overwritten by its next call.
        kind: equal for two executors exactly when the one may reuse what the other has cached.
        timestep: name of the input that tells the timestep, or its value where the graph was
            specialised on a number; None where nothing tells it.
        placed_by_call: whether the inputs tell nothing of the place in the loop, as behind a graph
            break, so that the arguments of the call that it runs for have to.
    """

    def __init__(
        self,
        parts: GuardedParts,
        strategy: BoundStrategy,
        inputs: Sequence[str],
        static: Sequence[bool],
        copy_residuals: bool,
        kind: object,
        timestep: str | float | None,
        placed_by_call: bool = False,
    ) -> None:
        self._placed_by_call = placed_by_call
        self._parts = parts
        self._strategy = strategy
        self._copy_residuals = copy_residuals
        self._kind = kind
        # Values of a call lie in one flat list: the model's inputs, then the prologue's outputs,
        # then the body's or, on a reused step, the residuals.
        body = parts.body
        slots = {name: slot for slot, name in enumerate([*inputs, *parts.prologue.outputs])}
        after_body = {**slots, **_numbered(body.outputs, len(slots))}
        after_reuse = {**slots, **_numbered(parts.residuals, len(slots))}
        self._prologue_inputs = _picker(parts.prologue, slots)
        self._body_inputs = _picker(body, slots)
        self._epilogue_inputs = _picker(parts.epilogue, after_body)
        self._reuse_inputs = _picker(parts.reuse, after_reuse)
        self._residuals = [body.outputs.index(name) for name in parts.residuals]
        self._finite = body.outputs.index(FINITE)
        self._signal = None if parts.signal is None else slots[parts.signal]
        self._timestep = slots[timestep] if isinstance(timestep, str) else None
        self._constant_timestep = None if isinstance(timestep, str) else timestep
        self._dynamic = [
            slot
            for slot, is_static in enumerate(static)
            if not is_static and slot != self._timestep
        ]
        body_weights = [
            slot for name in body.inputs if (slot := slots[name]) < len(static) and static[slot]
        ]
        # The last one, because a signal may have moved the first ones out of the body.
        self._identity = max(body_weights, default=None)
        # What the body reads decides the shape of what it returns, held values included.
        read = (*body.inputs, *parts.reuse.inputs)
        shaped = {slots[name] for name in read if name in slots}
        if self._signal is not None:
            shaped.add(self._signal)
        self._shaped = sorted(slot for slot in shaped if slot >= len(static) or not static[slot])
        # State for graphs whose weights are baked in, which therefore serve one instance alone.
        self._own_state = ModelState()
        self._has_warned = False

    def __call__(self, *args: Any) -> Any:
        """Run one forward on the model's flat inputs; returns its flat outputs."""
        call = bound_call()
        if call is not None:
            call.is_cached = True
        values = list(args)
        values += self._parts.prologue.run(*self._prologue_inputs(values))
        state = self._state(values)
        trajectory, decision = self._decide(state, values)
        try:
            return self._run(values, state, trajectory, decision)
        except BaseException:
            # Half a step is no basis for the next one.
            if trajectory is not None:
                trajectory.release()
            raise

    def _run(
        self,
        values: list[Any],
        state: ModelState,
        trajectory: Trajectory | None,
        decision: Decision,
    ) -> Any:
        measured: dict[str, float] = {}
        residuals = None if trajectory is None or decision.compute else trajectory.residuals
        if residuals is None and not decision.compute:  # another thread has just freed them
            decision = replace(decision, compute=True, reason="no residual")
        if residuals is not None:
            values += residuals
            result = self._parts.reuse.run(*self._reuse_inputs(values))
        else:
            made = self._parts.body.run(*self._body_inputs(values))
            values += made
            result = self._parts.epilogue.run(*self._epilogue_inputs(values))
            if trajectory is not None:
                residuals = tuple(made[slot] for slot in self._residuals)
                finite = made[self._finite]
                if self._copy_residuals:
                    residuals, finite = tuple(each.clone() for each in residuals), finite.clone()
                trajectory.keep(residuals, finite)
                if self._strategy_for(state).observes and trajectory.gate is not None:
                    output = next(each for each in result if isinstance(each, Tensor))
                    measured = trajectory.gate.observe(residuals, output)
        if trajectory is not None:
            predictions = (each for each in result if isinstance(each, Tensor))
            trajectory.conditioning.predicted = {each.shape for each in predictions}
            self._record(values, state, trajectory, decision, measured)
        return result

    def _record(
        self,
        values: Sequence[Any],
        state: ModelState,
        trajectory: Trajectory,
        decision: Decision,
        measured: dict[str, float],
    ) -> None:
        trajectory.steps.append(
            StepRecord(
                computed=decision.compute,
                distance=decision.distance,
                accumulated=decision.accumulated,
                timestep=self._timestep_read(trajectory, values),
                reason=decision.reason,
                measured=measured,
            )
        )
        trajectory.step_index += 1
        trajectory.measure_memory()
        total = self._total_steps(state)
        if total is not None and trajectory.step_index >= total:
            state.finish(trajectory)

    # --- placing and deciding
    # -----------------------------------------------------------------------

    def _decide(
        self, state: ModelState, values: Sequence[Any]
    ) -> tuple[Trajectory | None, Decision]:
        inputs = self._conditioning(values)
        known = state.named(inputs)
        if known is not None:
            return known, self._ask(known, state, values, _Read())
        timestep = self._timestep_of(values)
        if timestep is None:
            self._warn_of_unknown_place()
            return None, Decision(True, "no timestep and no context")
        time = _host_value(timestep)
        if time is None:
            return self._decide_on_device(state, values, inputs, timestep)
        known = state.infer(time, inputs)
        return known, self._ask(known, state, values, _Read())

    def _decide_on_device(
        self,
        state: ModelState,
        values: Sequence[Any],
        inputs: Sequence[Tensor],
        timestep: Tensor,
    ) -> tuple[Trajectory, Decision]:
        """Decide for the likely trajectory while the timestep comes over, which tells the true one.

        Both arrive in one read. The guess works on a copy of the gate, so that a wrong one is
        forgotten; the true trajectory then computes, as a gate that cannot decide does.
        """
        read = _Read()
        read.want("timestep", timestep.double().mean())
        guess = state.guess(inputs)
        gate = fork = decision = None
        # A gate without a signal needs no read of its own, so it can wait for the timestep.
        if guess is not None and self._signal is not None and guess.layout == self._layout(values):
            gate = guess.gate
        if guess is not None and gate is not None:
            fork = gate.fork()
            decision = self._verdict(guess, fork, state, values, read)
        true = state.infer(read.fetch("timestep"), inputs)
        if decision is not None and fork is not None and true is guess and true.gate is gate:
            true.gate = fork
            if not decision.compute and true.residuals is None:
                fork.overrule()
                decision = replace(decision, compute=True, reason="unexpected call")
            return true, decision
        may_reuse = self._signal is None
        decision = self._ask(true, state, values, _Read(), may_reuse)
        if decision.reason == "no residual":
            decision = replace(decision, reason="unexpected call")
        return true, decision

    def _ask(
        self,
        trajectory: Trajectory,
        state: ModelState,
        values: Sequence[Any],
        read: _Read,
        may_reuse: bool = True,
    ) -> Decision:
        """Let the trajectory's own gate decide."""
        changed = trajectory.enter_layout(self._layout(values))
        if trajectory.gate is None:
            strategy = self._strategy_for(state)
            trajectory.gate = strategy.make_gate(trajectory.branch, trajectory.position)
        decision = self._verdict(trajectory, trajectory.gate, state, values, read, may_reuse)
        if changed is None:
            return decision
        return replace(decision, compute=True, reason=f"{changed.replace('_', ' ')} changed")

    def _verdict(
        self,
        trajectory: Trajectory,
        gate: Gate,
        state: ModelState,
        values: Sequence[Any],
        read: _Read,
        may_reuse: bool = True,
    ) -> Decision:
        """What a gate says of a call, unless the residual is not fit for reuse."""
        finite = trajectory.finite
        if finite is not None and finite.device.type != "cpu":
            read.want("finite", finite)
        decision = gate.decide(
            Step(
                index=trajectory.step_index,
                num_inference_steps=self._total_steps(state),
                can_reuse=may_reuse and trajectory.residuals is not None,
                signal=None if self._signal is None else values[self._signal],
                read=read,
            )
        )
        if decision.compute or finite is None:
            return decision
        # A flag that would cost a read of its own is not asked for.
        known = bool(finite) if finite.device.type == "cpu" else read.known("finite") != 0.0
        if known:
            return decision
        gate.overrule()
        return replace(decision, compute=True, reason="non-finite residual")

    def _warn_of_unknown_place(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "omni-cache: this call has no timestep and no context, so it is computed. Name its "
                "place: with omni_cache.generation(...), omni_cache.branch('cond'): model(...)",
                stacklevel=2,
            )

    def _state(self, values: Sequence[Any]) -> ModelState:
        call = bound_call()
        if call is not None:
            return call.state
        return (
            self._own_state
            if self._identity is None
            else state_of_parameter(values[self._identity])
        )

    def _total_steps(self, state: ModelState) -> int | None:
        return state.num_inference_steps() or self._strategy_for(state).num_inference_steps

    def _strategy_for(self, state: ModelState) -> BoundStrategy:
        config = state.config
        return self._strategy if config is None else self._strategy.configured(config)

    def _timestep_of(self, values: Sequence[Any]) -> Any:
        if self._timestep is not None:
            return values[self._timestep]
        call = bound_call()
        # A graph behind a break has no timestep of its own; the call that it is a piece of has.
        return (
            call.timestep if call is not None and self._placed_by_call else self._constant_timestep
        )

    def _timestep_read(self, trajectory: Trajectory, values: Sequence[Any]) -> float | None:
        """The timestep of the call just placed, unless it lies on a device and nobody read it."""
        known = _host_value(self._timestep_of(values))
        return trajectory.course.timestep if known is None else known

    def _conditioning(self, values: Sequence[Any]) -> list[Tensor]:
        call = bound_call()
        if call is not None and self._placed_by_call:
            return call.inputs
        return [values[slot] for slot in self._dynamic if isinstance(values[slot], Tensor)]

    def _layout(self, values: Sequence[Any]) -> Layout:
        """Equal for two calls exactly when the one's residuals and signal fit the other."""
        tensors = [each for slot in self._shaped if isinstance(each := values[slot], Tensor)]
        return Layout(
            shape=[each.shape for each in tensors],
            dtype=[each.dtype for each in tensors],
            device=[each.device for each in tensors],
            inference_mode=torch.is_inference_mode_enabled(),
            graph=self._kind,
        )


class _Read:
    """The one device-to-host copy of a call: whatever is wanted comes along with the verdict."""

    def __init__(self) -> None:
        self._wanted: dict[str, Tensor] = {}
        self._known: dict[str, float] = {}

    def want(self, name: str, scalar: Tensor) -> None:
        """Ask for a one-element tensor to come along with the next copy."""
        self._wanted[name] = scalar

    def __call__(self, verdict: Tensor) -> list[float]:
        """Bring a verdict to the host, and all that is wanted."""
        packed = [verdict.double().reshape(-1)]
        packed += (each.double().reshape(1) for each in self._wanted.values())
        values: list[float] = torch.cat(packed).tolist()
        own = verdict.numel()
        self._known = dict(zip(self._wanted, values[own:], strict=True))
        return values[:own]

    def known(self, name: str) -> float | None:
        """What has come along; None where there was no copy yet."""
        return self._known.get(name)

    def fetch(self, name: str) -> float:
        """A wanted value, in a copy of its own where it has not come along."""
        if name not in self._known:
            (self._known[name],) = self(self._wanted.pop(name))
        return self._known[name]


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


def _host_value(timestep: Any) -> float | None:
    """A timestep as a number, the mean of several; None where that needs a device read."""
    if isinstance(timestep, Tensor):
        if timestep.device.type != "cpu" or timestep.numel() == 0:
            return None
        return float(timestep.double().mean())
    return None if timestep is None else float(timestep)
