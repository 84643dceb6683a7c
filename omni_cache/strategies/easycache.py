"""EasyCache: leave the model out while its result is predicted to change little.

    k  = |v_0 - v_1| / |x_0 - x_1|      latents and results of the last two computed calls
    e += k |x - x'| / |v_0|             latents of this call and of the one before it
    e < threshold: v = x + (v_0 - x_0);  otherwise compute and e = 0

Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive
Caching", 2025, https://arxiv.org/abs/2507.02860. Each guidance branch decides for itself; in the
authors' code for Wan the conditional one decides for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omni_cache.strategies.base import is_count, is_number, require
from omni_cache.strategies.gates import Accumulate, WarmUp, Within
from omni_cache.strategies.signals import PredictedChange
from omni_cache.strategies.strategy import Guard, Policy, Strategy


@dataclass(frozen=True, kw_only=True)
class EasyCache(Strategy):
    """EasyCache. `Strategy` has the flags that every strategy takes.

    Attributes:
        threshold (float, default 0.05): predicted change of the result, added up, at which a step
            is computed. 0 computes every step.
        retention_steps (int, default 7): how many first steps are always computed.
        force_last_step (bool, default True): always compute the last step. Takes effect when the
            number of steps is known.
    """

    name: ClassVar[str] = "easycache"

    threshold: float = 0.05
    retention_steps: int = 7
    force_last_step: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = is_number(self.threshold) and self.threshold >= 0
        require(fits, "threshold", self.threshold, "a finite number >= 0")
        steps, last = self.retention_steps, self.force_last_step
        require(is_count(steps, 0), "retention_steps", steps, "an integer >= 0")
        require(isinstance(last, bool), "force_last_step", last, "True or False")

    def guard(self) -> Guard:
        """The whole model; its results are updates of the latents."""
        depth = max(self.forecasting().depth, PredictedChange.looks_back)
        return Guard("latents", depth, whole=True)

    def policy(self, model_class: str | None) -> Policy:
        """The same for every class."""
        warm = WarmUp(Accumulate((1.0, 0.0), self.threshold), self.retention_steps)
        gate = Within(warm, self.start, self.end, self.force_last_step)
        steps = self.num_inference_steps
        signal = PredictedChange()
        return Policy(signal, lambda branch, position: gate, self.forecasting(), steps)
