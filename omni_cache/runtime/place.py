"""Where a call lies: on which branch of which generation, and at which step.

In this order: contexts that the caller opens; a loop that a pipeline announces; the inputs that
stay, with the timestep. Order decides only between calls that nothing else tells apart, and then
the place is not known: a gate that measures nothing computes there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from omni_cache.runtime.contexts import Branch, Course, Generation, Run
from omni_cache.runtime.inference import Change, Inputs
from omni_cache.runtime.model_state import ModelState
from omni_cache.runtime.reading import Reading
from omni_cache.strategies import Schedule, Time

MAX_BRANCHES = 16
"""Calls at one step that are taken for its branches; any more have no place."""

UNKNOWN = "no timestep and no context"
CROWDED = f"more than {MAX_BRANCHES} calls at one step"
UNCLEAR = "nothing tells the calls apart"
REPLACED = "inputs changed"


class Loop(Protocol):
    """A denoising loop that somebody has announced, such as a pipeline by its scheduler.

    Attributes:
        generation: the one that is running.
        timesteps: all of its timesteps.
        training: the number of timesteps in training, of which one may be a share.
        schedule: what else is known of it.
    """

    generation: Generation
    timesteps: Reading
    training: float

    @property
    def schedule(self) -> Schedule:
        """Read when it is asked for."""

    def count(self, branch: str | None) -> int | None:
        """The step, where it is known without the timestep."""

    def locate(self, value: float | None, branch: str | None) -> tuple[Generation, int | None]:
        """The generation and the step of a call, from its timestep (None where that is unread)."""


class Called(NamedTuple):
    """A call: what it is told of its place, and what it brings.

    Attributes:
        generation: that somebody has named.
        branch: that somebody has named.
        loop: that somebody has announced.
        value: the timestep, None where the host does not know it.
        inputs: the others.
        computation: what is computed, up to sizes.
    """

    generation: Generation | None
    branch: Branch | None
    loop: Loop | None
    value: float | None
    inputs: Inputs
    computation: object

    @property
    def needs_value(self) -> bool:
        """Whether the step cannot be known without the timestep."""
        if self.loop is not None:
            return self.loop.count(None if self.branch is None else self.branch.name) is None
        return self.branch is None or (self.generation is None and self.branch.step_index is None)

    def generations(self, state: ModelState) -> list[Generation]:
        """Those that the call may belong to, the newest first."""
        if self.generation is not None:
            return [self.generation]
        return [self.loop.generation] if self.loop else state.inferred[::-1]


@dataclass
class Place:
    """Where a call lies.

    Attributes:
        run: one model's part in the generation.
        course: the branch.
        at: the step, and the timestep where the host knows it.
        called: the call.
        changed: the inputs that differ from the branch's last call.
        stale: why nothing that is held fits the call, None where it does.
        is_known: whether more than the order of the calls tells the place.
        opens: begins the generation, where the call is its first one, once it has ended well.
    """

    run: Run
    course: Course
    at: Time
    called: Called
    changed: frozenset[int] | None
    stale: str | None
    is_known: bool = True
    opens: Callable[[], None] | None = None
    is_committed: bool = False

    @property
    def stayed(self) -> list[Tensor]:
        """The inputs that have not changed at every call of the branch so far."""
        seen = self.course.conditioning.seen
        pairs = zip(self.called.inputs.tensors, seen, strict=False)
        return [tensor for tensor, each in pairs if not each.changes]

    def commit(self, output: Any) -> None:
        """Have the branch's next call come after this one. All regions of a call share a place."""
        if self.is_committed:
            return
        self.is_committed = True
        self.run.begin(self.course)
        if self.opens is not None:
            self.opens()
            self.opens = None
        course, generation, inputs = self.course, self.run.generation, self.called.inputs
        predicted = frozenset([each.shape for each in output if isinstance(each, Tensor)])
        course.conditioning = course.conditioning.after(inputs, self.changed, predicted)
        course.last, course.computation = self.at, self.called.computation
        course.replaced = course.replaced + 1 if self.stale == REPLACED else 0
        if generation is None:
            return
        if len(self.run.trajectories) > 1 or len(generation.runs) > 1:
            # What has missed a step cannot be reused any more.
            generation.release(before=self.at.index - 1)
        generation.is_called = True
        generation.lasts[course.name] = self.at
        if generation.follows is not None:
            generation.follows.lasts[course.name] = self.at
        if self.at.value is not None:
            generation.timeline.reach(self.at.value, self.at.index)


