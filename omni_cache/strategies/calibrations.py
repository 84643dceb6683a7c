"""Calibration files: the numbers of a strategy as they were measured on one model, in JSON.

`tables` has what others have published, this what a user has measured; docs/calibration.md goes
through the fields. Knows nothing of how numbers are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from omni_cache.strategies.base import is_number, require
from omni_cache.strategies.fields import Fields, read_file, write_file

FORMAT = "omni-cache calibration 1"
CALIBRATED = ("teacache", "magcache")
"""Strategies that there are calibrations for."""


@dataclass(frozen=True)
class BranchNumbers:
    """What was measured of one guidance branch of one transformer.

    Attributes:
        numbers: TeaCache's coefficients, highest power first, or MagCache's ratios, one for each
            step.
        fit_error: root mean square of what was measured minus what the numbers say.
    """

    numbers: tuple[float, ...]
    fit_error: float


@dataclass(frozen=True)
class TransformerNumbers:
    """What was measured of one transformer: its class, and the numbers of each guidance branch."""

    model_class: str
    branches: Mapping[str, BranchNumbers]


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a measurement, step by step; the scheduler says in which units."""

    scheduler: str
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] | None


@dataclass(frozen=True)
class Calibration:
    """A strategy's numbers for one model, and what they were measured on.

    Attributes:
        strategy: "teacache" or "magcache".
        num_inference_steps: steps of each generation.
        generations: how many there were.
        transformers: by the component's name in the pipeline.
        date: in ISO 8601.
        versions: of torch, diffusers and omni-cache.
        schedule: None where no scheduler was at hand.
        signal: the flag ``signal``, None for the strategy's own.
    """

    strategy: str
    num_inference_steps: int
    generations: int
    transformers: Mapping[str, TransformerNumbers]
    date: str
    versions: Mapping[str, str]
    schedule: Schedule | None = None
    signal: str | None = None

    def save(self, path: str | Path) -> None:
        """Write the file."""
        write_file(path, FORMAT, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `save` has written.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is broken; the message names the field.
        """
        return read_file(path, FORMAT, _read)

    @property
    def classes(self) -> list[str]:
        """The classes of its transformers."""
        return [each.model_class for each in self.transformers.values()]

    def of(self, name: str, classes: Sequence[str]) -> Calibration:
        """With the numbers of one transformer only.

        Args:
            name: the component's name in its pipeline, "" where nobody has said.
            classes: names of the classes that it is made of, its own first.

        Raises:
            ValueError: the numbers are another class's, or of several transformers.
        """
        own = [name] if name in self.transformers else list(self.transformers)
        for each in own:
            found = self.transformers[each].model_class
            if found not in classes:
                raise ValueError(
                    f"transformers.{each}.model_class is {found!r} in the calibration, and the "
                    f"model is {classes[0]!r}"
                )
        if len(own) > 1:
            raise ValueError(
                f"transformers are {', '.join(own)} in the calibration, and nothing says which one "
                "this is; enable the pipeline that owns it"
            )
        return replace(self, transformers={own[0]: self.transformers[own[0]]})


def _read(fields: Fields) -> Calibration:
    strategy = fields["strategy"]
    require(strategy in CALIBRATED, "strategy", strategy, " or ".join(map(repr, CALIBRATED)))
    versions = fields.object("versions")
    return Calibration(
        strategy,
        steps := fields.count("num_inference_steps"),
        fields.count("generations"),
        {
            name: TransformerNumbers(
                each.text("model_class"),
                {
                    branch: _branch(numbers, steps if strategy == "magcache" else None)
                    for branch, numbers in each.object("branches").each()
                },
            )
            for name, each in fields.object("transformers").each()
        },
        fields.text("date"),
        {name: versions.text(name) for name in versions.content},
        fields.optional("schedule", lambda key: _schedule(fields.object(key))),
        fields.optional("signal", fields.text),
    )


def _branch(fields: Fields, length: int | None) -> BranchNumbers:
    numbers, error = fields.numbers("numbers"), fields["fit_error"]
    fits = length is None or (len(numbers) == length and min(numbers) > 0)
    require(
        fits, fields.name_of("numbers"), numbers, f"{length} positive numbers, one for each step"
    )
    allowed = "a finite number >= 0"
    require(is_number(error) and error >= 0, fields.name_of("fit_error"), error, allowed)
    return BranchNumbers(numbers, float(error))


def _schedule(fields: Fields) -> Schedule:
    sigmas = fields.optional("sigmas", fields.numbers)
    return Schedule(fields.text("scheduler"), fields.numbers("timesteps"), sigmas)
