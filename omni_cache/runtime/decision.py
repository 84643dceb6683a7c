"""One call of one region: decide on it, and commit what it leaves.

Deciding changes nothing, so that a call that fails leaves its trajectory as it was. It costs at
most one read from the device: what the gate measures and all that the host wants to know besides
(the timestep, whether residuals are finite, fingerprints of inputs) comes in one copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_cache.kernels import number_dtype
from omni_cache.runtime.agreement import add_up, common, digest, local
from omni_cache.runtime.calls import Call
from omni_cache.runtime.contexts import Observed, Region, current_observer
from omni_cache.runtime.history import History, Kept
from omni_cache.runtime.inference import Content
from omni_cache.runtime.model_state import ModelState
from omni_cache.runtime.place import Place
from omni_cache.runtime.trajectory import Layout, StepRecord, Trajectory
from omni_cache.strategies import Policy
from omni_cache.strategies.base import DEFAULT_STEPS

UNCLEAR = "nothing tells the calls apart"


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
    """

    region: Region
    computation: object
    depth: int = 1
    device: torch.device | None = None
    groups: Sequence[Any] = ()

    def is_shared(self, policy: Policy) -> bool:
        """Whether ranks measure together. Without a measurement they agree by themselves."""
        return policy.signal is not None and len(self.groups) > 0


@dataclass
class Pending:
    """What has to be read before a call has a place.

    Attributes:
        likely: where it lies if it goes on as expected; None where nothing is expected.
        timestep: on its device, None where the host knows it.
        contents: fingerprints that tell the inputs apart.
        settle: where it lies, given the timestep, once the contents are known.
    """

    likely: Place | None
    timestep: Tensor | None
    contents: Sequence[Content]
    settle: Callable[[float | None], Place | str]


class _View(NamedTuple):
    """What a call finds at its place.

    Attributes:
        total: the number of steps, None where nobody has said.
        stale: why what is held does not fit the call, None where it does.
        kept: what may be reused.
        must: why the call computes whatever is measured, None where the gate decides.
        goes_by: what the decision depends on besides the measurement.
    """

    trajectory: Trajectory
    total: int | None
    stale: str | None
    kept: Sequence[Kept]
    must: str | None
    goes_by: object


