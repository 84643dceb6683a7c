"""A skipped call runs nothing of the model: earlier results stand in for its own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from following import Followed, actions
from test_device_read import pretended_device
from test_extraction import NumpyToy, extract_toy
from test_whole_forwards import Broken, Talkative, Writing
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from toy_transformer import (
    CHANNELS,
    TOKENS,
    WIDTH,
    AbandonedError,
    Loop,
    ToyTransformer,
    compiled,
    gaussian,
    interrupted,
    reasons,
    same,
)

import omni_cache
from omni_cache.runtime.contexts import Observed, observing
from omni_cache.runtime.model_state import states_of_module

pytestmark = pytest.mark.usefixtures("no_grad")

PLAN = "cccssrcs"
ROW, SKIPPED = (1.5, -0.5), (1.8, -0.9, 0.1)


def followed(plan: str = PLAN, **fields: Any) -> Followed:
    return Followed(actions=actions(plan), row=(1.5, -0.5, 0.0), skipped=SKIPPED, **fields)


class Probe:
    """An inner compiler that counts all runs of all parts."""

    def __init__(self, fails_at: int = -1) -> None:
        self.runs = 0
        self.fails_at = fails_at

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            if self.runs == self.fails_at:
                raise AbandonedError
            return gm.forward(*args)

        return run


def taken(target: Any) -> list[str]:
    """For each branch of the latest generation the first letters of what was done."""
    return [
        "".join(step.action[0] for step in trajectory.steps)
        for trajectory in omni_cache.summary(target).trajectories
    ]


def run(model: Any, steps: int = len(PLAN), **shape: int) -> list[Tensor]:
    """A loop whose latents do not depend on what the model says."""
    prompt = gaussian("prompt", shape.get("batch", 1), 5, CHANNELS)
    made = []
    with omni_cache.generation(steps + 1), omni_cache.branch("cond"):
        for step in range(steps):
            x = gaussian(step, shape.get("batch", 1), shape.get("tokens", TOKENS), CHANNELS)
            made.append(model(x, torch.tensor([900.0 - 50 * step]), prompt))
    return made


def expected_of(made: list[Tensor], plan: str = PLAN) -> dict[int, Tensor]:
    """For each skipped step the weighted sum of what computed ones returned."""
    found: dict[int, Tensor] = {}
    computed: list[Tensor] = []
    for step, (action, output) in enumerate(zip(plan, made, strict=True)):
        if action == "c":
            computed.insert(0, output)
        elif action == "s":
            total = sum(w * each.float() for w, each in zip(SKIPPED, computed, strict=False))
            found[step] = total.to(output.dtype)
    return found


@pytest.mark.parametrize("enabled", [False, True], ids=["bare", "enabled"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_skipped_call_is_the_weighted_sum_and_runs_nothing(enabled: bool, batch: int) -> None:
    probe, model = Probe(), ToyTransformer()
    flags = {"cache": followed(), "inner": probe, "strict": True}
    called = omni_cache.enable(model, **flags) if enabled else compiled(model, **flags)
    ran: list[int] = []

    def counting(*args: Any) -> Tensor:
        before = probe.runs
        output: Tensor = called(*args)
        ran.append(probe.runs - before)
        return output

    made = run(counting, batch=batch)
    assert taken(model) == [PLAN]
    assert [count == 0 for count in ran] == [action == "s" for action in PLAN]
    plain = run(ToyTransformer(), batch=batch)
    for step, action in enumerate(PLAN):
        assert torch.equal(made[step], plain[step]) == (action == "c")
    for step, expected in expected_of(made).items():
        torch.testing.assert_close(made[step], expected, rtol=1e-6, atol=1e-6)
    assert reasons(model)[0][3:5] == ["as told"] * 2
    summary = omni_cache.summary(model)
    assert (summary.computed_steps, summary.reused_steps, summary.skipped_steps) == (4, 1, 3)
    assert "4 of 8 steps computed" in str(summary)
    assert str(summary).count("skipped") >= 3


def test_no_operator_runs_but_the_sum() -> None:
    model = ToyTransformer()
    cached = compiled(model, cache=followed("cccs"))
    ran: list[set[str]] = []

    def profiled(*args: Any) -> Tensor:
        with profile(activities=[ProfilerActivity.CPU]) as measured:
            output = cached(*args)
        ran.append({each.key for each in measured.key_averages() if each.key.startswith("aten::")})
        return output

    run(profiled, 4)
    assert taken(model) == ["cccs"]
    # The timestep, which is on the host here, is looked at for the record, and a weight is a number
    # that is brought into the dtype of the sum.
    looked_at = {"aten::item", "aten::_local_scalar_dense"}
    converted = {"aten::promote_types", "aten::to", "aten::_to_copy", "aten::empty_strided"}
    assert ran[-1] - looked_at - converted - {"aten::copy_"} == {"aten::mul", "aten::add_"}
    assert "aten::linear" in ran[-2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_sum_is_as_precise_as_it_may_be(dtype: torch.dtype) -> None:
    """Rounded once, and in the dtype that the model returns."""

    class Casting(ToyTransformer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs).to(dtype)

    made = run(compiled(Casting(), cache=followed(), history_dtype="float16"))
    for step, expected in expected_of(made).items():
        assert made[step].dtype == dtype
        if dtype == torch.bfloat16:
            assert torch.equal(made[step], expected)
        torch.testing.assert_close(made[step], expected, rtol=1e-6, atol=1e-6)


def test_a_caller_may_write_into_what_it_gets() -> None:
    def loop(spoil: bool) -> list[Tensor]:
        cached, made = compiled(ToyTransformer(), cache=followed()), []

        def writing(*args: Tensor) -> Tensor:
            output = cached(*args)
            made.append(output.clone())
            if spoil:
                output.fill_(torch.nan)
                args[0].fill_(torch.nan)
            return output

        run(writing)
        return made

    spoilt = loop(True)
    assert all(each.isfinite().all() for each in spoilt)
    assert same(spoilt, loop(False))


def test_integers_and_numbers_are_those_of_the_newest() -> None:
    model = Talkative()
    cached = compiled(model, dynamic=True, strict=True, cache=followed("ccss"))
    made = []
    with omni_cache.generation(5), omni_cache.branch("cond"):
        for step in range(4):
            given = gaussian(step, 1, TOKENS, CHANNELS), torch.tensor([900.0 - step])
            found = cached(*given, gaussian("prompt", 1, 5, CHANNELS))
            made.append(
                [found["tokens"], found["order"].clone(), *map(torch.clone, found["noise"])]
            )
            for each in (found["order"], *found["noise"]):
                each.zero_()  # it is the caller's
    assert taken(model) == ["ccss"]
    for tokens, order, noise, mask in made[2:]:
        assert tokens == TOKENS
        assert torch.equal(order, made[1][1])
        assert torch.equal(mask, made[1][3])
        torch.testing.assert_close(noise, SKIPPED[0] * made[1][2] + SKIPPED[1] * made[0][2])


def test_two_branches_skip_alike_and_by_their_own_results() -> None:
    model, loop = ToyTransformer(), Loop(("cond", "uncond"), explicit=True)
    made = loop.run(compiled(model, cache=followed()))
    assert taken(model) == [PLAN, PLAN]
    for branch in (made[::2], made[1::2]):
        for step, expected in expected_of(branch).items():
            torch.testing.assert_close(branch[step], expected, rtol=1e-6, atol=1e-6)
    assert not same(made[::2], made[1::2])


@pytest.mark.parametrize("explicit", [False, True], ids=["inferred", "named"])
def test_an_abandoned_loop_leaves_nothing_to_skip_by(explicit: bool) -> None:
    plan = "csssssss"
    loop = Loop(explicit=explicit)
    expected = loop.run(compiled(ToyTransformer(), cache=followed(plan)))
    model = ToyTransformer()
    cached = compiled(model, cache=followed(plan))
    other = Loop(("other",), seed=3, explicit=explicit, calls=4)
    with interrupted():
        other.run(cached)
    assert same(loop.run(cached), expected)
    assert taken(model) == [plan]


def test_a_call_that_failed_is_not_skipped_by() -> None:
    model, probe = ToyTransformer(), Probe()
    cached = compiled(model, cache=followed("cccs"), inner=probe)
    prompt = gaussian("prompt", 1, 5, CHANNELS)
    with omni_cache.generation(5):
        for step in range(4):
            x = gaussian(step, 1, TOKENS, CHANNELS)
            probe.fails_at = probe.runs + 2 if step == 2 else -1
            with omni_cache.branch("cond", step_index=step):
                if step == 2:
                    with interrupted():
                        cached(x, torch.tensor([900.0 - step]), prompt)
                else:
                    cached(x, torch.tensor([900.0 - step]), prompt)
    assert taken(model) == ["ccc"]
    assert reasons(model)[0][-1] == "a step was left out"


def test_another_size_is_never_skipped() -> None:
    """By whatever stands for its place: the results of the size before fit nothing."""
    model = ToyTransformer()
    cached = compiled(model, cache=followed("ccss"), dynamic=True)
    prompt = gaussian("prompt", 1, 5, CHANNELS)
    with omni_cache.generation(5), omni_cache.branch("cond"):
        for step, tokens in enumerate((6, 6, 9, 9)):
            x = gaussian(step, 1, tokens, CHANNELS)
            assert cached(x, torch.tensor([900.0 - step]), prompt).shape == x.shape
    assert taken(model) == ["cccs"]
    assert reasons(model)[0][2] == "shape changed"


def test_a_replaced_prompt_is_never_skipped() -> None:
    model = ToyTransformer()
    cached = compiled(model, cache=followed("ccccss"))
    with omni_cache.generation(7), omni_cache.branch("cond"):
        prompt = gaussian("prompt", 1, 5, CHANNELS)
        for step in range(6):
            if step == 4:
                prompt = gaussian("another", 1, 5, CHANNELS)
            x = gaussian(step, 1, TOKENS, CHANNELS)
            cached(x, torch.tensor([900.0 - step]), prompt)
    assert taken(model) == ["cccccs"]
    assert reasons(model)[0][4] == "inputs changed"


def test_results_of_another_graph_stand_in_for_nothing() -> None:
    """Asked for a dict, the model returns as much; asked for more results, it would not."""

    class Telling(ToyTransformer):
        def forward(self, *args: Any, more: bool = False, **kwargs: Any) -> Any:
            noise = super().forward(*args, **kwargs)
            return (noise, noise.mean()) if more else (noise,)

    model = Telling()
    cached: Any = compiled(model, cache=followed("ccssss"))
    prompt = gaussian("prompt", 1, 5, CHANNELS)
    lengths = []
    with omni_cache.generation(7), omni_cache.branch("cond"):
        for step in range(6):
            x = gaussian(step, 1, TOKENS, CHANNELS)
            lengths.append(len(cached(x, torch.tensor([900.0 - step]), prompt, more=step > 2)))
    assert lengths == [1, 1, 1, 2, 2, 2]
    assert taken(model) == ["ccsrrr"]


def test_nothing_is_read_to_skip_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fourth call on, when a branch knows which of its inputs move."""
    model, loop = ToyTransformer(), Loop(("cond", "uncond"), explicit=True)
    with pretended_device(monkeypatch) as reads:
        made = loop.run(compiled(model, cache=followed("cscsscsc")))
    assert taken(model) == ["crcsscsc"] * 2
    assert reads[6:] == [0] * 10
    assert len(made) == 16


