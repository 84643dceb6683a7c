"""A reused step of a strategy that skips the whole model runs nothing of it, and is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_device_read import BRANCHES, generations, pretended_device
from torch import Tensor
from toy_transformer import (
    CHANNELS,
    TOKENS,
    Loop,
    ToyTransformer,
    compiled,
    computed,
    gaussian,
    reasons,
    same,
)

import omni_cache
from omni_cache.strategies.base import Made
from omni_cache.strategies.signals import PredictedChange

pytestmark = pytest.mark.usefixtures("no_grad")

STEPCACHE: dict[str, Any] = {"cache": "stepcache", "skip_countdowns": (2, 1)}
EASYCACHE: dict[str, Any] = {"cache": "easycache", "threshold": 0.1, "retention_steps": 2}
STRATEGIES = {"stepcache": STEPCACHE, "easycache": EASYCACHE}
NEVER = {
    "stepcache": {"cache": "stepcache", "sim_thresholds": (2.0, 2.0)},
    "easycache": {"cache": "easycache", "threshold": 0},
}


class Counting:
    """An inner compiler that counts how often a part runs that computes with weights."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        is_model = any(isinstance(each, torch.nn.Parameter) for each in example_inputs)

        def run(*args: Any) -> Any:
            self.runs += is_model
            return gm.forward(*args)

        return run


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("enabled", [False, True], ids=["bare", "enabled"])
def test_a_reused_step_runs_nothing_of_the_model(name: str, enabled: bool) -> None:
    inner, model = Counting(), ToyTransformer()
    cached: Any = model
    if enabled:
        omni_cache.enable(model, inner=inner, strict=True, **STRATEGIES[name])
    else:
        cached = compiled(model, inner=inner, strict=True, **STRATEGIES[name])
    Loop(steps=12).run(cached)
    ((*schedule,),) = computed(model)
    assert inner.runs == sum(schedule)
    assert 3 <= sum(schedule) <= 9, schedule


@pytest.mark.parametrize("name", NEVER)
def test_a_computed_step_is_that_of_the_model(name: str) -> None:
    loop = Loop(BRANCHES[2], steps=6)
    assert same(loop.run(compiled(ToyTransformer(), **NEVER[name])), loop.run(ToyTransformer()))


def test_stepcache_repeats_the_last_result() -> None:
    model = ToyTransformer()
    made = Loop(steps=12).run(compiled(model, **STEPCACHE))
    ((*schedule,),) = computed(model)
    for step, is_computed in enumerate(schedule):
        if step:
            assert torch.equal(made[step], made[step - 1]) != is_computed
    assert "countdown" in reasons(model)[0]


def test_easycache_adds_what_the_model_added() -> None:
    model = ToyTransformer()
    cached = compiled(model, **EASYCACHE, force_last_step=False)
    prompt, latents = gaussian("cond", 1, 5, CHANNELS), gaussian(0, 1, TOKENS, CHANNELS)
    entered, made = [], []
    for step in range(10):
        entered.append(latents)
        made.append(cached(latents, torch.tensor([1000.0 - 5 * step]), prompt))
        latents = latents - made[-1] / 100
    ((*schedule,),) = computed(model)
    assert not all(schedule)
    last = 0
    for step, is_computed in enumerate(schedule):
        last = step if is_computed else last
        expected = entered[step] + (made[last] - entered[last])
        assert torch.allclose(made[step], expected, atol=1e-6)


def test_computed_steps_are_compared_with_each_other_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, look_back = [], PredictedChange.look_back

    def counted(self: PredictedChange, made: Sequence[Made]) -> Tensor:
        looked.append(made[0].signal)
        return look_back(self, made)

    monkeypatch.setattr(PredictedChange, "look_back", counted)
    model = ToyTransformer()
    Loop(steps=12, explicit=True).run(compiled(model, **EASYCACHE))
    (trajectory,) = omni_cache.summary(model).trajectories
    measured = [step for step in trajectory.steps if step.distance is not None]
    assert 2 <= len(looked) < len(measured)
    assert len({id(each) for each in looked}) == len(looked)


@pytest.mark.parametrize("name", STRATEGIES)
def test_nobody_can_write_into_what_is_kept(name: str) -> None:
    def run(spoil: bool) -> list[Tensor]:
        cached = compiled(ToyTransformer(), **STRATEGIES[name])
        prompt, latents = gaussian("cond", 1, 5, CHANNELS), gaussian(0, 1, TOKENS, CHANNELS)
        made = []
        for step in range(10):
            given = latents.clone()
            result = cached(given, torch.tensor([1000.0 - 5 * step]), prompt)
            made.append(result.clone())
            latents = latents - result / 100
            if spoil:
                result.fill_(torch.nan)
                given.fill_(torch.nan)
        return made

    assert same(run(True), run(False))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("on_device", [False, True])
