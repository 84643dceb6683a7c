"""The configuration of MagCache, under the names of ``vllm_omni.diffusion.cache.magcache``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_cache.strategies import MagCache
from omni_cache.strategies.base import require

Ratios = Tensor | Mapping[str, Tensor]
"""One row of magnitude ratios, or one for each guidance branch."""


@dataclass
class MagCacheConfig:
    """When MagCache reuses.

    Attributes:
        threshold: accumulated error up to which steps are reused; > 0.
        max_skip_steps: most steps in a row that are reused; > 0.
        retention_ratio: share of the first steps that are always computed; between 0 and 1.
        num_inference_steps: of a generation.
        mag_ratios: for each step the magnitude of its residual relative to that of the step before,
            a sequence of numbers or a mapping of branch names to such; kept as tensors. Steps
            beyond them count as 1.
        mag_calibrate: compute every step, and measure the ratios.
        transformer_type: the class of the transformer.

    Raises:
        ValueError: a value is not allowed, or there are no ratios and nothing is calibrated.
    """

    threshold: float = 0.24
    max_skip_steps: int = 5
    retention_ratio: float = 0.1
    num_inference_steps: int = 28
    mag_ratios: Any = None
    mag_calibrate: bool = False
    transformer_type: str = "FluxTransformer2DModel"

    def __post_init__(self) -> None:
        require(self.threshold > 0, "threshold", self.threshold, "> 0")
        require(self.max_skip_steps > 0, "max_skip_steps", self.max_skip_steps, "> 0")
        share, steps = self.retention_ratio, self.num_inference_steps
        require(0 < share < 1, "retention_ratio", share, "between 0 and 1, both left out")
        require(steps is not None, "num_inference_steps", steps, "given")
        require(steps > 0, "num_inference_steps", steps, "> 0")
        given = self.mag_ratios
        fits = given is not None or self.mag_calibrate
        require(fits, "mag_ratios", given, "given, unless mag_calibrate=True measures them")
        if given is not None:
            self.mag_ratios = each_row(given, lambda row: torch.as_tensor(row).float().cpu())

    def strategy(self) -> MagCache:
        """The strategy that decides so."""
        steps = self.num_inference_steps
        if self.mag_calibrate:  # a ratio of 2 is an error of 1, which no step is reused with
            return MagCache(mag_ratios=[2.0], threshold=0.0, num_inference_steps=steps)
        return MagCache(
            threshold=self.threshold,
            max_skip_steps=self.max_skip_steps,
            retention_ratio=self.retention_ratio,
            num_inference_steps=steps,
            mag_ratios=each_row(self.mag_ratios, lambda row: _of_length(row, steps)),
        )


def each_row(ratios: Any, change: Callable[[Any], Any]) -> Any:
    """What becomes of ratios if something is done with each row of them."""
    if isinstance(ratios, Mapping):
        return {branch: change(row) for branch, row in ratios.items()}
    return change(ratios)


def _of_length(row: Tensor, steps: int) -> list[float]:
    # In float64 the shortest decimals that are these float32: 1.1 and not 1.10000002.
    numbers = [float(str(each)) for each in row.numpy()[:steps]]
    return numbers + [1.0] * (steps - len(numbers))
