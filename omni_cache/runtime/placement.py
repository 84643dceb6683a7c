"""How the calls of one guarded graph are placed: whose state, and what tells where they lie."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni_cache.runtime.calls import Call, Ran, bound_call
from omni_cache.runtime.contexts import Region, named_branch, named_generation
from omni_cache.runtime.counters import current_tally
from omni_cache.runtime.decision import Given, Guarded, Step
from omni_cache.runtime.inference import Inputs, host_value
from omni_cache.runtime.model_state import ModelState, state_of_parameter
from omni_cache.runtime.place import Called
from omni_cache.strategies import Guard, Strategy


@dataclass
class Placement:
    """Where the calls of one guarded graph lie.

    Attributes:
        guarded: the region.
        model_class: name of the model's class.
        guard: what the graph was compiled for.
        signal: the signal that a flag has named in its place.
        strategy: what its calls follow in bare use; None where the bound call's model has one.
        identity: slot of an input that only one model instance has, None where there is none.
        inputs: slots of the tensors that are neither weights nor the timestep.
        timestep: slot of the timestep, None where no input is one.
        constant: the timestep, where the graph was specialised on a number.
        by_call: whether the inputs tell nothing of the place, as behind a graph break, so that the
            arguments of the bound call have to.
        constants: slots of the inputs that constants are made of.
        modulations: slots of those that modulations are made of besides the timestep.
        numbers: slots of the inputs that are numbers and no tensors.
        uncounted: what was compiled for the graph and has no call yet, whose model it counts for.
    """

    guarded: Guarded
    model_class: str | None
    guard: Guard
    signal: str | None
    strategy: Strategy | None
    identity: int | None
    inputs: Sequence[int]
    timestep: int | None = None
    constant: float | None = None
    by_call: bool = False
    constants: Sequence[int] = ()
    modulations: Sequence[int] = ()
    numbers: Sequence[int] = ()
    uncounted: list[Region] = field(default_factory=list)
    # State for graphs whose weights are baked in, which therefore serve one instance alone.
    own_state: ModelState = field(default_factory=ModelState)

    @property
    def call(self) -> Call | None:
        """The call of an enabled module that the graph runs for now, None for no such call."""
        # A graph that was compiled in bare use has nothing to do with a call around it.
        return bound_call.get() if self.strategy is None else None

    @property
    def asked_for(self) -> Sequence[int]:
        """The slots that tell the place of a call which the graph serves alone."""
        timestep = [] if self.timestep is None else [self.timestep]
        return [*{*self.inputs, *timestep, *self.constants, *self.modulations, *self.numbers}]

    def place(self, args: Sequence[Any] | Mapping[int, Any]) -> Step:
        """Place a call as far as that is possible without a read.

        Args:
            args: the graph's inputs, by their slots; of a call that the graph serves alone those
                that are `asked_for` will do.
        """
        call = self.call
        if call is not None:
            state, call.is_cached = call.state, True
        elif self.identity is None:
            state = self.own_state
        else:
            state = state_of_parameter(args[self.identity])
        current_tally.set(state.tally)
        if self.uncounted:
            self._count(state)
        generation, policy = named_generation.get(), None
        if generation is not None:
            policy = generation.policy(self.guard, self.model_class, self.signal, state.owner)
        if policy is None:
            policy = state.policy(self.strategy, self.model_class)
        timestep: Any = self.constant if self.timestep is None else args[self.timestep]
        ran = Ran(self.guarded.region)
        given = Given(
            timestep,
            [args[slot] for slot in self.constants],
            [args[slot] for slot in self.modulations],
            [args[slot] for slot in self.numbers],
        )
        if call is not None:
            weight = self.identity if self.by_call else None
            ran = call.run(ran.region, None if weight is None else id(args[weight]))
            if call.place is not None:  # another region has found it
                called = call.place.called
                return Step(state, policy, self.guarded, ran, called, call, given)
        # Behind a graph break the inputs are made by the piece before.
        slots = () if self.by_call else self.inputs
        tensors = [args[slot] for slot in slots]
        if self.by_call and call is not None:
            timestep, tensors = call.timestep, call.inputs
            given = given._replace(timestep=timestep)
        guarded, named = self.guarded, named_branch.get()
        said = None if named is None else named.timestep
        called = Called(
            generation,
            named,
            None if call is None else call.loop,
            host_value(timestep) if said is None else said,
            Inputs(tensors, not guarded.groups, guarded.is_shared(policy), timestep),
            guarded.computation,
        )
        return Step(state, policy, guarded, ran, called, call, given)

    def _count(self, state: ModelState) -> None:
        with contextlib.suppress(IndexError):  # another thread came first
            state.tally.compiled(self.uncounted.pop())


def without_cache(run: Callable[..., Any]) -> Callable[..., Any]:
    """A graph that was compiled with ``cache="none"``, and refuses generations that want one."""

    def refusing(*args: Any) -> Any:
        generation = named_generation.get()
        if generation is not None:
            generation.policy(None)
        return run(*args)

    return refusing
