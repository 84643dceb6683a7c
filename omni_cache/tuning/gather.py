"""What calibration measures of uncached loops: inner products over their steps, and nothing else.

One loop's residuals at a time lie on the host, in the dtype that they were kept in; products are
taken in float64, slice by slice. Knows calls and tensors; nothing of plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omni_cache.planning import Gram
from omni_cache.runtime.contexts import Observed, Run

Array = npt.NDArray[np.float64]

_SLICE = 1 << 20
"""Elements of a vector that are taken to float64 at once."""


class Course(NamedTuple):
    """One guidance branch of one transformer, by their names."""

    transformer: str
    branch: str


@dataclass
class Vectors:
    """An observer that keeps the vectors of one loop, step by step, on the host.

    A call that is seen in several regions adds to its vectors.
    """

    runs: dict[Run, dict[str, dict[int, _Call]]] = field(default_factory=dict)

    def __call__(self, step: Observed) -> None:
        """Keep what a computed step has made."""
        if step.finite is None:
            return
        calls = self.runs.setdefault(step.run, {}).setdefault(step.branch, {})
        call = calls.setdefault(step.at.index, _Call())
        weighed = [place for place, each in enumerate(step.residuals) if _is_weighed(each)]
        call.residuals += [_on_host(step.residuals[place]) for place in weighed]
        call.inputs += [
            _on_host(_partner(step.partners[place], step.residuals[place])) for place in weighed
        ]
        call.outputs = [_on_host(each) for each in step.result if _is_weighed(each)]

    def products(self, names: Mapping[Run, str], steps: int) -> dict[Course, Gram]:
        """The inner products of this loop, in units of the course's own mean square.

        Args:
            names: the transformer of each run.
            steps: of the loop.

        Raises:
            ValueError: a residual, an input or an output is not finite; the message names the step.
        """
        found = {}
        for run, branches in self.runs.items():
            for branch, calls in branches.items():
                course = Course(names[run], branch)
                found[course] = _gram(course, calls, steps)
        return found


@dataclass
class _Call:
    """The vectors of one call: each a list of tensors that are one vector together."""

    residuals: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def mean(grams: Sequence[Gram]) -> Gram:
    """The mean over samples, which count alike."""
    return Gram(
        *(
            np.mean([getattr(each, name) for each in grams], axis=0)
            for name in ("residuals", "cross", "inputs", "outputs")
        )
    )


def _gram(course: Course, calls: Mapping[int, _Call], steps: int) -> Gram:
    present = sorted(calls)
    made = [calls[step] for step in present]
    own = _products([each.residuals for each in made], [each.residuals for each in made])
    cross = _products([each.inputs for each in made], [each.residuals for each in made])
    inputs = _products([each.inputs for each in made], [each.inputs for each in made])
    outputs = _products([each.outputs for each in made], [each.outputs for each in made])
    for name, found in {"residual": own, "input": inputs, "output": outputs}.items():
        broken = [
            step for step, one in zip(present, np.diag(found), strict=True) if not one < np.inf
        ]
        if broken:
            raise ValueError(
                f"the {name} of step {broken[0]} ({course.transformer or 'the model'}, "
                f"{course.branch}) holds numbers that are not finite, so nothing can be fitted to it"
            )
    unit, output_unit = (float(np.mean(np.diag(each))) or 1.0 for each in (own, outputs))
    return Gram(
        *(
            _spread(found / scale, present, steps)
            for found, scale in ((own, unit), (cross, unit), (inputs, unit), (outputs, output_unit))
        )
    )


def _products(first: Sequence[Sequence[Tensor]], second: Sequence[Sequence[Tensor]]) -> Array:
    """<first_i, second_j> for all i and j, in float64."""
    total = torch.zeros(len(first), len(second), dtype=torch.float64)
    for place in range(len(first[0])):
        left, right = ([each[place] for each in vectors] for vectors in (first, second))
        for start in range(0, left[0].numel(), _SLICE):
            total += _stacked(left, start) @ _stacked(right, start).T
    return total.numpy()


def _stacked(vectors: Sequence[Tensor], start: int) -> Tensor:
    return torch.stack([each.view(-1)[start : start + _SLICE].double() for each in vectors])


def _spread(matrix: Array, present: Sequence[int], steps: int) -> Array:
    """A matrix over all steps of the loop, NaN where another transformer ran."""
    whole = np.full((steps, steps), np.nan)
    whole[np.ix_(present, present)] = matrix
    return whole


def _partner(partner: Tensor | None, residual: Tensor) -> Tensor:
    """The input that a residual is an update of; a value without one is an update of nothing."""
    return torch.zeros_like(residual) if partner is None else partner.expand_as(residual)


def _on_host(tensor: Tensor) -> Tensor:
    """A copy, since a caller may write into results and a compiler into the rest."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().to("cpu", copy=True).contiguous()


def _is_weighed(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
