"""What a gate that measures nothing does at every step, asked ahead of time.

Such a gate decides by the step and by what it has done before, so that a loop over steps and no
model shows it all. A loop may begin at any step: image-to-image begins in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omni_cache.strategies import Forecast, Gate, Time
from omni_cache.strategies.base import require

COMPUTED: dict[str, Any] = {"action": "computed"}


def check_forecast(forecast: Forecast) -> None:
    """Refuse a forecast that needs more than the steps.

    Raises:
        ValueError: it does.
    """
    if forecast.reads_values:
        raise ValueError(
            "forecast_axis='sigma' is not allowed; timesteps are not known when a package is "
            "written. Choose forecast_axis='step'"
        )
    if forecast.reads_products or forecast.feeds_back:
        raise ValueError(
            f"forecast={type(forecast).__name__} is not allowed; it weighs by what the residuals "
            "are, or by its own forecasts, which a package does not keep. Choose 'hold', "
            "'newton' with forecast_axis='step', 'taylor', 'hermite', 'adams' or 'chebyshev'"
        )


def schedules(
    gate: Gate, forecast: Forecast, steps: int, columns: int, weighs_inputs: bool
) -> list[list[dict[str, Any]]]:
    """For each step that a loop may begin with, what it does from there on.

    Args:
        gate: measures nothing.
        forecast: of the same branch.
        steps: their number.
        columns: how many residuals the reused step takes.
        weighs_inputs: whether it takes two weights more, of what enters.

    Returns:
        For each step an ``action``, and with "reused" and "skipped" the ``row`` of weights.
    """
    require(not gate.measures, "gate", gate, "one that measures nothing")
    return [_from(first, gate, forecast, steps, columns, weighs_inputs) for first in range(steps)]


def _from(
    first: int, gate: Gate, forecast: Forecast, steps: int, columns: int, weighs_inputs: bool
) -> list[dict[str, Any]]:
    found, state = [], gate.begin()
    kept: list[Time] = []
    for index in range(first, steps):
        at = Time(index)
        if kept and gate.begins_anew(at):
            kept, state = [], gate.begin()
        must = not kept or gate.foretell(at, steps) is not None
        verdict = gate.decide(state, at, steps, None)
        if verdict.reuse and not must:
            state = verdict.if_reused
            now, newest = at._replace(total=steps), kept[: forecast.depth]
            if gate.skips(at, steps):
                row: Sequence[float] = forecast.skip_weights(newest, now)
                found.append({"action": "skipped", "row": list(row)})
                continue
            row = [*forecast.weights(newest, now), *[0.0] * (columns - len(newest))]
            if weighs_inputs:
                weight = forecast.input_weight(newest, now)
                row = [*row, weight, -weight]
            found.append({"action": "reused", "row": list(row)})
        else:
            state = verdict.if_computed
            kept = [at, *kept][: forecast.depth]
            found.append(COMPUTED)
    return found
