"""Plans as values, and their files: what each step of a loop does, and what that was made from.

A plan holds several points, from few computed steps to many; docs/plans.md goes through the fields
of the file. Knows nothing of how plans are made, nor of how they are followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omni_cache.planning.gram import Gram
from omni_cache.planning.search import COMPUTE, REUSE, SKIP
from omni_cache.strategies.base import Row, is_count, require
from omni_cache.strategies.fields import Fields, read_file, write_file

FORMAT = "omni-cache plan 1"
EQUAL = "equal"
"""What stands in a file for the infinite PSNR of equal pictures."""
ACTIONS = (COMPUTE, REUSE, SKIP)


class Weights(NamedTuple):
    """What stands in for a step.

    Attributes:
        row: one weight for each kept residual, newest first; of a skipped step, for each kept
            result.
        input: the weight of what the blocks' input has changed by since the newest computed step.
    """

    row: Row
    input: float = 0.0


class Quality(NamedTuple):
    """How near pictures come to uncached ones, over samples: median and 5th percentile.

    Attributes:
        psnr: in dB, infinite where they are equal.
        psnr_low: its 5th percentile.
        ssim: None for what has no structure to compare, such as latents or sound.
        ssim_low: its 5th percentile.
    """

    psnr: float
    psnr_low: float
    ssim: float | None = None
    ssim_low: float | None = None


@dataclass(frozen=True)
class Point:
    """One plan among those of different length.

    Attributes:
        actions: "compute", "reuse" or "skip" for each step.
        depth: how many residuals are weighed at most.
        weights: by transformer, branch and step.
        predicted: on the samples that it was made from, less the optimism.
        judged: on others; None where there were none.
        seconds: of one generation, median; None where nobody has measured it.
        optimism: by how many decibels it does better, in the mean, on the samples that it was
            refined by than it is expected to do on others.
    """

    actions: tuple[str, ...]
    depth: int
    weights: Mapping[str, Mapping[str, Mapping[int, Weights]]] = field(hash=False)
    predicted: Quality | None = None
    judged: Quality | None = None
    seconds: float | None = None
    optimism: float = 0.0

    @property
    def computed_steps(self) -> int:
        """How many steps run the blocks."""
        return self.actions.count(COMPUTE)

    @property
    def skipped_steps(self) -> int:
        """How many steps run nothing of the model."""
        return self.actions.count(SKIP)

    @property
    def weighs_inputs(self) -> bool:
        """Whether a step weighs the input of the blocks."""
        return any(
            weights.input != 0.0
            for branches in self.weights.values()
            for steps in branches.values()
            for weights in steps.values()
        )

    @property
    def quality(self) -> Quality | None:
        """As judged, or else as predicted."""
        return self.judged or self.predicted


@dataclass(frozen=True)
class Signature:
    """What a plan was made on. A run that differs is refused, with the field's name.

    Attributes:
        transformers: class and digest of the configuration, by the component's name.
        scheduler: its class; None where no pipeline was at hand.
        sigmas: of the scheduler, or its timesteps where it has none; None as above.
        timesteps: that the model was called with, where the host knew them.
        owners: the transformer that runs each step.
        size: shape of the model's first result, without the batch.
        dtype: of it.
        guidance: the pipeline's guidance scale, None where it has none.
        versions: of torch, diffusers and omni-cache. They may differ.
    """

    transformers: Mapping[str, tuple[str, str]] = field(hash=False)
    scheduler: str | None
    sigmas: tuple[float, ...] | None
    timesteps: tuple[float, ...] | None
    owners: tuple[str, ...]
    size: tuple[int, ...]
    dtype: str
    guidance: float | None
    versions: Mapping[str, str] = field(hash=False)

    @property
    def num_inference_steps(self) -> int:
        """How many steps a generation has."""
        return len(self.owners)


@dataclass(frozen=True)
class Made:
    """How a plan was made.

    Attributes:
        date: in ISO 8601.
        effort: "low", "default" or "high".
        samples: how many it was made from.
        judged: how many others it was judged on.
        loops: generations that it took, as whole uncached ones.
        seconds: of an uncached generation, median.
        targets: what was asked for, by the name of the argument.
        verified: whether the points were run; what is re-timed was not.
        tuning_seconds: how long it took, None where nobody has measured it.
    """

    date: str
    effort: str
    samples: int
    judged: int
    loops: float
    seconds: float | None
    targets: Mapping[str, float | tuple[float, ...]] = field(hash=False)
    verified: bool = True
    tuning_seconds: float | None = None


@dataclass(frozen=True)
class Content:
    """All that a plan's file holds.

    Attributes:
        signature: what the plan was made on.
        made: how.
        grams: inner products by transformer and branch.
        sensitivity: for each step the squared error of the final result over the squared error of
            the step's residuals, summed over branches, in the units of ``grams``.
        output_sensitivity: the same over the error of the model's results; empty where nothing may
            be skipped.
        frontier: from the point that computes least to the one that computes most.
        chosen: which of them is followed.
        spread: for each step by what factor forecasts of the plan's worst sample are further off
            than the mean; empty where nobody has measured it.
    """

    signature: Signature
    made: Made
    grams: Mapping[str, Mapping[str, Gram]] = field(hash=False)
    sensitivity: tuple[float, ...]
    output_sensitivity: tuple[float, ...]
    frontier: tuple[Point, ...]
    chosen: int
    spread: tuple[float, ...] = ()

    @property
    def point(self) -> Point:
        """The one that is followed."""
        return self.frontier[self.chosen]

    def save(self, path: str | Path) -> None:
        """Write the file."""
        write_file(path, FORMAT, _jsonable(self))

    @classmethod
    def load(cls, path: str | Path) -> Content:
        """Read a file that `save` has written.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is broken; the message names the field.
        """
        return read_file(path, FORMAT, _read)

    @classmethod
    def load_unfinished(cls, path: str | Path) -> Content:
        """Read a file of a tuning that goes on, which may have no points yet; see `load`."""
        return read_file(path, FORMAT, partial(_read, finished=False))


def _jsonable(content: Content) -> dict[str, Any]:
    grams = {
        transformer: {
            branch: {field: _numbers(value) for field, value in vars(gram).items()}
            for branch, gram in branches.items()
        }
        for transformer, branches in content.grams.items()
    }
    return {
        "made": asdict(content.made),
        "signature": {
            **asdict(content.signature),
            "transformers": {
                name: {"model_class": kind, "digest": digest}
                for name, (kind, digest) in content.signature.transformers.items()
            },
        },
        "chosen": content.chosen,
        "frontier": [_point(each, content.signature.owners) for each in content.frontier],
        "sensitivity": content.sensitivity,
        "output_sensitivity": content.output_sensitivity,
        "spread": content.spread,
        "grams": grams,
    }


def _numbers(matrix: Any) -> list[list[float | None]]:
    """Rows of numbers; null where another transformer ran."""
    return [[None if math.isnan(each) else each for each in row] for row in matrix.tolist()]


def _point(point: Point, owners: Sequence[str]) -> dict[str, Any]:
    steps = [
        {"action": action}
        if action == COMPUTE
        else {
            "action": action,
            "weights": {
                branch: found[step]._asdict() for branch, found in point.weights[owner].items()
            },
        }
        for step, (action, owner) in enumerate(zip(point.actions, owners, strict=True))
    ]
    return {
        "computed_steps": point.computed_steps,
        "skipped_steps": point.skipped_steps,
        "depth": point.depth,
        "predicted": _quality(point.predicted),
        "judged": _quality(point.judged),
        "seconds": point.seconds,
        "optimism": point.optimism,
        "steps": steps,
    }


def _quality(quality: Quality | None) -> dict[str, float | str | None] | None:
    if quality is None:
        return None
    found = quality._asdict()
    return {name: EQUAL if value == math.inf else value for name, value in found.items()}


def _read(fields: Fields, finished: bool = True) -> Content:
    signature = _read_signature(fields.object("signature"))
    steps = signature.num_inference_steps
    grams = {
        name: {branch: _read_gram(each, steps) for branch, each in branches.each()}
        for name, branches in fields.object("grams").each()
    }
    allowed = f"an object with {', '.join(signature.transformers)}"
    same = grams.keys() == signature.transformers.keys()
    require(same, "grams", sorted(grams), allowed)
    points = fields.objects("frontier") if finished or fields["frontier"] else []
    frontier = tuple(_read_point(each, signature, grams) for each in points)
    chosen, last = fields["chosen"], max(len(frontier) - 1, 0)
    fits = is_count(chosen, 0) and chosen <= last
    require(fits, "chosen", chosen, f"an integer from 0 to {last}")
    return Content(
        signature,
        _read_made(fields.object("made")),
        grams,
        _for_steps(fields, "sensitivity", steps),
        _for_steps(fields, "output_sensitivity", steps) if fields["output_sensitivity"] else (),
        frontier,
        int(chosen),
        _for_steps(fields, "spread", steps) if fields["spread"] else (),
    )


def _read_signature(fields: Fields) -> Signature:
    owners, size = fields.texts("owners"), fields.numbers("size")
    transformers = {
        name: (each.text("model_class"), each.text("digest"))
        for name, each in fields.object("transformers").each()
    }
    unknown = sorted(set(owners) - set(transformers))
    name, allowed = fields.name_of("owners"), f"names out of {', '.join(transformers)}"
    require(not unknown, name, unknown, allowed)
    versions = fields.object("versions")
    return Signature(
        transformers,
        fields.optional("scheduler", fields.text),
        fields.optional("sigmas", fields.numbers),
        fields.optional("timesteps", fields.numbers),
        owners,
        tuple(map(int, size)),
        fields.text("dtype"),
        fields.optional("guidance", fields.number),
        {name: versions.text(name) for name in versions.content},
    )


def _read_made(fields: Fields) -> Made:
    targets, verified = fields.object("targets"), fields["verified"]
    require(isinstance(verified, bool), fields.name_of("verified"), verified, "true or false")
    return Made(
        fields.text("date"),
        fields.text("effort"),
        fields.count("samples"),
        fields.count("judged", least=0),
        fields.number("loops"),
        fields.optional("seconds", fields.positive),
        {
            name: (targets.numbers if isinstance(value, list) else targets.number)(name)
            for name, value in targets.content.items()
        },
        verified,
        fields.optional("tuning_seconds", fields.positive),
    )


def _read_gram(fields: Fields, steps: int) -> Gram:
    found = []
    for each in dataclass_fields(Gram):
        given = fields[each.name]
        try:
            matrix = np.array(given, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            matrix = np.zeros(())
        name, allowed = fields.name_of(each.name), f"{steps} rows of {steps} numbers"
        require(matrix.shape == (steps, steps), name, given, allowed)
        found.append(matrix)
    try:
        return Gram(*found)
    except ValueError as error:
        raise ValueError(f"{fields.name}: {error}") from None


def _read_point(fields: Fields, signature: Signature, grams: Mapping[str, Any]) -> Point:
    depth, steps = fields.count("depth"), fields.objects("steps")
    length, name = len(signature.owners), fields.name_of("steps")
    require(len(steps) == length, name, len(steps), f"a list of {length} steps")
    weights: dict[str, dict[str, dict[int, Weights]]] = {}
    actions = []
    for step, (each, owner) in enumerate(zip(steps, signature.owners, strict=True)):
        action = each.text("action")
        is_first = step == signature.owners.index(owner)
        allowed = (COMPUTE,) if is_first else ACTIONS
        require(action in allowed, each.name_of("action"), action, " or ".join(allowed))
        actions.append(action)
        if action == COMPUTE:
            continue
        for branch in grams[owner]:
            given = each.object("weights").object(branch)
            found = Weights(given.numbers("row"), given.number("input"))
            require(len(found.row) <= depth, given.name_of("row"), found.row, f"{depth} at most")
            weights.setdefault(owner, {}).setdefault(branch, {})[step] = found
    for key, kind in (("computed_steps", COMPUTE), ("skipped_steps", SKIP)):
        said, expected = fields.count(key, least=0), actions.count(kind)
        require(said == expected, fields.name_of(key), said, f"{expected}, as its steps say")
    return Point(
        tuple(actions),
        depth,
        weights,
        _read_quality(fields, "predicted"),
        _read_quality(fields, "judged"),
        fields.optional("seconds", fields.positive),
        fields.number("optimism"),
    )


def _read_quality(fields: Fields, key: str) -> Quality | None:
    if fields[key] is None:
        return None
    given = fields.object(key)

    def number(name: str) -> float:
        return math.inf if given[name] == EQUAL else given.number(name)

    return Quality(
        number("psnr"),
        number("psnr_low"),
        given.optional("ssim", number),
        given.optional("ssim_low", number),
    )


def _for_steps(fields: Fields, key: str, steps: int) -> tuple[float, ...]:
    numbers = fields.numbers(key)
    fits = numbers is not None and len(numbers) == steps and min(numbers) >= 0
    require(fits, fields.name_of(key), numbers, f"{steps} numbers >= 0, one for each step")
    return numbers
