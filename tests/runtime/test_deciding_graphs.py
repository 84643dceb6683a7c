"""lowering="cond": the graph decides, and all else is as where the host does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers_models import CASES
from plans_by_hand import plan
from torch import Tensor, nn
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    MAGCACHE,
    NEVER_REUSE,
    TEACACHE,
    TOKENS,
    AbandonedError,
    FlakyCompiler,
    Loop,
    ToyTransformer,
    compiled,
    computed,
    gaussian,
    interrupted,
    reasons,
    same,
)

import omni_cache
from omni_cache import CacheContext
from omni_cache.pipelines import is_enabled, states_of

GUIDED = Loop(("cond", "uncond"))

STRATEGIES: dict[str, dict[str, Any]] = {
    "teacache": TEACACHE,
    "taylor": {**TEACACHE, "forecast": "taylor", "forecast_order": 2, "rel_l1_thresh": 0.3},
    "newton": {**TEACACHE, "forecast": "newton", "forecast_order": 2, "rel_l1_thresh": 0.3},
    "within": {
        **TEACACHE,
        "start": 0.4,
        "end": 0.9,
        "force_last_step": True,
        "num_inference_steps": 8,
        "history_dtype": "bfloat16",
    },
    "latents": {**TEACACHE, "signal": "latents", "rel_l1_thresh": 0.3},
    "8 bits": {**TEACACHE, "forecast": "newton", "history_dtype": "float8_e4m3fn"},
    "first_block_cache": {"cache": "first_block_cache", "threshold": 0.3},
    "dbcache": {
        "cache": "dbcache",
        "fn_compute_blocks": 1,
        "max_warmup_steps": 2,
        "residual_diff_threshold": 0.3,
        "force_refresh_step_hint": 5,
    },
}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def enabled(lowering: str = "cond", model: nn.Module | None = None, **flags: Any) -> nn.Module:
    given = {"inner": "eager", "lowering": lowering, **flags}
    return omni_cache.enable(model or ToyTransformer(), **given)  # type: ignore[no-any-return]


def records(target: Any) -> list[Any]:
    return [each.steps for each in omni_cache.summary(target).trajectories]


def measured(step: Any) -> tuple[float, float]:
    """What a record says of the comparison; 0 where there was none."""
    return step.distance or 0.0, step.accumulated or 0.0


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_generations_of_two_branches_are_those_of_dispatch(name: str) -> None:
    models = [enabled(each, **STRATEGIES[name]) for each in ("cond", "dispatch")]
    for seed, explicit in enumerate((False, True)):
        loop = Loop(("cond", "uncond"), seed=seed, explicit=explicit)
        found, expected = (loop.run(each) for each in models)
        deciding, dispatched = map(records, models)
        assert deciding == dispatched
        assert {each.action for each in deciding[0]} == {"computed", "reused"}
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-5
    assert omni_cache.summary(models[0]).counters == omni_cache.summary(models[1]).counters


@pytest.mark.parametrize("name", ["flux", "pixart", "wan"])
def test_models_decide_and_compute_as_under_dispatch(name: str) -> None:
    case = CASES[name]
    models = [
        enabled(each, case.build(), **{**TEACACHE, "rel_l1_thresh": 0.25})
        for each in ("cond", "dispatch")
    ]
    plain = case.build()
    for index in range(6):
        inputs = case.inputs(index)
        ((found,), (expected,)) = (each(**inputs) for each in models)
        assert float((found - expected).abs().max()) < 1e-5
        if index == 0:
            assert torch.equal(found, plain(**inputs)[0])
    assert records(models[0]) == records(models[1])
    assert {each.action for each in records(models[0])[0]} == {"computed", "reused"}


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_inner_compilers_take_the_graph_and_another_size(inner: str) -> None:
    flags = {**TEACACHE, "forecast": "taylor", "rel_l1_thresh": 0.3}
    models = [enabled("cond", inner=inner, **flags), enabled("dispatch", **flags)]
    for batches in ([1] * 4, [1, 1, 2, 2, 2], [3] * 3):
        found, expected = (batched(each, batches) for each in models)
        for decided, dispatched in zip(*map(records, models), strict=True):
            # Inductor rounds what it measures otherwise than eager does.
            assert list(map(measured, decided)) == [
                pytest.approx(each, rel=1e-4) for each in map(measured, dispatched)
            ]
            assert [each.reason for each in decided] == [each.reason for each in dispatched]
            assert [each.action for each in decided] == [each.action for each in dispatched]
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-5
    counters = [omni_cache.summary(each).counters for each in models]
    assert counters[0] == counters[1]
    assert counters[0].recompiles > 0


def batched(model: nn.Module, batches: Sequence[int]) -> list[Tensor]:
    """A loop whose batch changes on its way."""
    found = []
    with omni_cache.generation(len(batches)), omni_cache.branch("cond"):
        for index, batch in enumerate(batches):
            latents = gaussian("noise", batch, TOKENS, CHANNELS) * (1 - 0.05 * index)
            prompt = gaussian("cond", 1, 5, CHANNELS).repeat(batch, 1, 1)
            found.append(model(latents, torch.tensor([1000.0 - 100 * index]), prompt))
    return found


@pytest.mark.parametrize("dynamic", [True, None])
def test_another_batch_in_the_middle_begins_anew(dynamic: bool | None) -> None:
    models = [enabled(each, dynamic=dynamic, **ALWAYS_REUSE) for each in ("cond", "dispatch")]
    found, expected = (batched(each, [2, 2, 3, 3]) for each in models)
    assert same(found, expected)
    assert records(models[0]) == records(models[1])
    assert computed(models[0]) == [[True, False, True, False]]
    assert omni_cache.summary(models[0]).counters == omni_cache.summary(models[1]).counters


def test_without_reuse_the_bits_are_the_models_own() -> None:
    model = enabled(**NEVER_REUSE)
    assert same(GUIDED.run(model), GUIDED.run(ToyTransformer()))
    assert computed(model) == [[True] * 8] * 2


def test_it_is_one_graph_and_other_numbers_are_another() -> None:
    inner, model = FlakyCompiler(), ToyTransformer()
    for flags, expected in ((NEVER_REUSE, 8), (ALWAYS_REUSE, 1)):
        enabled("cond", model, inner=inner, **flags)
        GUIDED.run(model)
        assert [sum(each) for each in computed(model)] == [expected] * 2
    assert inner.compilations == 2
    # The number of steps is no part of it.
    enabled("cond", model, inner=inner, **ALWAYS_REUSE, num_inference_steps=8)
    GUIDED.run(model)
    assert [sum(each) for each in computed(model)] == [1] * 2
    assert inner.compilations == 2


def test_a_call_that_fails_leaves_everything_as_it_was() -> None:
    inner = FlakyCompiler()
    model, loop = enabled(inner=inner, **TEACACHE), Loop()
    expected = loop.run(enabled(**TEACACHE))
    found = []
    for index, timestep in enumerate(loop.timesteps):
        latents = gaussian(0, 1, TOKENS, CHANNELS)
        for noise in expected[:index]:
            latents = latents - noise / loop.steps
        call = latents, torch.tensor([timestep]), PROMPT
        if index in (2, 3):
            inner.remaining = 0
            with interrupted():
                model(*call)
        found.append(model(*call))
    assert same(found, expected)


PROMPT = gaussian("cond", 1, 5, CHANNELS)


def test_bare_compilation_refuses_alike() -> None:
    for flags, message in ((MAGCACHE, "which goes by steps"), ({"cache": "seacache"}, "seacache")):
        run = compiled(ToyTransformer(), lowering="cond", **flags)
        with pytest.raises(ValueError, match=f"lowering='cond'.*{message}"):
            Loop().run(run)


def test_bare_compilation_decides_in_the_graph_too() -> None:
    inner = FlakyCompiler()
    run = compiled(model := ToyTransformer(), inner=inner, lowering="cond", **TEACACHE)
    other = enabled("dispatch", **TEACACHE)
    assert same(GUIDED.run(run), GUIDED.run(other))
    assert records(model) == records(other)
    assert inner.compilations == 1


def test_explain_says_who_decides() -> None:
    call = gaussian(0, 1, TOKENS, CHANNELS), torch.tensor([900.0]), PROMPT
    for lowering in ("cond", "dispatch"):
        options = {**TEACACHE, "inner": "eager", "lowering": lowering}
        text = str(omni_cache.explain(ToyTransformer(), *call, cache_options=options))
        assert ("decided in the graph by teacache" in text) is (lowering == "cond")


# --- what is kept ---------------------------------------------------------------------------------


def test_state_is_counted_and_freed_with_the_generation() -> None:
    deciding, dispatched = enabled(**TEACACHE), enabled("dispatch", **TEACACHE)
    trajectories: list[Any] = []
    for model in (deciding, dispatched):
        with omni_cache.generation(8) as generation, omni_cache.branch("cond"):
            model(gaussian(0, 1, TOKENS, CHANNELS), torch.tensor([900.0]), PROMPT)
            for run in generation.runs.values():
                trajectories += run.trajectories.values()
            assert (trajectories[-1].within is not None) is (model is deciding)
        assert trajectories[-1].within is None
        assert trajectories[-1].history.tensors == []
    # The gate's number, a flag and two times, which are 8, 1 and 16 bytes.
    assert trajectories[0].memory_bytes == trajectories[1].memory_bytes + 25


def overflowing() -> nn.Module:
    """A model whose blocks add numbers that float16 does not hold."""
    module = ToyTransformer()
    module.blocks[-1].out.weight.mul_(1e7)
    return module


def test_what_is_not_finite_is_never_reused() -> None:
    flags = {**ALWAYS_REUSE, "history_dtype": "float16"}
    models = [enabled(each, overflowing(), **flags) for each in ("cond", "dispatch")]
    for model in models:
        with pytest.warns(UserWarning, match="not finite"):
            Loop().run(model)
    assert computed(models[0]) == [[True] * 8]
    assert records(models[0]) == records(models[1])


@pytest.fixture
def _nothing_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the host know of no number until somebody waits for it, as of a GPU's."""
    for module in ("reading", "history"):
        monkeypatch.setattr(f"omni_cache.runtime.{module}.on_host", lambda tensor: False)
    monkeypatch.setattr("omni_cache.runtime.reading.Reading.fetch", lambda self: None)


