"""cache-dit's backend: names, configuration, lifecycle and errors, for both engines."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import cache_dit
import pytest
import torch
from cache_dit import ForwardPattern
from fake_pipeline import (
    REQUESTS,
    FakePipeline,
    FakeRunner,
    FakeTransformer,
    Request,
    check_requests,
)
from torch import nn

import omni_cache
from omni_cache.backends import cache_dit_backend, cachedit
from omni_cache.backends.cachedit import (
    CUSTOM_DIT_ENABLERS,
    CacheDiTAdapterConfig,
    CacheDiTBackend,
    CacheDiTConfig,
    CacheDiTEnableResult,
    CacheDiTRequestSpec,
    RequestScopedCacheDiTRuntime,
    cache_summary,
    enable_cache_for_dit,
)
from omni_cache.backends.cachedit.model_specific import steps_of_experts
from omni_cache.backends.config import DiffusionCacheConfig
from omni_cache.backends.selector import get_cache_backend
from omni_cache.strategies import Time

BLOCKS = CacheDiTAdapterConfig({"blocks": ForwardPattern.Pattern_3}, check_forward_pattern=False)
CONFIG = {"max_warmup_steps": 2, "residual_diff_threshold": 0.5, "max_continuous_cached_steps": 2}
ENGINES = ("graph", "library")


class Declared(FakeTransformer):
    """Says which its blocks are."""

    _cache_dit_adapter_config = BLOCKS

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, blocks=4)


def pipeline(**kwargs: Any) -> Any:
    return FakePipeline(make=Declared, **kwargs)


def backend(engine: str = "graph", **config: Any) -> Any:
    extra = {"inner": "eager", "strict": True} if engine == "graph" else {}
    return get_cache_backend("cache_dit", {**CONFIG, **extra, "engine": engine, **config})


def is_cached(module: nn.Module) -> bool:
    return omni_cache.pipelines.is_enabled(module) or cache_dit.BlockAdapter.is_cached(module)


def schedule(module: nn.Module) -> str:
    (trajectory,) = omni_cache.summary(module).trajectories
    return "".join("01"[step.computed] for step in trajectory.steps)


# Names


def test_the_names_of_both_spellings() -> None:
    for module in (cachedit, cache_dit_backend):
        assert all(hasattr(module, name) for name in module.__all__)
    assert cache_dit_backend.CacheDiTBackend is cachedit.CacheDiTBackend
    assert cache_dit_backend.CUSTOM_DIT_ENABLERS is CUSTOM_DIT_ENABLERS
    wan = ("Wan22Pipeline", "Wan22I2VPipeline", "Wan22TI2VPipeline", "Wan22VACEPipeline")
    assert {CUSTOM_DIT_ENABLERS[name] for name in wan} == {cache_dit_backend.enable_cache_for_wan22}


# Configuration


def test_the_defaults_are_those_of_the_shared_configuration() -> None:
    assert CacheDiTConfig.from_diffusion_config(DiffusionCacheConfig()) == CacheDiTConfig()
    assert len(fields(CacheDiTConfig)) == 12
    with pytest.raises(AttributeError):
        CacheDiTConfig().max_warmup_steps = 3  # type: ignore[misc]


def test_all_fields_reach_cache_dit() -> None:
    given = {
        "Fn_compute_blocks": 2,
        "Bn_compute_blocks": 3,
        "max_warmup_steps": 5,
        "max_cached_steps": 6,
        "residual_diff_threshold": 0.07,
        "max_continuous_cached_steps": 8,
        "force_refresh_step_hint": 9,
        "force_refresh_step_policy": "repeat",
    }
    config = CacheDiTConfig(**given, enable_taylorseer=True, taylorseer_order=2)
    made = config.to_db_cache_config()
    assert {name: getattr(made, name) for name in given} == given
    assert made.num_inference_steps is made.steps_computation_mask is None
    calibrator = config.to_calibrator_config()
    assert isinstance(calibrator, cache_dit.TaylorSeerCalibratorConfig)
    assert calibrator.taylorseer_order == 2
    assert CacheDiTConfig(taylorseer_order=2).to_calibrator_config() is None


def test_a_negative_limit_is_none() -> None:
    strategy = CacheDiTConfig(max_cached_steps=-1, max_continuous_cached_steps=-1).to_strategy()
    assert strategy.max_cached_steps is strategy.max_continuous_cached_steps is None
    assert CacheDiTConfig(max_cached_steps=0).to_strategy().max_cached_steps == 0


def test_masks_are_those_of_cache_dit_for_the_numbers_of_steps_that_it_has() -> None:
    for policy, computed in {"slow": 18, "medium": 15, "fast": 11, "ultra": 8}.items():
        config = CacheDiTConfig(scm_steps_mask_policy=policy)
        assert sum(config.mask(28) or ()) == computed
        for steps in (4, 6, *range(8, 60)):
            theirs = cache_dit.steps_mask(mask_policy=policy, total_steps=steps)
            assert list(config.mask(steps) or ()) == theirs
        assert [config.mask(steps) for steps in (None, 1, 2, 3, 5, 7)] == [None] * 6
    assert CacheDiTConfig().mask(28) is None


def test_forecasts_have_no_slope_before_the_third_step_after_a_forced_refresh() -> None:
    for policy, places in {"once": (0, 8), "repeat": (0, 8, 16, 24)}.items():
        forecast = (
            CacheDiTConfig(
                enable_taylorseer=True, force_refresh_step_hint=8, force_refresh_step_policy=policy
            )
            .to_strategy()
            .forecasting()
        )
        for begin, since in product(places, range(1, 7)):
            kept = [Time(begin + since), Time(begin + since - 1)]
            expected = (2.0, -1.0) if since >= 3 else (1.0, 0.0)
            assert forecast.weights(kept, Time(begin + since + 1)) == expected, (policy, kept)


def test_static_reuse_needs_a_mask() -> None:
    config = CacheDiTConfig(scm_steps_mask_policy="fast", scm_steps_policy="static")
    assert config.to_strategy(28).steps_computation_policy == "static"
    assert config.to_strategy(5).steps_computation_policy == "dynamic"


# Errors


def test_unknown_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="scm_steps_mask_policy='quick' is not allowed"):
        CacheDiTConfig(scm_steps_mask_policy="quick")
    with pytest.raises(ValueError, match="engine='graphs' is not allowed"):
        CacheDiTBackend(engine="graphs")
    with pytest.raises(ValueError, match="inner is not allowed with engine='library'"):
        CacheDiTBackend({"inner": "eager"}, engine="library")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_field_that_is_not_allowed_is_refused_when_it_is_enabled(engine: str) -> None:
    with pytest.raises(ValueError, match="fn_compute_blocks=0 is not allowed"):
        backend(engine, Fn_compute_blocks=0).enable(pipeline())


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_that_are_declared_and_missing(engine: str) -> None:
    class Renamed(Declared):
        _cache_dit_adapter_config = CacheDiTAdapterConfig({"layers": ForwardPattern.Pattern_3})

    with pytest.raises(AttributeError, match="Renamed, which has no attribute layers"):
        backend(engine).enable(FakePipeline(make=Renamed))


def test_a_refusal_of_the_library_names_pipeline_and_transformer() -> None:
    with pytest.raises(ValueError, match="FakeTransformer of FakePipeline") as refused:
        backend("library").enable(FakePipeline())
    assert isinstance(refused.value.__cause__, ValueError)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pipeline_without_a_transformer(engine: str) -> None:
    one = backend(engine)
    with pytest.raises(ValueError, match="SimpleNamespace has no transformer"):
        one.enable(SimpleNamespace(transformer=None))
    assert not one.is_enabled()


# Lifecycle


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "hook"), [("tea_cache", "teacache"), ("sea_cache", "sea_cache")])
@pytest.mark.parametrize("comes_first", [True, False])
def test_two_backends_on_one_transformer_are_refused(
    engine: str, name: str, hook: str, comes_first: bool
) -> None:
    pipe = pipeline()
    other = get_cache_backend(name, {"coefficients": [0, 0, 0, 1, 0], "inner": "eager"})
    first, second = (backend(engine), other) if comes_first else (other, backend(engine))
    first.enable(pipe)
    standing = "cache_dit" if comes_first else hook
    with pytest.raises(RuntimeError, match=f"has the hook '{standing}'"):
        second.enable(pipe)
    assert first.is_enabled()
    assert not second.is_enabled()
    assert is_cached(pipe.transformer)
    first.disable(pipe)
    assert not is_cached(pipe.transformer)
    assert "_hook_registry" not in vars(pipe.transformer)
    second.enable(pipe)
    assert is_cached(pipe.transformer)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_backend_takes_off_only_what_it_has_put_on(engine: str) -> None:
    pipe, first, second = pipeline(), backend(engine), backend(engine)
    first.enable(pipe)
    with pytest.warns(UserWarning, match="'cache_dit' was registered before"):
        second.enable(pipe)
    first.disable(pipe)
    assert is_cached(pipe.transformer)
    second.disable(pipe)
    assert not is_cached(pipe.transformer)


def test_the_engine_of_the_argument_reaches_enablers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CUSTOM_DIT_ENABLERS, "FakePipeline", enable_cache_for_dit)
    pipe, config = pipeline(), DiffusionCacheConfig.from_dict(CONFIG)
    CacheDiTBackend(config, engine="library").enable(pipe)
    assert cache_dit.BlockAdapter.is_cached(pipe.transformer)
    assert not omni_cache.pipelines.is_enabled(pipe.transformer)
    assert not hasattr(config, "engine")


def test_none_a_dict_and_a_configuration() -> None:
    assert CacheDiTBackend().config == DiffusionCacheConfig()
    assert CacheDiTBackend({"max_warmup_steps": 7}).config.max_warmup_steps == 7
    config = DiffusionCacheConfig()
    assert CacheDiTBackend(config).config is config


@pytest.mark.parametrize("engine", ENGINES)
def test_enable_and_disable_leave_a_pipeline_as_it_was(engine: str) -> None:
    pipe, one = pipeline(), backend(engine)
    one.disable(pipe)  # nothing to do
    expected = FakeRunner(pipe, None).run(Request())
    before = dict(vars(pipe.transformer))
    one.enable(pipe)
    assert one.is_enabled()
    assert is_cached(pipe.transformer)
    assert pipe._cache_dit_targets == (pipe.transformer,)
    assert expected is not None
    assert not torch.equal(FakeRunner(pipe, one).run(Request()), expected)
    one.disable(pipe)
    assert not one.is_enabled()
    assert not is_cached(pipe.transformer)
    assert not hasattr(pipe, "_cache_dit_targets")
    assert vars(pipe.transformer).keys() == before.keys()
    assert torch.equal(FakeRunner(pipe, None).run(Request()), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("by_itself", [False, True])
def test_another_transformer_is_cached_anew(
    engine: str, by_itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_itself:
        monkeypatch.setitem(CUSTOM_DIT_ENABLERS, "FakePipeline", enable_cache_for_dit)
    pipe, made = pipeline(), backend(engine)
    made.enable(pipe)
    before, pipe.transformer = pipe.transformer, Declared(5)
    made.refresh(pipe, 8)
    assert is_cached(pipe.transformer)
    assert not is_cached(before)
    assert pipe._cache_dit_targets == (pipe.transformer,)


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_that_a_pipeline_names(engine: str) -> None:
    part = SimpleNamespace(dit=Declared())
    pipe = SimpleNamespace(part=part, transformer=Declared(), _dit_modules=["part.dit", "gone.dit"])
    backend(engine).enable(pipe)
    assert is_cached(part.dit)
    assert not is_cached(pipe.transformer)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_transformers_or_none(engine: str) -> None:
    class Broken(Declared):
        _cache_dit_adapter_config = CacheDiTAdapterConfig({"layers": ForwardPattern.Pattern_3})

    pipe = SimpleNamespace(a=Declared(), b=Broken(), _dit_modules=["a", "b"])
    one = backend(engine)
    with pytest.raises(AttributeError):
        one.enable(pipe)
    assert not one.is_enabled()
    assert not is_cached(pipe.a)


def test_refresh_of_what_is_off_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="not enabled"):
        backend().refresh(pipeline(), 8)


def test_disable_leaves_nothing_on_even_if_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = SimpleNamespace(a=Declared(), b=Declared(), _dit_modules=["a", "b"])
    one = backend("library")
    one.enable(pipe)
    original = cache_dit.disable_cache

    def raising(target: Any) -> None:
        if target is pipe.b:
            raise RuntimeError("stuck")
        original(target)

    monkeypatch.setattr(cache_dit, "disable_cache", raising)
    with pytest.raises(RuntimeError, match="stuck"):
        one.disable(pipe)
    assert not one.is_enabled()
    assert not hasattr(pipe, "_cache_dit_targets")
    assert not is_cached(pipe.a)
    one.disable(pipe)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_request_gives_what_a_fresh_pipeline_gives(engine: str) -> None:
    check_requests(pipeline, lambda: backend(engine), REQUESTS)


def test_with_masks_hints_and_forecasts_too() -> None:
    config = {
        "scm_steps_mask_policy": "fast",
        "force_refresh_step_hint": 5,
        "enable_taylorseer": True,
    }
    check_requests(pipeline, lambda: backend(**config), REQUESTS[4:9])
    check_requests(pipeline, lambda: backend("library", **config), REQUESTS[4:9])


def test_a_branch_that_misses_steps_does_not_disturb_the_other() -> None:
    """cache-dit tells branches by forward parity, and takes the one for the other from there on."""
    runner = FakeRunner(pipeline(), backend(max_cached_steps=99, residual_diff_threshold=9.0))
    runner.run(Request(others=("blurry",), steps=8, skipped=(3,)))
    first, second = omni_cache.summary(runner.pipeline.transformer).trajectories
    assert [step.computed for step in first.steps] == [True] * 2 + [False, False, True] * 2
    assert [step.index for step in second.steps] == [0, 1, 2, 4, 5, 6, 7]
    assert second.steps[3].computed


# Enablers


class Wan22Pipeline(FakePipeline):
    """Two experts, and a boundary between them."""

    boundary_ratio: float | None = 0.55

    def __init__(self) -> None:
        super().__init__(experts=True, make=Declared)
        self.scheduler.config = SimpleNamespace(num_train_timesteps=1000)


def test_steps_are_split_at_the_boundary() -> None:
    pipe = Wan22Pipeline()
    # 1000, 900, ..., 600 lie above.
    assert steps_of_experts(pipe, 10) == (5, 5)
    assert pipe.scheduler.timesteps is None
    pipe.boundary_ratio = None
    assert steps_of_experts(pipe, 10) == (10, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_second_expert_of_wan_has_a_warm_up_of_its_own(engine: str) -> None:
    config = {"max_warmup_steps": 3, "residual_diff_threshold": 9.0}
    runner = FakeRunner(Wan22Pipeline(), backend(engine, **config))
    experts = runner.pipeline.transformer, runner.pipeline.transformer_2
    computed: list[list[int]] = [[], []]
    if engine == "library":
        for expert, calls in zip(experts, computed, strict=True):
            expert.blocks[2].qkv.register_forward_hook(lambda *_, calls=calls: calls.append(1))
    runner.run(Request(steps=14))
    if engine == "graph":
        assert [schedule(each) for each in experts] == ["1110010", "1100100"]
    else:
        assert list(map(len, computed)) == [4, 3]


def test_wan_with_one_transformer() -> None:
    pipe, one = Wan22Pipeline(), backend()
    pipe.transformer_2 = None
    one.enable(pipe)
    assert pipe._cache_dit_targets == (pipe.transformer,)


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_enabler_that_puts_cache_dit_on_by_itself(
    wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def enabler(pipe: Any, config: Any) -> Any:
        adapter = cache_dit.BlockAdapter(
            transformer=pipe.transformer,
            blocks=[pipe.transformer.blocks],
            forward_pattern=[ForwardPattern.Pattern_3],
            check_forward_pattern=False,
        )
        begin = enable_cache_for_dit(pipe, config, adapter, engine="library")

        def refresh(*args: Any) -> None:
            calls.append(args)
            begin(*args)

        return CacheDiTEnableResult(refresh, (pipe.transformer,)) if wrapped else refresh

    monkeypatch.setitem(CUSTOM_DIT_ENABLERS, "FakePipeline", enabler)
    pipe, one = FakePipeline(), CacheDiTBackend()
    one.enable(pipe)
    assert cache_dit.BlockAdapter.is_cached(pipe.transformer)
    one.refresh(pipe, 8, False)
    assert calls == [(pipe, 8, False)]
    one.disable(pipe)
    assert not is_cached(pipe.transformer)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_enabler_of_a_model_puts_the_cache_on(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CUSTOM_DIT_ENABLERS, "FakePipeline", cache_dit_backend.enable_cache_for_sd3)
    pipe, one = pipeline(), backend(engine)
    one.enable(pipe)
    assert omni_cache.pipelines.is_enabled(pipe.transformer) == (engine == "graph")
    assert cache_dit.BlockAdapter.is_cached(pipe.transformer) == (engine == "library")
    one.refresh(pipe, 8, False)
    one.disable(pipe)
    assert not is_cached(pipe.transformer)


def test_bagel_denoises_with_its_language_model() -> None:
    pipe = SimpleNamespace(language_model=SimpleNamespace(model=Declared()))
    config = DiffusionCacheConfig.from_dict({"inner": "eager"})
    begin = cache_dit_backend.enable_cache_for_bagel(pipe, config)
    begin(pipe, 8)
    assert is_cached(pipe.language_model.model)


@pytest.mark.parametrize("name", ["BagelCachedAdapter", "SensenovaCachedAdapter"])
def test_adapters_of_models_are_for_the_graph(name: str) -> None:
    class Adapted(Declared):
        _cache_dit_adapter_config = replace(BLOCKS, cached_adapter_cls=getattr(cachedit, name))

    pipe = FakePipeline(make=Adapted)
    with pytest.raises(ValueError, match=f"Adapted of FakePipeline .*{name} is not allowed"):
        backend("library").enable(pipe)
    assert not is_cached(pipe.transformer)
    backend("graph").enable(pipe)
    assert is_cached(pipe.transformer)


@pytest.mark.parametrize("name", ["cache_dit", "cache-dit"])
def test_cache_dit_may_be_enabled_by_a_configuration(name: str) -> None:
    pipe = pipeline()
    may = cache_dit_backend.may_enable_cache_dit
    for other in ({"cache_backend": "tea_cache"}, {"cache_config": None}):
        asked = SimpleNamespace(**{"cache_backend": name, "cache_config": CONFIG, **other})
        assert may(pipe, asked) is None
        assert not is_cached(pipe.transformer)
    one = may(pipe, SimpleNamespace(cache_backend=name, cache_config=CONFIG))
    assert one is not None
    assert one.is_enabled()
    assert is_cached(pipe.transformer)


# Summary


@pytest.mark.parametrize("details", [True, False])
def test_a_summary_is_logged(details: bool, caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner(pipeline(), backend())
    runner.run(Request())
    with caplog.at_level(logging.INFO):
        cache_summary(runner.pipeline, details)
    (record,) = [each for each in caplog.records if each.name.startswith("omni_cache")]
    said = record.getMessage()
    assert said.startswith("Declared: ")
    assert "steps computed" in said
    assert ("warm-up" in said) == details


def test_a_summary_of_the_library_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner(pipeline(), backend("library"))
    asked: list[Any] = []
    monkeypatch.setattr(cache_dit, "summary", lambda *args, **kwargs: asked.append((args, kwargs)))
    cache_summary(runner.pipeline, details=False)
    assert asked == [((runner.pipeline.transformer,), {"details": False})]


@pytest.mark.parametrize("pipe", [SimpleNamespace(), FakePipeline()], ids=["nothing", "uncached"])
def test_a_summary_of_nothing_is_a_warning(pipe: Any) -> None:
    with pytest.warns(UserWarning, match="no transformer that is cached"):
        cache_summary(pipe)


# Requests that say themselves what they want


def spec(key: str, steps: int = 8, **config: Any) -> CacheDiTRequestSpec:
    return CacheDiTRequestSpec(key, {**CONFIG, "inner": "eager", **config}, steps)


def test_each_request_has_what_it_wants() -> None:
    pipe = pipeline()
    runtime = RequestScopedCacheDiTRuntime(pipe)
    uncached = FakeRunner(pipe, None)

    def computed(want: CacheDiTRequestSpec | None) -> str:
        runtime.prepare(want)
        uncached.run(Request())
        return schedule(pipe.transformer) if runtime.is_enabled else ""

    high = spec("high", residual_diff_threshold=9.0)
    other = spec("other", residual_diff_threshold=9.0, max_warmup_steps=4)
    said = [computed(each) for each in (None, high, high, other, None, high)]
    assert said == ["", "11001001", "11001001", "11110010", "", "11001001"]
    runtime.disable()
    assert not runtime.is_enabled
    assert not is_cached(pipe.transformer)
    runtime.disable()


def test_a_backend_that_is_enabled_may_be_adopted() -> None:
    pipe, one = pipeline(), backend()
    runtime = RequestScopedCacheDiTRuntime(pipe)
    with pytest.raises(ValueError, match="backend is not enabled"):
        runtime.adopt(one, installation_key="high")
    one.enable(pipe)
    runtime.adopt(one, installation_key="high")
    runtime.adopt(one, installation_key="high")
    with pytest.raises(RuntimeError, match="'low' is not allowed while 'high' is installed"):
        runtime.adopt(one, installation_key="low")
    with pytest.raises(RuntimeError):
        runtime.adopt(backend(), installation_key="high")
    runtime.prepare(spec("high"))
    assert one.is_enabled()  # the same key: refreshed
    runtime.prepare(spec("low"))
    assert not one.is_enabled()
    assert runtime.is_enabled


def test_an_installation_that_fails_leaves_none() -> None:
    pipe = pipeline()
    runtime = RequestScopedCacheDiTRuntime(pipe)
    runtime.prepare(spec("high"))
    with pytest.raises(ValueError, match="fn_compute_blocks"):
        runtime.prepare(spec("broken", Fn_compute_blocks=0))
    assert not runtime.is_enabled
    assert not is_cached(pipe.transformer)
