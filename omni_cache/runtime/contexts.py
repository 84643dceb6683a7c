"""Generations, their branches, and the contexts in which a caller names them.

generation -> run: one model's part in it -> course: one guidance branch of it
-> trajectories: what its regions keep for a branch
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from omni_cache.passes.storage import restore
from omni_cache.runtime.inference import NEW, Conditioning
from omni_cache.runtime.trajectory import Action, Trajectory
from omni_cache.strategies import Guard, Owner, Policy, Strategy, Time, make_strategy
from omni_cache.strategies.base import is_count, require
from omni_cache.strategies.uncached import Uncached

Region = Any
"""What tells the guarded regions of a model apart; compared and hashed, never looked into."""


class Branch(NamedTuple):
    """The guidance branch that the current context names, and the step where it is known."""

    name: str
    step_index: int | None = None
    timestep: float | None = None


class Observed(NamedTuple):
    """A call of one region, as observers see it once it has ended well.

    Its tensors are the call's own: what an observer keeps, it copies, since a caller may write into
    results and a compiler into the rest.

    Attributes:
        run: the model's part in the generation.
        generation: the number of the generation.
        region: the region.
        branch: the guidance branch.
        at: the step.
        action: what ran of the model, or was recalled.
        signal: what the strategy compares, None where it compares nothing.
        stored: residuals of a computed step as they lie in memory; none of another, or of a call
            that has none.
        entered: partners of a computed step, as they are kept, where reused ones weigh them.
        finite: bool tensor, whether they all were finite; None where nothing was computed.
        result: what the graph returns, flat.
    """

    run: Run
    generation: int
    region: Region
    branch: str
    at: Time
    action: Action
    signal: Tensor | None
    stored: tuple[Tensor, ...]
    entered: tuple[Tensor, ...]
    finite: Tensor | None
    result: Sequence[Any]

    @property
    def computed(self) -> bool:
        """Whether the block loop ran, or was recalled."""
        return self.action == "computed"

    @property
    def residuals(self) -> tuple[Tensor, ...]:
        """The residuals as numbers."""
        return restore(self.stored)

    @property
    def output(self) -> Tensor:
        """The first tensor of the result."""
        return next(each for each in self.result if isinstance(each, Tensor))


class Observer(Protocol):
    """Who is shown the calls of a context.

    One that has a method ``recall(region, branch: str, at: Time) -> Computed | None`` is asked for
    what a computed step makes, and spares the model's blocks and all behind them where it knows.
    What it returns is kept and handed to the caller as if the model had made it: new tensors, where
    the model would have made them.
    """

    def __call__(self, step: Observed, /) -> None:
        """Look at a call."""


_numbers = itertools.count()
# What the contexts below have opened.
named_generation: ContextVar[Generation | None] = ContextVar("generation", default=None)
named_branch: ContextVar[Branch | None] = ContextVar("branch", default=None)
current_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def generation(
    num_inference_steps: int | None = None,
    cache: Any = None,
    timesteps: Iterable[float] | Tensor | None = None,
    **flags: Any,
) -> Iterator[Generation]:
    """Mark one run of the denoising loop; what it cached is freed at its end.

    Threads and tasks that each enter their own generation never share state. Models that take turns
    within one (high-noise and low-noise experts) count its steps together.

    Args:
        num_inference_steps: number of steps, for strategies that schedule by it.
        cache: what decides and forecasts in this generation, in place of what the models were
            compiled or enabled with: a strategy's name, a strategy object, or ``"none"`` to compute
            every step. Nothing is compiled for it. Where ranks compute together, it has to be the
            same on all of them.
        timesteps: all timesteps that models will be called with, as they are given to them, for
            ``hoist="modulations"``. A tensor on a device is read.
        flags: fields of the strategy.

    Raises:
        ValueError: ``num_inference_steps`` is no integer >= 1, ``timesteps`` are no numbers, or a
            name, a flag or its value is not allowed. The first call of a model raises it if what is
            compiled cannot serve the strategy, because that has other blocks that always run,
            another signal, or a forecast that weighs more residuals.
    """
    require(cache is not None or not flags, "cache", cache, "given where there are flags")
    strategy = None
    if cache is not None:
        strategy = make_strategy(cache, flags) or Uncached()
    is_list = timesteps is None or isinstance(timesteps, Iterable)
    require(is_list, "timesteps", timesteps, "numbers, or a tensor of them")
    listed = timesteps.flatten().tolist() if isinstance(timesteps, Tensor) else timesteps
    current = Generation(num_inference_steps, strategy, () if listed is None else tuple(listed))
    token = named_generation.set(current)
    outer_branch = named_branch.set(None)
    try:
        yield current
    finally:
        named_branch.reset(outer_branch)
        named_generation.reset(token)
        current.release()


@contextmanager
def branch(
    name: str, step_index: int | None = None, timestep: float | None = None
) -> Iterator[None]:
    """Name the guidance branch that the model is called for: ``"cond"``, ``"uncond"``, ...

    Args:
        name: the branch's name.
        step_index: the step of the denoising loop, from 0, where the caller knows it.
        timestep: the timestep or sigma, where it is another one than the model is given; it is then
            not read from the device. Of NaN every distance that depends on it is NaN.

    Raises:
        ValueError: the name is empty, the step index negative or the timestep no number.
    """
    require(isinstance(name, str) and name != "", "name", name, "a non-empty string")
    known = step_index is None or is_count(step_index, 0)
    require(known, "step_index", step_index, "an integer >= 0 or None")
    known = timestep is None or isinstance(timestep, Real)
    require(known, "timestep", timestep, "a number or None")
    token = named_branch.set(Branch(name, step_index, timestep))
    try:
        yield
    finally:
        named_branch.reset(token)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Show every call of this context that has a place to an observer, after it has run."""
    token = current_observer.set(observer)
    try:
        yield
    finally:
        current_observer.reset(token)


