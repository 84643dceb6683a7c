"""Which generation and which guidance branch a call belongs to.

    generation (contextvar, announced by a pipeline, or inferred)
      -> run: one model's part in it
        -> trajectory: one branch of it

A call is placed by, in this order: the contexts ``generation`` and ``branch``; what an enabled
pipeline announces (``scheduler.set_timesteps``, ``transformer.cache_context``); the timestep
argument: the same value again is the next branch of the same step, a value further along is the
next step, a value that jumps back is a new generation. A call that cannot be placed is computed.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from omni_cache.runtime.trajectory import Course, Progress, Trajectory
from omni_cache.strategies import Strategy
from omni_cache.strategies.base import is_count, require

MAX_BRANCHES = 16
"""Calls at one timestep that are taken for branches of one step; one more starts a generation."""


@dataclass(frozen=True)
class Branch:
    """The guidance branch that the current context names, and the step where it is known."""

    name: str
    step_index: int | None = None


_generation_ids = itertools.count()
_generation: ContextVar[Generation | None] = ContextVar("omni_cache_generation", default=None)
_recorder: ContextVar[list[Run] | None] = ContextVar("omni_cache_recorder", default=None)
_branch: ContextVar[Branch | None] = ContextVar("omni_cache_branch", default=None)


@contextmanager
def generation(num_inference_steps: int | None = None) -> Iterator[Generation]:
    """Mark one run of the denoising loop; what it cached is freed at its end.

    Threads and tasks that each enter their own generation never share state.

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


def in_generation() -> bool:
    """Whether a ``generation`` context is open."""
    return _generation.get() is not None


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


@contextmanager
def recording() -> Iterator[list[Run]]:
    """Collect every run that starts in this context, so that its records outlive it."""
    runs: list[Run] = []
    token = _recorder.set(runs)
    try:
        yield runs
    finally:
        _recorder.reset(token)


class Generation:
    """One run of the denoising loop, over all models that take part in it.

    Args:
        num_inference_steps: number of steps, None when nobody has said.
        experts: the models take turns within the loop (high-noise and low-noise expert), so that a
            branch's steps are counted over all of them.

    Raises:
        ValueError: ``num_inference_steps`` is no integer >= 1.
    """

    def __init__(self, num_inference_steps: int | None = None, experts: bool = False) -> None:
        known = num_inference_steps is None or is_count(num_inference_steps, 1)
        require(known, "num_inference_steps", num_inference_steps, "an integer >= 1 or None")
        self.num_inference_steps = num_inference_steps
        self._steps_given = num_inference_steps is not None
        self.experts = experts
        self.id = next(_generation_ids)
        self._runs: weakref.WeakKeyDictionary[ModelState, Run] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def run(self, state: ModelState) -> Run:
        """The part of a model in this generation."""
        with self._lock:
            run = self._runs.get(state)
            if run is None:
                run = self._runs[state] = Run(self)
                state.latest = run
                state.runs.add(run)
                recorder = _recorder.get()
                if recorder is not None:
                    recorder.append(run)
            return run

    def adopt(self, announced: Generation) -> None:
        """Learn from a generation that a pipeline announces within this one."""
        self.experts = announced.experts
        if not self._steps_given:
            self.num_inference_steps = announced.num_inference_steps

    def restart(self, state: ModelState) -> None:
        """Drop a model's part: its loop has started over."""
        with self._lock:
            run = self._runs.pop(state, None)
        if run is not None:
            run.release()

    def release(self) -> None:
        """Free the tensors of all trajectories."""
        for run in list(self._runs.values()):
            run.release()

    def finish(self, branch_name: str) -> None:
        """Free what models that take turns hold for a branch, when its last step is done."""
        if self.experts:
            for each in self._trajectories(branch_name):
                each.release()

    def steps_done(self, branch_name: str) -> int:
        """Calls of a branch so far over all models, where they take turns; else 0."""
        if not self.experts:
            return 0
        return max((each.step_index for each in self._trajectories(branch_name)), default=0)

    def _trajectories(self, branch_name: str) -> list[Trajectory]:
        runs = list(self._runs.values())
        return [run.trajectories[branch_name] for run in runs if branch_name in run.trajectories]


