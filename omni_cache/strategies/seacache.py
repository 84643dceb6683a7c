"""SeaCache: as TeaCache, but by latents whose noise is filtered out, and without coefficients.

    d    = mean|y - y'| / mean|y'|     y: the latents, filtered for their sigma; y' of the last call
    acc += d
    acc < threshold: reuse, but so many steps in a row at most;  otherwise compute and acc = 0

Chung et al., "SeaCache: Spectral-Evolution-Aware Cache for Accelerating Diffusion Models", CVPR
2026, https://arxiv.org/abs/2602.18993. The flags' defaults are those that the hooks of diffusers
and vLLM-Omni have in common, for video. The authors' scripts differ: signal="auto",
forecast="hold", max_consecutive_cached=0, and for images power_exp=2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from omni_cache.strategies.base import Forecast, Time, Verdict, is_count, is_number, require
from omni_cache.strategies.gates import Accumulate, Within, Wrapped
from omni_cache.strategies.signals import FilteredL1
from omni_cache.strategies.strategy import Guard, Policy, Strategy


@dataclass(frozen=True, kw_only=True)
class SeaCache(Strategy):
    """SeaCache. `Strategy` has the flags that every strategy takes.

    Attributes:
        threshold (float, default 0.25): accumulated change of the filtered latents at which a step
            is computed. 0 computes every step.
        power_exp (float, default 3): exponent of the power that clean latents have at a frequency.
        max_consecutive_cached (int, default 2): most steps in a row that are reused; 0 for any
            number.
        retention_steps (int, default 1): how many first steps are always computed.
        cache_end_steps (int, default 1): how many last steps are always computed. Takes effect
            when the number of steps is known.
        grid (sequence of int, optional): height and width, or frames, height and width in tokens,
            for latents that the model takes as (B, S, C). Without it these are filtered along S.
        forecast (default "newton"): see `Strategy`; with forecast_axis "step".
    """

    name: ClassVar[str] = "seacache"

    threshold: float = 0.25
    power_exp: float = 3.0
    max_consecutive_cached: int = 2
    retention_steps: int = 1
    cache_end_steps: int = 1
    grid: Sequence[int] | None = None
    forecast: str | Forecast = "newton"
    forecast_axis: str = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = is_number(self.threshold) and self.threshold >= 0
        require(fits, "threshold", self.threshold, "a finite number >= 0")
        fits = is_number(self.power_exp) and self.power_exp > 0
        require(fits, "power_exp", self.power_exp, "a finite number > 0")
        for flag in ("max_consecutive_cached", "retention_steps", "cache_end_steps"):
            value = getattr(self, flag)
            require(is_count(value, 0), flag, value, "an integer >= 0")
        if self.grid is not None:
            sizes = tuple(self.grid) if isinstance(self.grid, Sequence) else ()
            fits = len(sizes) > 0 and all(is_count(each, 1) for each in sizes)
            require(fits, "grid", self.grid, "a sequence of integers >= 1, or None")
            object.__setattr__(self, "grid", sizes)

    def guard(self) -> Guard:
        """All blocks; the latents as they enter the model are compared."""
        return Guard("latents", self.forecasting().depth)

    def policy(self, model_class: str | None) -> Policy:
        """The same for every class."""
        rule = Accumulate((1.0, 0.0), self.threshold)
        spared = Spared(rule, self.retention_steps, self.cache_end_steps)
        gate = Within(InARow(spared, self.max_consecutive_cached), self.start, self.end)
        signal = FilteredL1(self.power_exp, None if self.grid is None else tuple(self.grid))
        steps = self.num_inference_steps
        return Policy(signal, lambda branch, position: gate, self.forecasting(), steps)


@dataclass(frozen=True)
class Spared(Wrapped):
    """Computes so many first and last steps.

    Attributes:
        first: how many first steps.
        last: how many last ones, where the number of steps is known.
    """

    first: int = 0
    last: int = 0

    def against(self, at: Time, total: int | None) -> str | None:
        """Whether a step is one of these."""
        if at.index < self.first:
            return "retention"
        return "last step" if total is not None and at.index >= total - self.last else None


class Row(NamedTuple):
    """State of `InARow`: the state within, and the steps that were reused in a row."""

    within: Any
    reused: int = 0


@dataclass(frozen=True)
class InARow(Wrapped):
    """Reuses so many steps in a row at most; after these, the gate within begins anew.

    Attributes:
        most: how many; 0 for any number.
    """

    most: int = 0

    def begin(self) -> Row:
        """Nothing was reused."""
        return Row(self.gate.begin())

    def compares(self, state: Row) -> bool:
        """As the gate within."""
        return self.gate.compares(state.within)

    def decide(self, state: Row, at: Time, total: int | None, distance: float | None) -> Verdict:
        """As the gate within, until the limit is reached."""
        if self.most > 0 and state.reused >= self.most:
            anew = self.begin()
            return Verdict(False, "max_consecutive_cached", anew, anew, distance)
        verdict = super().decide(state.within, at, total, distance)
        reused, computed = Row(verdict.if_reused, state.reused + 1), Row(verdict.if_computed)
        return verdict._replace(if_reused=reused, if_computed=computed)
