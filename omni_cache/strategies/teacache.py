"""TeaCache: reuse until the accumulated, rescaled change of the signal reaches a threshold.

    d_t  = mean|s_t - s_{t-1}| / (mean|s_{t-1}| + 1e-8)
    acc += |poly(d_t)|
    acc < rel_l1_thresh: reuse;  otherwise compute and acc = 0

Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", CVPR 2025,
https://arxiv.org/abs/2411.19108. The polynomial maps the change of the signal to that of the
model's output and is fitted per model; ``tables`` has the published ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from omni_cache.strategies.base import Gate, is_number, require
from omni_cache.strategies.calibrated import CalibratedStrategy, of_branch
from omni_cache.strategies.calibrations import Calibration
from omni_cache.strategies.gates import Accumulate, Within
from omni_cache.strategies.signals import RelativeL1
from omni_cache.strategies.strategy import Guard, Policy, PublishedSource
from omni_cache.strategies.tables import teacache_signal, teacache_table

IDENTITY = (1.0, 0.0)
"""Coefficients of the polynomial that leaves a distance as it is."""


@dataclass(frozen=True, kw_only=True)
class TeaCache(CalibratedStrategy):
    """TeaCache. `Strategy` and `CalibratedStrategy` have the flags that others take too.

    Attributes:
        rel_l1_thresh (float, default 0.2): accumulated relative-L1 change at which a step is
            computed. 0 computes every step; larger is faster and less exact.
        coefficients (sequence of float, or a mapping of one per branch, optional): the rescaling
            polynomial, highest power first. By default the published one of the model's class; a
            class without one uses the identity.
        force_last_step (bool, default False): always compute the last step. Takes effect when the
            number of steps is known.
    """

    name: ClassVar[str] = "teacache"
    flag: ClassVar[str] = "coefficients"
    numbers: ClassVar[str] = "a sequence of at least one finite number, highest power first"

    rel_l1_thresh: float = 0.2
    coefficients: Sequence[float] | Mapping[str, Sequence[float]] | None = None
    force_last_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        threshold = self.rel_l1_thresh
        fits = is_number(threshold) and threshold >= 0
        require(fits, "rel_l1_thresh", threshold, "a finite number >= 0")
        last = self.force_last_step
        require(isinstance(last, bool), "force_last_step", last, "True or False")

    def guard(self) -> Guard:
        """The signal that the polynomial was fitted on."""
        source: str | PublishedSource = PublishedSource(self.variant, teacache_signal)
        if isinstance(self.calibration, Calibration):
            source = self.calibration.signal or "auto"
        elif self.coefficients is not None:
            source = "auto"
        return Guard(source, self.forecasting().depth)

    def policy(self, model_class: str | None) -> Policy:
        """The published polynomial of a class, unless the flags bring another.

        Raises:
            ValueError: the calibration is another class's.
        """
        polynomials = self.own_numbers(model_class)
        if polynomials is None:
            entry = teacache_table(model_class, self.variant)
            polynomials = {"cond": IDENTITY if entry is None else entry.coefficients}
            if entry is None:
                warnings.warn(
                    f"TeaCache: no coefficients are published for {model_class or 'this model'}; "
                    "the identity polynomial is used. Fit some with `omni-cache calibrate` or "
                    "omni_cache.calibration.estimate_coefficients and pass coefficients=[...].",
                    stacklevel=2,
                )

        def gate(branch: str, position: int) -> Gate:
            rule = Accumulate(of_branch(polynomials, branch, position), self.rel_l1_thresh)
            return Within(rule, self.start, self.end, self.force_last_step)

        return Policy(RelativeL1(), gate, self.forecasting(), self.num_inference_steps)
