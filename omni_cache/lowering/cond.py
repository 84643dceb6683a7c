"""The lowering in which the graph decides: gate and forecast of a strategy, on tensors.

The lines that decide are those of the strategy's own gate, and the weights those of its own
forecast. They are traced once with float64 tensors in place of numbers. Where that is not possible,
because they branch on what they are given, the strategy is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from omni_cache.strategies import Forecast, Gate, Policy, Time, Verdict
from omni_cache.strategies.signals import RelativeL1

ALLOWED = (
    "one that compares signals by their relative L1 (TeaCache, First Block Cache), or one that "
    "goes by steps alone (MagCache, TaylorSeer, a plan)"
)


def allowed_steps(gate: Gate, steps: int) -> list[bool]:
    """For each step, whether the gate has nothing against reusing it before it has measured."""
    return [gate.foretell(Time(index), steps) is None for index in range(steps)]


def decision(
    name: str, policy: Policy, gate: Gate, steps: int, depth: int, weights: torch.dtype
) -> Decision:
    """The decision of a strategy as a function of tensors.

    Args:
        name: of the strategy, for messages.
        policy: what it does; it measures something.
        gate: of the branch.
        steps: the number of steps.
        depth: how many residuals the graph weighs.
        weights: dtype of the row of weights.

    Raises:
        ValueError: the strategy does not decide on tensors, and why.
    """
    signal, forecast = policy.signal, policy.forecast
    if not isinstance(signal, RelativeL1):
        raise ValueError(
            f"cache={name!r} is not allowed; a graph does not take its measurement. Choose "
            f"{ALLOWED}"
        )
    if forecast.reads_products or forecast.feeds_back:
        raise ValueError(
            f"forecast={type(forecast).__name__} is not allowed; it weighs by what the residuals "
            "are, or by its own forecasts, which a graph does not keep. Choose 'hold', 'newton', "
            "'taylor' or 'hermite'"
        )
    open_steps = [index for index, each in enumerate(allowed_steps(gate, steps)) if each]
    if len(open_steps) < 2:
        raise ValueError(
            f"num_inference_steps={steps} is not allowed; of so many steps cache={name!r} reuses "
            "none"
        )
    _check_gate(name, gate, open_steps, steps)
    _check_forecast(forecast, steps, depth)
    return Decision(signal, gate, forecast, open_steps[-1], steps, depth, weights)


@dataclass(frozen=True)
class Decision:
    """A strategy's decision on tensors, as a value: what is compiled with equal ones is the same.

    Attributes:
        signal: how signals are compared.
        gate: what decides.
        forecast: what weighs.
        index: a step that the gate leaves to the measurement.
        steps: the number of steps.
        depth: how many residuals the graph weighs.
        weights: dtype of the row of weights.
    """

    signal: RelativeL1
    gate: Gate
    forecast: Forecast
    index: int
    steps: int
    depth: int
    weights: torch.dtype

    def __call__(
        self,
        allowed: Tensor,
        at: Tensor,
        state: Tensor,
        now: Tensor,
        before: Tensor,
        finite: Tensor,
        times: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `passes.cond.Decide`."""
        moved = (now.float() - before.float()).abs().sum()
        size = before.float().abs().sum()
        # Sums are in float32, everything after them in the dtype of the state.
        sums: Any = (moved.to(state), size.to(state), now.numel())
        distance: Any = self.signal.distance(sums)
        usable = finite.long().cumprod(0).sum()
        measures = allowed & (usable > 0)
        decide = _deciding(self.gate, self.index, self.steps)
        verdict, if_reused, if_computed, unmeasured = decide(state, distance)
        reuse = measures & verdict
        after = torch.where(measures, torch.where(reuse, if_reused, if_computed), unmeasured)
        kept = self.forecast.depth
        rows = _rows(self.forecast, times[:kept], at[0], self.steps, self.depth)
        row = rows.index_select(0, (usable - 1).clamp(0, kept - 1)[None])
        return reuse, after, distance, row.to(self.weights)


def gate_of_all(name: str, policy: Policy, branches: Sequence[str], advice: str = "") -> Gate:
    """The gate that is the same for all branches.

    Args:
        name: of the strategy, for messages.
        policy: what it does.
        branches: their names, in order.
        advice: what to do if there is none, to end the message with.

    Raises:
        ValueError: they have numbers of their own.
    """
    first, *others = (policy.gate(each, place) for place, each in enumerate(branches))
    if any(each != first for each in others):
        raise ValueError(
            f"cache={name!r} with numbers for each branch is not allowed; one graph decides for "
            f"all of them{advice}"
        )
    return first


def verdict_on(gate: Gate, told: Sequence[float], at: Time, total: int | None) -> Verdict:
    """What a gate says of a step that a graph has decided.

    Args:
        gate: the one within.
        told: its state before the step, as numbers, and the distance.
        at: where the step lies.
        total: the number of steps.
    """
    *numbers, distance = told
    state = tree_unflatten(numbers, tree_flatten(gate.begin())[1])
    return gate.decide(state, at, total, distance)


