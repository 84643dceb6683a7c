"""What TeaCache keeps for one guidance branch, under the names of vLLM-Omni."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class TeaCacheState:
    """State of one branch.

    Attributes:
        cnt: calls since the request began.
        accumulated_rel_l1_distance: rescaled change since the last computed step.
        previous_modulated_input: signal of the call before, None before the first one.
        previous_residual: what the blocks added at the last computed step, None where none is kept.
        previous_residual_encoder: the same of the second stream.
    """

    cnt: int = 0
    accumulated_rel_l1_distance: float = 0.0
    previous_modulated_input: Tensor | None = None
    previous_residual: Tensor | None = None
    previous_residual_encoder: Tensor | None = None

    def reset(self) -> None:
        """As before the first call."""
        self.__init__()  # type: ignore[misc]  # the defaults stand there
