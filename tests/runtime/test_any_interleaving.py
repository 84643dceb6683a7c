"""Random interleavings of what callers do, against an oracle that knows the truth.

Every call of the model is made for a request, a branch and a prompt that the test knows. What the
blocks of the plain model add is worked out beside it, so that a prediction tells of which calls'
residuals it may be made. No call may be given that of another request, branch, prompt or size; and
a loop that nothing disturbs reuses nearly all that it could.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from contextvars import Context, copy_context
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    AbandonedError,
    FlakyCompiler,
    ToyTransformer,
    gaussian,
)

import omni_cache

STRATEGIES: dict[str, dict[str, Any]] = {
    "teacache": ALWAYS_REUSE,
    "magcache": {
        "cache": "magcache",
        "mag_ratios": [1.0] * 28,
        "threshold": 1e9,
        "max_skip_steps": 99,
        "retention_ratio": 0.0,
    },
}
STEPS = 8


class Request:
    """One denoising loop, as its caller knows it: it goes on in a context of its own."""

    def __init__(self, number: int, branches: int, tokens: int, anew: bool, named: bool) -> None:
        self.number, self.branches, self.tokens = number, branches, tokens
        self.anew, self.named, self.step = anew, named, 0
        self.words = dict.fromkeys(range(branches), 0)
        self.prompts = {branch: self._embedded(branch) for branch in self.words}
        self.context: Context = copy_context()
        self.generation = omni_cache.generation(STEPS) if named else nullcontext()
        self.context.run(self.generation.__enter__)

    def end(self) -> None:
        """Leave the context of its generation."""
        self.context.run(self.generation.__exit__, None, None, None)

    def say(self, branch: int, words: int) -> None:
        """Have a branch be told other words."""
        self.words[branch] = words
        self.prompts[branch] = self._embedded(branch)

    def prompt(self, branch: int) -> Tensor:
        return self.prompts[branch].clone() if self.anew else self.prompts[branch]

    def truth(self, branch: int) -> tuple[int, int, int]:
        return self.number, branch, self.words[branch]

    def _embedded(self, branch: int) -> Tensor:
        return gaussian((self.number, branch, self.words[branch]), 1, 5, CHANNELS)


class TwoRegions(nn.Module):
    """Two transformers in one call, with a graph break between: two guarded graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ToyTransformer(seed=0), ToyTransformer(seed=1)
        self.eval()

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> tuple[Any, Any]:
        first = self.first(hidden_states, timestep, prompt)
        torch._dynamo.graph_break()
        return first, self.second(hidden_states, timestep, prompt)


MODELS: dict[int, Callable[[], nn.Module]] = {1: ToyTransformer, 2: TwoRegions}


class Oracle:
    """The model, and what any prediction of it may have been made of, region by region."""

    def __init__(self, regions: int = 1, **flags: Any) -> None:
        self.inner = FlakyCompiler()
        plain, self.model = MODELS[regions](), MODELS[regions]()
        self.plain = [each for each in plain.modules() if isinstance(each, ToyTransformer)]
        omni_cache.enable(self.model, inner=self.inner, **flags)
        self.made: list[tuple[tuple[int, int, int], list[Tensor]]] = []

    def forget(self) -> None:
        """Begin anew, with what is compiled."""
        omni_cache.refresh(self.model)
        self.made.clear()

    @torch.no_grad()
    def call(self, request: Request, branch: int) -> None:
        """Call the model for a branch; what it predicts must be of that branch alone."""
        latents = gaussian((request.number, len(self.made)), 1, request.tokens, CHANNELS)
        timestep = torch.tensor([1000.0 - 100 * request.step])
        prompt = request.prompt(branch)
        streams = [stream_and_residual(each, latents, timestep, prompt) for each in self.plain]
        self.made.append((request.truth(branch), [added for _, added in streams]))
        place = omni_cache.branch(f"{branch}", request.step) if request.named else nullcontext()
        with place:
            predicted = self.model(latents, timestep, prompt)
        predictions = [predicted] if isinstance(predicted, Tensor) else predicted
        assert len(predictions) == len(self.plain)
        for region, (plain, prediction) in enumerate(zip(self.plain, predictions, strict=True)):
            stream = streams[region][0]
            sources = {
                truth
                for truth, added in self.made
                if added[region].shape == stream.shape
                and torch.allclose(plain.project(stream + added[region]), prediction, atol=1e-5)
            }
            assert sources == {request.truth(branch)}


