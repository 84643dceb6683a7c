"""No cache: every step is computed, in a graph that was compiled for another strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omni_cache.strategies.forecasts import Hold
from omni_cache.strategies.schedules import Compute, Reuse
from omni_cache.strategies.strategy import Guard, Policy, Strategy


@dataclass(frozen=True)
class Nothing(Hold):
    """Keeps nothing, so that there is nothing to forecast from."""

    depth: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True)
class Uncached(Strategy):
    """What ``cache="none"`` means for a single generation."""

    name: ClassVar[str] = "none"

    def guard(self) -> Guard:
        """Any graph serves it."""
        return Guard(None, Nothing.depth)

    def policy(self, model_class: str | None) -> Policy:
        """The same for every class."""
        gate = Compute(Reuse(), "cache='none'")
        return Policy(None, lambda branch, position: gate, Nothing(), self.num_inference_steps)