def initial_state(gate: Gate) -> list[float]:
    """The numbers of a gate's first state."""
    return [float(each) for each in tree_leaves(gate.begin())]


def _deciding(
    gate: Gate, index: int, steps: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``(state, distance) -> reuse``, and the states if reused, if computed, if unmeasured.

    The gate is asked as at the step ``index``.
    """
    _, nesting = tree_flatten(gate.begin())

    def run(state: Tensor, distance: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        numbers = tree_unflatten(state.unbind(), nesting)
        verdict = gate.decide(numbers, Time(index), steps, distance)
        unmeasured = gate.decide(numbers, Time(index), steps, None)

        def packed(after: Any) -> Tensor:
            values = tree_leaves(after)
            return torch.stack([torch.as_tensor(each, dtype=state.dtype) for each in values])

        return (
            torch.as_tensor(verdict.reuse),
            packed(verdict.if_reused),
            packed(verdict.if_computed),
            packed(unmeasured.if_computed),
        )

    return run


def _check_gate(name: str, gate: Gate, open_steps: Sequence[int], steps: int) -> None:
    """Refuse a gate that does not decide on tensors, or by the step too.

    Raises:
        ValueError: it is one.
    """
    index = open_steps[-1]
    try:
        state = torch.tensor(initial_state(gate), dtype=torch.float64)
        examples = state, torch.tensor(0.1, dtype=torch.float64)
        make_fx(_deciding(gate, index, steps), tracing_mode="fake")(*examples)
    except Exception as error:
        raise ValueError(
            f"cache={name!r} is not allowed; its gate branches on what it has measured or counted "
            f"({_said(error)}), and so a graph cannot decide by it. Choose {ALLOWED}"
        ) from error
    states, distances = [gate.begin()], [4.0**-power for power in range(8)]
    for distance in distances:
        states.append(gate.decide(states[-1], Time(index), steps, distance).if_reused)
    for asked in ((state, distance) for state in states for distance in distances):
        verdicts = (gate.decide(asked[0], Time(each), steps, asked[1]) for each in open_steps)
        if len({(each.reuse, each.if_reused, each.if_computed) for each in verdicts}) > 1:
            raise ValueError(
                f"cache={name!r} is not allowed; its gate weighs a measurement by the step. Choose "
                f"{ALLOWED}"
            )


def _rows(forecast: Forecast, times: Tensor, now: Tensor, steps: int, depth: int) -> Tensor:
    """The weights where 1, 2, ... entries are usable, (forecast.depth, depth)."""
    rows = []
    for count in range(1, forecast.depth + 1):
        row = _row(forecast, times[:count], now, steps, with_values=True)
        if forecast.reads_values:
            # On the host, timesteps that are unknown or come twice leave it to the steps.
            by_step = _row(forecast, times[:count], now, steps, with_values=False)
            row = torch.where(row.isfinite().all(), row, by_step)
        rows.append(torch.nn.functional.pad(row, (0, depth - count)))
    return torch.stack(rows)


def _row(forecast: Forecast, times: Tensor, now: Tensor, steps: int, with_values: bool) -> Tensor:
    def time(pair: Tensor, total: int | None = None) -> Time:
        return Time(pair[0], pair[1] if with_values else None, total)  # type: ignore[arg-type]

    row = forecast.weights([time(each) for each in times.unbind()], time(now, steps))
    return torch.stack([torch.as_tensor(each, dtype=times.dtype) for each in row])


def _check_forecast(forecast: Forecast, steps: int, depth: int) -> None:
    """Refuse a forecast that says something else of tensors than of numbers.

    Raises:
        ValueError: it does.
    """
    chance = random.Random(0)
    try:
        examples = torch.zeros(forecast.depth, 2, dtype=torch.float64), torch.zeros(2).double()
        traced = make_fx(
            lambda times, now: _rows(forecast, times, now, steps, depth), tracing_mode="fake"
        )(*examples)
        for now in range(depth, max(steps, depth + 1)):
            before = sorted(chance.sample(range(now), depth))
            places = [(float(i), 1000.0 * (1 - i / (steps + depth))) for i in [*before[::-1], now]]
            times = torch.tensor(places, dtype=torch.float64)
            found = traced(times[: forecast.depth], times[-1])
            for count, row in enumerate(found.tolist(), 1):
                kept = [Time(int(i), value) for i, value in places[:count]]
                at = Time(now, places[-1][1], steps)
                expected = torch.tensor(forecast.weights(kept, at), dtype=torch.float64)
                if not torch.allclose(expected.new_tensor(row[:count]), expected, rtol=1e-9):
                    raise ValueError("its weights on tensors are others")
    except Exception as error:
        raise ValueError(
            f"forecast={type(forecast).__name__} is not allowed; a graph cannot weigh by it "
            f"({_said(error)}). Choose 'hold', 'newton', 'taylor' or 'hermite', or a strategy that "
            "goes by steps alone (MagCache, TaylorSeer, a plan), which any forecast by steps fits"
        ) from error


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:100].rstrip(".") if lines else type(error).__name__