class Step:
    """One call of one region.

    Args:
        state: the model's.
        policy: what its calls follow.
        guarded: the region.
        place: where the call lies, or what has to be read first; a word where nothing tells.
        call: the call of an enabled module that it is a part of.
    """

    def __init__(
        self,
        state: ModelState,
        policy: Policy,
        guarded: Guarded,
        place: Place | Pending | str,
        call: Call | None,
    ) -> None:
        self._state, self._policy, self._guarded, self._call = state, policy, guarded, call
        self._pending = place if isinstance(place, Pending) else None
        self._place = place if not isinstance(place, Pending) else ""
        self._is_shared = guarded.is_shared(policy)

    def decide(self, signal: Tensor | None, layout: Layout) -> bool:
        """Whether the call reuses what is held.

        Args:
            signal: of this call, None where the policy compares none.
            layout: of this call.
        """
        self._signal, self._layout = None if signal is None else local(signal), layout
        likely = self._place if self._pending is None else self._pending.likely
        view = self._look(likely) if isinstance(likely, Place) else None
        view, distance = self._measure(view)
        place = self._place
        if isinstance(place, str):
            self._tell(
                place,
                f"{place}: such a call is computed. Name its place: with "
                "omni_cache.generation(...), omni_cache.branch('cond'): model(...)",
            )
            return False
        if place is not likely:  # it had to be read
            expected = isinstance(likely, Place) and place.is_same(likely)
            kept = len(view.kept) if view else 0
            view = self._look(place, view.must if view and expected else None)
            view = view._replace(kept=view.kept[:kept]) if expected else view
            if not expected and view.must is None and view.trajectory.gate.measures:
                view = view._replace(must="unexpected call")
        assert view is not None
        self._warn(view, place)
        if self._call is not None:
            self._call.place = place
        gate = view.trajectory.gate
        # Where one rank computes because it must, all go on from the same state.
        begins = view.stale or (self._is_shared and view.must)
        state = gate.begin() if begins else view.trajectory.state
        verdict = gate.decide(state, place.at, view.total, None if view.must else distance)
        if view.must is not None:
            verdict = verdict._replace(reuse=False, reason=view.must)
        self._view, self._verdict = view, verdict
        return verdict.reuse

    def operands(self) -> tuple[list[Tensor], tuple[float, ...]]:
        """The residuals for a reused step, ``depth`` sets of them, and a weight for each set."""
        assert isinstance(self._place, Place)
        kept, history = self._view.kept, self._view.trajectory.history
        weights = self._policy.forecast.weights([each.at for each in kept], self._place.at)
        return history.operands(kept), weights + (0.0,) * (history.depth - len(kept))

    def commit(self, made: tuple[Tensor, ...], finite: Tensor | None, output: Any) -> None:
        """Have the next call come after this one, once the whole call has ended well.

        Args:
            made: the residuals of a computed step, nothing for a reused one.
            finite: bool tensor, whether they are all finite.
            output: what the model returns, flat.
        """
        if isinstance(self._place, str):
            return
        commit = partial(self._commit, self._place, made, finite, output)
        if self._call is None:
            commit()
        else:
            self._call.commits.append(commit)

    def _commit(
        self, place: Place, made: tuple[Tensor, ...], finite: Tensor | None, output: Any
    ) -> None:
        view, verdict, at = self._view, self._verdict, place.at
        trajectory, computed = view.trajectory, finite is not None
        if view.stale:
            trajectory.release()
        place.run.trajectories[place.course.name, self._guarded.region] = trajectory
        trajectory.state = verdict.if_computed if computed else verdict.if_reused
        if finite is not None:
            trajectory.history.push(at, made, finite)
        signal = self._policy.signal
        if signal is not None and (computed or signal.against == "last call"):
            trajectory.signal = self._signal
        trajectory.layout, trajectory.last = self._layout, at
        record = StepRecord(
            computed, verdict.distance, verdict.accumulated, at.value, verdict.reason, at.index
        )
        trajectory.steps.append(record)
        trajectory.measure_memory()
        place.commit(output)
        observer, generation = current_observer(), place.run.generation
        if observer is not None and computed and generation is not None:
            first = next(each for each in output if isinstance(each, Tensor))
            seen = place.run, generation.number, place.course.name, at
            observer(Observed(*seen, self._signal, made, first))
        if view.total is not None and at.index >= view.total - 1:
            trajectory.release()

    def _look(self, place: Place, must: str | None = None) -> _View:
        """What the call finds at a place, where it may be known already that it computes."""
        generation, course = place.run.generation, place.course
        trajectory = place.run.trajectories.get((course.name, self._guarded.region))
        if trajectory is None:
            gate = self._policy.gate(course.name, course.position)
            history = History(self._guarded.depth, self._guarded.device)
            trajectory = Trajectory(course.name, gate, history)
        told = None if generation is None else generation.num_inference_steps
        total = told or self._policy.num_inference_steps
        before, history = trajectory.layout, trajectory.history
        stale = (self._layout.change_from(before) if before else None) or place.stale
        # Ranks that measure nothing would not agree on what was finite; what was not is zero.
        symmetric = len(self._guarded.groups) > 0 and not self._is_shared
        kept = [] if stale else history.kept if symmetric else history.usable
        foretold = self._foretold(trajectory, place, total)
        if total is not None and place.at.index >= total:
            must = foretold
        elif stale is not None:
            must = stale
        elif not kept:
            held = trajectory.history.kept
            must = "non-finite residual" if held else "no residual"
            must = "first step" if trajectory.last is None else must
        elif must is None and not place.is_known and not trajectory.gate.measures:
            must = UNCLEAR
        goes_by = course.name, place.at.index, total, trajectory.state, course.conditioning.flags
        return _View(trajectory, total, stale, kept, must or foretold, goes_by)

    def _foretold(self, trajectory: Trajectory, place: Place, total: int | None) -> str | None:
        """Why the step is computed whatever is held."""
        if total is not None and place.at.index >= total:
            return "after the last step"
        return trajectory.gate.foretell(place.at, total)

    def _warn(self, view: _View, place: Place) -> None:
        """Tell what is odd of a place, which is the call's own and no guess."""
        index, total = place.at.index, view.total
        if view.must == UNCLEAR and view.stale is None:
            self._tell(
                UNCLEAR,
                "calls that no input tells apart are computed, since this strategy "
                "compares nothing; name them with omni_cache.generation(...) and "
                "omni_cache.branch(...)",
            )
        if total is not None and index >= total:
            self._tell(
                "after the last step",
                f"a call came after the last of {total} steps, and is computed. Name "
                "their number in omni_cache.generation(num_inference_steps=...)",
            )
        elif total is None and view.trajectory.gate.schedules and index >= DEFAULT_STEPS:
            self._tell(
                "steps",
                f"nobody said how many steps there are, so {DEFAULT_STEPS} were "
                "assumed. Pass num_inference_steps=..., or name it in "
                "omni_cache.generation(...)",
            )

    def _measure(self, view: _View | None) -> tuple[_View | None, float | None]:
        """Compare the signals and settle the place, in one read.

        Returns:
            What the call finds now, and the distance; None where nothing was compared.
        """
        view, sums, timestep = (self._read_together if self._is_shared else self._read)(view)
        if self._pending is not None:
            self._place = self._pending.settle(timestep)
        signal = self._policy.signal
        return view, signal.distance(sums) if signal is not None and sums else None

    def _read(self, view: _View | None) -> tuple[_View | None, list[float], float | None]:
        """What the call finds now, the sums of the comparison if there is one, and the timestep."""
        signal, pending = self._policy.signal, self._pending
        compares = signal is not None and view is not None and view.must is None
        timestep = None if pending is None else pending.timestep
        contents = [] if pending is None else pending.contents
        unread = [each for each in (view.kept if view else ()) if each.is_finite is None]
        # What would cost a read of its own is not asked for.
        unread = unread if compares or timestep is not None or contents else []
        along = [] if timestep is None else [timestep]
        along += [torch.stack([each.finite for each in unread])] if unread else []
        parts: list[Tensor] = []
        if signal is not None and view is not None and compares:
            before = view.trajectory.signal
            assert self._signal is not None
            assert before is not None
            parts = [signal.measure(self._signal, before, along)]
        elif along:
            parts = [each.to(number_dtype(each.device)).mean().reshape(1) for each in along]
        sums = signal.sums if signal is not None and compares else 0
        parts += [each.tensor for each in contents]
        if not parts:
            return view, [], None
        numbers: list[float] = (parts[0] if len(parts) == 1 else torch.cat(parts)).tolist()
        measured, means = numbers[:sums], numbers[sums : len(numbers) - 2 * len(contents)]
        prints = iter(numbers[len(numbers) - 2 * len(contents) :])
        for content, pair in zip(contents, zip(prints, prints, strict=True), strict=True):
            content.numbers = pair
        for each in unread:
            each.is_finite = means[-1] == 1.0
        if view is not None and unread and not view.trajectory.history.usable:
            view = view._replace(kept=[], must="non-finite residual")
        return view, measured, None if timestep is None else means[0]

    def _read_together(self, view: _View | None) -> tuple[_View | None, list[float], float | None]:
        """The same where ranks decide together, from what all of them have found.

        A rank that cannot reuse takes part too, so that none waits for another.
        """
        signal, pending, guarded = self._policy.signal, self._pending, self._guarded
        assert signal is not None
        assert self._signal is not None
        device = self._signal.device
        contents = [] if pending is None else pending.contents
        found, going_by = torch.zeros(signal.sums, device=device), 0
        lacking = torch.ones(guarded.depth, device=device)
        if view is not None and view.must is None:
            before = view.trajectory.signal
            assert before is not None
            found, going_by = signal.measure(self._signal, before, ()), digest(view.goes_by)
            for age, each in enumerate(view.kept):
                lacking[age] = 0.0 if each.is_finite else ~each.finite
        prints = [each.tensor for each in contents]
        parts = [add_up([found, *prints], lacking, going_by, guarded.groups)]
        if pending is not None and pending.timestep is not None:
            parts.append(pending.timestep.to(parts[0]).mean().reshape(1))
        numbers: Iterator[float] = iter(torch.cat(parts).tolist())
        sums = list(islice(numbers, signal.sums))
        for content in contents:
            content.numbers = next(numbers), next(numbers)
        usable = common(list(islice(numbers, guarded.depth + 3)))
        if view is not None:
            must = view.must if usable or view.must else "another rank computes"
            view = view._replace(kept=view.kept[:usable], must=must)
        return view, sums, next(numbers, None)

    def _tell(self, key: str, message: str) -> None:
        """Warn of something, once for each model."""
        if key not in self._state.told:
            self._state.told.add(key)
            warnings.warn(f"omni-cache: {message}.", stacklevel=2)
