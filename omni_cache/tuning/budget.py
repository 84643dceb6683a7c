"""What tuning costs, in loops of one sample: counted exactly, and never beyond what was announced.

A loop is one uncached run of ``generate``. A run whose blocks compute some of the steps, all the
others being reused, skipped or recalled, is that share of a loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

Effort = Literal["low", "default", "high"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)

_LOOPS: dict[Effort, float] = {"low": 4, "default": 25, "high": math.inf}
"""At most so many loops for each calibration sample."""

_JUDGING = 3.5
"""Loops that judging takes for each judged sample: an uncached one, and the shares of the plans."""

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
        limit_seconds: that all of it may take, judging included.
        judged: how many samples judge; their time is set aside.
        earlier_seconds: as ``earlier``.
        clock: what tells the time, in seconds.
    """

    effort: Effort
    samples: int
    progress: Progress
    stage: str = ""
    calls: int = 1
    is_judging: bool = False
    earlier: float = 0.0
    limit_seconds: float = math.inf
    judged: int = 0
    earlier_seconds: float = 0.0
    clock: Callable[[], float] = time.perf_counter
    _ran: int = 0
    _judging: int = 0
    _began: float = field(init=False)
    _first: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def seconds(self) -> float:
        """How long it has taken."""
        return self.earlier_seconds + self.clock() - self._began

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
        """Loops that calibration and refinement may still run, by their number and by time."""
        return min(self.limit - self.loops, self._left_by_time)

    @property
    def _left_by_time(self) -> float:
        """By what a loop has taken since the first run, which compiles; all are left until then."""
        if math.isinf(self.limit_seconds) or self._first is None or self._first[1] == self._ran:
            return math.inf
        began, ran = self._first
        per_loop = (self.clock() - began) * self.calls / (self._ran - ran)
        seconds = self.limit_seconds - self.seconds
        return seconds / per_loop - _JUDGING * self.judged if per_loop > 0 else math.inf

    def count(self, calls: int) -> None:
        """Take a run into account, by how many calls ran the blocks."""
        if self.is_judging:
            self._judging += calls
        else:
            self._ran += calls
        if self._first is None:
            self._first = self.clock(), self._ran
        self.progress(self.stage, self.loops + self.judging, self.limit)

    def begin(self, stage: str, judges: bool = False) -> None:
        """Say what is done from now on."""
        self.stage, self.is_judging = stage, judges
        self.progress(stage, self.loops + self.judging, self.limit)

    @property
    def announcement(self) -> str:
        """What it will cost, for people."""
        most = "as many loops as help"
        if not math.isinf(self.limit):
            most = f"at most {self.limit:.0f} loops of one sample, and those that judge"
        if math.isinf(self.limit_seconds):
            return most
        return f"{most}, within {self.limit_seconds / 60:g} minutes"
