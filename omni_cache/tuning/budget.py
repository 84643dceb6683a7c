"""What tuning costs, in loops of one sample: counted exactly, and never beyond what was announced.

A loop is one uncached run of ``generate``. A run whose blocks compute some of the steps, all the
others being reused, skipped or recalled, is that share of a loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Effort = Literal["low", "default", "high"]
EFFORTS = get_args(Effort)

_LOOPS: dict[Effort, float] = {"low": 4, "default": 25, "high": math.inf}
"""At most so many loops for each calibration sample."""


@dataclass
class Budget:
    """Loops that may be run, and those that have been.

    Attributes:
        effort: how much may be spent.
        samples: how many samples calibrate.
        calls: how often the blocks run in one loop, once that is known.
        ran: how often they have run, up to now.
    """

    effort: Effort
    samples: int
    calls: int = 0
    ran: int = 0

    @property
    def limit(self) -> float:
        """Loops that may be run in all."""
        return _LOOPS[self.effort] * self.samples

    @property
    def loops(self) -> float:
        """Loops that have been run."""
        return self.ran / self.calls if self.calls else 0.0

    @property
    def left(self) -> float:
        """Loops that may still be run."""
        return self.limit - self.loops

    def count(self, calls: int) -> None:
        """Take a run into account, by how many calls ran the blocks."""
        self.ran += calls