def test_an_observer_sees_skipped_calls() -> None:
    seen: list[Observed] = []
    with observing(seen.append):
        made = run(compiled(ToyTransformer(), cache=followed()))
    assert "".join(each.action[0] for each in seen) == PLAN
    assert same([each.output for each in seen], made)
    assert [len(each.residuals) for each in seen] == [int(action == "c") for action in PLAN]


def test_with_inputs_under_inductor_with_rolled_blocks() -> None:
    flags = {"inner": "inductor", "blocks": "rolled", "strict": True}
    model = ToyTransformer(blocks=3)
    made = run(compiled(model, cache=followed(input=0.3), **flags), batch=2)
    eager = run(compiled(ToyTransformer(blocks=3), cache=followed(input=0.3)), batch=2)
    assert taken(model) == [PLAN]
    for one, other in zip(made, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_graph_that_keeps_no_results_refuses_to_skip() -> None:
    cached = compiled(ToyTransformer(), cache=Followed(actions=actions("crc")))
    with (
        omni_cache.generation(cache=Followed(actions=actions("crs"))),
        omni_cache.branch("cond"),
        pytest.raises(ValueError, match="needs results that are kept, so that a call may skip"),
    ):
        cached(gaussian(0, 1, TOKENS, CHANNELS), 900.0, gaussian("prompt", 1, 5, CHANNELS))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Broken, "skips the whole model, and a graph holds only a piece of it"),
        (Writing, "writes in place into an input or a buffer, which a skipped forward would lose"),
    ],
)
def test_what_cannot_be_skipped_runs_uncached_and_says_why(
    kind: type[ToyTransformer], reason: str
) -> None:
    call = compiled(kind(), cache=followed())
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("cond", 1, 5, CHANNELS)
    with pytest.warns(omni_cache.UncachedWarning, match=reason):
        call(latents, torch.tensor([500.0]), prompt)