class Timeline:
    """The timesteps of a loop, in the order in which they came first.

    Whether they fall or rise shows in the first change. A timestep against that is back.
    """

    def __init__(self) -> None:
        self._indexes: dict[float, int] = {}
        self._last, self.latest = 0.0, -1
        self._rises: bool | None = None

    def index(self, value: float | None) -> int:
        """The step at a timestep, a new one where it lies further along; -1 where it is back."""
        if value is None:
            return -1
        if value in self._indexes or not self._indexes:
            return self._indexes.get(value, 0)
        return len(self._indexes) if self._rises in (None, value > self._last) else -1

    def reach(self, value: float, index: int) -> None:
        """Move on to a timestep, unless it has come before."""
        if value not in self._indexes:
            self._rises = value > self._last if self._indexes else None
            self._indexes[value] = self.latest = index
            self._last = value


@dataclass(eq=False)
class Course:
    """One guidance branch of a run: how far it has come, and by what it is known.

    ``replaced`` counts the calls in a row whose conditioning differed from the call before.
    """

    name: str
    position: int
    last: Time | None = None
    conditioning: Conditioning = NEW
    computation: object = None
    replaced: int = 0

    def is_before(self, index: int) -> bool:
        """Whether the branch has yet to reach a step."""
        return self.last is None or self.last.index < index


