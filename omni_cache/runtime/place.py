"""Where a call lies: on which branch of which generation, and at which step.

In this order: contexts that the caller opens; a loop that a pipeline announces; the inputs that
stay, with the timestep. Order decides only between calls that nothing else tells apart, and then
the place is not known: a gate that measures nothing computes there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from omni_cache.runtime.contexts import Branch, Course, Generation, Run
from omni_cache.runtime.inference import Inputs, known_by_nothing
from omni_cache.runtime.model_state import ModelState
from omni_cache.strategies import Time

MAX_BRANCHES = 16
"""Calls at one step that are taken for its branches; any more have no place."""


class Loop(Protocol):
    """A denoising loop that somebody has announced, such as a pipeline by its scheduler.

    Attributes:
        generation: the one that is running.
    """

    generation: Generation

    @property
    def counts(self) -> bool:
        """Whether it knows the step of a call without its timestep."""

    def locate(self, value: float | None, branch: str | None) -> tuple[Generation, int | None]:
        """The generation and the step of a call, from its timestep (None where that is unread)."""


class Told(NamedTuple):
    """What a call is told of its place before anybody looks at its timestep and inputs."""

    generation: Generation | None
    branch: Branch | None
    loop: Loop | None

    @property
    def is_enough(self) -> bool:
        """Whether the step is known without the timestep."""
        if self.loop is not None:
            return self.loop.counts
        named = self.branch is not None and self.generation is not None
        return named or (self.branch is not None and self.branch.step_index is not None)


@dataclass
class Place:
    """Where a call lies.

    Attributes:
        run: one model's part in the generation.
        course: the branch.
        at: the step, and the timestep where the host knows it.
        stale: why nothing that is held fits the call, None where it does.
        is_known: whether more than the order of the calls tells the place.
    """

    run: Run
    course: Course
    at: Time
    inputs: Inputs
    changed: frozenset[int] | None
    computation: object
    stale: str | None = None
    is_known: bool = True

    is_committed: bool = False

    def is_same(self, other: Place) -> bool:
        """Whether a call lies where it was expected."""
        return self.course is other.course and self.at.index == other.at.index

    def commit(self, output: Any) -> None:
        """Have the branch's next call come after this one. All regions of a call share a place."""
        if self.is_committed:
            return
        self.is_committed = True
        course, generation = self.course, self.run.generation
        predicted = frozenset(each.shape for each in output if isinstance(each, Tensor))
        course.conditioning = course.conditioning.after(self.inputs, self.changed, predicted)
        course.last, course.computation = self.at, self.computation
        if generation is None:
            return
        generation.release_left_behind(self.at.index)
        generation.is_called = True
        generation.lasts[course.name] = self.at
        if generation.follows is not None:
            generation.follows.lasts[course.name] = self.at
        if self.at.value is not None:
            generation.timeline.reach(self.at.value, self.at.index)


class Called(NamedTuple):
    """What a call brings: its timestep if the host knows it, its inputs, what is computed."""

    value: float | None
    inputs: Inputs
    computation: object


UNKNOWN = "no timestep and no context"
CROWDED = f"more than {MAX_BRANCHES} calls at one step"


def locate(state: ModelState, told: Told, called: Called) -> Place | str:
    """Where a call lies; a word why it has no place."""
    generation, branch, loop = told
    index = None if branch is None else branch.step_index
    if loop is not None:
        # A pipeline's own count begins at 0 where its schedule is begun in the middle.
        announced, found = loop.locate(called.value, None if branch is None else branch.name)
        index = index if found is None else found
        if generation is None:
            generation = announced
        elif generation.follows is not announced:
            generation.restart(announced)
    if branch is not None:
        if generation is None:
            generation = _generation_of(state, branch, index, called)
        return UNKNOWN if generation is None else _named(state, generation, branch, index, called)
    if generation is not None:
        return _unnamed(state, generation, index, called)
    return UNKNOWN if called.value is None else _inferred(state, called)


def open_runs(state: ModelState, told: Told) -> list[Run]:
    """The runs that a call may belong to, the newest first."""
    if told.generation is not None:
        generations = [told.generation]
    else:
        generations = [told.loop.generation] if told.loop else state.inferred[::-1]
    return [each.run(state) for each in generations]


def likely_place(state: ModelState, told: Told, called: Called) -> Place | None:
    """Where a call lies if it is the next one of its branch; None where no branch is likely."""
    likely: list[tuple[Any, Run, Course, int]] = []
    for age, run in enumerate(open_runs(state, told)):
        courses = list(run.courses.values())
        named = None if told.branch is None else told.branch.name
        own = [each for each in courses if each.name == named]
        fits = own if named is not None else _changes(courses, called)
        latest = max((each.last.index for each in courses if each.last is not None), default=0)
        for each in fits:
            if each.last is not None and (named is not None or each.last.index >= latest - 1):
                index, doubts = each.last.index, each.conditioning.doubts(called.inputs)
                likely.append(((doubts, age, index), run, each, index))
    if not likely:
        return None
    # Of those for which their inputs speak best, the one that is furthest behind.
    _, run, course, index = min(likely, key=itemgetter(0))
    return _at(run, course, Time(index + 1, called.value), called)


