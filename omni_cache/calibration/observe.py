"""Observers: what calibration measures of computed steps. They know tensors and places only."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from omni_cache.kernels import magnitude_stats
from omni_cache.runtime.contexts import Observed
from omni_cache.strategies.signals import RelativeL1

Series = dict[tuple[int, str], list[Any]]
"""What was measured at each step, for each generation (by a number) and guidance branch."""


@dataclass
class MagnitudeRatios:
    """Measures the magnitude of each step's residual against that of the step before.

    ``series`` holds the mean over tokens of |r_t| / |r_(t-1)|; 1.0 at a model's first step.
    """

    series: Series = field(default_factory=lambda: defaultdict(list))
    _before: dict[str, tuple[object, Tensor]] = field(default_factory=dict)

    def __call__(self, step: Observed) -> None:
        """Look at a computed step."""
        residual = max(step.residuals, key=Tensor.numel)
        # The kernel measures the dtypes that models run in; float64 is measured in float32.
        residual = residual.float() if residual.element_size() == 8 else residual
        run, before = self._before.get(step.branch, (None, residual))
        ratio = 1.0
        if run is step.run and before.shape == residual.shape:
            ratio = float(magnitude_stats(residual, before)[0])
        self._before[step.branch] = step.run, residual
        self.series[step.generation, step.branch].append(ratio)


@dataclass
class SignalAndOutput:
    """Measures how much signal and output change from step to step, as TeaCache's rule does.

    ``series`` holds pairs of relative-L1 distances.
    """

    series: Series = field(default_factory=lambda: defaultdict(list))
    _before: dict[str, tuple[object, Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, step: Observed) -> None:
        """Look at a computed step."""
        assert step.signal is not None, "TeaCache needs a signal"
        signal, output = step.signal, step.output.detach().clone()
        run, *before = self._before.get(step.branch, (None, signal, output))
        if run is step.run:
            measure = RelativeL1()
            pairs = zip((signal, output), before, strict=True)
            changes = [measure.distance(measure.measure(*each, ()).tolist()) for each in pairs]
            self.series[step.generation, step.branch].append(tuple(changes))
        self._before[step.branch] = step.run, signal, output