def test_what_is_not_finite_is_never_reused(
    name: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after it is computed, and so is the one for which only one result is left."""
    model = ToyTransformer()
    always = {"stepcache": {"sim_thresholds": (-1.0,), "skip_countdowns": (1,)}, "easycache": {}}
    easy = {"threshold": 1e9, "retention_steps": 0} if name == "easycache" else always[name]
    cached = compiled(model, cache=name, **easy)
    healthy = model.project.bias.clone()
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("cond", 1, 5, CHANNELS)
    finite = []

    def run() -> None:
        for step in range(6):
            model.project.bias.copy_(healthy)
            if step == 1:
                model.project.bias[0] = torch.nan
            place = torch.tensor([900.0 - step])
            moved = latents + step
            finite.append(bool(cached(moved, place, prompt).isfinite().all()))

    if on_device:
        with pretended_device(monkeypatch):
            run()
    else:
        run()
    assert finite == [True, False, True, True, True, True]
    assert reasons(model)[0][:4] == [
        "first step",
        "too few computed steps",
        "non-finite residual",
        "too few computed steps",
    ]
    assert not computed(model)[0][4]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("explicit", [False, True], ids=["inferred", "named"])
def test_a_call_costs_one_read_at_most(
    name: str, explicit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = [Loop(BRANCHES[2], explicit=explicit, seed=seed) for seed in (0, 1)]
    expected, expected_schedules, _ = generations(loops, **STRATEGIES[name])
    with pretended_device(monkeypatch) as reads:
        predictions, schedules, _ = generations(loops, **STRATEGIES[name])
    assert (schedules, same(predictions, expected)) == (expected_schedules, True)
    assert any(False in each for each in schedules[-1])
    assert max(reads) <= 1


def test_a_countdown_costs_no_read_where_the_place_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, model = Loop(explicit=True, steps=12), ToyTransformer()
    with pretended_device(monkeypatch) as reads:
        loop.run(compiled(model, cache="stepcache", sim_thresholds=[-1.0], skip_countdowns=[4]))
    round_of_five = ["results alike", "countdown", "countdown", "countdown", "countdown over"]
    assert reasons(model)[0][2:] == round_of_five * 2
    assert reads[7:] == [1, 0, 0, 0, 0]


class Talkative(ToyTransformer):
    """Returns a size, integers and a mask beside its result."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        noise = super().forward(*args, **kwargs)
        return {"tokens": noise.shape[1], "order": noise.argsort(1), "noise": [noise, noise > 0]}


def test_all_results_of_a_model_are_kept() -> None:
    model, plain = Talkative(), Talkative()
    cached = compiled(model, dynamic=True, strict=True, **STEPCACHE)
    prompt, latents = gaussian("cond", 1, 5, CHANNELS), gaussian(0, 1, TOKENS, CHANNELS)
    made, last = [], 0
    for step in range(8):
        place = torch.tensor([1000.0 - 5 * step])
        moved = latents + step / 100
        made.append(cached(hidden_states=moved, timestep=place, prompt=prompt))
        result = plain(latents + step / 100, place, prompt)
        last = step if computed(model)[0][step] else last
        expected = made[last] if last < step else result
        assert made[step]["tokens"] == TOKENS
        assert torch.equal(made[step]["order"], expected["order"])
        for one, other in zip(made[step]["noise"], expected["noise"], strict=True):
            assert torch.equal(one, other)
            assert one is not other
    assert not all(computed(model)[0])


class Broken(ToyTransformer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        noise = super().forward(*args, **kwargs)
        torch._dynamo.graph_break()
        return noise * 2


class Writing(ToyTransformer):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        noise = super().forward(hidden_states, *args, **kwargs)
        hidden_states.mul_(0.5)
        return noise


class Elsewhere(ToyTransformer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs).flatten()


@pytest.mark.parametrize(
    ("kind", "flags", "reason"),
    [
        (Broken, STEPCACHE, "skips the whole model, and a graph holds only a piece of it"),
        (Writing, STEPCACHE, "writes in place into a tensor from outside"),
        (Elsewhere, EASYCACHE, "no input has the shape of what the model returns"),
        (Talkative, EASYCACHE, "a reused step would hand out an earlier step's"),
        (ToyTransformer, {**EASYCACHE, "signal": "auto"}, "only signal='latents' goes with that"),
    ],
)
@pytest.mark.parametrize("enabled", [False, True], ids=["bare", "enabled"])
def test_what_cannot_be_skipped_runs_uncached_and_says_why(
    kind: type[ToyTransformer], flags: dict[str, Any], reason: str, enabled: bool
) -> None:
    model: Any = kind()
    cached = omni_cache.enable(model, inner="eager", **flags) if enabled else None
    call = cached or compiled(model, **flags)
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("cond", 1, 5, CHANNELS)
    with pytest.warns(omni_cache.UncachedWarning, match=reason):
        call(latents, torch.tensor([500.0]), prompt)


def test_explain_foresees_what_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    given = gaussian(0, 1, TOKENS, CHANNELS), torch.tensor([500.0]), gaussian(1, 1, 5, CHANNELS)
    for flags in STRATEGIES.values():
        model = ToyTransformer()
        (graph,) = omni_cache.explain(model, *given, cache_options=flags).graphs
        assert graph.analysis is not None
        foreseen = graph.analysis.residual_bytes(2) + graph.analysis.signal_bytes()
        Loop(steps=12).run(compiled(model, **flags))
        assert omni_cache.summary(model).memory_bytes == foreseen
    assert "kept as a value: no input" not in capsys.readouterr().out
