"""What tuning costs, in loops of one sample: counted exactly, and never beyond what was announced.

A loop is one uncached run of ``generate``. A run whose blocks compute some of the steps, all the
others being reused, skipped or recalled, is that share of a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Effort = Literal["low", "default", "high"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)

_LOOPS: dict[Effort, float] = {"low": 4, "default": 25, "high": math.inf}
"""At most so many loops for each calibration sample."""

Progress = Callable[[str, float, float], None]
"""Is told what is being done, the loops that have been run, and at most how many will be."""


@dataclass
class Budget:
    """Loops that may be run, and those that have been.

    Those that judge are counted apart: there is one for each judged sample, and the share of the
    computed steps for each plan that is judged.

    Attributes:
        effort: how much calibration and refinement may cost.
        samples: how many samples calibrate.
        progress: is told of every run.
        stage: what is being done.
        calls: how often the blocks run in one loop; 1 until that is known.
        is_judging: whether runs judge from now on.
        earlier: loops that were run before this tuning was interrupted.
    """

    effort: Effort
    samples: int
    progress: Progress
    stage: str = ""
    calls: int = 1
    is_judging: bool = False
    earlier: float = 0.0
    _ran: int = 0
    _judging: int = 0

    @property
    def limit(self) -> float:
        """Loops that calibration and refinement may run in all."""
        return _LOOPS[self.effort] * self.samples

    @property
    def loops(self) -> float:
        """Loops that calibration and refinement have run."""
        return self.earlier + self._ran / self.calls

    @property
    def judging(self) -> float:
        """Loops that have judged."""
        return self._judging / self.calls

    @property
    def left(self) -> float:
        """Loops that calibration and refinement may still run."""
        return self.limit - self.loops

    def count(self, calls: int) -> None:
        """Take a run into account, by how many calls ran the blocks."""
        if self.is_judging:
            self._judging += calls
        else:
            self._ran += calls
        self.progress(self.stage, self.loops + self.judging, self.limit)

    def begin(self, stage: str, judges: bool = False) -> None:
        """Say what is done from now on."""
        self.stage, self.is_judging = stage, judges
        self.progress(stage, self.loops + self.judging, self.limit)

    @property
    def announcement(self) -> str:
        """What it will cost, for people."""
        if math.isinf(self.limit):
            return "as many loops as help"
        return f"at most {self.limit:.0f} loops of one sample, and those that judge"
