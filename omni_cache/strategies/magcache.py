"""MagCache: reuse while the residual's magnitude, known from a calibration, says that it is safe.

    from step int(retention_ratio * N + 0.5) on, at every step t:
        ratio *= mag_ratios[t];  skipped += 1;  err += |1 - ratio|
        err <= threshold and skipped <= max_skip_steps: reuse
        otherwise ratio, skipped, err = 1, 0, 0 and compute

Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache", 2025,
https://arxiv.org/abs/2506.09045. ``mag_ratios[t]`` is the mean over tokens of |r_t| / |r_{t-1}|.
The decision needs no data, so it is taken on the host, without a sync.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from omni_cache.kernels import magnitude_stats
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
from omni_cache.strategies.tables import magcache_table

DEFAULT_STEPS = 28
"""Number of inference steps that is assumed when nobody says."""

NUMBERS = "a sequence of at least one finite number"


@dataclass(frozen=True)
class MagCacheConfig(Strategy):
    """MagCache.

    Attributes:
        threshold (float, default 0.24): accumulated error up to which steps are reused.
        max_skip_steps (int, default 5): most steps in a row that are reused (K in the paper).
        retention_ratio (float, default 0.1): share of the first steps that are always computed.
        num_inference_steps (int, optional): steps of a generation, where the run time is not told
            otherwise; 28 when nobody says.
        mag_ratios (sequence of float, or a mapping of one per branch, optional): the calibrated
            ratios, first entry 1.0; nearest-interpolated to the number of steps. By default the
            published ones of the model's class.
        variant (str, optional): which published ratios, where a class has several.
        calibrate (bool, default False): compute every step and measure the ratios; see
            ``omni_cache.calibration.estimate_mag_ratios``.
    """

    name: ClassVar[str] = "magcache"
    has_signal: ClassVar[bool] = False
    run_time: ClassVar[tuple[str, ...]] = (
        "threshold",
        "max_skip_steps",
        "retention_ratio",
        "num_inference_steps",
    )

    threshold: float = 0.24
    max_skip_steps: int = 5
    retention_ratio: float = 0.1
    num_inference_steps: int | None = None
    mag_ratios: Sequence[float] | Mapping[str, Sequence[float]] | None = None
    variant: str | None = None
    calibrate: bool = False

    def __post_init__(self) -> None:
        require(
            is_number(self.threshold) and self.threshold >= 0,
            "threshold",
            self.threshold,
            "a finite number >= 0",
        )
        require(
            is_count(self.max_skip_steps, 0),
            "max_skip_steps",
            self.max_skip_steps,
            "an integer >= 0",
        )
        require(
            is_number(self.retention_ratio) and 0 <= self.retention_ratio <= 1,
            "retention_ratio",
            self.retention_ratio,
            "a number from 0 to 1",
        )
        steps = self.num_inference_steps
        require(
            steps is None or is_count(steps, 1),
            "num_inference_steps",
            steps,
            "an integer >= 1 or None",
        )
        require(isinstance(self.calibrate, bool), "calibrate", self.calibrate, "True or False")
        variant, tables = self.variant, self.mag_ratios
        require(variant is None or isinstance(variant, str), "variant", variant, "a string or None")
        if tables is None:
            return
        require(variant is None, "variant", variant, "None when mag_ratios are given")
        allowed = f"{NUMBERS}, or a mapping of branch names to such"
        if isinstance(tables, Mapping):
            named = len(tables) > 0 and all(isinstance(name, str) for name in tables)
            require(named, "mag_ratios", tables, allowed)
            numbers: Any = {
                name: finite_numbers(f"mag_ratios[{name!r}]", each, NUMBERS)
                for name, each in tables.items()
            }
        else:
            numbers = finite_numbers("mag_ratios", tables, allowed)
        object.__setattr__(self, "mag_ratios", numbers)

    def bind(self, model_class: str | None) -> MagCache:
        """The published ratios of a class, unless the config brings its own.

        Raises:
            ValueError: neither are there; the message says how to calibrate.
        """
        if self.calibrate:
            return MagCache(self, {})
        if self.mag_ratios is not None:
            own = self.mag_ratios
            return MagCache(self, dict(own) if isinstance(own, Mapping) else {"cond": tuple(own)})
        entry = magcache_table(model_class, self.variant)
        if entry is None:
            raise ValueError(
                f"MagCache: no magnitude ratios are published for {model_class or 'this model'}, "
                "and mag_ratios was not given. Measure them: "
                "1. ratios = omni_cache.calibration.estimate_mag_ratios(model, generate); "
                "2. pass mag_ratios=ratios."
            )
        return MagCache(self, entry.ratios)


class MagCache(BoundStrategy):
    """MagCache with its ratios chosen, by branch."""

    def __init__(self, config: MagCacheConfig, ratios: Mapping[str, Sequence[float]]) -> None:
        self.config = config
        self.ratios = {name: tuple(values) for name, values in ratios.items()}
        self.signal = None

    def make_gate(self, branch: str, branch_position: int) -> Gate:
        """A gate with the branch's own ratios, found by name, else by position, else the first."""
        if self.config.calibrate:
            return MagCacheCalibration()
        by_position = list(self.ratios.values())
        ratios = self.ratios.get(branch)
        if ratios is None:
            ratios = by_position[branch_position] if branch_position < len(by_position) else None
        return MagnitudeGate(self.config, by_position[0] if ratios is None else ratios)