@pytest.mark.usefixtures("_nothing_is_on_the_host")
def test_records_are_filled_in_when_the_numbers_have_come() -> None:
    model = enabled(**TEACACHE)
    loop = Loop(explicit=True)
    found = loop.run(model)
    (own,) = model_trajectories(model)
    assert {each.distance for each in own.steps} == {None}
    assert {each.reason for each in own.steps} == {"first step", "decided in the graph"}
    filled = records(model)
    other = enabled("dispatch", **TEACACHE)
    assert same(found, loop.run(other))
    assert [each.action for each in own.steps] == [each.action for each in records(other)[0]]
    assert filled == records(other)


def model_trajectories(model: nn.Module) -> list[Any]:
    (state,) = (state for _, state in states_of(model))
    assert state.latest is not None
    return list(state.latest.trajectories.values())


@pytest.mark.usefixtures("_nothing_is_on_the_host")
def test_the_graph_itself_sees_what_is_not_finite() -> None:
    model = enabled("cond", overflowing(), **{**ALWAYS_REUSE, "history_dtype": "float16"})
    Loop(explicit=True).run(model)
    assert computed(model) == [[True] * 8]
    assert reasons(model) == [["first step", *["non-finite residual"] * 7]]


# --- requests -------------------------------------------------------------------------------------


