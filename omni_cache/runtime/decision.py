"""One call of one region: decide on it, and commit what it leaves.

Deciding changes nothing, so that a call that fails leaves its trajectory as it was. It costs at
most one read from the device: what the gate measures and all that the host wants to know besides
(the timestep, whether residuals are finite, fingerprints of inputs) comes in one copy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_cache.kernels import number_dtype
from omni_cache.lowering.deciding import Decided, Standing, Within
from omni_cache.lowering.program import Computed
from omni_cache.runtime.agreement import add_up, common, digest, local
from omni_cache.runtime.calls import Call, Ran
from omni_cache.runtime.constants import Constants
from omni_cache.runtime.contexts import Observed, Region, current_observer
from omni_cache.runtime.counters import current_tally
from omni_cache.runtime.history import History, Kept
from omni_cache.runtime.inference import Content, host_value
from omni_cache.runtime.model_state import ModelState
from omni_cache.runtime.modulations import (
    Candidate,
    Piece,
    Table,
    as_given,
    choose,
    kind_of,
    of_schedule,
    pack,
    spread,
)
from omni_cache.runtime.place import (
    CROWDED,
    REPLACED,
    UNCLEAR,
    UNKNOWN,
    Called,
    Place,
    likely_place,
    locate,
)
from omni_cache.runtime.reading import Reading, on_host, read
from omni_cache.runtime.trajectory import Action, Layout, StepRecord, Trajectory
from omni_cache.strategies import Gate, Policy, Time, Verdict
from omni_cache.strategies.base import DEFAULT_STEPS, Around, Made, Row
from omni_cache.strategies.strategy import Found

AFTER = "after the last step"
LATE = "after the first step of the plan"
REFUSED = "another run than the plan's"
UNLISTED = "a timestep that is in no list"
NO_LIST = "no list of timesteps"
WITHIN = "decided in the graph"
_OWN_NUMBERS = (
    "numbers of its own for branch {!r} are not allowed with lowering='cond'; one graph decides "
    "for all branches. Choose lowering='dispatch'"
)
_NAME_IT = (
    "such a call is computed. Name its place: with omni_cache.generation(...), "
    "omni_cache.branch('cond'): model(...)"
)
_WARNINGS = {
    UNKNOWN: f"{UNKNOWN}: {_NAME_IT}",
    CROWDED: f"{CROWDED}: {_NAME_IT}",
    UNCLEAR: "calls that no input tells apart are computed, since this strategy compares nothing; "
    "name them with omni_cache.generation(...) and omni_cache.branch(...)",
    REPLACED: "conditioning differs at every step, and so every step is computed: see what makes "
    "the input tensors {inputs} of the model anew (they are counted without weights and timestep)",
    "non-finite residual": "the blocks added numbers that are not finite, and so the next step was "
    "computed; with history_dtype='float16', 'bfloat16' keeps larger ones",
    AFTER: "a call came after the last of {total} steps, and is computed. Name their number in "
    "omni_cache.generation(num_inference_steps=...)",
    "products": "ranks that measure nothing together do not know their inner products, and so the "
    "forecast goes without them (a DMD is TaylorSeer); choose a strategy that measures",
    REFUSED: "all steps are computed, because the plan is for another run: {why}",
    LATE: "a loop began at step {step}, where the plan was made for loops that begin at step "
    "{begins}; what it forecasts from is not what the plan had, so that nobody has verified it. "
    "Tune a plan on such loops",
    UNLISTED: "a timestep came that is none of the {count} that modulations were computed for, and "
    "so they are computed for it alone. Pass all timesteps, as the model is given them, to "
    "omni_cache.generation(timesteps=...)",
    NO_LIST: "nobody said which timesteps will come, and so modulations are computed at every step "
    "of this generation; if the host knows its timesteps, the next one goes by them. Pass all "
    "timesteps, as the model is given them, to omni_cache.generation(timesteps=...)",
    "steps": f"nobody said how many steps there are, so {DEFAULT_STEPS} were assumed. Pass "
    "num_inference_steps=..., or name it in omni_cache.generation(...)",
}


@dataclass
class Guarded:
    """What one guarded region is to the runtime.

    Attributes:
        region: which of the model's regions it is.
        computation: what its blocks compute, up to sizes.
        depth: how many residuals its reused step takes.
        device: where residuals are kept, None where they are made.
        groups: the process groups of the ranks that compute a call together: several for the
            dimensions of a mesh, none where this rank computes alone.
        per_sample: whether its reused step takes weights for each sample.
        inputs: whether its reused step weighs what enters it.
        skips: whether results are kept, so that a call may skip the forward.
        only_returns: whether what was traced does nothing but call the graph and return.
        hoists: whether constants are held.
        modulates: whether modulations are held, for many timesteps.
        gate: the gate in the graph, which decides by itself; None where the host decides.
    """

    region: Region
    computation: object
    depth: int = 1
    device: torch.device | None = None
    groups: Sequence[Any] = ()
    per_sample: bool = False
    inputs: bool = False
    skips: bool = False
    only_returns: bool = False
    hoists: bool = False
    modulates: bool = False
    gate: Gate | None = None

    def is_shared(self, policy: Policy) -> bool:
        """Whether ranks measure together. Without a measurement they agree by themselves."""
        return policy.signal is not None and len(self.groups) > 0


class Given(NamedTuple):
    """What one graph is given in a call.

    Attributes:
        timestep: a tensor, a number, or None where the graph has none.
        constants: the inputs that constants are made of.
        modulations: those that modulations are made of besides the timestep.
        numbers: the inputs that are Python's numbers, such as a size or a count of calls.
    """

    timestep: Any
    constants: Sequence[Any] = ()
    modulations: Sequence[Any] = ()
    numbers: Sequence[Any] = ()


class _View(NamedTuple):
    """What a call finds at a place.

    Attributes:
        place: the place.
        total: the number of steps, None where nobody has said.
        stale: why what is held does not fit the call, None where it does.
        kept: what may be reused.
        must: why the call computes whatever is measured, None where the gate decides.
        refusal: what the strategy says of a call that it is not for.
    """

    place: Place
    trajectory: Trajectory
    total: int | None
    stale: str | None
    kept: Sequence[Kept]
    must: str | None
    refusal: str | None = None

    @property
    def goes_by(self) -> object:
        """What the decision depends on besides the measurement."""
        course, index = self.place.course, self.place.at.index
        return course.name, index, self.total, self.trajectory.state, course.conditioning.flags


class Step:
    """One call of one region.

    Attributes:
        is_refuted: whether the call has been taken for another one, whose constants it went by.

    Args:
        state: the model's.
        policy: what its calls follow.
        guarded: the region.
        ran: the region, as the call runs it.
        called: what the call brings.
        call: the call of an enabled module that it is a part of.
        given: what the region's graph is given.
    """

    is_refuted = False
    # What most calls never come to know.
    _contents: Sequence[Content] = ()
    _loop: Sequence[Reading] = ()
    _timestep: Tensor | None = None
    _likely: Place | None = None
    _constants: Constants | None = None
    _table: Table | None = None
    _timesteps: Tensor | None = None
    _is_taken = False
    _signal: Tensor | None = None
    _arrived: Layout | None = None
    _action: Action = "reused"
    # Of a graph that decides by itself.
    _within: Within | None = None
    _told: Tensor | None = None

    def __init__(
        self,
        state: ModelState,
        policy: Policy,
        guarded: Guarded,
        ran: Ran,
        called: Called,
        call: Call | None,
        given: Given,
    ) -> None:
        self._given = given
        self._state, self._policy, self._guarded = state, policy, guarded
        self._ran, self._called, self._call = ran, called, call
        self._is_shared = guarded.is_shared(policy)
        self._is_within = guarded.gate is not None
        # Ranks that measure nothing would not agree on what was finite; what was not is zero.
        self._is_symmetric = len(guarded.groups) > 0 and not self._is_shared
        self._place: Place | str | None = None if call is None else call.place
        if self._place is not None:
            return
        timestep, wanted = given.timestep, called.needs_value or policy.reads_values
        if wanted and called.value is None and isinstance(timestep, Tensor):
            self._timestep = timestep
            self._loop = [called.loop.timesteps] if called.loop is not None else []
        if self._timestep is not None or self._is_shared or called.inputs.on_device:
            self._likely = likely_place(state, called)
            self._contents = called.inputs.unread
            if self._contents and not self._is_shared:
                runs = [each.run(state) for each in called.generations(state)]
                courses = [each for run in runs for each in list(run.courses.values())]
                before = [each for one in courses for each in one.conditioning.unread]
                self._contents = [*self._contents, *before]
        if self._timestep is None and not self._contents:
            self._place = locate(state, called)

    def skip(self) -> list[Any] | None:
        """What a call returns of which nothing runs; None where it has to go on.

        That is for the host to say, before anything runs and without a read: where the place of the
        call is not known by then, or where ranks measure together, the call goes on.
        """
        guarded, place = self._guarded, self._place
        if not guarded.skips:
            return None
        # Of its own graph, since another one may return other results.
        # Dynamo's guards hold dtypes and devices of a graph's inputs.
        shapes, mode = self._called.inputs.shapes, torch.is_inference_mode_enabled()
        self._arrived = Layout(shapes, (), (), mode, id(guarded))
        if not isinstance(place, Place) or self._is_shared:
            return None
        view = self._look(place, self._arrived)
        trajectory, newest = view.trajectory, view.kept[: self._policy.forecast.depth]
        kept = list(takewhile(lambda each: each.results is not None, newest))
        gate, total = trajectory.gate, view.total
        if view.must or not kept or not gate.skips(place.at, total):
            return None
        if trajectory.numbers != self._given.numbers and not all(
            isinstance(each, Tensor) for each in kept[0].results or ()
        ):
            return None  # a number that the model returns is made of numbers that have changed
        verdict = gate.decide(trajectory.state, place.at, total, self._excess(view))
        if not verdict.reuse:
            return None
        if self._call is not None:
            self._call.place = place
        self._view, self._verdict, self._action = view, verdict, "skipped"
        return trajectory.history.results(kept, Time(place.at.index, place.at.value, total))

    def held(self) -> tuple[Tensor, ...] | None:
        """The constants of an earlier call that are this one's too; None where there are none.

        Where the host does not know the place by now, they are those of the likely one, and inputs
        that have stayed there are taken to stay.
        """
        if not self._guarded.hoists:
            return None
        place = self._expected
        if place is None:
            return None
        trajectory = place.run.trajectories.get((place.course.name, self._ran))
        held = None if trajectory is None else trajectory.constants
        trusted = place.stayed if self._place is None else ()
        if held is None or not self._serve(held, self._given.constants, trusted):
            return None
        self._constants = held
        return held.results

    def row(self) -> list[Tensor] | None:
        """The modulations of this call in a table of its generation; None where none has them.

        Branches share a table where the inputs are the same that it was made of. A place that is a
        guess counts as for constants.

        Raises:
            RuntimeError: an earlier call's timestep, which lies on a device, was in no table.
        """
        place = self._expected
        trusted = place.stayed if self._place is None and place is not None else ()
        for table in self._tables(place):
            if self._serve(table.held, self._given.modulations, trusted):
                self._table, self._is_taken = table, True
                row = table.row(self._given.timestep)
                if row is None:
                    self._tell_unlisted(table)
                return row
        return None

    def listed(self, made: Sequence[Tensor]) -> Tensor | None:
        """The timesteps ``(N, *shape)`` to make a table for; None where there is one, or no list.

        Args:
            made: the modulations of this call.
        """
        timestep = self._given.timestep
        if self._table is not None or isinstance(self._place, str):
            return None
        before = next(iter(self._tables(self._expected)), None)
        found = choose(self._candidates(made), timestep) if before is None else before.timesteps
        self._timesteps = timestep.new_empty(0, device="cpu") if found is None else found
        if len(self._timesteps):
            return spread(self._timesteps, timestep.shape)
        self._tabulate()
        self._tell_unlisted(self._table)
        return None

    def tabulate(self, made: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        """Have the calls to come find the modulations of the timesteps that were `listed`.

        Args:
            made: the modulations of this call.
            rows: for each of them ``(N, *its shape)``.
        """
        self._tabulate(*pack(made, rows))

    def _tabulate(self, rows: Sequence[Tensor] = (), pieces: Sequence[Piece] = ()) -> None:
        given, inputs = self._given, self._called.inputs
        held = Constants.of(rows, self._guarded, given.modulations, inputs)
        assert self._timesteps is not None
        self._table = Table(self._timesteps, kind_of(given.timestep), held, pieces)

    @property
    def _expected(self) -> Place | None:
        """Where the call lies, as far as the host can tell before it runs."""
        place = self._likely if self._place is None else self._place
        return place if isinstance(place, Place) else None

    def _tables(self, place: Place | None) -> list[Table]:
        """Tables for such timesteps that the region's branches have, that of the place first."""
        if place is None:
            return []
        found = list(place.run.trajectories.items())
        found.sort(key=lambda each: each[0][0] != place.course.name)
        tables = [each.modulations for (_, ran), each in found if ran == self._ran]
        return [each for each in tables if each is not None and each.is_for(self._given.timestep)]

    def _candidates(self, made: Sequence[Tensor]) -> list[Candidate]:
        """The lists that may be those of the call's loop.

        On a device nothing but NaN can tell that a timestep is in none. So only lists count there
        that somebody answers for: the caller, or a scheduler whose step the host knows.
        """
        called, timestep, place = self._called, self._given.timestep, self._expected
        is_known = host_value(timestep) is not None
        if not is_known and not all(each.is_floating_point() for each in made):
            return []
        if called.generation is not None and called.generation.timesteps:
            return [Candidate(as_given(called.generation.timesteps, timestep))]
        found = []
        if called.loop is not None:
            branch = None if called.branch is None else called.branch.name
            index = called.loop.count(branch) if place is None else place.at.index
            if is_known or index is not None:
                schedule = called.loop.timesteps, called.loop.training
                found += of_schedule(*schedule, index, timestep)
        latest = self._state.latest
        if is_known and latest is not None:
            moments = list(latest.moments)
            if place is None:  # whether a run begins or goes on
                moments = max(moments, list(latest.before), key=len)
            elif place.run.trajectories:
                moments = list(place.run.before)
            found.append(Candidate(as_given(moments, timestep)))
        return found

    def _tell_unlisted(self, table: Table | None) -> None:
        self._state.tally.modulated(unlisted=1)
        count = 0 if table is None else len(table.timesteps)
        self._tell(UNLISTED if count else NO_LIST, count=count)

    def keep(self, constants: tuple[Tensor, ...], signal: Tensor | None) -> None:
        """Have the next call of the branch find what this one goes by, once it has ended well."""
        if self.is_refuted:
            self._signal = None if signal is None else local(signal)
        held = self._constants
        if self._guarded.hoists and (held is None or held.results is not constants):
            inputs = self._called.inputs
            given = self._given.constants
            self._constants = Constants.of(constants, self._guarded, given, inputs)

    def _serve(self, held: Constants, given: Sequence[Any], trusted: Sequence[Tensor] = ()) -> bool:
        return held.serve(self._guarded, given, self._called.inputs, trusted)

    def _refute(self, place: Place | str) -> None:
        """Find out whether what was taken before the read is this call's."""
        trajectory = None
        if isinstance(place, Place):
            trajectory = place.run.trajectories.get((place.course.name, self._ran))
        if self._constants is not None:
            held = None if trajectory is None else trajectory.constants
            is_own = held is self._constants
            self.is_refuted = not is_own or not self._serve(self._constants, self._given.constants)
        if self._table is not None and self._is_taken:
            # One of another generation may be of other weights.
            is_own = isinstance(place, Place) and self._table in self._tables(place)
            if not is_own or not self._serve(self._table.held, self._given.modulations):
                self.is_refuted = True
                self._table = None if trajectory is None else trajectory.modulations

    def decide(self, signal: Tensor | None, layout: Layout) -> bool:
        """Whether the call reuses what is held.

        Args:
            signal: of this call, None where the policy compares none.
            layout: of this call.
        """
        self._signal, self._layout = None if signal is None else local(signal), layout
        view, sums = self._find(layout)
        agree = None if self._call is None else self._call.agree
        if view is None:
            if agree is not None:  # who waits for this rank has to hear of it
                agree(True)
            return False
        gate, compares = view.trajectory.gate, self._policy.signal
        measured = compares if sums and not view.must else None
        distance = self._excess(view) if measured is None else measured.distance(sums)
        self._progress = None if measured is None else measured.progress(sums)
        # Where one rank computes because it must, all go on from the same state.
        begins = view.stale or (self._is_shared and view.must)
        state = gate.begin() if begins else view.trajectory.state
        verdict = gate.decide(state, view.place.at, view.total, distance)
        if view.must is not None:
            verdict = verdict._replace(reuse=False, reason=view.must)
        if agree is not None:
            reuse = not agree(not verdict.reuse) and len(view.kept) > 0
            if reuse != verdict.reuse:
                # Either way as if it had been computed: nothing has accumulated.
                verdict = verdict._replace(
                    reuse=reuse, reason="agreed", if_reused=verdict.if_computed
                )
        self._verdict = verdict
        return verdict.reuse

    def _find(self, layout: Layout) -> tuple[_View | None, Sequence[float]]:
        """What the call finds, None where it has no place, and the sums of the comparison."""
        is_known = self._place is not None
        likely = self._place if is_known else self._likely
        view = self._look(likely, layout) if isinstance(likely, Place) else None
        view, sums, value = (self._read_together if self._is_shared else self._read)(view)
        if self._place is None:
            called = self._called if value is None else self._called._replace(value=value)
            self._place = locate(self._state, called)
            self._refute(self._place)
        place = self._place
        if isinstance(place, str):
            self._tell(place)
            return None, ()
        if not is_known:
            # Where the call was expected, what was measured counts.
            seen, view = view, self._look(place, layout)
            if seen and (seen.place.course, seen.place.at.index) == (place.course, place.at.index):
                view = view._replace(kept=view.kept[: len(seen.kept)], must=view.must or seen.must)
            elif view.must is None and view.trajectory.gate.measures and not self._is_within:
                view = view._replace(must="unexpected call")
            if self.is_refuted and view.must is None and view.trajectory.gate.measures:
                view = view._replace(must=REPLACED)  # what was measured is another call's
        assert view is not None
        self._warn(view)
        if self._call is not None:
            self._call.place = place
        self._view = view
        return view, sums

    def standing(self, layout: Layout) -> Standing:
        """What the call finds, for a graph that decides by itself.

        Args:
            layout: of this call.
        """
        self._layout = layout
        view, _ = self._find(layout)
        if view is None:
            return Standing()
        trajectory, at = view.trajectory, view.place.at
        if view.stale:
            return Standing(at=at)
        kept = trajectory.history.kept
        history = trajectory.history.operands(kept, self._guarded.depth) if kept else ()
        return Standing(view.must is None, at, trajectory.within, trajectory.signal, history)

    def learn(self, decided: Decided) -> None:
        """Take in what the graph has decided."""
        if not on_host(decided.told):
            current_tally.get().copied(1, waited=True)  # the flag that `torch.cond` goes by
        if isinstance(self._place, str):
            return
        view, is_reused = self._view, decided.finite is None
        # Of a strategy that keeps nothing, nothing is kept for the graph either.
        self._within = None if self._policy.signal is None else decided.within
        self._signal = decided.signal
        self._told = decided.told if view.must is None else None
        state = view.trajectory.state
        self._verdict = Verdict(is_reused, view.must or WITHIN, state, state)

    def _excess(self, view: _View) -> float | None:
        """How far off forecasts are, for a strategy that checks them, as the host has heard."""
        if not self._policy.forecast.checks:
            return None
        errors = view.trajectory.history.errors
        return None if errors is None else errors.excess

    def operands(self) -> tuple[list[Tensor], list[Row]]:
        """The residuals for a reused step, ``depth`` sets of them, and rows of a weight for each.

        Where what enters is weighed, so is what entered at the newest of them, with two weights.
        Inner products that a forecast reads are on the host by now if the decision read anything.
        """
        view, depth = self._view, self._guarded.depth
        kept, history = view.kept[: self._policy.forecast.depth], view.trajectory.history
        now = Time(view.place.at.index, view.place.at.value, view.total, self._progress)
        rows = history.rows(kept, now, depth)
        if self._guarded.inputs:
            weight = history.forecast.input_weight([each.at for each in kept], now)
            rows = [(*row, weight, -weight) for row in rows]
        return history.operands(kept, depth), rows

    def recalled(self) -> Computed | None:
        """What an observer knows this call to compute; None where it has to be computed."""
        recall, place = getattr(current_observer.get(), "recall", None), self._place
        if recall is None or not isinstance(place, Place):
            return None
        known: Computed | None = recall(self._ran, place.course.name, place.at)
        return known

    def commit(
        self,
        result: Any,
        made: tuple[Tensor, ...] = (),
        finite: Tensor | None = None,
        entered: tuple[Tensor, ...] = (),
    ) -> None:
        """Have the next call come after this one, once the whole call has ended well.

        Args:
            result: what the model returns, flat.
            made: the residuals of a computed step, nothing for another one.
            finite: bool tensor, whether they are all finite.
            entered: the partners of a computed step that reused ones weigh.
        """
        if isinstance(self._place, str):
            return
        if self._call is None:
            self._commit(result, made, finite, entered)
        else:
            self._call.commits.append(partial(self._commit, result, made, finite, entered))

    def _commit(
        self,
        result: Any,
        made: tuple[Tensor, ...],
        finite: Tensor | None,
        entered: tuple[Tensor, ...],
    ) -> None:
        current_tally.set(self._state.tally)  # calls of other models may have come between
        place, trajectory, total, stale, *_ = self._view
        verdict, at, computed = self._verdict, place.at, finite is not None
        action: Action = "computed" if computed else self._action
        if stale:
            trajectory.release()
        if not place.run.trajectories:  # it begins
            latest, self._state.latest = self._state.latest, place.run
            place.run.before = () if latest is None else tuple(latest.moments)
        if self._guarded.modulates:
            value = host_value(self._given.timestep)
            place.run.moments.update({} if value is None else {value: None})
        place.run.trajectories[place.course.name, self._ran] = trajectory
        if action != "skipped":
            trajectory.constants, trajectory.modulations = self._constants, self._table
            if self._table is not None and self._table.branch is None:
                self._table.branch = place.course.name
        trajectory.state = verdict.if_computed if computed else verdict.if_reused
        compares = self._policy.signal
        looks_back = compares is not None and compares.looks_back > 0
        if trajectory.arrived != self._arrived:
            trajectory.arrived = self._arrived
            trajectory.history.forget_results()
        if finite is not None:
            kept = self._signal if looks_back else None
            results = result if self._guarded.skips else None
            trajectory.history.push(at, made, finite, kept, entered, results)
            trajectory.numbers = self._given.numbers
        if action != "skipped":
            if compares is not None and (computed or compares.against == "last call"):
                trajectory.signal = self._signal
            trajectory.layout = self._layout
        trajectory.last = at
        distance, accumulated = verdict.distance, verdict.accumulated
        record = StepRecord(action, distance, accumulated, at.value, verdict.reason, at.index)
        trajectory.record(record)
        trajectory.within = self._within
        if self._told is not None:
            trajectory.tell(self._told, at, total)
        if self._policy.refuses is not None and action != "skipped":
            first = next(each for each in result if isinstance(each, Tensor))
            trajectory.size, trajectory.dtype = tuple(first.shape[1:]), str(first.dtype)
        if computed or looks_back:  # which keeps more signals than one
            trajectory.measure_memory()
        place.commit(result)
        observer, generation = current_observer.get(), place.run.generation
        if observer is not None and generation is not None:
            seen = place.run, generation.number, self._ran, place.course.name, at
            observer(Observed(*seen, action, self._signal, made, entered, finite, result))
        if total is not None and at.index >= total - 1:
            trajectory.release()

    def _look(self, place: Place, layout: Layout) -> _View:
        """What the call finds at a place, by its layout or that of its inputs."""
        generation, course, at = place.run.generation, place.course, place.at
        guarded = self._guarded
        trajectory = place.run.trajectories.get((course.name, self._ran))
        if trajectory is None:
            gate = self._policy.gate(course.name, course.position)
            if self._is_within and gate.measures and gate != guarded.gate:
                raise ValueError(_OWN_NUMBERS.format(course.name))
            forecast = self._policy.forecast.of_branch(course.name)
            settings = guarded.device, guarded.per_sample, not self._is_symmetric
            history = History(self._policy.depth, forecast, *settings)
            trajectory = Trajectory(course.name, gate, history)
        gate, history = trajectory.gate, trajectory.history
        before = trajectory.arrived if layout is self._arrived else trajectory.layout
        told = None if generation is None else generation.num_inference_steps
        total = told or self._policy.num_inference_steps
        stale = (layout.change_from(before) if before else None) or place.stale
        if stale is None and trajectory.last is not None and at.index != trajectory.last.index + 1:
            stale = "a step was left out"
        if stale is None and gate.begins_anew(at):
            stale = "refresh"
        kept = [] if stale else history.kept if self._is_symmetric else history.usable
        refusal = self._refusal(place, trajectory, total)
        if total is not None and at.index >= total:
            must: str | None = AFTER
        elif refusal is not None:
            must = REFUSED  # why is told once
        elif stale is not None:
            must = stale
        elif trajectory.last is None:
            must = "first step"
        elif (foretold := gate.foretell(at, total)) is not None:
            must = foretold
        elif not kept:
            must = "non-finite residual" if history.kept else "no residual"
        elif self._policy.signal is not None and len(kept) < self._policy.signal.looks_back:
            must = "too few computed steps"
        elif not gate.measures and not (place.is_known and self._is_only(place)):
            must = UNCLEAR
        else:
            must = None
        return _View(place, trajectory, total, stale, kept, must, refusal)

    def _is_only(self, place: Place) -> bool:
        """Whether a call runs the region once: of two times only their order tells which it is."""
        again = Ran(self._ran.region, self._ran.weight, 1)
        return (place.course.name, again) not in place.run.trajectories

    def _refusal(self, place: Place, trajectory: Trajectory, total: int | None) -> str | None:
        """What the strategy says of a call that it is not for."""
        if self._policy.refuses is None:
            return None
        loop, name = place.called.loop, place.course.name
        schedule = None if loop is None else loop.schedule
        # A rank's part of the result may be of any size; of a model in pieces each has its own.
        pieces = {region for _, region in place.run.trajectories}
        size = None if self._guarded.groups else trajectory.size
        result = (size, trajectory.dtype) if len(pieces) < 2 else (None, None)
        return self._policy.refuses(Found(place.at, total, name, schedule, *result))

    def _read(self, view: _View | None) -> tuple[_View | None, Sequence[float], float | None]:
        """What the call finds now, the sums of the comparison if there is one, and the timestep."""
        signal, timestep, others = (
            self._policy.signal,
            self._timestep,
            [*self._contents, *self._loop],
        )
        compares = (
            signal is not None
            and view is not None
            and view.must is None
            and view.trajectory.gate.compares(view.trajectory.state)
            and not self._is_within
        )
        unread = [each for each in (view.kept if view else ()) if each.is_finite is None]
        # What would cost a read of its own is not asked for.
        unread = unread if compares or others or timestep is not None else []
        along = [] if timestep is None else [timestep]
        along += [torch.stack([each.finite for each in unread])] if unread else []
        measured = []
        if compares and view is not None:
            measured = [Reading(self._compared(view, along))]
        elif along:
            dtype = number_dtype(along[0].device)
            measured = [Reading(torch.stack([each.to(dtype).mean() for each in along]))]
        products = self._policy.forecast.reads_products and (measured or others)
        read([*measured, *others, *(self._unread_products() if products else ())])
        numbers = measured[0].numbers or () if measured else ()
        for each in unread:
            each.is_finite = numbers[-1] == 1.0
        if view is not None and unread and not view.trajectory.history.usable:
            view = view._replace(kept=[], must="non-finite residual")
        sums, means = numbers[: len(numbers) - len(along)], numbers[len(numbers) - len(along) :]
        return view, sums, None if timestep is None else means[0]

    def _read_together(
        self, view: _View | None
    ) -> tuple[_View | None, Sequence[float], float | None]:
        """The same where ranks decide together, from what all of them have found.

        A rank that cannot reuse takes part too, so that none waits for another.
        """
        signal, guarded, contents = self._policy.signal, self._guarded, self._contents
        assert signal is not None
        device = self._layout.device[0]
        found, going_by = torch.zeros(signal.sums, device=device), 0
        lacking = torch.ones(guarded.depth, device=device)
        if view is not None and view.must is None:
            found, going_by = self._compared(view, ()), digest(view.goes_by)
            for age, kept in enumerate(view.kept):
                lacking[age] = 0.0 if kept.is_finite else ~kept.finite
        prints = [each.tensor for each in contents]
        newest = view.kept[0] if view is not None and view.kept else None
        wanted = self._policy.depth + 1 if self._policy.forecast.reads_products else 0
        products = torch.zeros(wanted, device=device)
        if newest is not None and newest.products is not None:
            products = torch.nn.functional.pad(newest.products.tensor, (0, 1), value=1.0)
        shared = Reading(add_up([found, *prints, products], lacking, going_by, guarded.groups))
        timesteps = (
            [] if self._timestep is None else [self._timestep.to(shared.tensor).mean()[None]]
        )
        moments = [Reading(each) for each in timesteps]
        read([shared, *moments, *self._loop])
        numbers = list(shared.numbers or ())
        sums, numbers = numbers[: signal.sums], numbers[signal.sums :]
        for each in contents:
            each.numbers, numbers = tuple(numbers[:2]), numbers[2:]
        own, numbers = numbers[:wanted], numbers[wanted:]
        if newest is not None and newest.products is not None:
            newest.products.numbers = tuple(own[:-1])
            if own[-1] != numbers[-1]:  # some rank has none
                newest.products = None
        usable = common(numbers)
        if view is not None:
            must = view.must if usable or view.must else "another rank computes"
            view = view._replace(kept=view.kept[:usable], must=must)
        return view, sums, moments[0].numbers[0] if moments and moments[0].numbers else None

    def _unread_products(self) -> list[Reading]:
        """What a forecast will want to know of residuals, wherever the call turns out to lie."""
        kept = [
            each
            for run in list(self._state.runs)
            for (_, region), trajectory in list(run.trajectories.items())
            if region == self._ran
            for each in trajectory.history.kept
        ]
        found = [each.products for each in kept if each.products is not None]
        return [each for each in found if each.numbers is None]

    def _compared(self, view: _View, along: Sequence[Tensor]) -> Tensor:
        signal, now, before = self._policy.signal, self._signal, view.trajectory.signal
        assert signal is not None
        history, kept = view.trajectory.history, view.kept[: signal.looks_back]
        past = kept[0].past if kept else None
        if kept and past is None:
            made = [Made(each.signal, tuple(map(local, history.at_home(each)))) for each in kept]
            past = kept[0].past = signal.look_back(made)
        if signal.against == "results":
            now = before = past
        assert now is not None
        assert before is not None
        signals = [each.signal for each in kept if each.signal is not None]
        around = Around(self._times(view, now.device), past, signals)
        return signal.measure(now, before, along, around)

    def _times(self, view: _View, device: torch.device) -> Tensor | None:
        """The timesteps of this call and of the one that it is compared with, for `Around`."""
        signal, last = self._policy.signal, view.trajectory.last
        if signal is None or not signal.reads_values:
            return None
        before = last if signal.against == "last call" else view.trajectory.history.kept[0].at
        values = [None if at is None else at.value for at in (view.place.at, before)]
        known = [math.nan if value is None else value for value in values]
        times = torch.tensor(known, dtype=number_dtype(device)).to(device, non_blocking=True)
        if self._timestep is not None:
            times[0] = self._timestep.to(times).mean()
        return times

    def _warn(self, view: _View) -> None:
        """Tell what is odd of a place, which is the call's own and no guess."""
        if view.must == AFTER or (view.must == UNCLEAR and view.stale is None):
            self._tell(view.must, total=view.total)
        if view.stale == REPLACED and view.place.course.replaced > 1:
            self._tell(REPLACED, inputs=sorted(view.place.changed or ()))
        if view.refusal is not None:
            self._tell(REFUSED, why=view.refusal)
        begins, index = self._policy.begins, view.place.at.index
        if begins is not None and view.trajectory.last is None and index > begins:
            self._tell(LATE, step=index, begins=begins)
        if view.must == "non-finite residual":
            self._tell(view.must)
        if self._is_symmetric and self._policy.forecast.reads_products:
            self._tell("products")
        is_late = view.total is None and view.place.at.index >= DEFAULT_STEPS
        if is_late and view.trajectory.gate.schedules:
            self._tell("steps")

    def _tell(self, key: str, **numbers: Any) -> None:
        """Warn of something, once for each model."""
        if key not in self._state.told:
            self._state.told.add(key)
            warnings.warn(f"omni-cache: {_WARNINGS[key].format(**numbers)}.", stacklevel=2)
