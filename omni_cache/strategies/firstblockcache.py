"""First Block Cache: the first block always runs, and what it adds says whether the others have to.

    d = mean|r_1 - r_1'| / mean|r_1'|     r_1' of the last computed step
    d < threshold: reuse the residual of the other blocks;  otherwise compute

https://github.com/chengzeyi/ParaAttention; `apply_first_block_cache` of diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omni_cache.strategies.base import is_number, require
from omni_cache.strategies.gates import Threshold, Within
from omni_cache.strategies.signals import RelativeL1
from omni_cache.strategies.strategy import Guard, Policy, Strategy


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(Strategy):
    """First Block Cache. `Strategy` has the flags that every strategy takes.

    Attributes:
        threshold (float, default 0.05): relative change of the first block's residual below which
            a step is reused.
    """

    name: ClassVar[str] = "first_block_cache"

    threshold: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = is_number(self.threshold) and self.threshold >= 0
        require(fits, "threshold", self.threshold, "a finite number >= 0")

    def guard(self) -> Guard:
        """The first block outside of the region."""
        return Guard("first_blocks", self.forecasting().depth, first=1)

    def policy(self, model_class: str | None) -> Policy:
        """The same for every class."""
        gate = Within(Threshold(self.threshold), self.start, self.end)
        signal = RelativeL1("last computed call")
        steps = self.num_inference_steps
        return Policy(signal, lambda branch, position: gate, self.forecasting(), steps)
