"""An observer sees every call, and may tell what a computed one makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from toy_transformer import (
    MAGCACHE,
    STRATEGIES,
    TOKENS,
    WIDTH,
    Loop,
    ToyTransformer,
    compiled,
    computed,
    same,
)

from omni_cache.lowering.program import Computed
from omni_cache.runtime.contexts import Observed, observing
from omni_cache.strategies import Time

pytestmark = pytest.mark.usefixtures("no_grad")


class Recorder:
    """Keeps all that it is shown, and tells what it knows of the steps before ``until``."""

    def __init__(self, until: int = 0) -> None:
        self.steps: list[Observed] = []
        self.known: dict[tuple[str, int], Computed] = {}
        self.asked: list[tuple[str, int]] = []
        self.until = until

    def __call__(self, step: Observed) -> None:
        self.steps.append(step)
        if step.finite is not None:
            results = [each.clone() for each in step.result]
            made = Computed(results, step.stored, step.finite)
            self.known[step.branch, step.at.index] = made

    def recall(self, region: object, branch: str, at: Time) -> Computed | None:
        self.asked.append((branch, at.index))
        return self.known[branch, at.index] if at.index < self.until else None


class Running:
    """An inner compiler that counts how often a part with attention runs."""

    def __init__(self) -> None:
        self.bodies = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        has_attention = "scaled_dot_product_attention" in gm.code

        def run(*args: Any) -> Any:
            self.bodies += has_attention
            return gm.forward(*args)

        return run


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("explicit", [False, True])
def test_every_call_is_shown(strategy: str, explicit: bool) -> None:
    model, observer = ToyTransformer(), Recorder()
    loop = Loop(("cond", "uncond"), explicit=explicit)
    with observing(observer):
        predictions = loop.run(compiled(model, **STRATEGIES[strategy]))
    assert len(observer.steps) == len(predictions) == 16
    assert same([each.output for each in observer.steps], predictions)
    branches = dict.fromkeys(each.branch for each in observer.steps)
    for name, flags in zip(branches, computed(model), strict=True):
        steps = [each for each in observer.steps if each.branch == name]
        assert [each.at.index for each in steps] == list(range(8))
        assert [each.computed for each in steps] == flags
        assert [len(each.residuals) for each in steps] == list(map(int, flags))
        assert [each.finite is not None for each in steps] == flags
        assert 2 <= sum(flags) < 8
    assert len({each.generation for each in observer.steps}) == 1
    assert len({each.region for each in observer.steps}) == 1


@pytest.mark.parametrize("until", [3, 8])
def test_what_an_observer_knows_is_not_computed(until: int) -> None:
    """The residuals that it gives are those that later steps reuse."""
    inner, observer = Running(), Recorder(until)
    loop = Loop(("cond", "uncond"), explicit=True)
    model = compiled(ToyTransformer(), **{**MAGCACHE, "inner": inner})
    observer.until = 0
    with observing(observer):
        expected = loop.run(model)
    told, observer.until, observer.asked = inner.bodies, until, []
    assert told == len(observer.known) < 16
    with observing(observer):
        assert same(loop.run(model), expected)
    assert inner.bodies - told == sum(index >= until for _, index in observer.known)
    assert observer.asked == list(observer.known)  # and of no step that is reused


def test_a_recalled_step_counts_as_computed() -> None:
    """What is told is taken: other residuals give other predictions, and the record says so."""
    loop, observer, module = Loop(explicit=True), Recorder(1), ToyTransformer()
    model = compiled(module, **MAGCACHE)
    expected = Loop(explicit=True).run(model)
    first = expected[0]
    other = torch.ones(1, TOKENS, WIDTH)
    observer.known["cond", 0] = Computed([first.clone()], (other,), torch.tensor(True))
    with observing(observer):
        predictions = loop.run(model)
    assert same(predictions[:1], [first])
    assert computed(module)[0][:2] == [True, False]
    assert not torch.equal(predictions[1], expected[1])
