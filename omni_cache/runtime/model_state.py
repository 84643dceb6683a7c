"""What the runtime knows of one model instance: never shared with another instance.

State hangs on the instance that ``enable`` bound, else on the identity of a parameter that a graph
is called with, because one compiled graph may serve several instances.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection

from torch import Tensor, nn

from omni_cache.runtime.contexts import Generation, Run
from omni_cache.runtime.counters import Tally
from omni_cache.strategies import Owner, Policy, Strategy


class _ThreadLoops(threading.local):
    """The loops of one thread that nobody has named; they end with it."""

    def __init__(self) -> None:
        self.loops: list[Generation] = []


class ModelState:
    """What the runtime knows of one model instance.

    Attributes:
        strategy: what its calls follow, where that is not for the compiled graph to say.
        owner: which transformer it is, where somebody has said.
        latest: the run that began last.
        runs: all runs that somebody still holds.
        expected_steps: the number of steps of coming generations, where it was announced.
        told: what the user has been warned of.
        tally: what its calls have compiled, read and copied.
    """

    def __init__(self) -> None:
        self.strategy: Strategy | None = None
        self.owner: Owner | None = None
        self.latest: Run | None = None
        self.runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self.expected_steps: int | None = None
        self.told: set[str] = set()
        self.tally = Tally()
        self._policies: dict[tuple[int, str | None], tuple[Strategy, Policy]] = {}
        self._thread = _ThreadLoops()

    def policy(self, default: Strategy | None, model_class: str | None) -> Policy:
        """What calls follow: the model's own strategy, else the one that its graph came with."""
        strategy = self.strategy or default
        assert strategy is not None  # without one nothing is guarded
        key = (id(strategy), model_class)
        if key not in self._policies:
            # With the strategy, which must live as long as its identity counts.
            self._policies[key] = strategy, strategy.policy(model_class)
        return self._policies[key][1]

    @property
    def model_class(self) -> str | None:
        """The class that owns the block loop; None before the first call or where it is unknown."""
        return next((name for _, name in self._policies), None)

    @property
    def inferred(self) -> list[Generation]:
        """The generations of this thread that nobody has named, the oldest first."""
        return self._thread.loops

    def open(self, current: Generation, over: Collection[Generation | None] = ()) -> None:
        """Take in a generation that nobody has named.

        Loops are over that are named in ``over``, that have had no call since the last one began,
        or whose caller has dropped what it had kept.
        """
        open_loops = self.inferred
        for each in list(open_loops):
            courses = list(each.run(self).courses.values())
            is_gone = all(course.conditioning.is_gone for course in courses)
            if each in over or not each.is_called or is_gone:
                each.release()
                open_loops.remove(each)
            each.is_called = False
        open_loops.append(current)

    def forget(self) -> None:
        """Free everything and forget all generations, those of other threads included."""
        for run in list(self.runs):
            for each in list(run.trajectories.values()):
                each.release()
            if run.generation is not None:
                run.generation.runs.pop(self, None)
        self.latest, self.expected_steps = None, None
        self._thread, self._policies = _ThreadLoops(), {}


_by_parameter: dict[int, ModelState] = {}
_lock = threading.Lock()


def state_of_parameter(parameter: Tensor) -> ModelState:
    """The state of the instance that owns a parameter; it lives as long as the parameter."""
    key = id(parameter)
    state = _by_parameter.get(key)
    if state is None:
        with _lock:
            state = _by_parameter.get(key)
            if state is None:
                state = _by_parameter[key] = ModelState()
                weakref.finalize(parameter, _by_parameter.pop, key, None)
    return state


def expected_state(module: nn.Module) -> ModelState:
    """The state that the first cached call of a module will find, whichever weight it looks by."""
    state = ModelState()
    for parameter in module.parameters():
        if _by_parameter.setdefault(id(parameter), state) is state:
            weakref.finalize(parameter, _by_parameter.pop, id(parameter), None)
    return state


def states_of_module(module: nn.Module) -> list[ModelState]:
    """The states that calls of a module have left, for bare use; empty if it never ran cached."""
    found = (_by_parameter.get(id(each)) for each in module.parameters())
    return list(dict.fromkeys(each for each in found if each is not None))
