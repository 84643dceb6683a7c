"""Gates driven as the runtime drives them: of each verdict one of the two states is kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from omni_cache.strategies import Gate, Time, Verdict
from omni_cache.strategies.signals import RelativeL1


def drive(
    gate: Gate,
    distances: Iterable[float | None],
    total: int | None = None,
    lost: Collection[int] = (0,),
) -> list[Verdict]:
    """The verdicts on a whole loop, one for each distance.

    Args:
        gate: whose.
        distances: of each step's signal from that of the step before; None where it has none.
        total: the number of steps, as far as somebody says.
        lost: the steps at which no residual is held, whatever was computed before.
    """
    state, verdicts = gate.begin(), []
    for index, distance in enumerate(distances):
        at = Time(index)
        must = gate.foretell(at, total)
        if gate.begins_anew(at):
            must, state = "refresh", gate.begin()
        if index in lost:
            must = "no residual" if index else "first step"
        verdict = gate.decide(state, at, total, None if must else distance)
        if must is not None:
            verdict = verdict._replace(reuse=False, reason=must)
        state = verdict.if_reused if verdict.reuse else verdict.if_computed
        verdicts.append(verdict)
    return verdicts


def distances(signals: Sequence[Tensor]) -> list[float | None]:
    """How far each signal is from the one before."""
    measure = RelativeL1()
    pairs = zip(signals[1:], signals[:-1], strict=True)
    return [None, *(measure.distance(measure.measure(*each, ()).tolist()) for each in pairs)]


def computed(verdicts: Sequence[Verdict]) -> list[bool]:
    """Which steps are computed."""
    return [not each.reuse for each in verdicts]


def reasons(verdicts: Sequence[Verdict]) -> list[str]:
    """Why."""
    return [each.reason for each in verdicts]
