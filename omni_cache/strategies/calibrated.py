"""Strategies that decide by numbers of the model: published ones, a user's own, or a file's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from omni_cache.strategies.base import finite_numbers, require
from omni_cache.strategies.calibrations import Calibration
from omni_cache.strategies.strategy import Owner, Strategy

ByBranch = Mapping[str, tuple[float, ...]]
"""Numbers by the name of the guidance branch."""


def of_branch(numbers: ByBranch, branch: str, position: int) -> tuple[float, ...]:
    """A branch's own numbers: by its name, else by its position, else the first."""
    by_position = list(numbers.values())
    beyond = position >= len(by_position)
    return numbers.get(branch) or by_position[0 if beyond else position]


@dataclass(frozen=True, kw_only=True)
class CalibratedStrategy(Strategy):
    """Base of strategies with numbers of the model, which come from one place.

    Subclasses name the field that a user's own numbers are given in, and say what they are.

    Attributes:
        variant (str, optional): which published numbers, where a class has several.
        calibration (path or :class:`Calibration`, optional): a file that ``omni-cache calibrate``
            wrote, with numbers for each transformer and branch.
    """

    flag: ClassVar[str]
    numbers: ClassVar[str]

    variant: str | None = None
    calibration: str | Path | Calibration | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        own, variant, file = getattr(self, self.flag), self.variant, self.calibration
        require(variant is None or isinstance(variant, str), "variant", variant, "a string or None")
        if own is not None:
            require(variant is None, "variant", variant, f"None when {self.flag} are given")
            require(file is None, "calibration", file, f"None when {self.flag} are given")
            object.__setattr__(self, self.flag, _checked(self.flag, own, self.numbers))
        if file is not None:
            require(variant is None, "variant", variant, "None when a calibration is given")
            object.__setattr__(self, "calibration", _calibration(file, self.name))

    def own_numbers(self, model_class: str | None) -> ByBranch | None:
        """Numbers that the flags bring; None where they bring none.

        Raises:
            ValueError: the calibration is another class's.
        """
        own, file = getattr(self, self.flag), self.calibration
        if own is not None:
            return dict(own) if isinstance(own, Mapping) else {"cond": own}
        if file is None:
            return None
        assert isinstance(file, Calibration)
        # Where nobody knows the class, nothing tells that it is another one.
        classes = file.classes if model_class is None else [model_class]
        (transformer,) = file.of("", classes).transformers.values()
        return {name: each.numbers for name, each in transformer.branches.items()}

    def for_transformer(self, owner: Owner) -> Strategy:
        """With the numbers of one transformer, for pipelines that have several."""
        if self.calibration is None:
            return self
        assert isinstance(self.calibration, Calibration)
        schedule, scheduler = self.calibration.schedule, owner.scheduler
        if schedule is not None and scheduler not in (None, schedule.scheduler):
            warnings.warn(
                f"calibration: schedule.scheduler is {schedule.scheduler!r}, and the pipeline has "
                f"{scheduler!r}: its steps lie elsewhere, so the numbers may not fit. Calibrate "
                "with this scheduler",
                stacklevel=3,
            )
        return replace(self, calibration=self.calibration.of(owner.name, owner.classes))


def _calibration(given: Any, strategy: str) -> Calibration:
    if isinstance(given, Calibration):
        found = given
    else:
        is_path = isinstance(given, str | Path)
        allowed = "the path of a file that `omni-cache calibrate` wrote"
        require(is_path, "calibration", given, allowed)
        try:
            found = Calibration.load(given)
        except OSError as error:
            raise ValueError(
                f"calibration={str(given)!r} is not allowed; calibration must be {allowed}: {error}"
            ) from None
    if found.strategy != strategy:
        raise ValueError(
            f"strategy is {found.strategy!r} in the calibration, and cache={strategy!r}"
        )
    return found


def _checked(flag: str, given: Any, allowed: str) -> tuple[float, ...] | ByBranch:
    """One row of numbers for all branches, or one for each."""
    either = f"{allowed}, or a mapping of branch names to such"
    if not isinstance(given, Mapping):
        return finite_numbers(flag, given, either)
    named = len(given) > 0 and all(isinstance(name, str) for name in given)
    require(named, flag, given, either)
    return {
        name: finite_numbers(f"{flag}[{name!r}]", each, allowed) for name, each in given.items()
    }
