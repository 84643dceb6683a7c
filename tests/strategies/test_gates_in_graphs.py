"""The gates decide inside a graph as they do on the host: same lines, same bits, no read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from driving import computed, drive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from omni_cache import MagCache, TeaCache
from omni_cache.strategies import Gate, Strategy, Time

STEPS = 12
GATES: dict[str, Strategy] = {
    "teacache": TeaCache(rel_l1_thresh=0.3, coefficients=[-2.0, 1.5, 0.01]),
    "teacache, one coefficient": TeaCache(rel_l1_thresh=0.3, coefficients=[0.11]),
    "teacache within": TeaCache(
        rel_l1_thresh=0.3, coefficients=[1.0, 0.0], start=0.2, end=0.9, force_last_step=True
    ),
    "magcache": MagCache(mag_ratios=[1.0, 0.9, 1.07, 1.12, 0.95], threshold=0.2, max_skip_steps=2),
    "magcache within": MagCache(
        mag_ratios=[1.0, 0.99, 1.04], threshold=0.2, retention_ratio=0, start=0.2, end=0.7
    ),
}


def gate_of(strategy: Strategy) -> Gate:
    return strategy.policy(None).gate("cond", 0)


def on_tensors(gate: Gate, total: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A whole loop as one function of the distances, (total,) float64, which reads nothing.

    It returns what is reused, (total,) bool, and the states that are left, (total, numbers).
    """

    def run(distances: Tensor) -> tuple[Tensor, Tensor]:
        state = gate.begin()
        state = type(state)(*(distances.new_tensor(float(each)) for each in state))
        reuses, states = [], []
        for index in range(total):
            at = Time(index)
            must = index == 0 or gate.foretell(at, total) is not None
            verdict = gate.decide(state, at, total, None if must else distances[index])
            reuse = torch.as_tensor(verdict.reuse) & (not must)
            pairs = zip(verdict.if_reused, verdict.if_computed, strict=True)
            state = type(state)(
                *(
                    torch.where(reuse, *(torch.as_tensor(each).double() for each in p))
                    for p in pairs
                )
            )
            reuses.append(reuse)
            states.append(torch.stack(tuple(state)))
        return torch.stack(reuses), torch.stack(states)

    return run


def on_floats(gate: Gate, distances: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The same loop on the host."""
    verdicts = drive(gate, distances, len(distances))
    states = [each.if_reused if each.reuse else each.if_computed for each in verdicts]
    return (
        torch.tensor([not each for each in computed(verdicts)]),
        torch.tensor(states, dtype=torch.float64),
    )


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def walks(count: int) -> list[list[float]]:
    """Distances of loops, some of which break."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(count, STEPS, generator=generator, dtype=torch.float64) * 0.3
    rows[1, 5], rows[2, 7] = float("nan"), float("inf")
    found: list[list[float]] = rows.tolist()
    return found


@pytest.mark.parametrize("name", GATES)
def test_what_comes_out_is_worth_comparing(name: str) -> None:
    schedules = [on_floats(gate_of(GATES[name]), each)[0].tolist() for each in walks(9)]
    assert all(0 < sum(each) < STEPS for each in schedules)
    # Only what measures depends on the distances.
    assert (len({tuple(each) for each in schedules}) > 1) is name.startswith("teacache")


@settings(max_examples=200)
@given(
    name=st.sampled_from(list(GATES)),
    distances=st.lists(st.floats(0, 0.5), min_size=1, max_size=30),
)
def test_tensors_give_the_bits_that_floats_give(name: str, distances: list[float]) -> None:
    gate = gate_of(GATES[name])
    found = on_tensors(gate, len(distances))(torch.tensor(distances, dtype=torch.float64))
    assert same(found, on_floats(gate, distances))


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("how", ["make_fx", "compile"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_traced_loop_decides_on_other_distances_as_the_host_does(how: str, name: str) -> None:
    """Nothing of what it was traced with is baked in."""
    gate, eager = gate_of(GATES[name]), on_tensors(gate_of(GATES[name]), STEPS)
    rows = walks(9)
    if how == "make_fx":
        traced: Any = make_fx(eager)(torch.tensor(rows[0], dtype=torch.float64))
    else:
        traced = torch.compile(eager, fullgraph=True, backend="eager")
    for distances in rows:
        found = traced(torch.tensor(distances, dtype=torch.float64))
        assert same(found, on_floats(gate, distances))


def test_a_verdict_on_tensors_has_the_measurements_and_no_words() -> None:
    gate = gate_of(GATES["teacache"])
    state = type(gate.begin())(torch.tensor(0.1, dtype=torch.float64))
    verdict = gate.decide(state, Time(3), STEPS, torch.tensor(0.01, dtype=torch.float64))  # type: ignore[arg-type]
    assert verdict.reason == ""
    expected = gate.decide(type(gate.begin())(0.1), Time(3), STEPS, 0.01)
    assert (verdict.distance, verdict.accumulated) == expected[-2:]
    assert (bool(verdict.reuse), expected.reason) == (True, "below threshold")
