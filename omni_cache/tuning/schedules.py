"""Plans from what was calibrated, without running the model: schedules, and least-squares rows.

Knows inner products and sensitivities; nothing of samples and targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from omni_cache.planning.gram import FittedCosts, Gram, fit, fit_outputs, fits, fits_outputs
from omni_cache.planning.search import COMPUTE, SKIP, Schedule, frontier
from omni_cache.strategies.plans import Point
from omni_cache.tuning.gather import Course
from omni_cache.tuning.sensitivity import Sensitivity


@dataclass(frozen=True)
class Model:
    """What is known of a target: enough to price any plan.

    Attributes:
        grams: of all courses, means over the calibration samples.
        sensitivity: of the final result to each step.
        depth: how many computed steps are kept.
        skips: whether forwards may be skipped.
    """

    grams: Mapping[Course, Gram]
    sensitivity: Sensitivity
    depth: int
    skips: bool = False

    @property
    def steps(self) -> int:
        """Of a loop."""
        return len(self.sensitivity.residuals)

    @property
    def owners(self) -> list[str]:
        """The transformer that runs each step."""
        owners = [""] * self.steps
        for course, gram in self.grams.items():
            for step in np.flatnonzero(gram.present):
                owners[int(step)] = course.transformer
        return owners

    def schedules(self, with_input: bool, skips: bool = False) -> list[Schedule]:
        """The best schedule of every budget, by what the forecasts are off at the end."""
        grams = list(self.grams.values())
        reuse = FittedCosts(grams, self.sensitivity.residuals, partial(fits, with_input=with_input))
        skip = FittedCosts(grams, self.sensitivity.outputs, fits_outputs) if skips else None
        return frontier(self.steps, self.depth, reuse, skip, owner=self.owners)

    def fitted(self, actions: Sequence[str], with_input: bool) -> Point:
        """A plan with these actions and with the rows that are best step by step."""
        rows: dict[str, dict[int, tuple[float, ...]]] = {}
        skipped: dict[str, dict[int, tuple[float, ...]]] = {}
        inputs: dict[str, dict[int, float]] = {}
        schedule, owners = Schedule(tuple(actions), 0.0), self.owners
        for (_, branch), gram in self.grams.items():
            for step, action in enumerate(actions):
                if action == COMPUTE or not gram.present[step]:
                    continue
                kept = schedule.kept(step, self.depth, owners)
                if action == SKIP:
                    skipped.setdefault(branch, {})[step] = fit_outputs(gram, kept, step).weights
                    continue
                found = fit(gram, kept, step, with_input)
                rows.setdefault(branch, {})[step] = found.weights
                if with_input:
                    inputs.setdefault(branch, {})[step] = found.input_weight
        return Point(tuple(actions), rows=rows, input_weights=inputs, skip_rows=skipped)
