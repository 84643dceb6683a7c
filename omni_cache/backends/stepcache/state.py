"""What a denoising loop asks at each step: whether the model runs. The rule is `StepCache`'s."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

from torch import Tensor

from omni_cache.backends.stepcache.config import StepCacheConfig
from omni_cache.strategies import Time
from omni_cache.strategies.base import Made
from omni_cache.strategies.signals import ResultSimilarity
from omni_cache.strategies.stepcache import Countdown, Left


class StepCacheState:
    """How far the countdown of one generation has come.

    Attributes:
        config: the thresholds and countdowns.
        skip_countdown: how many more steps are left out, the one that was decided on last included.
    """

    def __init__(self, config: StepCacheConfig) -> None:
        self.config = config
        self._gate = Countdown(tuple(config.sim_thresholds), tuple(config.skip_countdowns))
        self.reset()

    def reset(self) -> None:
        """Begin a generation."""
        self.skip_countdown = 0

    def should_run_step(self, prev_predictions: Sequence[tuple[Tensor, ...]]) -> bool:
        """Whether the model runs at this step; otherwise the last prediction is repeated.

        Args:
            prev_predictions: what it has predicted, the newest last. Of each the first tensor,
                (B, ...), is compared.
        """
        config, state = self.config, Left(self.skip_countdown)
        if not config.enabled or len(prev_predictions) < config.min_history_steps:
            return True
        similarity = None
        if self._gate.compares(state) and len(prev_predictions) > 1:
            signal = ResultSimilarity()
            last_two = [Made(None, prev_predictions[place][:1]) for place in (-1, -2)]
            similarity = signal.distance(signal.look_back(last_two).tolist())
        verdict = self._gate.decide(state, Time(0), None, similarity)
        after: Left = verdict.if_reused if verdict.reuse else verdict.if_computed
        self.skip_countdown = after.calls
        return not verdict.reuse

    def trim_history(self, prev_predictions: MutableSequence[tuple[Tensor, ...]]) -> None:
        """Drop the oldest predictions, in place, until ``max_history`` are left."""
        while len(prev_predictions) > self.config.max_history:
            del prev_predictions[0]
