"""How the calls of one guarded graph are placed: whose state, and what tells where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from omni_cache.runtime.calls import Call, bound_call
from omni_cache.runtime.contexts import named_branch, named_generation
from omni_cache.runtime.decision import Guarded, Pending, Step
from omni_cache.runtime.inference import Inputs, host_value
from omni_cache.runtime.model_state import ModelState, state_of_parameter
from omni_cache.runtime.place import Called, Place, Told, likely_place, locate, open_runs
from omni_cache.strategies import Policy, Strategy


@dataclass
class Placement:
    """Where the calls of one guarded graph lie.

    Attributes:
        guarded: the region.
        model_class: name of the model's class.
        strategy: what its calls follow in bare use; None where the bound call's model has one.
        identity: slot of an input that only one model instance has, None where there is none.
        inputs: slots of the inputs that are neither weights nor the timestep.
        timestep: slot of the timestep, None where no input is one.
        constant: the timestep, where the graph was specialised on a number.
        by_call: whether the inputs tell nothing of the place, as behind a graph break, so that the
            arguments of the bound call have to.
    """

    guarded: Guarded
    model_class: str | None
    strategy: Strategy | None
    identity: int | None
    inputs: Sequence[int]
    timestep: int | None = None
    constant: float | None = None
    by_call: bool = False
    # State for graphs whose weights are baked in, which therefore serve one instance alone.
    own_state: ModelState = field(default_factory=ModelState)

    def place(self, args: Sequence[Any]) -> Step:
        """Place a call, given the graph's inputs."""
        call = bound_call()
        if call is not None:
            call.is_cached = True
        # A graph that was compiled in bare use has nothing to do with a call around it.
        call = call if self.strategy is None else None
        state = self._state(call, args)
        policy = state.policy(self.strategy, self.model_class)
        known = None if call is None else call.place
        place = self._find(state, policy, call, args) if known is None else known
        return Step(state, policy, self.guarded, place, call)

    def _find(
        self, state: ModelState, policy: Policy, call: Call | None, args: Sequence[Any]
    ) -> Place | Pending | str:
        if self.by_call and call is not None:
            timestep, tensors = call.timestep, call.inputs
        else:
            timestep = self.constant if self.timestep is None else args[self.timestep]
            # Behind a graph break the inputs are made by the piece before.
            slots = () if self.by_call else self.inputs
            tensors = [each for slot in slots if isinstance(each := args[slot], Tensor)]
        told = Told(named_generation(), named_branch(), None if call is None else call.loop)
        is_shared = self.guarded.is_shared(policy)
        inputs = Inputs(tensors, not self.guarded.groups, is_shared, timestep)
        called = Called(host_value(timestep), inputs, self.guarded.computation)
        unread = None
        wanted = policy.forecast.reads_values or not told.is_enough
        if isinstance(timestep, Tensor) and called.value is None and wanted:
            unread = timestep
        if unread is not None or is_shared or inputs.on_device:
            likely = likely_place(state, told, called)
            contents = inputs.unread
            if contents and not is_shared:
                courses = (each.courses.values() for each in open_runs(state, told))
                before = (each.conditioning.unread for some in courses for each in some)
                contents += (each for some in before for each in some)
            if unread is not None or contents:
                return Pending(likely, unread, contents, partial(_settle, state, told, called))
        return locate(state, told, called)

    def _state(self, call: Call | None, args: Sequence[Any]) -> ModelState:
        if call is not None:
            return call.state
        return self.own_state if self.identity is None else state_of_parameter(args[self.identity])


def _settle(state: ModelState, told: Told, called: Called, value: float | None) -> Place | str:
    return locate(state, told, called if value is None else called._replace(value=value))
