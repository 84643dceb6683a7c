"""What a strategy is: a named triple of signal, gate and forecast.

A strategy is a frozen config that a user writes; bound to a model it becomes a factory of gates,
one for each trajectory. A gate sees one call after another and says compute or reuse. It knows
tensors and step numbers; it knows nothing of graphs, generations or models. The forecast of every
strategy here is hold: a reused step takes over the residual of the last computed one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True)
class Decision:
    """What a gate says of one call.

    ``distance`` is this step's change and ``accumulated`` the change since the last computed step,
    as the strategy measures them; None where it did not measure.
    """

    compute: bool
    reason: str
    distance: float | None = None
    accumulated: float | None = None


@dataclass(frozen=True)
class Step:
    """What a gate may know of the call that it decides on.

    Attributes:
        index: how many calls of this trajectory went before.
        num_inference_steps: how many there will be in all, or None when nobody has said.
        can_reuse: whether there is a residual to reuse.
        signal: the signal of this call, any shape, or None for a strategy that needs none.
        read: brings a small 1-D tensor to the host as floats. It is the one device-to-host read
            that a call may cost, so a gate calls it once at most.
    """

    index: int
    num_inference_steps: int | None
    can_reuse: bool
    signal: Tensor | None
    read: Callable[[Tensor], list[float]]


class Gate(ABC):
    """Decides for one trajectory, call after call."""

    @abstractmethod
    def decide(self, step: Step) -> Decision:
        """Decide on a call. A gate that cannot decide computes."""

    @abstractmethod
    def overrule(self) -> None:
        """Learn that the call just decided on is computed, although the gate said reuse."""

    @abstractmethod
    def fork(self) -> Gate:
        """An independent copy, for a decision that may have to be forgotten."""

    def observe(self, residuals: tuple[Tensor, ...], output: Tensor) -> dict[str, float]:
        """Look at a computed call's residuals and the model's output; used by calibration.

        Returns:
            Measurements to record with the step, by name.
        """
        return {}

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors that the gate keeps between calls."""
        return 0


class BoundStrategy(ABC):
    """A strategy for one model: tables looked up, ready to make gates."""

    config: Any
    """What the user wrote: a :class:`Strategy`."""

    signal: str | None
    """Which signal the graph must deliver (see ``passes.find_signal``), None for none."""

    @property
    def num_inference_steps(self) -> int | None:
        """Steps of a generation, where neither a context nor a pipeline says."""
        steps: int | None = self.config.num_inference_steps
        return steps

    @property
    def observes(self) -> bool:
        """Whether gates want to see every computed call (calibration)."""
        return bool(self.config.calibrate)

    def configured(self, config: Strategy) -> Self:
        """The same strategy with the same tables, and other values of the run-time fields."""
        other = copy(self)
        other.config = config
        return other

    @abstractmethod
    def make_gate(self, branch: str, branch_position: int) -> Gate:
        """A gate for a trajectory.

        Args:
            branch: name of the guidance branch.
            branch_position: 0 for the first branch of a generation, 1 for the second, ...
        """


@dataclass(frozen=True)
class Strategy(ABC):
    """Base of the configs that users write. Subclasses validate their fields on construction."""

    name: ClassVar[str]
    has_signal: ClassVar[bool]
    """Whether it decides by a signal."""
    run_time: ClassVar[tuple[str, ...]]
    """The fields that only gates read, so that another value needs no compilation."""

    @abstractmethod
    def bind(self, model_class: str | None) -> BoundStrategy:
        """Look up what is published for a model class (None when it is unknown)."""

    def for_compilation(self) -> Self:
        """The config with its run-time fields at their defaults: what a compiled graph is of."""
        defaults = {each.name: each.default for each in fields(self) if each.name in self.run_time}
        return replace(self, **defaults)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the strategy's flags."""
        return tuple(field.name for field in fields(cls))


def require(condition: bool, flag: str, given: Any, allowed: str) -> None:
    """Raise ValueError that names a flag, what was given and what is allowed.

    Raises:
        ValueError: ``condition`` is false.
    """
    if not condition:
        raise ValueError(f"{flag}={given!r} is not allowed; {flag} must be {allowed}")


def is_number(value: Any) -> bool:
    """Whether a value is a real, finite number (a bool is none)."""
    return _is_a(value, Real) and math.isfinite(value)


def is_count(value: Any, least: int) -> bool:
    """Whether a value is an integer of at least ``least`` (a bool is none)."""
    return _is_a(value, Integral) and value >= least


def _is_a(value: Any, kind: Any) -> bool:
    # The numbers of numpy are registered with the abstract kinds.
    return isinstance(value, kind) and not isinstance(value, bool)


def finite_numbers(flag: str, given: Any, allowed: str) -> tuple[float, ...]:
    """A sequence, array or 1-D tensor of at least one finite number, as floats.

    Raises:
        ValueError: ``given`` is none; the message names the flag, what was given and ``allowed``.
    """
    try:
        numbers = () if isinstance(given, str) else tuple(float(each) for each in given)
    except (TypeError, ValueError):
        numbers = ()
    require(len(numbers) > 0 and all(map(math.isfinite, numbers)), flag, given, allowed)
    return numbers