class MagnitudeGate(Gate):
    """The gate of MagCache."""

    def __init__(self, config: MagCacheConfig, ratios: tuple[float, ...]) -> None:
        self.config = config
        self.ratios = ratios
        self.overrule()

    def decide(self, step: Step) -> Decision:
        """Follow the magnitude that the calibration predicts."""
        config = self.config
        total = step.num_inference_steps or DEFAULT_STEPS
        ratios = nearest_interpolation(self.ratios, total)
        if step.index < int(config.retention_ratio * total + 0.5):
            return Decision(True, "first step" if step.index == 0 else "retention")
        if step.index >= total:
            return self._decide_beyond(step, total)
        self.ratio *= ratios[step.index]
        self.skipped += 1
        self.error += abs(1.0 - self.ratio)
        distance, error = abs(1.0 - self.ratio), self.error
        if not step.can_reuse:
            reason = "first step" if step.index == 0 else "no residual"
        elif not error <= config.threshold:
            reason = "threshold reached"
        elif self.skipped > config.max_skip_steps:
            reason = "max_skip_steps"
        else:
            return Decision(False, "below threshold", distance, error)
        self.overrule()
        return Decision(True, reason, distance, error)

    def _decide_beyond(self, step: Step, total: int) -> Decision:
        """Compute: no ratio says how a step behind the last one changes."""
        if step.num_inference_steps is None:
            warnings.warn(
                f"MagCache: nobody said how many steps there are, so {total} were assumed; from "
                "there on all are computed. Pass num_inference_steps=..., or name it in "
                "omni_cache.generation(...).",
                stacklevel=2,
            )
        self.overrule()
        return Decision(True, "no ratio")

    def overrule(self) -> None:
        """A computed step starts the accumulation anew."""
        self.ratio, self.skipped, self.error = 1.0, 0, 0.0

    def fork(self) -> MagnitudeGate:
        """A copy with its own accumulators."""
        copy = MagnitudeGate(self.config, self.ratios)
        copy.ratio, copy.skipped, copy.error = self.ratio, self.skipped, self.error
        return copy


class MagCacheCalibration(Gate):
    """Computes every step and measures the magnitude of the residual against the step before."""

    def __init__(self) -> None:
        self.previous: Tensor | None = None

    def decide(self, step: Step) -> Decision:
        """Always compute."""
        return Decision(True, "calibration")

    def overrule(self) -> None:
        """Nothing accumulates."""

    def fork(self) -> MagCacheCalibration:
        """A copy that shares the previous residual, which is never written in place."""
        copy = MagCacheCalibration()
        copy.previous = self.previous
        return copy

    def observe(self, residuals: tuple[Tensor, ...], output: Tensor) -> dict[str, float]:
        """Per-token norm ratio (mean, spread) and cosine distance of the largest residual."""
        residual = max(residuals, key=Tensor.numel)
        # The kernel measures the dtypes that models run in; float64 is measured in float32.
        residual = residual.float() if residual.dtype == torch.float64 else residual
        measured: dict[str, float] = {"mag_ratio": 1.0}
        if self.previous is not None and self.previous.shape == residual.shape:
            mean, deviation, distance = magnitude_stats(residual, self.previous).tolist()
            measured = {"mag_ratio": mean, "mag_std": deviation, "cosine_distance": distance}
        self.previous = residual
        return measured


@lru_cache(maxsize=256)
def nearest_interpolation(ratios: tuple[float, ...], length: int) -> tuple[float, ...]:
    """Ratios of another number of steps, nearest neighbour (rule as published with MagCache)."""
    if length == len(ratios):
        return ratios
    if length == 1:
        return (ratios[-1],)
    scale = (len(ratios) - 1) / (length - 1)
    return tuple(ratios[round(step * scale)] for step in range(length))
