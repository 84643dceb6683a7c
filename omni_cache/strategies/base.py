"""What a strategy is made of: a signal, a gate, a forecast. All of it is values and pure functions.

    signal    WHAT is compared between calls, and how: a few sums, measured in one launch
    gate      WHEN to compute: (state, time, measurement) -> verdict with both next states
    forecast  WHAT STANDS IN for the residual: a row of weights over the residuals that are kept

Nothing here knows graphs, generations or models, and nothing changes itself: who calls a gate keeps
its state.
"""

from __future__ import annotations

import difflib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

DEFAULT_STEPS = 28
"""Number of inference steps that a gate that schedules by it assumes when nobody says."""


Row = tuple[float, ...]
"""The weights of a forecast, one for each residual that is kept, newest first."""

Matrix = tuple[Row, ...]


class Time(NamedTuple):
    """Where a call lies on its trajectory: its step, and its timestep or sigma where it is known.

    Steps count over the whole schedule, so that image-to-image begins in the middle of them.
    ``total`` is their number, where a forecast is asked for one and somebody has said it.
    ``progress`` is how far the signal has gone by then, where its way between the last two computed
    steps is 1 and begins at 0, if a forecast is asked for and the signal measures it.
    """

    index: int  # type: ignore[assignment]  # hides a method that nobody needs here
    value: float | None = None
    total: int | None = None
    progress: float | None = None


class Verdict(NamedTuple):
    """What a gate says of one call. The caller commits one of the two states.

    ``distance`` is this step's change and ``accumulated`` the change since the last computed step,
    as the gate measures them; None where it measured nothing.
    """

    reuse: bool
    reason: str
    if_reused: Any
    if_computed: Any
    distance: float | None = None
    accumulated: float | None = None


class Errors(NamedTuple):
    """How far a forecast was from what it stands for, relative, and how far that was expected."""

    observed: float
    expected: float

    @property
    def excess(self) -> float:
        """How many times as far as expected."""
        return self.observed / self.expected if self.expected > 0 else float(self.observed > 0)


class Made(NamedTuple):
    """What a computed step has left: its signal, and its residuals in the order of the results."""

    signal: Tensor | None
    residuals: tuple[Tensor, ...]


class Around(NamedTuple):
    """What a measurement may take into account beside the two signals.

    Attributes:
        times: (2,) of ``kernels.number_dtype``, on the signal's device: the timesteps of this call
            and of the one that it is compared with, NaN where unknown. None for a signal that does
            not read them.
        past: what the signal has found in the last computed steps; None for one that does not look
            back.
        signals: those of these steps, newest first.
    """

    times: Tensor | None = None
    past: Tensor | None = None
    signals: Sequence[Tensor] = ()


NOTHING = Around()


class Signal(Protocol):
    """What is compared between calls."""

    @property
    def against(self) -> Literal["last call", "last computed call", "results"]:
        """The call whose signal this one's is compared with.

        A signal of "results" measures nothing but what it finds when it looks back, and is given
        that in place of two signals.
        """

    @property
    def sums(self) -> int:
        """How many numbers a measurement has."""

    @property
    def reads_values(self) -> bool:
        """Whether it compares by `Time.value` too."""

    @property
    def looks_back(self) -> int:
        """At how many computed steps it looks; with fewer, the step is computed."""

    def look_back(self, computed: Sequence[Made]) -> Tensor:
        """Compare the last computed steps with each other, once for each new one.

        Args:
            computed: as many as it looks back at, newest first.

        Returns:
            ``(n,)``: sums that may be added up over ranks, for `Around.past`.
        """

    def measure(
        self, now: Tensor, before: Tensor, along: Sequence[Tensor], around: Around = NOTHING
    ) -> Tensor:
        """Compare two signals on their device.

        Args:
            now: the signal of this call, any shape.
            before: of the call that it is compared with, of the same shape and dtype.
            along: small tensors whose means are wanted on the host with the measurement.
            around: what else there is to know.

        Returns:
            ``(sums + len(along),)``: sums that may be added up over ranks, then the means.
        """

    def distance(self, sums: Sequence[float]) -> float:
        """The distance of the two signals, from the sums."""

    def progress(self, sums: Sequence[float]) -> float | None:
        """`Time.progress`, from the sums; None for a signal that does not measure it."""


class Gate(ABC):
    """When to compute. Pure, and written with ``+ * abs < &`` and `where`.

    The same lines therefore decide on Python floats and on float64 tensors inside a graph.
    """

    measures: ClassVar[bool]
    """Whether it decides by a measurement of the signal."""
    schedules: bool = False
    """Whether it decides by the number of steps."""

    @abstractmethod
    def begin(self) -> Any:
        """The state that a trajectory begins with: a NamedTuple of a few numbers."""

    def foretell(self, at: Time, total: int | None) -> str | None:
        """Why a step is computed whatever is measured; None where the measurement decides."""
        return None

    def begins_anew(self, at: Time) -> bool:
        """Whether a step is computed as the first one, and all that was kept before is dropped."""
        return False

    def skips(self, at: Time, total: int | None) -> bool:
        """Whether a step, if it is reused, skips the whole forward.

        It is asked before anything of the model runs, where the guard ``skips``. If nothing fits
        the step or its place is not known by then, what is around the blocks runs, as at any reused
        step.
        """
        return False

    def compares(self, state: Any) -> bool:
        """Whether the decision in a state depends on the measurement, which costs a read."""
        return self.measures

    @abstractmethod
    def decide(self, state: Any, at: Time, total: int | None, distance: float | None) -> Verdict:
        """Decide on a call.

        Args:
            state: what the call before committed, or `begin`.
            at: where the call lies.
            total: how many steps there are, None when nobody has said.
            distance: of the signals, None where nothing was measured.
        """