def test_a_generation_without_a_cache_is_computed_and_the_same_strategy_is_the_models_own() -> None:
    model = enabled(**ALWAYS_REUSE)
    loop = Loop()
    for request, steps in (({"cache": "none"}, 8), (ALWAYS_REUSE, 1), ({}, 1)):
        with omni_cache.generation(8, **request):
            found = loop.run(model)
        assert [sum(each) for each in computed(model)] == [steps]
        if steps == 8:
            assert same(found, loop.run(ToyTransformer()))
            assert omni_cache.summary(model).memory_bytes == 0


@pytest.mark.parametrize("request_", [TEACACHE, MAGCACHE], ids=["threshold", "gate"])
def test_a_generation_with_another_strategy_is_refused(request_: dict[str, Any]) -> None:
    model = enabled(**ALWAYS_REUSE)
    message = re.escape("a decision of its own, where the graph decides by TeaCache(")
    with omni_cache.generation(**request_), pytest.raises(ValueError, match=message):
        Loop().run(model)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (MAGCACHE, "lowering='cond' is not allowed with cache='magcache', which goes by steps"),
        ({"cache": "taylorseer"}, "torch.cond would add one; lowering must be 'dispatch'"),
        ({"cache": plan()}, "lowering='cond' is not allowed with cache="),
        ({"cache": "stepcache"}, "with cache='stepcache', which reuses the whole model"),
        ({"cache": "easycache"}, "lowering must be 'dispatch'"),
        ({"mode": "reduce-overhead", "inner": "inductor"}, "mode='reduce-overhead' is not allowed"),
        ({"blocks": "rolled"}, "blocks='rolled' is not allowed with lowering='cond'"),
        ({"hoist": True}, "hoist=True is not allowed with lowering='cond'"),
        ({"history_device": "cpu"}, "history_device must be None, or lowering 'dispatch'"),
    ],
    ids=str,
)
def test_what_a_graph_cannot_do_is_refused_before_anything_is_touched(
    flags: dict[str, Any], message: str
) -> None:
    model = ToyTransformer()
    with pytest.raises(ValueError, match=re.escape(message)):
        enabled("cond", model, **flags)
    assert not is_enabled(model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cache": "seacache"}, "lowering='cond': cache='seacache' is not allowed; a graph does"),
        ({"cache": "dicache"}, "forecast=Aligned is not allowed; a graph cannot weigh by it"),
        ({**TEACACHE, "forecast": "dmd"}, "forecast=DMD is not allowed"),
        ({**TEACACHE, "forecast": "foca"}, "forecast=FoCa is not allowed"),
        ({**TEACACHE, "forecast": "chebyshev"}, "forecast=Chebyshev is not allowed"),
        ({**TEACACHE, "forecast": {3: [0.5]}}, "its weights on tensors are others"),
        (
            {**STRATEGIES["dbcache"], "max_continuous_cached_steps": 2},
            "its gate branches on what it has measured or counted",
        ),
        (
            {**TEACACHE, "coefficients": {"cond": [1.0, 0.0], "uncond": [2.0, 0.0]}},
            "with numbers for each branch is not allowed; one graph decides for all of them",
        ),
    ],
    ids=str,
)
def test_what_does_not_decide_on_tensors_is_refused_at_the_first_call(
    flags: dict[str, Any], message: str
) -> None:
    model = enabled(**flags)
    with pytest.raises(ValueError, match=re.escape(message)):
        Loop().run(model)


def test_a_branch_with_numbers_of_its_own_is_refused_when_it_comes() -> None:
    numbers = {name: [1.0, 0.0] for name in ("cond", "uncond")}
    model = enabled(**{**TEACACHE, "coefficients": {**numbers, "reference": [2.0, 0.0]}})
    loop = Loop(("cond", "uncond", "reference"), explicit=True)
    with pytest.raises(ValueError, match="numbers of its own for branch 'reference'"):
        loop.run(model)


def test_an_extractor_has_no_graph_that_could_decide() -> None:
    class Extracted(ToyTransformer):
        """Has an extractor."""

    def extract(model: Extracted, *args: Any, **kwargs: Any) -> CacheContext:
        raise AbandonedError

    omni_cache.register_extractor(Extracted, extract)
    with pytest.raises(ValueError, match="lowering='cond' is not allowed"):
        enabled("cond", Extracted(), **TEACACHE)
