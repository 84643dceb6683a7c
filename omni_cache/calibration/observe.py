"""Observers: what calibration measures of computed steps. They know tensors and places only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from omni_cache.kernels import magnitude_stats
from omni_cache.runtime.contexts import Observed, Run
from omni_cache.strategies.signals import RelativeL1


class Measured(NamedTuple):
    """What was measured at one step, with the place of it."""

    run: Run
    generation: int
    branch: str
    step: int
    value: Any


@dataclass
class MagnitudeRatios:
    """Measures the magnitude of each step's residual against that of the step before.

    ``steps`` hold the mean over tokens of |r_t| / |r_(t-1)|; 1.0 at a model's first step.
    """

    steps: list[Measured] = field(default_factory=list)
    _before: dict[str, tuple[object, Tensor]] = field(default_factory=dict)

    def __call__(self, step: Observed) -> None:
        """Look at a call; only one that has left residuals tells something."""
        if not step.residuals:
            return
        residual = max(step.residuals, key=Tensor.numel)
        # The kernel measures the dtypes that models run in; float64 is measured in float32.
        residual = residual.float() if residual.element_size() == 8 else residual
        run, before = self._before.get(step.branch, (None, residual))
        ratio = 1.0
        if run is step.run and before.shape == residual.shape:
            ratio = float(magnitude_stats(residual, before)[0])
        self._before[step.branch] = step.run, residual.clone()  # it is the call's own
        self.steps.append(_measured(step, ratio))


@dataclass
class SignalAndOutput:
    """Measures how much signal and output change from step to step, as TeaCache's rule does.

    ``steps`` hold pairs of relative-L1 distances.
    """

    steps: list[Measured] = field(default_factory=list)
    _before: dict[str, tuple[object, Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, step: Observed) -> None:
        """Look at a call; only one that has left residuals tells something."""
        if not step.residuals:
            return
        assert step.signal is not None, "TeaCache needs a signal"
        signal, output = step.signal.clone(), step.output.detach().clone()
        run, *before = self._before.get(step.branch, (None, signal, output))
        if run is step.run:
            measure = RelativeL1()
            pairs = zip((signal, output), before, strict=True)
            changes = [measure.distance(measure.measure(*each, ()).tolist()) for each in pairs]
            self.steps.append(_measured(step, tuple(changes)))
        self._before[step.branch] = step.run, signal, output


def _measured(step: Observed, value: Any) -> Measured:
    return Measured(step.run, step.generation, step.branch, step.at.index, value)
