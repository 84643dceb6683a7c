"""DiCache: the first blocks always run, and tell when to compute the others and what they add.

    d    = mean|p - p'| / mean|p'|                    p: what the first blocks add; p' of last call
    acc += d
    acc < threshold: reuse;  otherwise compute and acc = 0
    g    = |p - p_1| / |p_0 - p_1|, from 1 to 1.5     of the last two computed steps
    r    = r_1 + g (r_0 - r_1)                        what stands in for what the others add

Bu et al., "DiCache: Let Diffusion Model Determine Its Own Cache", ICLR 2026,
https://arxiv.org/abs/2508.17356. In the authors' code d is the change of what leaves the first
blocks, of which p is a part, so that their thresholds are lower; and r is what all blocks add,
where here p is taken as it is and only the others are forecast. Their code can also go by how
much more that changes than what enters the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from omni_cache.strategies.base import (
    DEFAULT_STEPS,
    NOTHING,
    Around,
    Forecast,
    Made,
    Time,
    is_count,
    is_number,
    require,
)
from omni_cache.strategies.forecasts import Aligned
from omni_cache.strategies.gates import Accumulate, Within, Wrapped
from omni_cache.strategies.signals import RelativeL1
from omni_cache.strategies.strategy import Guard, Policy, Strategy


@dataclass(frozen=True, kw_only=True)
class DiCache(Strategy):
    """DiCache. `Strategy` has the flags that every strategy takes.

    Attributes:
        threshold (float, default 0.3): change of what the first blocks add, added up, at which a
            step is computed. 0 computes every step. On the bundled pipeline
            (docs/benchmarks/compare) 0.3 computes 11 of 28 steps and is 5.8 dB nearer to the
            uncached picture than 11 steps are; 0.6 computes 9 and is 2.7 dB farther away than 9.
        probe_depth (int, default 1): how many first blocks always run. The authors advise 1 to 5.
        retention_ratio (float, default 0.2): share of the steps, after the first one, that are
            always computed.
        force_last_step (bool, default True): always compute the last step. Takes effect when the
            number of steps is known.
        forecast (default "aligned"): see `Strategy`.
    """

    name: ClassVar[str] = "dicache"

    threshold: float = 0.3
    probe_depth: int = 1
    retention_ratio: float = 0.2
    force_last_step: bool = True
    forecast: str | Forecast | Mapping[int, Sequence[float]] | Sequence[Any] = "aligned"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = is_number(self.threshold) and self.threshold >= 0
        require(fits, "threshold", self.threshold, "a finite number >= 0")
        require(is_count(self.probe_depth, 1), "probe_depth", self.probe_depth, "an integer >= 1")
        share, last = self.retention_ratio, self.force_last_step
        fits = is_number(share) and 0 <= share <= 1
        require(fits, "retention_ratio", share, "a number from 0 to 1")
        require(isinstance(last, bool), "force_last_step", last, "True or False")

    def guard(self) -> Guard:
        """The blocks behind the first ones."""
        return Guard("first_blocks", self.policy(None).depth, first=self.probe_depth)

    def policy(self, model_class: str | None) -> Policy:
        """The same for every class. Only a forecast that goes by the probe has it look back."""
        forecast, steps = self.forecasting(), self.num_inference_steps
        signal = Probe() if isinstance(forecast, Aligned) else RelativeL1()
        rule = Retained(Accumulate((1.0, 0.0), self.threshold), self.retention_ratio)
        gate = Within(rule, self.start, self.end, self.force_last_step)
        return Policy(signal, lambda branch, position: gate, forecast, steps)


@dataclass(frozen=True)
class Probe(RelativeL1):
    """How much a signal changes from call to call, and how far it has gone since computed steps."""

    against: Literal["last call"] = "last call"
    sums: ClassVar[int] = 5
    looks_back: ClassVar[int] = 2

    def look_back(self, computed: Sequence[Made]) -> Tensor:
        """``[sum|p_0 - p_1|]``."""
        newest, older = (made.signal for made in computed)
        assert newest is not None
        assert older is not None
        return super().measure(newest, older, ())[:1]

    def measure(
        self, now: Tensor, before: Tensor, along: Sequence[Tensor], around: Around = NOTHING
    ) -> Tensor:
        """``[sum|p - p'|, sum|p'|, elements, sum|p - p_1|, sum|p_0 - p_1|, *means]``."""
        assert around.past is not None
        changed = super().measure(now, before, along)
        gone = super().measure(now, around.signals[1], ())
        return torch.cat([changed[:3], gone[:1], around.past, changed[3:]])

    def distance(self, sums: Sequence[float]) -> float:
        """The relative change since the last call."""
        return super().distance(sums[:3])

    def progress(self, sums: Sequence[float]) -> float | None:
        """``|p - p_1| / |p_0 - p_1|``; None where the two computed steps are alike."""
        *_, gone, way = sums
        return gone / way if way else None


@dataclass(frozen=True)
class Retained(Wrapped):
    """Computes the first step, and a share of the steps after it.

    Attributes:
        share: of all steps.
    """

    share: float = 0.0

    @property
    def schedules(self) -> bool:  # type: ignore[override]
        """Whether the number of steps matters to it, or to the gate within."""
        return self.share > 0 or self.gate.schedules

    def against(self, at: Time, total: int | None) -> str | None:
        """Whether a step is one of these."""
        return "retention" if at.index <= int(self.share * (total or DEFAULT_STEPS)) else None
