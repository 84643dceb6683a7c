"""Runs a user's loop under a plan, from the first step that differs from a run before.

What a computed step made is recorded on the host, and told to a later run in place of computing it
again. Knows loops and the calls that they make; nothing of how plans are found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from omni_cache.lowering.program import Computed
from omni_cache.pipelines.enable import as_it_was, enable, refresh, states_of
from omni_cache.runtime.contexts import Observed, Region, Run, observing
from omni_cache.strategies import Guard, Plan, Policy, Strategy, Time
from omni_cache.strategies.plans import Content, Point
from omni_cache.strategies.schedules import Compute, Reuse
from omni_cache.strategies.uncached import Nothing
from omni_cache.tuning.budget import Budget
from omni_cache.tuning.results import Result

Generate = Callable[[int], Any]
"""Runs the whole loop for a sample, and returns what quality is judged on."""


class Played(NamedTuple):
    """One run of the loop.

    Attributes:
        result: what it returned.
        seconds: how long it took.
        ran: how often the blocks of a region ran.
        tape: what they computed, where that was recorded.
    """

    result: Result
    seconds: float
    ran: int
    tape: Tape


class Spot(NamedTuple):
    """A call of one region."""

    region: Region
    branch: str
    step: int


@dataclass
class Tape:
    """What the computed steps of one run made, on the host."""

    calls: dict[Spot, Computed] = field(default_factory=dict)

    def results(self, branch: str, step: int) -> Any:
        """What the last region of a call returned, flat."""
        spots = [spot for spot in self.calls if spot[1:] == (branch, step)]
        return self.calls[spots[-1]].result

    def before(self, step: int) -> Tape:
        """The part of it before a step, from which a run that differs there may be resumed."""
        return Tape({spot: made for spot, made in self.calls.items() if spot.step < step})


@dataclass(frozen=True)
class Uncached(Strategy):
    """Computes every step, with graphs that serve plans.

    Attributes:
        compiled_for: what plans need.
    """

    name: ClassVar[str] = "plan"
    compiled_for: Guard = field(kw_only=True)

    def guard(self) -> Guard:
        """That of plans."""
        return self.compiled_for

    def policy(self, model_class: str | None) -> Policy:
        """The same for every class."""
        gate = Compute(Reuse())
        return Policy(None, lambda branch, position: gate, Nothing(), self.num_inference_steps)


@dataclass(frozen=True, kw_only=True, repr=False)
class Rehearsed(Plan):
    """A plan of one point, followed to the letter by graphs that serve all of them.

    Attributes:
        compiled_for: what they were compiled for.
    """

    compiled_for: Guard
    guardrail: float | None = None

    def guard(self) -> Guard:
        """That of all plans."""
        return self.compiled_for


class Rehearsal:
    """A target that plays plans, sample by sample; made by `rehearsing`.

    Attributes:
        target: the pipeline or module.
        budget: counts what the blocks compute.
        content: what all plans have in common, once that is known.
        compiled_for: what graphs are compiled for, to serve all plans.
    """

    def __init__(
        self,
        target: Any,
        generate: Generate,
        flags: Mapping[str, Any],
        compiled_for: Guard,
        budget: Budget,
    ) -> None:
        self.target, self.budget = target, budget
        self.content: Content | None = None
        self.compiled_for = compiled_for
        self._generate, self._flags = generate, flags

    def play(
        self,
        point: Point | None,
        sample: int,
        *,
        known: Tape | None = None,
        records: bool = False,
        observer: Callable[[Observed], None] | None = None,
    ) -> Played:
        """Run the loop of a sample.

        Args:
            point: the plan; None to compute every step.
            sample: its number.
            known: what computed steps make that are as they were in another run of this sample.
            records: whether to keep what the blocks compute.
            observer: is shown every call too.
        """
        enable(self.target, self._strategy(point), **self._flags)
        refresh(self.target)
        watch = _Watch(known or Tape(), records, observer)
        started = time.perf_counter()
        with observing(watch):
            returned = self._generate(sample)
        result = Result.of(returned)  # on the host, so that all of it has run
        seconds = time.perf_counter() - started
        self.budget.count(watch.ran)
        return Played(result, seconds, watch.ran, watch.tape)

    def names(self) -> dict[Run, str]:
        """The transformer that each run of the last loop was a part of, "" for a bare module."""
        return {run: name for name, state in states_of(self.target) for run in state.runs}

    def _strategy(self, point: Point | None) -> Strategy:
        if point is None:
            return Uncached(compiled_for=self.compiled_for)
        assert self.content is not None  # the first loop has run
        content = replace(self.content, frontier=(point,), chosen=0)
        return Rehearsed(content=content, compiled_for=self.compiled_for)


@contextmanager
def rehearsing(
    target: Any,
    generate: Generate,
    flags: Mapping[str, Any],
    compiled_for: Guard,
    budget: Budget,
) -> Iterator[Rehearsal]:
    """Borrow a target: at the end it is as it was, enabled or not."""
    with as_it_was(target), torch.no_grad():
        yield Rehearsal(target, generate, flags, compiled_for, budget)


class _Watch:
    """The observer of one run."""

    def __init__(self, known: Tape, records: bool, also: Callable[[Observed], None] | None) -> None:
        self._known, self._records, self._also = known, records, also
        self._recalled: set[Spot] = set()
        self.tape = Tape()
        self.ran = 0

    def __call__(self, step: Observed) -> None:
        spot = Spot(step.region, step.branch, step.at.index)
        if step.finite is not None and spot in self._recalled:
            self.tape.calls[spot] = self._known.calls[spot]
        elif step.finite is not None:
            self.ran += 1
            if self._records:
                residuals = tuple(map(_on_host, step.stored))
                results = [_on_host(each, copies=True) for each in step.result]
                self.tape.calls[spot] = Computed(results, residuals, step.finite)
        if self._also is not None:
            self._also(step)

    def recall(self, region: Region, branch: str, at: Time) -> Computed | None:
        """What a computed step makes, where a run before has told."""
        spot = Spot(region, branch, at.index)
        made = self._known.calls.get(spot)
        if made is None:
            return None
        self._recalled.add(spot)
        device = made.finite.device
        residuals = tuple(each.to(device) for each in made.residuals)
        # Callers may write into results.
        results = [_copied_to(each, device) for each in made.result]
        return Computed(results, residuals, made.finite)


def _on_host(value: Any, copies: bool = False) -> Any:
    return value.to("cpu", copy=copies) if isinstance(value, Tensor) else value


def _copied_to(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