def stream_and_residual(plain: ToyTransformer, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the blocks of an uncached model, and what they add to it."""
    ends: list[Tensor] = []
    hooks = [
        plain.embed.register_forward_hook(lambda *call: ends.append(call[-1])),
        plain.project.register_forward_pre_hook(lambda *call: ends.append(*call[-1])),
    ]
    plain(*inputs)
    for hook in hooks:
        hook.remove()
    return ends[0], ends[1] - ends[0]


class Interleaving(RuleBasedStateMachine):
    """Requests that arrive, take steps in turn, change, fail and stay away."""

    oracle: Oracle
    requests: list[Request]

    @initialize()
    def begin(self) -> None:
        # One model for all examples, so that it is compiled once; it forgets what came before.
        self.oracle.forget()
        self.requests, self.count = [], 0

    @rule(
        branches=st.integers(1, 4),
        tokens=st.sampled_from([4, 6]),
        anew=st.booleans(),
        named=st.booleans(),
    )
    @precondition(lambda self: len(self.requests) < 3)
    def arrive(self, branches: int, tokens: int, anew: bool, named: bool) -> None:
        self.count += 1
        self.requests.append(Request(self.count, branches, tokens, anew, named))

    @rule(data=st.data(), advance=st.sampled_from([1, 1, 1, 2]), own_thread=st.booleans())
    @precondition(lambda self: self.requests)
    def step(self, data: st.DataObject, advance: int, own_thread: bool) -> None:
        request = data.draw(st.sampled_from(self.requests))
        order = data.draw(st.permutations(range(request.branches)))
        called = order[: data.draw(st.integers(1, request.branches))]
        self._in_its_context(request, called, own_thread)
        request.step += advance
        if request.step >= STEPS:
            self._end(request)

    @rule(data=st.data(), words=st.integers(1, 3))
    @precondition(lambda self: self.requests)
    def replace_a_prompt(self, data: st.DataObject, words: int) -> None:
        request = data.draw(st.sampled_from(self.requests))
        request.say(data.draw(st.integers(0, request.branches - 1)), words)

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def repeat_a_timestep(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self._in_its_context(request, [data.draw(st.integers(0, request.branches - 1))])

    @rule(data=st.data(), parts=st.integers(0, 3))
    @precondition(lambda self: self.requests)
    def fail_inside_the_model(self, data: st.DataObject, parts: int) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.oracle.inner.remaining = parts
        with suppress(AbandonedError):
            self._in_its_context(request, [0])
        self.oracle.inner.remaining = None

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def abandon(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(self.requests)))

    @rule()
    def refresh(self) -> None:
        omni_cache.refresh(self.oracle.model)

    def teardown(self) -> None:
        for request in list(getattr(self, "requests", ())):
            self._end(request)

    def _end(self, request: Request) -> None:
        self.requests.remove(request)
        request.end()

    def _in_its_context(
        self, request: Request, branches: Sequence[int], own_thread: bool = False
    ) -> None:
        def work() -> None:
            for branch in branches:
                self.oracle.call(request, branch)

        if own_thread:
            in_a_thread(lambda: request.context.run(work))
        else:
            request.context.run(work)


def in_a_thread(work: Callable[[], None]) -> None:
    """Run something in a thread of its own; raises what that raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def drive(strategy: str, regions: int, examples: int) -> None:
    oracle = Oracle(regions, **STRATEGIES[strategy])
    machine = type("Machine", (Interleaving,), {"oracle": oracle})
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=30, suppress_health_check=checks
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("regions", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_call_is_given_what_is_held_for_another(strategy: str, regions: int) -> None:
    drive(strategy, regions, 10)


@pytest.mark.exhaustive
@pytest.mark.parametrize("regions", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_call_is_given_what_is_held_for_another_in_many_more(
    strategy: str, regions: int
) -> None:
    drive(strategy, regions, 500)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("regions", MODELS)
def test_orderly_loops_reuse_nearly_all_that_they_could(strategy: str, regions: int) -> None:
    """Two requests that take turns, step by step, on one thread; with one model for all."""
    oracle = Oracle(regions, **STRATEGIES[strategy])
    several = (1, 2, 4) if regions == 1 else (2,)
    for branches, named, anew in product(several, (False, True), (False, True)):
        reused, could = turns(oracle, branches, named, anew)
        case = f"branches={branches}, named={named}, anew={anew}"
        assert could == 2 * branches * regions * (STEPS - 1), case
        assert reused >= 0.95 * could, case


def turns(oracle: Oracle, branches: int, named: bool, anew: bool) -> tuple[int, int]:
    """How many steps of the two requests are reused, and of how many."""
    oracle.forget()
    requests = [Request(number, branches, 4 + 2 * number, anew, named) for number in range(2)]
    for _ in range(STEPS):
        for request in requests:
            for branch in range(branches):
                request.context.run(oracle.call, request, branch)
            request.step += 1
    steps = [
        each.steps
        for run in oracle.model._compiled_call_impl.state.runs
        for each in run.trajectories.values()
    ]
    for request in requests:
        request.end()
    reused = sum(not step.computed for each in steps for step in each)
    return reused, sum(len(each) - 1 for each in steps)