def test_a_model_with_an_extractor_refuses() -> None:
    omni_cache.register_extractor(NumpyToy, extract_toy)
    try:
        with pytest.raises(ValueError, match="runs in parts"):
            omni_cache.enable(NumpyToy(), cache=followed())
    finally:
        omni_cache.register_extractor(NumpyToy, None)


def test_explain_foresees_what_is_held_and_all_of_it_is_freed() -> None:
    model = ToyTransformer()
    strategy = followed("cccs", input=0.3)
    given = gaussian(0, 1, TOKENS, CHANNELS), torch.tensor([500.0]), gaussian(1, 1, 5, CHANNELS)
    (graph,) = omni_cache.explain(model, *given, cache_options={"cache": strategy}).graphs
    cached = compiled(model, cache=strategy)
    held: list[weakref.ref[Tensor]] = []

    def watched(*args: Any) -> Tensor:
        output = cached(*args)
        (state,) = states_of_module(model)
        assert state.latest is not None
        for trajectory in state.latest.trajectories.values():
            held.extend(map(weakref.ref, trajectory.history.tensors))
        return output

    gc.collect()
    gc.disable()
    try:
        run(watched, 4)
        assert all(each() is None for each in held)
    finally:
        gc.enable()
    residual, result = TOKENS * WIDTH * 4, TOKENS * CHANNELS * 4
    assert omni_cache.summary(model).memory_bytes == 4 * residual + 3 * result
    assert f"input {residual} bytes, result {3 * result} bytes" in graph.text
