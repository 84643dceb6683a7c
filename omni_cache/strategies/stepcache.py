"""StepCache: where the model's results hardly turn, the next few calls of it are left out.

    s = mean over the samples of cos(v_0, v_1)      the results of the last two computed calls
    the first threshold that s exceeds says how many calls repeat v_0;  none: compute

The rule of vLLM-Omni's ``step_cache``. Nothing of a call is needed to decide on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from omni_cache.strategies.base import Gate, Time, Verdict, finite_numbers, is_count, require
from omni_cache.strategies.gates import Within, where
from omni_cache.strategies.signals import ResultSimilarity
from omni_cache.strategies.strategy import Guard, Policy, Strategy


@dataclass(frozen=True, kw_only=True)
class StepCache(Strategy):
    """StepCache. `Strategy` has the flags that every strategy takes.

    Attributes:
        sim_thresholds (sequence of float, default (0.95, 0.93)): similarities, the highest first.
        skip_countdowns (sequence of int, default (4, 2)): for each of them, how many calls are left
            out where the similarity exceeds it, and no threshold before it.
    """

    name: ClassVar[str] = "stepcache"

    sim_thresholds: Sequence[float] = (0.95, 0.93)
    skip_countdowns: Sequence[int] = (4, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "a sequence of at least one finite number"
        numbers = finite_numbers("sim_thresholds", self.sim_thresholds, allowed)
        object.__setattr__(self, "sim_thresholds", numbers)
        given = self.skip_countdowns
        counts = tuple(given) if isinstance(given, Sequence) else ()
        fits = len(counts) == len(numbers) and all(is_count(each, 1) for each in counts)
        require(fits, "skip_countdowns", given, f"a sequence of {len(numbers)} integers >= 1")
        object.__setattr__(self, "skip_countdowns", counts)

    def guard(self) -> Guard:
        """The whole model; its results are kept."""
        depth = max(self.forecasting().depth, ResultSimilarity.looks_back)
        return Guard(None, depth, whole=True)

    def policy(self, model_class: str | None) -> Policy:
        """The same for every class."""
        rule = Countdown(tuple(self.sim_thresholds), tuple(self.skip_countdowns))
        gate = Within(rule, self.start, self.end)
        steps = self.num_inference_steps
        signal = ResultSimilarity()
        return Policy(signal, lambda branch, position: gate, self.forecasting(), steps)


class Left(NamedTuple):
    """State of `Countdown`: the calls until the next one that is computed; 0 to look anew."""

    calls: int = 0


@dataclass(frozen=True)
class Countdown(Gate):
    """Leaves out so many calls, and computes one, each time that the results are alike.

    Attributes:
        thresholds: similarities; the first one that is exceeded counts.
        countdowns: how many calls are left out, for each threshold.
    """

    thresholds: tuple[float, ...]
    countdowns: tuple[int, ...]
    measures: ClassVar[bool] = True

    def begin(self) -> Left:
        """Nothing is left out."""
        return Left()

    def compares(self, state: Left) -> bool:
        """Only where no countdown runs."""
        return state.calls == 0

    def decide(self, state: Left, at: Time, total: int | None, distance: float | None) -> Verdict:
        """Go on with the countdown, or begin one; what is not finite computes."""
        counts = state.calls > 0
        begun = 0
        if distance is not None:
            pairs = zip(reversed(self.thresholds), reversed(self.countdowns), strict=True)
            for threshold, countdown in pairs:
                begun = where(distance > threshold, countdown, begun)
        left = where(counts, state.calls - 1, begun)
        said = where(counts, where(left > 0, "countdown", "countdown over"), "results differ")
        said = where(left > 0, where(counts, said, "results alike"), said)
        return Verdict(left > 0, said, Left(left), Left(), distance)
