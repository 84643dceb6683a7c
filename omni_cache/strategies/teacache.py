"""TeaCache: reuse until the accumulated, rescaled change of the signal reaches a threshold.

    d_t  = mean|s_t - s_{t-1}| / (mean|s_{t-1}| + 1e-8)
    acc += |poly(d_t)|
    acc < rel_l1_thresh: reuse;  otherwise compute and acc = 0

Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", CVPR 2025,
https://arxiv.org/abs/2411.19108. The polynomial maps the change of the signal to that of the
model's output and is fitted per model; the published ones are in ``omni_cache.calibration``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from omni_cache.kernels import rel_l1_gate, rel_l1_workspace
from omni_cache.strategies.base import (
    BoundStrategy,
    Decision,
    Gate,
    Step,
    Strategy,
    finite_numbers,
    is_count,
    is_number,
    require,
)
from omni_cache.strategies.tables import teacache_table

IDENTITY = (1.0, 0.0)
"""Coefficients of the polynomial that leaves a distance as it is."""


@dataclass(frozen=True)
class TeaCacheConfig(Strategy):
    """TeaCache.

    Attributes:
        rel_l1_thresh (float, default 0.2): accumulated relative-L1 change at which a step is
            computed. 0 computes every step; larger is faster and less exact.
        coefficients (sequence of float, optional): the rescaling polynomial, highest power first.
            By default the published one of the model's class; a class without one uses the
            identity.
        variant (str, optional): which published polynomial, where a class has several.
        num_inference_steps (int, optional): steps of a generation, where the run time is not told
            otherwise.
        force_last_step (bool, default False): always compute the last step. Takes effect when the
            number of steps is known.
        calibrate (bool, default False): compute every step and measure what
            ``omni_cache.calibration.estimate_coefficients`` fits.
    """

    name: ClassVar[str] = "teacache"
    has_signal: ClassVar[bool] = True
    run_time: ClassVar[tuple[str, ...]] = (
        "rel_l1_thresh",
        "num_inference_steps",
        "force_last_step",
    )

    rel_l1_thresh: float = 0.2
    coefficients: Sequence[float] | None = None
    variant: str | None = None
    num_inference_steps: int | None = None
    force_last_step: bool = False
    calibrate: bool = False

    def __post_init__(self) -> None:
        require(
            is_number(self.rel_l1_thresh) and self.rel_l1_thresh >= 0,
            "rel_l1_thresh",
            self.rel_l1_thresh,
            "a finite number >= 0",
        )
        steps = self.num_inference_steps
        require(
            steps is None or is_count(steps, 1),
            "num_inference_steps",
            steps,
            "an integer >= 1 or None",
        )
        for flag in ("force_last_step", "calibrate"):
            given = getattr(self, flag)
            require(isinstance(given, bool), flag, given, "True or False")
        variant = self.variant
        require(variant is None or isinstance(variant, str), "variant", variant, "a string or None")
        if self.coefficients is not None:
            require(variant is None, "variant", variant, "None when coefficients are given")
            allowed = "a sequence of at least one finite number, highest power first"
            numbers = finite_numbers("coefficients", self.coefficients, allowed)
            object.__setattr__(self, "coefficients", numbers)

    def bind(self, model_class: str | None) -> TeaCache:
        """The published polynomial and signal of a class, unless the config names its own."""
        if self.calibrate:
            # On the signal that fitted coefficients are going to be used with.
            return TeaCache(self, IDENTITY, "auto")
        if self.coefficients is not None:
            return TeaCache(self, tuple(self.coefficients), "auto")
        entry = teacache_table(model_class, self.variant)
        if entry is None:
            warnings.warn(
                f"TeaCache: no coefficients are published for {model_class or 'this model'}; "
                "the identity polynomial is used. Fit some with "
                "omni_cache.calibration.estimate_coefficients and pass coefficients=[...].",
                stacklevel=2,
            )
            return TeaCache(self, IDENTITY, "auto")
        return TeaCache(self, entry.coefficients, entry.signal)


class TeaCache(BoundStrategy):
    """TeaCache with its polynomial chosen."""

    def __init__(
        self, config: TeaCacheConfig, coefficients: tuple[float, ...], signal: str
    ) -> None:
        self.config = config
        self.coefficients = coefficients
        self.signal = signal

    def make_gate(self, branch: str, branch_position: int) -> Gate:
        """A gate; all branches decide alike."""
        if self.config.calibrate:
            return TeaCacheCalibration(self)
        return RelL1Gate(self)


class RelL1Gate(Gate):
    """The gate of TeaCache. All state lies on the signal's device; one launch decides."""

    def __init__(self, strategy: TeaCache) -> None:
        self.strategy = strategy
        self.previous: Tensor | None = None
        self.accumulated: Tensor | None = None

    def decide(self, step: Step) -> Decision:
        """Compare the signal with that of the call before."""
        assert step.signal is not None, "TeaCache needs a signal"
        config = self.strategy.config
        # The kernel compares the dtypes that models run in; float64 is compared in float32.
        wide = step.signal.dtype == torch.float64
        signal = step.signal.float() if wide else step.signal
        if self.previous is None or self.accumulated is None:
            self._start(signal)
            return Decision(True, "first step")
        if not step.can_reuse:
            self._advance(signal)
            return Decision(True, "no residual")
        is_last = (
            step.num_inference_steps is not None and step.index >= step.num_inference_steps - 1
        )
        if config.force_last_step and is_last:
            self._advance(signal)
            return Decision(True, "last step")
        verdict = rel_l1_gate(
            signal,
            self.previous,
            self.accumulated,
            self.workspace,
            self.coefficients,
            config.rel_l1_thresh,
        )
        compute, distance, accumulated = step.read(verdict)
        if compute:
            finite = math.isfinite(distance) and math.isfinite(accumulated)
            reason = "threshold reached" if finite else "non-finite distance"
            return Decision(True, reason, distance, accumulated)
        return Decision(False, "below threshold", distance, accumulated)

    def overrule(self) -> None:
        """A computed step starts the accumulation anew."""
        if self.accumulated is not None:
            self.accumulated.zero_()

    def fork(self) -> RelL1Gate:
        """A copy with its own previous signal and accumulator."""
        copy = RelL1Gate(self.strategy)
        if self.previous is not None and self.accumulated is not None:
            copy.previous, copy.accumulated = self.previous.clone(), self.accumulated.clone()
            copy.workspace, copy.coefficients = self.workspace, self.coefficients
        return copy

    @property
    def memory_bytes(self) -> int:
        """Bytes of the previous signal."""
        return 0 if self.previous is None else self.previous.nbytes

    def _start(self, signal: Tensor) -> None:
        self.previous = signal.clone(memory_format=torch.contiguous_format)
        self.accumulated = torch.zeros(1, dtype=torch.float64, device=signal.device)
        self.workspace = rel_l1_workspace(signal.device)
        self.coefficients = torch.tensor(
            self.strategy.coefficients, dtype=torch.float64, device=signal.device
        )

    def _advance(self, signal: Tensor) -> None:
        assert self.previous is not None
        assert self.accumulated is not None
        self.previous.copy_(signal)
        self.accumulated.zero_()