class _Candidate(NamedTuple):
    """A branch that a call may go on with, the step that it would be, and how the call differs."""

    run: Run
    course: Course
    step: int
    change: Change


def locate(state: ModelState, called: Called) -> Place | str:
    """Where a call lies; a word why it has no place."""
    generation, branch, loop, value, *_ = called
    index = None if branch is None else branch.step_index
    if loop is not None:
        # A pipeline's own count begins at 0 where its schedule is begun in the middle.
        announced, found = loop.locate(value, None if branch is None else branch.name)
        index = index if found is None else found
        if generation is None:
            generation = announced
        elif generation.follows is not announced:
            generation.restart(announced)
    if index is None and value is None and (branch is None or generation is None):
        return UNKNOWN
    if branch is None:
        return _by_inputs(state, generation, index, called)
    if generation is None:
        generation = _generation_of(state, branch.name, index, called)
    if generation is None:
        return _first_place(state, branch.name, index or 0, (), called)
    return _by_name(state, generation, branch, index, called)


def likely_place(state: ModelState, called: Called) -> Place | None:
    """Where a call lies if it is the next one of its branch; None where no branch is likely."""
    likely = []
    name = None if called.branch is None else called.branch.name
    for age, generation in enumerate(called.generations(state)):
        run = generation.run(state)
        courses = [run.courses.get(name)] if name is not None else list(run.courses.values())
        begun = [each for each in courses if each is not None and each.last is not None]
        latest = max((each.last.index for each in begun if each.last), default=0)
        for course in begun:
            assert course.last is not None
            change = course.conditioning.change(called.inputs)
            goes_on = _may_go_on(course, change, called) and course.last.index >= latest - 1
            if goes_on or name is not None:
                # Best those for which their inputs speak, then the one that is furthest behind.
                rank = course.conditioning.doubts(called.inputs), age, course.last.index
                likely.append((rank, run, course, change))
    if not likely:
        return None
    (*_, index), run, course, change = min(likely, key=itemgetter(0))
    return _at(run, course, index + 1, called, change)


def _by_name(
    state: ModelState, generation: Generation, branch: Branch, index: int | None, called: Called
) -> Place | str:
    """The place of a call whose branch has a name."""
    run, name, count = generation.run(state), branch.name, 1
    course = run.course(name)
    last = course.last or generation.lasts.get(name)
    if index is None:
        # Another model may have had the branch until now, and may have had this step.
        joins = course.last is None and last is not None and called.value == last.value
        index = 0 if last is None else last.index + (not joins or called.value is None)
    elif branch.step_index is not None and course.last is not None and index < course.last.index:
        return _anew(state, generation, name, index, called)
    while not course.is_before(index):
        if count == MAX_BRANCHES:
            return CROWDED
        # The name has been called for at this step: nothing tells the two apart.
        count += 1
        course = run.course(f"{name} {count}")
    place = _at(run, course, index, called)
    place.is_known = count == 1 and f"{name} 2" not in run.courses
    return place


def _generation_of(
    state: ModelState, name: str, index: int | None, called: Called
) -> Generation | None:
    """The generation of a branch that is named where no generation is: its own timesteps tell."""
    others = []
    for loop in reversed(state.inferred):
        course = loop.run(state).courses.get(name)
        if course is None:
            others.append(loop)
            continue
        is_next = course.last is not None and course.last.index < _step(loop, index, called)
        if is_next and course.conditioning.change(called.inputs).fits:
            return loop
    return others[0] if others else None


