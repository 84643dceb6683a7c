"""DBCache: the first n and the last m blocks always run; what the first add decides on the others.

    d = mean|r_n - r_n'| / mean|r_n'|     r_n' of the last computed step
    d < residual_diff_threshold: reuse the residual of the blocks between;  otherwise compute

with steps that are computed in any case, and limits on those that are reused.
https://github.com/vipshop/cache-dit
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omni_cache.strategies.base import is_count, is_number, require
from omni_cache.strategies.gates import Limit, Threshold, WarmUp, Within
from omni_cache.strategies.signals import RelativeL1
from omni_cache.strategies.strategy import Guard, Policy, Strategy


@dataclass(frozen=True, kw_only=True)
class DBCache(Strategy):
    """DBCache. `Strategy` has the flags that every strategy takes.

    Attributes:
        fn_compute_blocks (int, default 8): how many blocks at the beginning always run.
        bn_compute_blocks (int, default 0): how many blocks at the end always run.
        residual_diff_threshold (float, default 0.08): relative change of the first blocks' residual
            below which a step is reused. 0 computes every step.
        max_accumulated_residual_diff_threshold (float, optional): once all measured changes add up
            to it, the rest of the generation is computed.
        max_warmup_steps (int, default 8): the first steps, which are computed.
        warmup_interval (int, default 1): of those, only every so many are.
        max_cached_steps (int, optional): most steps of a generation that are reused.
        max_continuous_cached_steps (int, optional): most steps in a row that are reused.
    """

    name: ClassVar[str] = "dbcache"

    fn_compute_blocks: int = 8
    bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int | None = None
    max_continuous_cached_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, least in (
            ("fn_compute_blocks", 1),
            ("bn_compute_blocks", 0),
            ("max_warmup_steps", 0),
            ("warmup_interval", 1),
        ):
            value = getattr(self, flag)
            require(is_count(value, least), flag, value, f"an integer >= {least}")
        for flag in ("max_cached_steps", "max_continuous_cached_steps"):
            value = getattr(self, flag)
            require(value is None or is_count(value, 0), flag, value, "an integer >= 0 or None")
        threshold = self.residual_diff_threshold
        fits = is_number(threshold) and threshold >= 0
        require(fits, "residual_diff_threshold", threshold, "a finite number >= 0")
        most = self.max_accumulated_residual_diff_threshold
        fits = most is None or (is_number(most) and most > 0)
        allowed = "a finite number > 0 or None"
        require(fits, "max_accumulated_residual_diff_threshold", most, allowed)

    def guard(self) -> Guard:
        """The blocks between the first and the last ones."""
        depth, first, last = (
            self.forecasting().depth,
            self.fn_compute_blocks,
            self.bn_compute_blocks,
        )
        return Guard("first_blocks", depth, first, last)

    def policy(self, model_class: str | None) -> Policy:
        """The same for every class."""
        most = self.max_accumulated_residual_diff_threshold
        rule = Threshold(self.residual_diff_threshold, most)
        limited = Limit(rule, self.max_cached_steps, self.max_continuous_cached_steps)
        warm = WarmUp(limited, self.max_warmup_steps, self.warmup_interval)
        gate = Within(warm, self.start, self.end)
        signal = RelativeL1("last computed call")
        steps = self.num_inference_steps
        return Policy(signal, lambda branch, position: gate, self.forecasting(), steps)
