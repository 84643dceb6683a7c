"""Generations, their branches, and the contexts in which a caller names them.

generation -> run: one model's part in it -> course: one guidance branch of it
-> trajectories: what its regions keep for a branch
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from omni_cache.runtime.inference import Conditioning
from omni_cache.runtime.trajectory import Trajectory
from omni_cache.strategies import Time
from omni_cache.strategies.base import is_count, require

Region = Any
"""What tells the guarded regions of a model apart; compared and hashed, never looked into."""


@dataclass(frozen=True)
class Branch:
    """The guidance branch that the current context names, and the step where it is known."""

    name: str
    step_index: int | None = None


class Observed(NamedTuple):
    """A computed step, as observers see it. ``generation`` numbers the generations."""

    run: Run
    generation: int
    branch: str
    at: Time
    signal: Tensor | None
    residuals: tuple[Tensor, ...]
    output: Tensor


Observer = Callable[[Observed], None]

_numbers = itertools.count()
_generation: ContextVar[Generation | None] = ContextVar("omni_cache_generation", default=None)
_branch: ContextVar[Branch | None] = ContextVar("omni_cache_branch", default=None)
_observer: ContextVar[Observer | None] = ContextVar("omni_cache_observer", default=None)


@contextmanager
def generation(num_inference_steps: int | None = None) -> Iterator[Generation]:
    """Mark one run of the denoising loop; what it cached is freed at its end.

    Threads and tasks that each enter their own generation never share state. Models that take turns
    within one (high-noise and low-noise experts) count its steps together.

    Args:
        num_inference_steps: number of steps, for strategies that schedule by it.

    Raises:
        ValueError: ``num_inference_steps`` is no integer >= 1.
    """
    current = Generation(num_inference_steps)
    token = _generation.set(current)
    outer_branch = _branch.set(None)
    try:
        yield current
    finally:
        _branch.reset(outer_branch)
        _generation.reset(token)
        current.release()


def named_generation() -> Generation | None:
    """The generation whose context is open."""
    return _generation.get()


@contextmanager
def branch(name: str, step_index: int | None = None) -> Iterator[None]:
    """Name the guidance branch that the model is called for: ``"cond"``, ``"uncond"``, ...

    Args:
        name: the branch's name.
        step_index: the step of the denoising loop, from 0, where the caller knows it.

    Raises:
        ValueError: the name is empty or the step index negative.
    """
    require(isinstance(name, str) and name != "", "name", name, "a non-empty string")
    known = step_index is None or is_count(step_index, 0)
    require(known, "step_index", step_index, "an integer >= 0 or None")
    token = _branch.set(Branch(name, step_index))
    try:
        yield
    finally:
        _branch.reset(token)


def named_branch() -> Branch | None:
    """The branch whose context is open."""
    return _branch.get()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Show every computed step of this context to an observer, after it has run."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def current_observer() -> Observer | None:
    """Who wants to see computed steps."""
    return _observer.get()


class Timeline:
    """The timesteps of a loop, in the order in which they came first.

    Whether they fall or rise shows in the first change. A timestep against that is back.
    """

    def __init__(self) -> None:
        self._indexes: dict[float, int] = {}
        self._rises: bool | None = None

    def index(self, value: float) -> int | None:
        """The step at a timestep, a new one where it lies further along; None where it is back."""
        if value in self._indexes or not self._indexes:
            return self._indexes.get(value, 0)
        rises = value > next(reversed(self._indexes))
        return len(self._indexes) if self._rises in (None, rises) else None

    def reach(self, value: float, index: int) -> None:
        """Move on to a timestep."""
        if value not in self._indexes:
            if self._indexes:
                self._rises = value > next(reversed(self._indexes))
            self._indexes[value] = index

    @property
    def latest(self) -> int:
        """The step at the timestep that came last."""
        return self._indexes[next(reversed(self._indexes))] if self._indexes else -1


@dataclass(eq=False)
class Course:
    """One guidance branch of a run: how far it has come, and by what it is known."""

    name: str
    position: int
    last: Time | None = None
    conditioning: Conditioning = field(default_factory=Conditioning)
    computation: object = None


class Generation:
    """One run of the denoising loop, over all models that take part in it.

    Args:
        num_inference_steps: number of steps, None when nobody has said.

    Raises:
        ValueError: ``num_inference_steps`` is no integer >= 1.
    """

    def __init__(self, num_inference_steps: int | None = None) -> None:
        known = num_inference_steps is None or is_count(num_inference_steps, 1)
        require(known, "num_inference_steps", num_inference_steps, "an integer >= 1 or None")
        self.num_inference_steps = num_inference_steps
        self.number = next(_numbers)
        self.timeline = Timeline()
        self.lasts: dict[str, Time] = {}
        self.follows: Generation | None = None
        self.is_called = False
        self._runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def run(self, model: Any) -> Run:
        """The part of a model in this generation."""
        with self._lock:
            if model not in self._runs:
                self._runs[model] = model.latest = Run(self)
                model.runs.add(self._runs[model])
            return self._runs[model]

    def restart(self, follows: Generation | None = None) -> None:
        """Begin anew: the loop within this generation has started over."""
        with self._lock:
            self.release()
            self._runs.clear()
            self.timeline, self.lasts = Timeline(), {}
            if follows is not None:
                self.follows = follows
                self.num_inference_steps = self.num_inference_steps or follows.num_inference_steps

    def drop(self, model: Any) -> None:
        """Forget a model's part."""
        with self._lock:
            self._runs.pop(model, None)

    def newcomer(self, branch_name: str, value: float | None) -> int:
        """The step of a model's first call for a branch, which another may have had before it."""
        last = self.lasts.get(branch_name)
        if last is None:
            return 0
        joins = value is not None and value == last.value
        return last.index if joins else last.index + 1

    def release(self) -> None:
        """Free the tensors of all trajectories."""
        for run in list(self._runs.values()):
            run.release()

    def release_left_behind(self, index: int) -> None:
        """Free what branches hold that have missed a step, and so cannot reuse it any more."""
        for run in list(self._runs.values()):
            for each in list(run.trajectories.values()):
                if each.last is not None and each.last.index < index - 1:
                    each.release()


class Run:
    """One model's part in one generation."""

    def __init__(self, generation: Generation) -> None:
        # Weak, so that dropping a generation frees its tensors at once, without a cycle collection.
        self._generation = weakref.ref(generation)
        self._lock = threading.Lock()
        self.courses: dict[str, Course] = {}
        self.trajectories: dict[tuple[str, Region], Trajectory] = {}

    @property
    def generation(self) -> Generation | None:
        """The generation, as long as somebody is in it."""
        return self._generation()

    def course(self, name: str) -> Course:
        """The course of a branch, made on its first call."""
        with self._lock:
            return self.courses.setdefault(name, Course(name, len(self.courses)))

    @property
    def is_gone(self) -> bool:
        """Whether no branch can be gone on with by the objects that its caller had kept."""
        return all(each.conditioning.is_gone for each in self.courses.values())

    def release(self) -> None:
        """Free the tensors of all trajectories."""
        for each in list(self.trajectories.values()):
            each.release()
