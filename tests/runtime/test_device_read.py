"""Decisions where tensors lie on a device, driven on the CPU by denying the host a look at them.

One copy to the host per call brings verdict and timestep together, so the call's trajectory must be
guessed before it is known. Schedules and predictions must be those of the path that need not guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    MAGCACHE,
    STRATEGIES,
    TOKENS,
    Loop,
    ToyTransformer,
    compiled,
    computed,
    gaussian,
    interrupted,
    reasons,
    same,
)

from omni_cache.runtime import executor

BRANCHES = {1: ("cond",), 2: ("cond", "uncond"), 3: ("cond", "uncond", "reference")}

pytestmark = pytest.mark.usefixtures("no_grad")


@contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let the host see no tensor; yields how many copies to the host each call has made."""
    copies: list[int] = []
    bring, run = executor._Read.__call__, executor.Executor.__call__

    def counting_bring(read: executor._Read, verdict: Tensor) -> list[float]:
        copies[-1] += 1
        return bring(read, verdict)

    def counting_run(self: executor.Executor, *args: Any) -> Any:
        copies.append(0)
        return run(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(executor._Read, "__call__", counting_bring)
        patch.setattr(executor.Executor, "__call__", counting_run)
        patch.setattr(executor, "_host_value", lambda value: None)
        yield copies


def generations(loops: list[Loop], **flags: Any) -> tuple[list[Tensor], list[list[list[bool]]]]:
    """All predictions of loops that go over one model, and the schedule of each."""
    model = ToyTransformer()
    cached = compiled(model, **flags)
    predictions, schedules = [], []
    for loop in loops:
        predictions += loop.run(cached)
        schedules.append(computed(model))
    return predictions, schedules


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("branches", BRANCHES)
def test_schedules_and_predictions_are_those_of_the_host(
    branches: int, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = [Loop(BRANCHES[branches], seed=seed) for seed in (0, 1, 0)]
    expected, expected_schedules = generations(loops, **STRATEGIES[strategy])

    with pretended_device(monkeypatch) as copies:
        predictions, schedules = generations(loops, **STRATEGIES[strategy])

    assert schedules == expected_schedules
    assert same(predictions, expected)
    assert any(False in schedule for schedule in schedules[-1])
    assert len(copies) == len(predictions)
    assert set(copies) == {1}  # the timestep at least, and never twice


def test_a_known_place_costs_a_host_decided_strategy_no_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Loop(BRANCHES[2], explicit=True)
    expected, expected_schedules = generations([loop], **MAGCACHE)

    with pretended_device(monkeypatch) as copies:
        predictions, schedules = generations([loop], **MAGCACHE)

    assert (same(predictions, expected), schedules) == (True, expected_schedules)
    assert set(copies) == {0}


def test_a_known_place_costs_a_measuring_strategy_one_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Loop(BRANCHES[2], explicit=True)
    expected, expected_schedules = generations([loop])

    with pretended_device(monkeypatch) as copies:
        predictions, schedules = generations([loop])

    assert (same(predictions, expected), schedules) == (True, expected_schedules)
    assert copies == [0, 0] + [1] * 14  # nothing to compare at the first step


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_branch_that_ends_early_costs_one_computed_step_at_most(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance that stops half-way: the guess, another branch, is wrong once."""
    flags = {**STRATEGIES[strategy], "threshold": 1e9} if strategy == "magcache" else ALWAYS_REUSE
    model = ToyTransformer()
    cached = compiled(model, **flags)
    prompts = [gaussian(name, 1, 5, CHANNELS) for name in BRANCHES[2]]
    latents = gaussian(0, 1, TOKENS, CHANNELS)

    with pretended_device(monkeypatch) as copies:
        for step in range(7):
            for prompt in prompts[: 2 if step < 3 else 1]:
                cached(latents.clone(), torch.tensor([1000.0 - step]), prompt)

    assert max(copies) == 1
    if strategy == "teacache":
        # Its one copy was spent on the wrong branch.
        assert reasons(model)[0][4] == "unexpected call"
        assert computed(model) == [
            [True, False, False, False, True, False, False],
            [True, False, False],
        ]
    else:
        assert reasons(model)[0][1:] == [*["below threshold"] * 2, "max_skip_steps"] * 2


def test_a_second_step_with_new_inputs_computes_without_a_copy_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    with pretended_device(monkeypatch) as copies:
        for step in range(4):
            prompt, latents = gaussian("p", 1, 5, CHANNELS), gaussian(0, 1, TOKENS, CHANNELS)
            cached(latents, torch.tensor([1000.0 - step]), prompt, None)

    assert set(copies) == {1}
    assert computed(model) == [[True, True, False, False]]


@pytest.mark.parametrize("calls", range(1, 6))
def test_abandoned_loop_is_not_reused(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(BRANCHES[2])
    expected = loop.run(compiled(ToyTransformer(), **ALWAYS_REUSE))

    cached = compiled(ToyTransformer(), **ALWAYS_REUSE)
    with pretended_device(monkeypatch):
        with interrupted():
            replace(loop, prompts=("one", "two"), seed=1, calls=calls).run(cached)
        assert same(loop.run(cached), expected)


def test_non_finite_residual_comes_over_with_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device the flag must not cost a copy of its own."""
    read = executor._Read()
    read.want("finite", torch.tensor(False))
    assert read.known("finite") is None
    assert read(torch.tensor([1.0, 2.0])) == [1.0, 2.0]
    assert read.known("finite") == 0.0
