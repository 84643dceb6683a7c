"""DBCache: the first n and the last m blocks always run; what the first add decides on the others.

    d = mean|r_n - r_n'| / mean|r_n'|     r_n' of the last computed step
    d < residual_diff_threshold: reuse the residual of the blocks between;  otherwise compute

with steps that are computed in any case, and limits on those that are reused. Each guidance branch
decides for itself, as with cache-dit's ``enable_separate_cfg=True``. Branches that come in one
batch are one.
https://github.com/vipshop/cache-dit
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

from omni_cache.strategies.base import Gate, is_count, is_number, require
from omni_cache.strategies.gates import Limit, Threshold, WarmUp, Within
from omni_cache.strategies.masks import PRESETS
from omni_cache.strategies.schedules import Mask, Refresh, Reuse
from omni_cache.strategies.signals import RelativeL1
from omni_cache.strategies.strategy import Guard, Policy, Strategy


@dataclass(frozen=True, kw_only=True)
class DBCache(Strategy):
    """DBCache. `Strategy` has the flags that every strategy takes. Steps are those of a branch.

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
        steps_computation_mask (optional): a 1 for each step that is computed and a 0 for each that
            may be reused, or the preset "slow", "medium", "fast" or "ultra" (see ``masks``). It
            takes the warm-up's place.
        steps_computation_policy (str, default "dynamic"): "dynamic" decides by the threshold and
            the limits where the mask has a 0; "static" reuses there and measures nothing.
        force_refresh_step_hint (int, optional): the step at which everything begins anew: residuals
            are dropped, warm-up, mask and limits count from there.
        force_refresh_step_policy (str, default "once"): "repeat" does so every so many steps.
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
    steps_computation_mask: Sequence[int] | str | None = None
    steps_computation_policy: str = "dynamic"
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"

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
        hint = self.force_refresh_step_hint
        fits = hint is None or is_count(hint, 1)
        require(fits, "force_refresh_step_hint", hint, "an integer >= 1 or None")
        for flag, one, other in (
            ("steps_computation_policy", "dynamic", "static"),
            ("force_refresh_step_policy", "once", "repeat"),
        ):
            value = getattr(self, flag)
            require(value in (one, other), flag, value, f"{one!r} or {other!r}")
        object.__setattr__(self, "steps_computation_mask", _mask(self.steps_computation_mask))
        require(
            self.steps_computation_policy == "dynamic" or self.steps_computation_mask is not None,
            "steps_computation_policy",
            self.steps_computation_policy,
            "'dynamic' without a steps_computation_mask",
        )
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
        mask, is_static = self.steps_computation_mask, self.steps_computation_policy == "static"
        rule: Gate = Reuse()
        if not is_static:
            most = self.max_accumulated_residual_diff_threshold
            rule = Threshold(self.residual_diff_threshold, most)
            rule = Limit(rule, self.max_cached_steps, self.max_continuous_cached_steps)
        if mask is None:
            rule = WarmUp(rule, self.max_warmup_steps, self.warmup_interval)
        else:
            rule = Mask(rule, mask)
        repeats = self.force_refresh_step_policy == "repeat"
        rule = Refresh(rule, self.force_refresh_step_hint, repeats)
        gate = Within(rule, self.start, self.end)
        signal = None if is_static else RelativeL1("last computed call")
        steps = self.num_inference_steps
        return Policy(signal, lambda branch, position: gate, self.forecasting(), steps)


def _mask(given: Any) -> tuple[int, ...] | str | None:
    """The mask as a tuple, its preset's name, or None."""
    if given is None or (isinstance(given, str) and given in PRESETS):
        return given
    bits = list(given) if isinstance(given, Iterable) else []
    fits = len(bits) > 0 and all(isinstance(each, Integral) and each in (0, 1) for each in bits)
    names = ", ".join(map(repr, PRESETS))
    allowed = f"one of {names}, a sequence of zeros and ones, or None"
    require(fits, "steps_computation_mask", given, allowed)
    return tuple(map(int, bits))