class Forecast(ABC):
    """What stands in for the residual: ``sum_i weights[i] * kept[i]``."""

    feeds_back: ClassVar[bool] = False
    """Whether it weighs a forecast of its own: of what is kept, the third is then what it says of
    the step before the newest computed one, and there is nothing older."""
    reads_products: ClassVar[bool] = False
    """Whether it weighs by what the residuals are, for which it has `rows`."""

    checks: bool = False
    """Whether it says, by `check`, how far off it would have been at a computed step."""

    @property
    def reads_values(self) -> bool:
        """Whether it weighs by `Time.value`, and not by the step alone."""
        return False

    def of_branch(self, name: str) -> Forecast:
        """What is forecast of one guidance branch."""
        return self

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many residuals it wants kept."""

    @abstractmethod
    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """One weight for each kept residual.

        Args:
            kept: times of the computed steps whose residuals are kept, newest first; at least one
                and at most ``depth``.
            now: the time to forecast for; it alone has `Time.total` and `Time.progress`.
        """

    def input_weight(self, kept: Sequence[Time], now: Time) -> float:
        """The weight u of what enters now less what entered at the newest computed step.

        What stands in is then ``sum_i weights[i] * kept[i] + u * (input - newest input)``. It is
        asked where the guard weighs ``inputs``; the arguments are as for `weights`.
        """
        return 0.0

    def skip_weights(self, kept: Sequence[Time], now: Time) -> Row:
        """One weight for the results of each kept step, where the gate skips the forward.

        The arguments are as for `weights`, whose weights are taken where nothing else is said.
        """
        return self.weights(kept, now)

    def rows(self, kept: Sequence[Time], now: Time, products: Sequence[Matrix]) -> Sequence[Row]:
        """One row of weights for each sample, or one for all of them.

        It is asked only of a forecast that reads products, and `weights` only where there are none.

        Args:
            kept: as for `weights`.
            now: as for `weights`.
            products: for each sample the inner products of the kept residuals, newest first.
        """
        return [self.weights(kept, now)]

    def check(self, kept: Sequence[Time], products: Matrix) -> Errors | None:
        """How far off the newest of what is kept was from its forecast by the others.

        Args:
            kept: times of the computed steps whose residuals are kept, newest first.
            products: their inner products, over the whole batch.

        Returns:
            None where there is nothing to compare.
        """
        return None


def require(condition: bool, flag: str, given: Any, allowed: str) -> None:
    """Raise ValueError that names a flag, what was given and what is allowed.

    Raises:
        ValueError: ``condition`` is false.
    """
    if not condition:
        raise ValueError(f"{flag}={given!r} is not allowed; {flag} must be {allowed}")


def one_of(flag: str, given: Any, allowed: Sequence[Any], also: str = "") -> None:
    """Raise ValueError, with the nearest of what is allowed, where a value is none of it.

    Raises:
        ValueError: ``given`` is not in ``allowed``.
    """
    if not isinstance(given, (str, bool)) or given not in allowed:
        close = difflib.get_close_matches(str(given), [str(each) for each in allowed], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        listed = ", ".join(map(repr, allowed))
        raise ValueError(
            f"{flag}={given!r} is not allowed{hint}; {flag} must be one of {listed} {also}".rstrip()
        )


def is_number(value: Any) -> bool:
    """Whether a value is a real, finite number; a bool is not."""
    return _is_a(value, Real) and abs(value) <= sys.float_info.max


def is_count(value: Any, least: int) -> bool:
    """Whether a value is an integer of at least ``least``; a bool is not."""
    return _is_a(value, Integral) and value >= least


def _is_a(value: Any, kind: Any) -> bool:
    # The numbers of numpy are registered with the abstract kinds.
    return isinstance(value, kind) and not isinstance(value, bool)


def finite_numbers(flag: str, given: Any, allowed: str) -> tuple[float, ...]:
    """A sequence, array or 1-D tensor of at least one finite number, as floats.

    Raises:
        ValueError: ``given`` is something else; the message names the flag, what was given and
            ``allowed``.
    """
    try:
        numbers = () if isinstance(given, str) else tuple(float(each) for each in given)
    except (TypeError, ValueError):
        numbers = ()
    require(len(numbers) > 0 and all(map(math.isfinite, numbers)), flag, given, allowed)
    return numbers