class Run:
    """One model's part in one generation: its trajectories, and how far the timestep has come."""

    def __init__(self, generation: Generation) -> None:
        self.generation_id = generation.id
        # Weak, so that dropping a generation frees its tensors at once, without a cycle collection.
        self._generation = weakref.ref(generation)
        self.trajectories: dict[str, Trajectory] = {}
        self.course = Course()
        self.step_index = 0
        self.position = -1
        self.branches = 1
        self.begins_a_step = True

    def trajectory(self, name: str) -> Trajectory:
        """The trajectory of a branch, made on its first call."""
        if name not in self.trajectories:
            generation = self._generation()
            done = generation.steps_done(name) if generation is not None else 0
            self.trajectories[name] = Trajectory(name, len(self.trajectories), done)
        return self.trajectories[name]

    def release(self) -> None:
        """Free the tensors of all trajectories."""
        for each in self.trajectories.values():
            each.release()

    def guess(
        self, inputs: Sequence[Tensor], schedulers: tuple[int | None, ...]
    ) -> Trajectory | None:
        """The likely trajectory of a call at an unknown timestep; None where there is none."""
        following = self.position + 1
        if following >= self.branches or schedulers != self.course.schedulers:
            following = 0
            if not self.course.direction and self.trajectories:
                first = self._first_branch(inputs)
                return None if first is None else list(self.trajectories.values())[first]
        return self.trajectories.get(_branch_name(following))

    def place(
        self, timestep: float, schedulers: tuple[int | None, ...], inputs: Sequence[Tensor]
    ) -> Trajectory | None:
        """The trajectory of a call at a timestep, or None where it starts a new generation."""
        progress = self.course.compare(timestep, schedulers)
        if progress is Progress.BACK:
            return None
        if progress is Progress.SAME:
            if self.position + 1 >= MAX_BRANCHES:
                return None
            self.position += 1
        else:
            if progress is Progress.ONWARD:
                if not self.course.direction:
                    self._review_first_step(inputs)
                self.step_index += 1
            self.branches, self.position = self.position + 1, 0
        self.branches = max(self.branches, self.position + 1)
        self.course.advance(timestep, schedulers)
        found = self.trajectory(_branch_name(self.position))
        if progress is Progress.START:
            self.step_index = found.step_index
        if found.conditioning.contradicts(inputs):
            return None
        if not found.conditioning.confirms(inputs):
            found.drop_residuals()
        found.skip_to(self.step_index)
        return found

    def _review_first_step(self, inputs: Sequence[Tensor]) -> None:
        """Forget those calls of step 0 that were the start of a loop that ended right there."""
        first = self._first_branch(inputs)
        if first is None:
            self.release()
            return
        remaining = list(self.trajectories.values())[first:]
        self.trajectories = {}
        for position, each in enumerate(remaining):
            each.branch, each.position = _branch_name(position), position
            self.trajectories[each.branch] = each
        self.position -= first

    def _first_branch(self, inputs: Sequence[Tensor]) -> int | None:
        """Which call of step 0 the first call of step 1 goes on with; None where that is unclear.

        It is the one that shares most inputs with it.
        """
        shared = [
            each.conditioning.shared(inputs) if each.steps else -1
            for each in self.trajectories.values()
        ]
        most = max(shared)
        return shared.index(most) if self.begins_a_step and shared.count(most) == 1 else None


def _branch_name(position: int) -> str:
    return f"branch {position}"


