"""What calibration measures of uncached loops: inner products over their steps, and nothing else.

One loop's residuals at a time lie on the host, in the dtype that they were kept in; products are
taken in float64, slice by slice. Knows calls and tensors; nothing of plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omni_cache.planning.gram import Gram, error_of, fit
from omni_cache.runtime.contexts import Observed, Run

Array = npt.NDArray[np.float64]

_FIELDS = ("residuals", "cross", "inputs", "outputs")
_DISTANCES = 6
"""How far apart the computed steps of a forecast lie at most, where its spread is measured."""
_SLICE = 1 << 20
"""Elements of a vector that are taken to float64 at once."""


Grams = dict[str, dict[str, Gram]]
"""By transformer and branch."""


@dataclass
class Vectors:
    """An observer that keeps the vectors of one loop, step by step, on the host.

    A call that is seen in several regions adds to its vectors.

    Attributes:
        runs: for each model's part in the loop, by branch and step.
        times: the timestep of each step, None where the host does not know it.
        size: the shape of the model's first result, without the batch.
        dtype: of it.
    """

    runs: dict[Run, dict[str, dict[int, _Call]]] = field(default_factory=dict)
    times: dict[int, float | None] = field(default_factory=dict)
    size: tuple[int, ...] = ()
    dtype: str = ""

    def __call__(self, step: Observed) -> None:
        """Keep what a computed step has made."""
        if step.finite is None:
            return
        calls = self.runs.setdefault(step.run, {}).setdefault(step.branch, {})
        call = calls.setdefault(step.at.index, _Call())
        self.times[step.at.index] = step.at.value
        self.size, self.dtype = tuple(step.output.shape[1:]), str(step.output.dtype)
        residuals = [each for each in step.residuals if _is_weighed(each)]
        call.residuals += map(_on_host, residuals)
        call.inputs += map(_on_host, _partners(residuals, step.entered))
        call.outputs = [_on_host(each) for each in step.result if _is_weighed(each)]

    def products(self, names: Mapping[Run, str], steps: int) -> Grams:
        """The inner products of this loop, in units of each branch's own mean square.

        Args:
            names: the transformer of each run.
            steps: of the loop.

        Raises:
            ValueError: a residual, an input or an output is not finite, or of another shape than
                at the first step; the message names the step.
        """
        return {
            names[run]: {
                branch: _gram(names[run], branch, calls, steps)
                for branch, calls in branches.items()
            }
            for run, branches in self.runs.items()
        }


@dataclass
class _Call:
    """The vectors of one call: each a list of tensors that are one vector together."""

    residuals: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def mean(samples: Sequence[Grams]) -> Grams:
    """The mean over samples, which count alike."""
    return {
        name: {
            branch: Gram(
                *(
                    np.mean([getattr(each[name][branch], field) for each in samples], axis=0)
                    for field in _FIELDS
                )
            )
            for branch in branches
        }
        for name, branches in samples[0].items()
    }


def spread(samples: Sequence[Grams]) -> tuple[float, ...]:
    """For each step by what factor forecasts of the worst sample are further off than the mean.

    Forecasts are those from the two steps that lie one distance and two before it, for several
    distances; both errors are relative to the step's own residual.
    """
    together = mean(samples)
    found = [1.0] * len(next(iter(next(iter(together.values())).values())))
    for name, branches in together.items():
        for branch, gram in branches.items():
            ran = np.flatnonzero(gram.present).tolist()
            for place, step in enumerate(ran):
                for distance in range(1, min(_DISTANCES, place) + 1):
                    kept = [
                        ran[each] for each in (place - distance, place - 2 * distance) if each >= 0
                    ]
                    weights = fit(gram, kept, step).weights
                    expected = _relative(gram, kept, step, weights)
                    worst = max(
                        _relative(each[name][branch], kept, step, weights) for each in samples
                    )
                    if expected > 0:
                        found[step] = max(found[step], worst / expected)
    return tuple(found)


def _relative(gram: Gram, kept: Sequence[int], step: int, weights: Sequence[float]) -> float:
    """How far off a forecast is, over the norm of what it stands for; 0 for a forecast of 0."""
    square = float(gram.residuals[step, step])
    return math.sqrt(error_of(gram, kept, step, weights) / square) if square > 0 else 0.0


def _gram(name: str, branch: str, calls: Mapping[int, _Call], steps: int) -> Gram:
    present = sorted(calls)
    made = [calls[step] for step in present]
    residuals, inputs, outputs = (
        [getattr(each, kind) for each in made] for kind in ("residuals", "inputs", "outputs")
    )
    for step, call in zip(present, made, strict=True):
        if _shapes(call) != _shapes(made[0]):
            raise ValueError(
                f"step {step} of {name or 'the model'}, {branch}, adds tensors of the shapes "
                f"{_shapes(call)}, where step {present[0]} adds {_shapes(made[0])}; a plan is for "
                "loops whose batch and size stay the same, guidance included"
            )
    own, within, after = (_products(each, each) for each in (residuals, inputs, outputs))
    for kind, found in {"residual": own, "input": within, "output": after}.items():
        for step, square in zip(present, np.diag(found), strict=True):
            if not square < np.inf:
                raise ValueError(
                    f"the {kind} of step {step} in {name or 'the model'}, {branch}, is not finite, "
                    "and so nothing can be fitted to it"
                )
    unit, output_unit = (float(np.mean(np.diag(each))) or 1.0 for each in (own, after))
    return Gram(
        residuals=_spread(own / unit, present, steps),
        cross=_spread(_products(inputs, residuals) / unit, present, steps),
        inputs=_spread(within / unit, present, steps),
        outputs=_spread(after / output_unit, present, steps),
    )


def _shapes(call: _Call) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in (*call.residuals, *call.outputs)]


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


def _partners(residuals: Sequence[Tensor], entered: Sequence[Tensor]) -> list[Tensor]:
    """The input that each residual is an update of; a value without one is an update of nothing.

    Partners come in the order of the residuals, and have their shapes.
    """
    waiting, found = list(entered), []
    for residual in residuals:
        has_one = bool(waiting) and waiting[0].shape == residual.shape
        found.append(waiting.pop(0) if has_one else torch.zeros_like(residual))
    return found


def _on_host(tensor: Tensor) -> Tensor:
    """A copy, since a caller may write into results and a compiler into the rest."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().to("cpu", copy=True).contiguous()


def _is_weighed(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