class TeaCacheCalibration(Gate):
    """Computes every step and measures the change of the signal beside that of the output."""

    def __init__(self, strategy: TeaCache) -> None:
        self.strategy = strategy
        self.signal: Tensor | None = None
        self.output: Tensor | None = None
        self.signal_change: float | None = None

    def decide(self, step: Step) -> Decision:
        """Always compute."""
        assert step.signal is not None, "TeaCache needs a signal"
        self.signal_change = None
        if self.signal is not None:
            self.signal_change = relative_l1(step.signal, self.signal)
        self.signal = step.signal.clone()
        return Decision(True, "calibration", distance=self.signal_change)

    def overrule(self) -> None:
        """Nothing accumulates."""

    def fork(self) -> TeaCacheCalibration:
        """A copy that shares the measured tensors, which are never written in place."""
        copy = TeaCacheCalibration(self.strategy)
        copy.signal, copy.output = self.signal, self.output
        copy.signal_change = self.signal_change
        return copy

    def observe(self, residuals: tuple[Tensor, ...], output: Tensor) -> dict[str, float]:
        """The relative-L1 changes of signal and output since the call before."""
        changes: dict[str, float] = {}
        if self.output is not None and self.signal_change is not None:
            changes = {
                "signal_change": self.signal_change,
                "output_change": relative_l1(output, self.output),
            }
        self.output = output.detach().clone()
        return changes

    @property
    def memory_bytes(self) -> int:
        """Bytes of the previous signal and output."""
        return sum(each.nbytes for each in (self.signal, self.output) if each is not None)


def relative_l1(current: Tensor, previous: Tensor) -> float:
    """``mean|cur - prev| / (mean|prev| + 1e-8)`` in fp32, as the TeaCache rule defines it."""
    change = (current.float() - previous.float()).abs().mean()
    return float(change / (previous.float().abs().mean() + 1e-8))