def _named(
    state: ModelState, generation: Generation, branch: Branch, index: int | None, called: Called
) -> Place:
    """The place of a call whose branch has a name."""
    course = generation.run(state).course(branch.name)
    if course.last is None:
        index = generation.newcomer(branch.name, called.value) if index is None else index
    elif index is None:
        index = course.last.index + 1
    elif branch.step_index is not None and index < course.last.index:
        generation.restart()
        course = generation.run(state).course(branch.name)
    run, count = generation.run(state), 1
    while course.last is not None and course.last.index >= index:
        # The name has been called for at this step: nothing tells the two apart.
        count += 1
        course = run.course(f"{branch.name} {count}")
    place = _at(run, course, Time(index, called.value), called)
    place.is_known = count == 1 and f"{branch.name} 2" not in run.courses
    return place


def _unnamed(
    state: ModelState, generation: Generation, index: int | None, called: Called
) -> Place | str:
    """The place of a call in a known generation, whose branch is known by its inputs."""
    if index is None:
        if called.value is None:
            return UNKNOWN
        index = generation.timeline.index(called.value)
        if index is None:
            generation.restart()
            index = 0
    run, at = generation.run(state), Time(index, called.value)
    courses = list(run.courses.values())
    likely = _likely(courses, called)
    open_ones = [each for each in likely or courses if _before(each, index)]
    if not open_ones and any(each.last and each.last.index > index for each in likely):
        generation.restart()  # the same inputs at an earlier step
        return _unnamed(state, generation, index, called)
    if not open_ones:
        if len(courses) >= MAX_BRANCHES:
            return CROWDED
        place = _at(run, run.course(f"branch {len(courses)}"), at, called)
    else:
        place = _at(run, open_ones[0], at, called)
    place.is_known = len(likely) == 1 or len(run.courses) == 1
    return _unless_unclear(place, likely)


def _inferred(state: ModelState, called: Called) -> Place | str:
    """The place of a call of which nobody has told anything."""
    assert called.value is not None
    steps: dict[Course, tuple[Generation, int]] = {}
    gone_by: dict[Course, Generation] = {}
    for loop in reversed(state.inferred):
        index = loop.timeline.index(called.value)
        for course in loop.run(state).courses.values():
            if index is None or (course.last is not None and course.last.index > index):
                gone_by[course] = loop
            else:
                steps[course] = loop, index
    likely = _likely(steps, called)
    for course in likely:
        loop, index = steps[course]
        if _before(course, index):
            place = _at(loop.run(state), course, Time(index, called.value), called)
            nothing_stays = known_by_nothing(called.inputs, place.changed)
            place.is_known = len(likely) == 1 and not nothing_stays
            return _unless_unclear(place, likely)
    newest = state.inferred[-1] if state.inferred else None
    index = newest.timeline.index(called.value) if newest is not None else None
    if newest is not None and index is not None and index >= newest.timeline.latest:
        run = newest.run(state)
        courses = list(run.courses.values())
        second = [each for each in courses if each.conditioning.calls == 1 and _before(each, index)]
        if second and index > newest.timeline.latest:
            # The second call of a branch that is known by nothing yet: latents and more change.
            place = _at(run, second[0], Time(index, called.value), called)
            place.is_known = False
            return place
        if index == newest.timeline.latest:
            if len(courses) >= MAX_BRANCHES:
                return CROWDED
            course = run.course(f"branch {len(courses)}")
            return _at(run, course, Time(index, called.value), called)
    # The same inputs at an earlier step: that loop is over.
    over = {gone_by[course] for course in _likely(gone_by, called)}
    run = state.begin(over).run(state)
    return _at(run, run.course("branch 0"), Time(0, called.value), called)


def _generation_of(
    state: ModelState, branch: Branch, index: int | None, called: Called
) -> Generation | None:
    """The generation of a branch that is named where no generation is: its own timesteps tell."""
    for loop in reversed(state.inferred):
        course = loop.run(state).courses.get(branch.name)
        if course is None or course.last is None:
            continue
        allowed = course.conditioning.allows(
            course.conditioning.changed(called.inputs), called.inputs
        )
        step = index
        if step is None and called.value is not None:
            step = loop.timeline.index(called.value)
        if allowed and step is not None and course.last.index < step:
            return loop
    if index is None and called.value is None:
        return None
    for loop in reversed(state.inferred):
        if branch.name not in loop.run(state).courses:
            return loop
    return state.begin()


def _at(run: Run, course: Course, at: Time, called: Called) -> Place:
    """A place, with what its branch's last call says of this one."""
    changed, stale = None, None
    if course.last is not None:
        changed = course.conditioning.changed(called.inputs)
        if not course.conditioning.allows(changed, called.inputs):
            stale = "inputs changed"
        elif at.index != course.last.index + 1:
            stale = "a step was left out"
    return Place(run, course, at, called.inputs, changed, called.computation, stale)


def _unless_unclear(place: Place, likely: Sequence[Course]) -> Place:
    """A place that is stale where a second call may be that of several branches."""
    if len(likely) > 1 and place.course.conditioning.calls == 1:
        place.stale = "nothing tells the calls apart"
    return place


def _before(course: Course, index: int) -> bool:
    return course.last is None or course.last.index < index


def _likely(courses: Iterable[Course], called: Called) -> Sequence[Course]:
    """The branches that a call may go on with, as far as its inputs tell: all that do so best."""
    changes = _changes(courses, called)
    fewest = min(changes.values(), default=0)
    return [each for each, count in changes.items() if count == fewest]


def _changes(courses: Iterable[Course], called: Called) -> dict[Course, int]:
    """The branches that a call may go on with, and how many inputs have changed for each."""
    changes: dict[Course, int] = {}
    for each in courses:
        changed = each.conditioning.changed(called.inputs)
        same = each.computation == called.computation
        if changed is not None and same and each.conditioning.allows(changed, called.inputs):
            changes[each] = len(changed)
    return changes
