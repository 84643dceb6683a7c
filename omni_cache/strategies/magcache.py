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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from omni_cache.strategies.base import Gate, is_count, is_number, require
from omni_cache.strategies.calibrated import ByBranch, CalibratedStrategy, of_branch
from omni_cache.strategies.gates import Ratios, Within
from omni_cache.strategies.strategy import Guard, Policy
from omni_cache.strategies.tables import magcache_table


@dataclass(frozen=True, kw_only=True)
class MagCache(CalibratedStrategy):
    """MagCache. `Strategy` and `CalibratedStrategy` have the flags that others take too.

    Attributes:
        threshold (float, default 0.24): accumulated error up to which steps are reused.
        max_skip_steps (int, default 5): most steps in a row that are reused (K in the paper).
        retention_ratio (float, default 0.1): share of the first steps that are always computed.
        mag_ratios (sequence of float, or a mapping of one per branch, optional): the calibrated
            ratios, first entry 1.0; nearest-interpolated to the number of steps. By default the
            published ones of the model's class.
    """

    name: ClassVar[str] = "magcache"
    flag: ClassVar[str] = "mag_ratios"
    numbers: ClassVar[str] = "a sequence of at least one finite number"

    threshold: float = 0.24
    max_skip_steps: int = 5
    retention_ratio: float = 0.1
    mag_ratios: Sequence[float] | Mapping[str, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        threshold, skips, share = self.threshold, self.max_skip_steps, self.retention_ratio
        fits = is_number(threshold) and threshold >= 0
        require(fits, "threshold", threshold, "a finite number >= 0")
        require(is_count(skips, 0), "max_skip_steps", skips, "an integer >= 0")
        fits = is_number(share) and 0 <= share <= 1
        require(fits, "retention_ratio", share, "a number from 0 to 1")

    def guard(self) -> Guard:
        """No signal."""
        return Guard(None, self.forecasting().depth)

    def policy(self, model_class: str | None) -> Policy:
        """The published ratios of a class, unless the flags bring others.

        Raises:
            ValueError: there are neither, and the message says how to calibrate; or the
                calibration is another class's.
        """
        by_branch = self.own_numbers(model_class) or self._published(model_class)

        def gate(branch: str, position: int) -> Gate:
            ratios = of_branch(by_branch, branch, position)
            rule = Ratios(ratios, self.threshold, self.max_skip_steps, self.retention_ratio)
            return Within(rule, self.start, self.end)

        return Policy(None, gate, self.forecasting(), self.num_inference_steps)

    def _published(self, model_class: str | None) -> ByBranch:
        entry = magcache_table(model_class, self.variant)
        if entry is None:
            raise ValueError(
                f"MagCache: no magnitude ratios are published for {model_class or 'this model'}, "
                "and mag_ratios was not given. Measure them: "
                "1. ratios = omni_cache.calibration.estimate_mag_ratios(model, generate); "
                "2. pass mag_ratios=ratios. Or with the command `omni-cache calibrate`."
            )
        return dict(entry.ratios)
