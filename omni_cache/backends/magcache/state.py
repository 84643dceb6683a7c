"""What MagCache knows of one guidance branch, to look at."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from omni_cache.runtime.trajectory import Trajectory


@dataclass
class MagCacheState:
    """One branch of a generation after its last call.

    Attributes:
        previous_residual: of the last computed step.
        head_block_input: None; what enters the blocks stays in the graph.
        should_compute: whether the last call ran its blocks.
        accumulated_ratio: product of the ratios since then.
        accumulated_err: error since then.
        accumulated_steps: steps since then.
        step_index: of the next call; 0 after the last step.
        calibration_ratios: of a calibration the mean ratio at each step.
        norm_ratios: the same, to five digits.
        norm_stds: the ratio's standard deviation over tokens, to five digits.
        cos_dises: one minus the cosine of successive residuals, to five digits.
    """

    previous_residual: Tensor | None = None
    head_block_input: Tensor | None = None
    should_compute: bool = True
    accumulated_ratio: float = 1.0
    accumulated_err: float = 0.0
    accumulated_steps: int = 0
    step_index: int = 0
    calibration_ratios: list[float] = field(default_factory=list)
    norm_ratios: list[float] = field(default_factory=list)
    norm_stds: list[float] = field(default_factory=list)
    cos_dises: list[float] = field(default_factory=list)
    _is_first_step: bool = True

    def reset(self) -> None:
        """Begin anew, as a state that was just made."""
        vars(self).update(vars(MagCacheState()))

    def follow(self, trajectory: Trajectory, steps: int) -> None:
        """Take over what the runtime knows after a call of a loop of so many steps."""
        last = trajectory.steps[-1]
        kept = trajectory.history.kept  # none after the last step
        self.previous_residual = max(kept[0].residuals, key=Tensor.numel) if kept else None
        self.should_compute = last.computed
        product, skipped, error = trajectory.state
        self.accumulated_ratio, self.accumulated_steps, self.accumulated_err = (
            product,
            skipped,
            error,
        )
        self.step_index = (last.index + 1) % steps
        self._is_first_step = self.step_index == 0

    def measured(self, metrics: tuple[float, float, float]) -> None:
        """Note what the calibration of one step has found: ratio, deviation, cosine distance."""
        self.calibration_ratios.append(metrics[0])
        lists = (self.norm_ratios, self.norm_stds, self.cos_dises)
        for numbers, found in zip(lists, metrics, strict=True):
            numbers.append(round(found, 5))