def _by_inputs(
    state: ModelState, told: Generation | None, index: int | None, called: Called
) -> Place | str:
    """The place of a call whose branch nobody names: it goes on with the inputs that stay.

    Args:
        told: the generation, None to find one by the inputs too.
        index: the step, None to find it by the timestep.
    """
    loops = state.inferred[::-1] if told is None else [told]
    ahead: list[_Candidate] = []
    behind: list[_Candidate] = []
    for loop in loops:
        run, step = loop.run(state), _step(loop, index, called)
        for course in list(run.courses.values()):
            change = course.conditioning.change(called.inputs)
            if _may_go_on(course, change, called):
                is_back = step < (0 if course.last is None else course.last.index)
                (behind if is_back else ahead).append(_Candidate(run, course, step, change))
    likely, over = _least_changed(ahead), _least_changed(behind)
    for run, course, step, change in likely:
        if course.is_before(step):
            place = _at(run, course, step, called, change)
            something_stays = len(change.inputs or ()) < len(called.inputs.tensors)
            place.is_known = len(likely) == 1 and (told is not None or something_stays)
            if len(likely) > 1 and course.conditioning.calls == 1:
                place.stale = UNCLEAR
            return place
    if told is not None and (over or _step(told, index, called) < 0):
        return _anew(state, told, "branch 0", index or 0, called)
    if loops:
        run, step, latest = (
            loops[0].run(state),
            _step(loops[0], index, called),
            loops[0].timeline.latest,
        )
        courses = list(run.courses.values())
        waiting = [each for each in courses if each.is_before(step) and not (told and likely)]
        if told is None:
            # Of a loop that goes on, only a branch that is known by nothing yet: latents and more
            # change at its second call.
            waiting = [each for each in waiting if each.conditioning.calls == 1 and step > latest]
        if waiting:
            place = _at(run, waiting[0], step, called)
            place.is_known = told is not None and len(courses) == 1
            return place
        if told is not None or 0 <= step == latest:
            if len(courses) >= MAX_BRANCHES:
                return CROWDED
            return _at(run, run.course(f"branch {len(courses)}"), step, called)
    # The same inputs at an earlier step: that loop is over.
    ended = [each.run.generation for each in over]
    return _first_place(state, "branch 0", 0, ended, called)


def _first_place(
    state: ModelState,
    name: str,
    index: int,
    over: Sequence[Generation | None],
    called: Called,
) -> Place:
    """The first place of a generation that nobody has named, and that may end others."""
    generation = Generation(state.expected_steps)
    place = _at(run := generation.run(state), run.course(name), index, called)
    place.opens = partial(state.open, generation, over)
    return place


def _anew(
    state: ModelState, generation: Generation, name: str, index: int, called: Called
) -> Place:
    """The first place of a loop that starts over within its generation."""
    run = Run(generation)
    place = _at(run, run.course(name), index, called)
    place.opens = partial(generation.restart, first=(state, run))
    return place


def _step(loop: Generation, index: int | None, called: Called) -> int:
    """The step of a call in a loop; -1 where it would be one that is over."""
    return loop.timeline.index(called.value) if index is None else index


def _at(
    run: Run, course: Course, index: int, called: Called, change: Change | None = None
) -> Place:
    """A place, with what its branch's last call says of this one."""
    stale = None
    if course.last is not None:
        change = change or course.conditioning.change(called.inputs)
        if not change.fits:
            stale = REPLACED
    changed = None if change is None else change.inputs
    return Place(run, course, Time(index, called.value), called, changed, stale)


def _may_go_on(course: Course, change: Change, called: Called) -> bool:
    return change.fits and course.computation == called.computation


def _least_changed(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """All those for which the fewest inputs have changed."""
    least = min([len(each.change.inputs or ()) for each in candidates], default=0)
    return [each for each in candidates if len(each.change.inputs or ()) == least]
