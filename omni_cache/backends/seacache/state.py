"""What SeaCache knows of one cache context, to look at."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from omni_cache.runtime.trajectory import Trajectory


@dataclass(slots=True)
class SeaCacheState:
    """One context after its last call.

    Attributes:
        last_step: the step of that call.
        accumulated_distance: change since the last computed step.
        previous_indicator: the latents of that call, not filtered: their sigma is a part of the
            next comparison.
        history: steps and residuals of the last computed calls, the newest last.
        consecutive_cached: how many steps in a row were reused.
    """

    last_step: int | None = None
    accumulated_distance: float = 0.0
    previous_indicator: list[Tensor] | None = None
    history: list[tuple[int, Tensor]] = field(default_factory=list)
    consecutive_cached: int = 0

    def reset(self) -> None:
        """Begin anew, as a state that was just made."""
        self.last_step, self.previous_indicator = None, None
        self.accumulated_distance, self.consecutive_cached = 0.0, 0
        self.history.clear()

    @classmethod
    def of(cls, trajectory: Trajectory) -> SeaCacheState:
        """What the runtime knows of a context."""
        signal, kept = trajectory.signal, trajectory.history.kept
        change, reused = trajectory.state
        return cls(
            None if trajectory.last is None else trajectory.last.index,
            change.change,
            None if signal is None else [signal],
            [(each.at.index, max(each.residuals, key=Tensor.numel)) for each in reversed(kept)],
            reused,
        )