class Generation:
    """One run of the denoising loop, over all models that take part in it.

    ``lasts`` has the last step of each branch over all models, and ``follows`` is the generation of
    an announced loop that this one, named by its caller, runs in. ``strategy`` is what its calls
    follow, None where that is for the models to say. ``timesteps`` are those that models will be
    called with, none where nobody has said.

    Raises:
        ValueError: ``num_inference_steps`` (None when nobody has said) is no integer >= 1, or
            ``timesteps`` are no numbers.
    """

    def __init__(
        self,
        num_inference_steps: int | None = None,
        strategy: Strategy | None = None,
        timesteps: Sequence[float] = (),
    ) -> None:
        known = num_inference_steps is None or is_count(num_inference_steps, 1)
        require(known, "num_inference_steps", num_inference_steps, "an integer >= 1 or None")
        known = all(isinstance(each, Real) for each in timesteps)
        require(known, "timesteps", timesteps, "numbers")
        self.num_inference_steps = num_inference_steps
        self.strategy = strategy
        self.timesteps = timesteps
        self.number = next(_numbers)
        self.timeline = Timeline()
        self.lasts: dict[str, Time] = {}
        self.follows: Generation | None = None
        self.is_called = False
        self.runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
        self._policies: dict[tuple[Any, ...], Policy] = {}
        self._lock = threading.Lock()

    def policy(
        self,
        guard: Guard | None,
        model_class: str | None = None,
        signal: str | None = None,
        owner: Owner | None = None,
    ) -> Policy | None:
        """What calls of a graph follow; None where that is for the model to say.

        Args:
            guard: what the graph was compiled for, None for no cache.
            model_class: name of the model's class.
            signal: the signal that a flag has named.
            owner: the transformer, where it is known.

        Raises:
            ValueError: the graph cannot serve the generation's strategy, or the strategy is for
                another model.
        """
        strategy = self.strategy
        if strategy is None:
            return None
        key = guard, model_class, signal, owner
        if key not in self._policies:
            is_within = guard is not None and guard.within is not None
            wanted = strategy.guard_within() if is_within else strategy.guard()
            if guard is not None:
                lacking = guard.lacks(wanted, model_class, signal)
            else:
                lacking = "a cache, where it has none" if wanted.depth > 0 else None
            if lacking is not None:
                raise ValueError(
                    f"cache={strategy.name!r} is not possible in this generation, because "
                    f"{model_class or 'the model'} was compiled for something else: it needs "
                    f"{lacking}. Pass cache={strategy.name!r} with these flags to "
                    "omni_cache.enable or torch.compile"
                )
            own = strategy if owner is None else strategy.for_transformer(owner)
            self._policies[key] = own.policy(model_class)
        return self._policies[key]

    def run(self, model: Any) -> Run:
        """The part of a model in this generation."""
        run = self.runs.get(model)
        if run is None:
            with self._lock:
                run = self.runs.get(model)
                if run is None:
                    run = self.runs[model] = Run(self)
                    model.runs.add(run)
        return run

    def restart(
        self, follows: Generation | None = None, first: tuple[Any, Run] | None = None
    ) -> None:
        """Begin anew: the loop within this generation has started over.

        Args:
            follows: the generation of the announced loop that it now runs in.
            first: the model that is called first, and its part.
        """
        with self._lock:
            self.release()
            self.runs.clear()
            self.timeline, self.lasts = Timeline(), {}
            if follows is not None:
                self.follows = follows
                self.num_inference_steps = self.num_inference_steps or follows.num_inference_steps
            if first is not None:
                model, self.runs[model] = first
                model.runs.add(first[1])

    def release(self, before: float = float("inf")) -> None:
        """Free the tensors of trajectories: of all, or of those whose last step is earlier."""
        for run in list(self.runs.values()):
            for each in list(run.trajectories.values()):
                if each.last is None or each.last.index < before:
                    each.release()


class Run:
    """One model's part in one generation.

    Attributes:
        courses: the branches that have had a call which ended well, by name.
        trajectories: what regions keep for branches.
        moments: the timesteps that have come, where the host knows them and somebody asks.
        before: those of the run before.
    """

    def __init__(self, generation: Generation) -> None:
        # Weak, so that dropping a generation frees its tensors at once, without a cycle collection.
        self._generation = weakref.ref(generation)
        self._lock = threading.Lock()
        self._asked_for: dict[str, Course] = {}
        self.courses: dict[str, Course] = {}
        self.trajectories: dict[tuple[str, Region], Trajectory] = {}
        self.moments: dict[float, None] = {}
        self.before: Sequence[float] = ()

    @property
    def generation(self) -> Generation | None:
        """The generation, as long as somebody is in it."""
        return self._generation()

    def course(self, name: str) -> Course:
        """The course of a branch, made when it is asked for first."""
        course = self._asked_for.get(name)
        if course is None:
            with self._lock:
                course = self._asked_for.setdefault(name, Course(name, len(self._asked_for)))
        return course

    def begin(self, course: Course) -> None:
        """Count a branch among those of the run."""
        self.courses[course.name] = course