class ModelState:
    """What the runtime knows of one model instance: never shared with another instance."""

    def __init__(self) -> None:
        self.config: Strategy | None = None  # where it differs from what was compiled
        self.latest: Run | None = None
        self.runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self._thread = _ThreadPlace()

    def announce(self, current: Generation) -> None:
        """Put this thread into a generation, freeing what the one before had cached."""
        self._enter(current, announced=True)
        explicit = _generation.get()
        if explicit is not None:
            explicit.adopt(current)
            explicit.restart(self)

    def hear(self, schedulers: tuple[int | None, ...]) -> None:
        """Learn, before a call, how many steps the schedulers of its pipelines have made."""
        self._thread.schedulers = schedulers

    def forget(self) -> None:
        """Free everything and forget all generations, those of other threads included."""
        for run in list(self.runs):
            run.release()
        self.latest = None
        self._thread = _ThreadPlace()
        explicit = _generation.get()
        if explicit is not None:
            explicit.restart(self)

    def finish(self, trajectory: Trajectory) -> None:
        """Free what is held for a trajectory whose last step is done."""
        trajectory.release()
        current = self._announced()
        if current is not None:
            current.finish(trajectory.branch)

    def num_inference_steps(self) -> int | None:
        """The number of steps of the generation that this thread is in, if it is known."""
        current = self._announced() or self._thread.generation
        return None if current is None else current.num_inference_steps

    def named(self, inputs: Sequence[Tensor]) -> Trajectory | None:
        """The trajectory that contexts and announcements alone determine, without a timestep.

        Args:
            inputs: the call's tensors other than weights and timestep.
        """
        current, named = self._announced(), _branch.get()
        if named is None or (current is None and named.step_index is None):
            return None
        found = self._run().trajectory(named.name)
        if named.step_index is not None:
            if named.step_index < found.step_index:
                found = self._fresh().trajectory(named.name)
            found.skip_to(named.step_index)
        elif _generation.get() is None:
            if self._is_over(found) or found.conditioning.contradicts(inputs):
                # More calls than were announced, or other words: a loop of which nobody has told.
                self._enter(Generation())
                return None
            found.conditioning.saw(inputs)
        return found

    def guess(self, inputs: Sequence[Tensor]) -> Trajectory | None:
        """The likely trajectory of a call whose timestep is not known on the host yet."""
        current, named = self._announced() or self._thread.generation, _branch.get()
        if current is None:
            return None
        run = current.run(self)
        if named is None:
            return run.guess(inputs, self._thread.schedulers)
        return run.trajectories.get(named.name)

    def infer(self, timestep: float, inputs: Sequence[Tensor]) -> Trajectory:
        """The trajectory of a call from its timestep.

        Args:
            timestep: the timestep argument, its mean where it has several elements.
            inputs: the call's tensors other than weights and timestep.
        """
        named, schedulers = _branch.get(), self._thread.schedulers
        run = self._run()
        if named is not None:
            # A branch without a generation: its own timesteps tell where a generation starts.
            found = run.trajectory(named.name)
            progress = found.course.compare(timestep, schedulers)
            if progress in (Progress.SAME, Progress.BACK) or found.conditioning.contradicts(inputs):
                found = self._fresh().trajectory(named.name)
            elif not found.conditioning.confirms(inputs):
                found.drop_residuals()
            found.course.advance(timestep, schedulers)
        else:
            same_step = run.course.compare(timestep, schedulers) is Progress.SAME
            placed = run.place(timestep, schedulers, inputs)
            if placed is None:
                run = self._fresh()
                # Which branch the step after this one begins with is anybody's guess then.
                run.begins_a_step = not same_step
                placed = run.place(timestep, schedulers, inputs)
                assert placed is not None  # a fresh run takes any call
            found = placed
        found.conditioning.saw(inputs)
        return found

    def _is_over(self, trajectory: Trajectory) -> bool:
        total = self.num_inference_steps()
        return total is not None and trajectory.step_index >= total

    def _announced(self) -> Generation | None:
        """The generation that a context or a pipeline has announced, if one has."""
        explicit = _generation.get()
        if explicit is not None:
            return explicit
        return self._thread.generation if self._thread.announced else None

    def _run(self) -> Run:
        current = self._announced() or self._thread.generation
        return self._enter(Generation()) if current is None else current.run(self)

    def _fresh(self) -> Run:
        """A new run: of a new generation, or of the announced one, whose loop started over."""
        current = self._announced()
        if current is None:
            return self._enter(Generation())
        current.restart(self)
        return current.run(self)

    def _enter(self, current: Generation, announced: bool = False) -> Run:
        before = self._thread.generation
        if before is not None and before is not current:
            before.release()
        self._thread.generation, self._thread.announced = current, announced
        return current.run(self)


class _ThreadPlace(threading.local):
    """Where one thread stands in the course of generations, when no context says."""

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.announced = False
        self.schedulers: tuple[int | None, ...] = ()
