"""Runs a user's loop under a plan, from the first step that differs from a run before.

What a computed step made is recorded on the host, and told to a later run in place of computing it
again. Knows loops and the calls that they make; nothing of how plans are found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_cache.lowering.program import Computed
from omni_cache.pipelines.enable import as_it_was, enable, refresh, states_of
from omni_cache.runtime.contexts import Observed, Observer, Run, observing
from omni_cache.strategies import Strategy, Time
from omni_cache.tuning.budget import Budget
from omni_cache.tuning.results import Result

Generate = Callable[[int], Any]
"""Runs the whole loop for a sample, and returns what quality is judged on."""


class Played(NamedTuple):
    """One run of the loop: what it returned, how long it took, and what the blocks computed."""

    result: Result
    seconds: float
    tape: Tape


@dataclass
class Tape:
    """What the computed steps of one run made, by branch and step, on the host."""

    calls: dict[tuple[str, int], Computed] = field(default_factory=dict)

    def before(self, step: int) -> Tape:
        """The part of it before a step, from which a run that differs there may be resumed."""
        return Tape({place: made for place, made in self.calls.items() if place[1] < step})


class Rehearsal:
    """A target that plays plans, sample by sample; made by `rehearsing`.

    Attributes:
        budget: counts what the blocks compute.
        num_inference_steps: steps of a loop, once one has been seen.
    """

    def __init__(
        self, target: Any, generate: Generate, flags: dict[str, Any], budget: Budget
    ) -> None:
        self._target, self._generate, self._flags = target, generate, flags
        self.budget = budget

    def play(
        self,
        strategy: Strategy,
        sample: int,
        *,
        known: Tape | None = None,
        records: bool = False,
        observer: Observer | None = None,
    ) -> Played:
        """Run the loop of a sample.

        Args:
            strategy: what the calls follow.
            sample: its number.
            known: what computed steps make that are as they were in another run of this sample.
            records: whether to keep what the blocks compute.
            observer: is shown every call too.
        """
        enable(self._target, strategy, **self._flags)
        refresh(self._target)
        watch = _Watch(known or Tape(), records, observer)
        started = time.perf_counter()
        with observing(watch):
            returned = self._generate(sample)
        result = Result.of(returned)  # on the host, so that all of it has run
        seconds = time.perf_counter() - started
        self.budget.count(watch.ran)
        return Played(result, seconds, watch.tape)

    def names(self) -> dict[Run, str]:
        """The transformer that each run of the last loop was a part of, "" for a bare module."""
        return {run: name for name, state in states_of(self._target) for run in state.runs}


@contextmanager
def rehearsing(
    target: Any, generate: Generate, flags: dict[str, Any], budget: Budget
) -> Iterator[Rehearsal]:
    """Borrow a target: at the end it is as it was, enabled or not."""
    with as_it_was(target), torch.no_grad():
        yield Rehearsal(target, generate, flags, budget)


class _Watch:
    """The observer of one run."""

    def __init__(self, known: Tape, records: bool, also: Observer | None) -> None:
        self._known, self._records, self._also = known, records, also
        self._recalled: set[tuple[str, int]] = set()
        self.tape = Tape()
        self.ran = 0

    def __call__(self, step: Observed) -> None:
        place = step.branch, step.at.index
        if step.finite is not None and place in self._recalled:
            self.tape.calls[place] = self._known.calls[place]
        elif step.finite is not None:
            self.ran += 1
            if self._records:
                residuals = tuple(map(_on_host, step.residuals))
                results = [_on_host(each, copies=True) for each in step.result]
                self.tape.calls[place] = Computed(results, residuals, step.finite)
                self._device = step.finite.device
        if self._also is not None:
            self._also(step)

    def recall(self, branch: str, at: Time) -> Computed | None:
        """What a computed step makes, where a run before has told."""
        made = self._known.calls.get((branch, at.index))
        if made is None:
            return None
        self._recalled.add((branch, at.index))
        device = made.finite.device
        residuals = tuple(each.to(device) for each in made.residuals)
        # Callers may write into results.
        results = [_copied_to(each, device) for each in made.result]
        return Computed(results, residuals, made.finite)


def _on_host(value: Any, copies: bool = False) -> Any:
    return value.to("cpu", copy=copies) if isinstance(value, Tensor) else value


def _copied_to(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
