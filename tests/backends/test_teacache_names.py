"""Names, defaults and errors of TeaCache under the names of vLLM-Omni."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_pipeline import FakePipeline, FakeRunner, FakeTransformer, Request
from torch import Tensor, nn
from toy_transformer import CHANNELS, TOKENS, Loop, ToyTransformer, gaussian, same

import omni_cache
from omni_cache import UncachedWarning
from omni_cache.backends import teacache
from omni_cache.backends.config import DiffusionCacheConfig
from omni_cache.backends.hooks import HookRegistry, ModelHook
from omni_cache.backends.seacache import SeaCacheConfig, apply_sea_cache_hook
from omni_cache.backends.selector import get_cache_backend
from omni_cache.backends.teacache import (
    CacheContext,
    TeaCacheBackend,
    TeaCacheConfig,
    TeaCacheHook,
    TeaCacheState,
    apply_teacache_hook,
    register_extractor,
)
from omni_cache.backends.teacache.backend import CUSTOM_TEACACHE_ENABLERS
from omni_cache.backends.teacache.coefficient_estimator import DataCollectionHook
from omni_cache.backends.teacache.extractors import EXTRACTOR_REGISTRY, get_extractor
from omni_cache.capture.extractor import find_extractor
from omni_cache.pipelines.enable import is_enabled
from omni_cache.strategies.tables import teacache_table

IDENTITY = [0.0, 0.0, 0.0, 1.0, 0.0]
TYPES = [
    "FluxTransformer2DModel",
    "Flux2Klein",
    "QwenImageTransformer2DModel",
    "Bagel",
    "SenseNovaU1ForCausalLM",
    "ZImageTransformer2DModel",
    "StableAudioDiTModel",
    "HunyuanImage3Pipeline",
    "Flux2Transformer2DModel",
    "LongCatImageTransformer2DModel",
    "MiniMaxH3DiTModel",
]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The registry of extractors, left as it was."""
    kept = dict(EXTRACTOR_REGISTRY)
    monkeypatch.setattr("omni_cache.capture.extractor._of_modules", weakref.WeakKeyDictionary())
    yield EXTRACTOR_REGISTRY
    EXTRACTOR_REGISTRY.clear()
    EXTRACTOR_REGISTRY.update(kept)


def hooked(module: nn.Module, threshold: float = 1e9) -> nn.Module:
    apply_teacache_hook(module, TeaCacheConfig(threshold, IDENTITY), inner="eager")
    return module


def test_the_package_has_its_names() -> None:
    assert set(teacache.__all__) == {
        "TeaCacheBackend",
        "TeaCacheConfig",
        "TeaCacheState",
        "TeaCacheHook",
        "apply_teacache_hook",
        "register_extractor",
        "CacheContext",
    }


# --- the configuration ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:several tables are published for ZImage")
@pytest.mark.parametrize("transformer_type", TYPES)
def test_every_known_type_has_its_published_coefficients(transformer_type: str) -> None:
    config = TeaCacheConfig(transformer_type=transformer_type)
    table = teacache_table(transformer_type)
    assert table is not None
    assert config.coefficients == list(table.coefficients)
    assert config.rel_l1_thresh == (0.17 if transformer_type == "MiniMaxH3DiTModel" else 0.2)
    config.coefficients[0] = 0.0  # nobody else's
    assert TeaCacheConfig(transformer_type=transformer_type).coefficients[0] != 0.0


def test_z_image_has_the_numbers_of_0_30_0_and_is_told_of_better_ones() -> None:
    with pytest.warns(UserWarning, match="after 0.30.0"):
        config = TeaCacheConfig(transformer_type="ZImageTransformer2DModel")
    assert config.coefficients == TeaCacheConfig().coefficients
    tuned = teacache_table("ZImageTransformer2DModel", "Z-Image (after 0.30.0)")
    assert tuned is not None
    assert tuned.coefficients != tuple(TeaCacheConfig().coefficients)


def test_defaults() -> None:
    config = TeaCacheConfig()
    assert config.transformer_type == "QwenImageTransformer2DModel"
    assert config.rel_l1_thresh == 0.2
    config.rel_l1_thresh = 0.5  # mutable


@pytest.mark.parametrize("threshold", [0, 0.0, -0.1, float("nan"), "0.2"])
def test_a_threshold_has_to_be_more_than_0(threshold: Any) -> None:
    with pytest.raises(ValueError, match="rel_l1_thresh"):
        TeaCacheConfig(rel_l1_thresh=threshold)


@pytest.mark.parametrize("count", [0, 4, 6])
def test_there_are_five_coefficients(count: int) -> None:
    with pytest.raises(ValueError, match="five"):
        TeaCacheConfig(coefficients=[1.0] * count)


@pytest.mark.parametrize(
    "given", [["a", 0, 0, 0, 0], [None] * 5, "abcde", 5, [float("nan")] * 5], ids=str
)
def test_coefficients_are_numbers(given: Any) -> None:
    with pytest.raises(ValueError, match="five numbers"):
        TeaCacheConfig(coefficients=given)


def test_a_copy_of_a_configuration_has_the_signal_of_its_coefficients() -> None:
    config = TeaCacheConfig(transformer_type="HunyuanImage3Pipeline")
    assert config.signal == "timestep_embedding"
    assert replace(config, rel_l1_thresh=0.3).signal == config.signal
    assert TeaCacheConfig(**asdict(config)).signal == config.signal
    assert replace(config, coefficients=IDENTITY).signal == "auto"


def test_an_unknown_type_is_a_key_error_that_lists_the_known() -> None:
    with pytest.raises(KeyError) as caught:
        TeaCacheConfig(transformer_type="Unheard")
    for known in TYPES:
        assert known in str(caught.value)
    assert (
        TeaCacheConfig(coefficients=IDENTITY, transformer_type="Unheard").coefficients == IDENTITY
    )


# --- extractors -----------------------------------------------------------------------------------


def test_a_registered_extractor_is_found_by_name_and_along_bases(registry: dict[str, Any]) -> None:
    class Sharded(FakeTransformer):
        pass

    def first(*args: Any) -> Any: ...
    def second(*args: Any) -> Any: ...

    register_extractor("FakeTransformer", first)
    register_extractor("FakeTransformer", second)
    assert get_extractor("FakeTransformer") is get_extractor(Sharded) is second
    assert registry["FakeTransformer"] is second
    for unknown in ("Sharded", ToyTransformer):
        with pytest.raises(ValueError, match=r"^Unknown model type"):
            get_extractor(unknown)  # type: ignore[arg-type]


def extract_toy(
    module: Any, hidden_states: Tensor, timestep: Tensor, prompt: Tensor
) -> CacheContext:
    x = module.embed(hidden_states)
    time = module.embed_prompt(prompt).mean(1) + module.embed_time(timestep.reshape(-1, 1) / 500)

    def run_transformer_blocks() -> tuple[Tensor]:
        y = x
        for block in module.blocks:
            y = block(y, time, None)
        return (y,)

    return CacheContext(x, x, None, time, run_transformer_blocks, module.project)


def test_an_extractor_is_found_by_the_type_and_not_by_the_class(registry: dict[str, Any]) -> None:
    calls = []

    def extractor(module: Any, *args: Any) -> CacheContext:
        calls.append(module)
        return extract_toy(module, *args)

    register_extractor("A type", extractor)
    model = ToyTransformer()
    config = TeaCacheConfig(1e9, IDENTITY, "A type")
    apply_teacache_hook(model, config, inner="eager")
    Loop().run(model)
    assert calls == [model] * 8
    assert omni_cache.summary(model).reused_steps == 7
    HookRegistry.get_or_create(model).remove_hook("teacache")
    assert same(Loop().run(model), Loop().run(ToyTransformer()))
    assert calls == [model] * 8


# --- the hook -------------------------------------------------------------------------------------


def stub(module: nn.Module, hidden_states: Tensor, modulated_input: Tensor) -> CacheContext:
    def run_transformer_blocks() -> tuple[Tensor]:
        module.runs = getattr(module, "runs", 0) + 1  # type: ignore[assignment]
        return (hidden_states + 1.0,)

    temb = torch.zeros(1)
    return CacheContext(
        modulated_input, hidden_states, None, temb, run_transformer_blocks, lambda hidden: hidden
    )


def make_hook(extractor: Any = stub) -> tuple[TeaCacheHook, Any]:
    hook = TeaCacheHook(TeaCacheConfig(0.2, IDENTITY), inner="eager")
    hook.extractor_fn = extractor
    return hook, nn.Module()


def test_a_hook_has_its_attributes() -> None:
    hook = TeaCacheHook(TeaCacheConfig())
    assert isinstance(hook, ModelHook)
    assert TeaCacheHook._HOOK_NAME == "teacache"
    assert isinstance(hook.rescale_func, np.poly1d)
    assert hook.rescale_func(0.3) == np.poly1d(hook.config.coefficients)(0.3)
    assert hook.extractor_fn is None
    assert hook._forward_cnt == 0
    assert isinstance(hook.state_manager.get_state(), TeaCacheState)


def test_a_call_without_timestep_is_counted_by_the_order() -> None:
    hook, module = make_hook()
    for _ in range(4):
        hook.new_forward(module, torch.zeros(4), torch.ones(4))
    assert module.runs == 1
    assert hook._forward_cnt == 4
    state = hook.state_manager.get_state()
    assert (state.cnt, state.accumulated_rel_l1_distance) == (4, 0.0)
    assert torch.equal(state.previous_modulated_input, torch.ones(4))
    assert torch.equal(state.previous_residual, torch.ones(4))
    assert state.previous_residual_encoder is None
    hook.reset_state(module)
    assert hook._forward_cnt == hook.state_manager.get_state().cnt == 0
    hook.new_forward(module, torch.zeros(4), torch.ones(4))
    assert module.runs == 2


def test_two_branches_take_turns_where_guidance_is_true_cfg() -> None:
    hook, module = make_hook()
    module.do_true_cfg = True
    for _ in range(3):
        for signal in (1.0, 5.0):
            hook.new_forward(module, torch.zeros(4), torch.full((4,), signal))
    assert set(hook.state_manager._states) == {"teacache_positive", "teacache_negative"}
    assert module.runs == 2
    hook.state_manager.set_context("teacache_positive")
    assert torch.equal(hook.state_manager.get_state().previous_modulated_input, torch.ones(4))


def test_a_tag_names_one_call() -> None:
    hook, module = make_hook()
    for _ in range(2):
        for branch, signal in enumerate((1.0, 5.0, 25.0)):
            module._teacache_branch_id = branch
            hook.new_forward(module, torch.zeros(4), torch.full((4,), signal))
            assert module._teacache_branch_id is None
    names = {"teacache_branch_0", "teacache_branch_1", "teacache_branch_2"}
    assert set(hook.state_manager._states) == names
    assert module.runs == 3


def test_calls_with_and_without_guidance_do_not_swap_stamped_branches() -> None:
    hook, module = make_hook()
    module.do_true_cfg = True
    positive, negative = ("positive", 1.0), ("negative", 5.0)
    runs = []
    for stamp, signal in (positive, negative, positive, positive, negative, positive, negative):
        module.cfg_branch = stamp
        hook.new_forward(module, torch.zeros(4), torch.full((4,), signal))
        runs.append(module.runs)
    # Only the branch that has missed a step is computed when it is back.
    assert runs == [1, 2, 2, 2, 3, 3, 3]


def test_a_stamp_may_be_any_name() -> None:
    hook, module = make_hook()
    for _ in range(2):
        for stamp, signal in (("text", 1.0), ("image", 5.0), ("none", 25.0)):
            module.cfg_branch = stamp
            hook.new_forward(module, torch.zeros(4), torch.full((4,), signal))
    assert module.runs == 3


def test_the_runner_of_vllm_omni_may_name_the_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(cfg_branch_id=0)
    theirs = SimpleNamespace(
        is_forward_context_available=lambda: True, get_forward_context=lambda: context
    )
    monkeypatch.setitem(sys.modules, "vllm_omni.diffusion.forward_context", theirs)
    hook, module = make_hook()
    for _ in range(2):
        for context.cfg_branch_id, signal in enumerate((1.0, 5.0, 25.0)):
            hook.new_forward(module, torch.zeros(4), torch.full((4,), signal))
    assert module.runs == 3


@pytest.mark.parametrize(
    ("size", "rank", "branches"),
    [
        (2, 0, {"teacache_positive"}),
        (2, 1, {"teacache_negative"}),
        (1, 0, {"teacache_positive", "teacache_negative"}),
        (None, 0, {"teacache_positive", "teacache_negative"}),
    ],
)
def test_a_rank_that_shares_guidance_has_one_branch(
    size: int | None, rank: int, branches: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def world_size() -> int:
        assert size is not None, "classifier-free guidance group is not initialized"
        return size

    theirs = SimpleNamespace(
        get_classifier_free_guidance_world_size=world_size,
        get_classifier_free_guidance_rank=lambda: rank,
    )
    monkeypatch.setitem(sys.modules, "vllm_omni.diffusion.distributed.parallel_state", theirs)
    hook, module = make_hook()
    module.do_true_cfg = True
    for _ in range(4):
        hook.new_forward(module, torch.zeros(4), torch.ones(4))
    assert set(hook.state_manager._states) == branches
    assert module.runs == len(branches)


def test_an_extractor_names_the_branch_over_a_stamp() -> None:
    def extractor(module: Any, *args: Any) -> CacheContext:
        context = stub(module, *args)
        context.extra_states = {"teacache_branch": "negative"}
        return context

    hook, module = make_hook(extractor)
    module.cfg_branch = "positive"
    hook.new_forward(module, torch.zeros(4), torch.ones(4))
    assert set(hook.state_manager._states) == {"teacache_negative"}


def test_the_synchronized_decision_has_the_last_word() -> None:
    asked, answers = [], [True, False, True, False]

    def extractor(module: Any, *args: Any) -> CacheContext:
        context = stub(module, *args)

        def agree(computes: bool) -> bool:
            asked.append(computes)
            return answers[len(asked) - 1]

        context.extra_states = {"synchronize_cache_decision": agree}
        return context

    hook, module = make_hook(extractor)
    runs = []
    for signal in (1.0, 1.1, 1.2, 2.0):
        hook.new_forward(module, torch.zeros(4), torch.full((4,), signal))
        runs.append(module.runs)
    # Computed, reused, computed because others do, reused because others do.
    assert asked == [True, False, False, True]
    assert runs == [1, 1, 2, 2]
    assert hook.state_manager.get_state().accumulated_rel_l1_distance == 0.0


def test_a_function_of_both_streams_runs_in_place_of_the_blocks() -> None:
    ran = []

    def extractor(module: Any, hidden: Tensor, signal: Tensor) -> CacheContext:
        context = stub(module, hidden, signal)
        context.encoder_hidden_states = torch.zeros(4, 2)

        def run_both(hidden: Tensor, encoder: Tensor) -> tuple[Tensor, Tensor]:
            ran.append(1)
            return hidden + 3, encoder + 5

        context.extra_states = {"run_flux2_full_transformer_with_single": run_both}
        return context

    hook, module = make_hook(extractor)
    for start in (0.0, 10.0):
        result = hook.new_forward(module, torch.full((4,), start), torch.ones(4))
        assert torch.equal(result, torch.full((4,), start + 3))
    assert (len(ran), getattr(module, "runs", 0)) == (1, 0)
    state = hook.state_manager.get_state()
    assert torch.equal(state.previous_residual, torch.full((4,), 3.0))
    assert state.previous_residual_encoder is None


def test_hooking_again_warns_and_begins_anew() -> None:
    model = hooked(FakeTransformer())
    Loop().run(model)
    first = HookRegistry.get_or_create(model).get_hook("teacache")
    with pytest.warns(UserWarning, match="registered before"):
        hooked(model)
    assert HookRegistry.get_or_create(model).get_hook("teacache") is not first
    assert omni_cache.summary(model).reused_steps == 0
    Loop().run(model)
    assert omni_cache.summary(model).reused_steps == 7


def test_removing_the_hook_leaves_the_module_as_it_was() -> None:
    model = FakeTransformer()
    before = dict(vars(model))
    hooked(model)
    Loop().run(model)
    model._hook_registry.remove_hook("teacache")
    del vars(model)["_hook_registry"]
    assert vars(model) == before


def test_a_hook_leaves_the_extractor_of_a_module_as_it_was() -> None:
    def extractor(module: nn.Module, *args: Any, **kwargs: Any) -> CacheContext:
        raise NotImplementedError

    def another(module: nn.Module, *args: Any, **kwargs: Any) -> CacheContext:
        raise NotImplementedError

    model = FakeTransformer()
    omni_cache.register_extractor(model, extractor)
    hooked(model)
    with pytest.warns(UserWarning, match="replaced"):
        hooked(model)
    hook = model._hook_registry.get_hook("teacache")
    assert hook.extractor_fn is extractor
    model._hook_registry.remove_hook("teacache")
    assert find_extractor(model) is extractor
    with pytest.raises(ValueError, match="inner"):
        apply_teacache_hook(model, TeaCacheConfig(coefficients=IDENTITY), inner="nothing")
    assert find_extractor(model) is extractor
    collecting = DataCollectionHook("FakeTransformer", inner="eager")
    collecting.initialize_hook(model)
    collecting.remove_hook(model)
    assert find_extractor(model) is extractor
    apply_sea_cache_hook(model, SeaCacheConfig(), extractor_fn=another, inner="eager")
    assert find_extractor(model) is another
    model._hook_registry.remove_hook("sea_cache")
    assert find_extractor(model) is extractor


def test_a_hook_that_would_never_run_is_refused() -> None:
    class Own(ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    class Attached(Own):
        def initialize_hook(self, module: nn.Module) -> nn.Module:
            return super().initialize_hook(module)

    model = FakeTransformer()
    registry = HookRegistry.get_or_create(model)
    with pytest.raises(TypeError, match=r"Own\.new_forward is never called"):
        registry.register_hook("own", Own())
    assert registry.get_hook("own") is None
    registry.register_hook("own", Attached())


def test_a_second_kind_of_hook_is_refused_and_a_failed_one_leaves_nothing() -> None:
    model = hooked(FakeTransformer())
    with pytest.raises(RuntimeError, match="teacache"):
        HookRegistry.get_or_create(model).register_hook("magcache", ModelHook())
    model = FakeTransformer()
    with pytest.raises(ValueError, match="inner"):
        apply_teacache_hook(model, TeaCacheConfig(coefficients=IDENTITY), inner="nothing")
    assert HookRegistry.get_or_create(model).get_hook("teacache") is None
    assert not is_enabled(model)


def test_a_hooked_module_is_freed_with_its_last_reference() -> None:
    model = hooked(FakeTransformer())
    Loop().run(model)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# --- the backend ----------------------------------------------------------------------------------


def backend(**config: Any) -> TeaCacheBackend:
    return TeaCacheBackend(DiffusionCacheConfig.from_dict({"inner": "eager", **config}))


@pytest.mark.parametrize(
    "config", [{}, {"coefficients": [1.0]}, {"rel_l1_thresh": 0, "coefficients": IDENTITY}], ids=str
)
def test_a_wrong_configuration_is_a_value_error_and_touches_nothing(config: Any) -> None:
    made, pipeline = backend(**config), FakePipeline(experts=True)
    with pytest.raises(ValueError, match=r"^Invalid TeaCache configuration: "):
        made.enable(pipeline)
    assert not made.enabled
    assert not is_enabled(pipeline.transformer)


def test_a_backend_without_config_fails_when_it_is_enabled() -> None:
    made = get_cache_backend("tea_cache", None)
    assert made is not None
    assert made.config is None
    with pytest.raises(ValueError, match="Invalid TeaCache configuration"):
        made.enable(FakePipeline())


def test_a_pipeline_without_transformer_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no transformer: none of transformer,"):
        backend(coefficients=IDENTITY).enable(SimpleNamespace())


def test_a_subclass_has_the_coefficients_of_its_base() -> None:
    base = type("FluxTransformer2DModel", (FakeTransformer,), {})
    pipeline = SimpleNamespace(transformer=type("FSDPFlux", (base,), {})())
    backend().enable(pipeline)
    hook = pipeline.transformer._hook_registry.get_hook("teacache")
    assert hook.config.transformer_type == "FluxTransformer2DModel"


def test_a_pipeline_may_name_its_transformers() -> None:
    inner = FakeTransformer()
    pipeline = SimpleNamespace(
        model=SimpleNamespace(dit=inner), _dit_modules=("model.dit", "absent.dit")
    )
    backend(coefficients=IDENTITY).enable(pipeline)
    assert is_enabled(inner)


@pytest.mark.parametrize("kind", ["tea_cache", "mag_cache", "sea_cache", "cache_dit"])
def test_of_nested_modules_the_outer_one_denoises(kind: str) -> None:
    pipeline = FakePipeline()
    pipeline.transformer.language_model = tower = ToyTransformer()
    pipeline._dit_modules = ["transformer.language_model", "transformer"]
    config = {"coefficients": IDENTITY, "mag_ratios": [1.0] * 8, "inner": "eager"}
    get_cache_backend(kind, config).enable(pipeline)
    assert is_enabled(pipeline.transformer)
    assert not is_enabled(tower)


@pytest.mark.parametrize(
    ("kind", "named_first"),
    [("tea_cache", False), ("mag_cache", False), ("sea_cache", False), ("cache_dit", True)],
)
def test_the_usual_names_come_first_except_for_cache_dit(kind: str, named_first: bool) -> None:
    pipeline = FakePipeline()
    pipeline.text = tower = ToyTransformer()
    pipeline._dit_modules = ["text"]
    config = {"coefficients": IDENTITY, "mag_ratios": [1.0] * 8, "inner": "eager"}
    get_cache_backend(kind, config).enable(pipeline)
    assert is_enabled(tower) is named_first
    assert is_enabled(pipeline.transformer) is not named_first


def test_refreshing_what_is_not_enabled_warns_if_verbose(recwarn: pytest.WarningsRecorder) -> None:
    made = backend(coefficients=IDENTITY)
    made.refresh(FakePipeline(), 8, verbose=False)
    assert not recwarn
    with pytest.warns(UncachedWarning, match="TeaCache is not enabled on FakePipeline"):
        made.refresh(FakePipeline(), 8)


@pytest.mark.parametrize("kind", ["tea_cache", "mag_cache", "sea_cache"])
def test_a_backend_leaves_nothing_on_a_module(kind: str) -> None:
    config = {"coefficients": IDENTITY, "mag_ratios": [1.0] * 8, "inner": "eager"}
    pipeline, made = FakePipeline(), get_cache_backend(kind, config)
    before = dict(vars(pipeline.transformer))
    made.disable(pipeline)
    assert vars(pipeline.transformer) == before
    if kind == "tea_cache":
        made.refresh(pipeline, 8, verbose=False)
        assert vars(pipeline.transformer) == before
    made.enable(pipeline)
    made.disable(pipeline)
    assert vars(pipeline.transformer) == before


def test_refresh_refuses_what_is_no_number_of_steps() -> None:
    runner = FakeRunner(FakePipeline(), backend(coefficients=IDENTITY))
    with pytest.raises(ValueError, match="num_inference_steps"):
        runner.backend.refresh(runner.pipeline, -1)


def test_further_keys_are_flags_of_ours() -> None:
    config = {"coefficients": IDENTITY, "rel_l1_thresh": 1e9, "forecast": "newton"}
    runner = FakeRunner(FakePipeline(), backend(**config))
    latents = runner.run(Request())
    held = FakeRunner(FakePipeline(), backend(**{**config, "forecast": "hold"})).run(Request())
    assert omni_cache.summary(runner.pipeline.transformer).reused_steps > 0
    assert latents is not None
    assert held is not None
    assert latents.shape == held.shape


# --- pipelines with enablers of their own ---------------------------------------------------------


def pipeline_of(name: str, **attributes: Any) -> Any:
    made = type(name, (), {})()
    vars(made).update(attributes)
    return made


def config_of(module: Any) -> TeaCacheConfig:
    config: TeaCacheConfig = module._hook_registry.get_hook("teacache").config
    return config


@pytest.mark.parametrize(
    ("name", "attribute", "transformer_type"),
    [
        ("BagelPipeline", "bagel", "Bagel"),
        ("Flux2KleinPipeline", "transformer", "Flux2Klein"),
        ("SenseNovaU1Pipeline", "denoising_transformer", "SenseNovaU1ForCausalLM"),
    ],
)
def test_some_pipelines_have_types_of_their_own(
    name: str, attribute: str, transformer_type: str
) -> None:
    model = FakeTransformer()
    pipeline, made = pipeline_of(name, **{attribute: model}), backend()
    made.enable(pipeline)
    assert made.is_enabled()
    assert config_of(model).transformer_type == transformer_type
    if name == "BagelPipeline":
        assert pipeline.transformer is model
    made.refresh(pipeline, 8)


def test_hunyuan_image_applies_the_rule_in_its_own_loop(recwarn: pytest.WarningsRecorder) -> None:
    model = FakeTransformer()
    pipeline, made = pipeline_of("HunyuanImage3Pipeline", transformer=model), backend()
    made.enable(pipeline)
    assert pipeline._tea_cache_config.transformer_type == "HunyuanImage3Pipeline"
    assert not is_enabled(model)
    made.refresh(pipeline, 8)
    assert not recwarn


@pytest.mark.parametrize("partition", ["fl2va", "combined"])
def test_minimax_has_a_threshold_of_its_own(partition: str) -> None:
    model = FakeTransformer()
    backend().enable(pipeline_of("MiniMaxH3Pipeline", transformer=model, partition=partition))
    assert config_of(model).rel_l1_thresh == 0.17


@pytest.mark.parametrize("partition", ["ref2va", None])
def test_other_partitions_of_minimax_are_refused(partition: str | None) -> None:
    pipeline = pipeline_of("MiniMaxH3Pipeline", transformer=FakeTransformer(), partition=partition)
    with pytest.raises(ValueError, match="fl2va"):
        backend().enable(pipeline)


def test_an_enabler_may_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(CUSTOM_TEACACHE_ENABLERS, "OwnPipeline", lambda *given: seen.append(given))
    made, pipeline = backend(), pipeline_of("OwnPipeline")
    made.enable(pipeline)
    assert seen == [(pipeline, made.config)]
    assert made.is_enabled()


def own_enabler(pipeline: Any, config: Any) -> None:
    apply_teacache_hook(pipeline.net.dit, TeaCacheConfig(1e9, IDENTITY), inner="eager")


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("BagelPipeline", "bagel"), ("SenseNovaU1Pipeline", "denoising_transformer"), ("Own", "net")],
)
def test_what_an_enabler_has_hooked_is_refreshed_and_taken_off(
    name: str,
    attribute: str,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setitem(CUSTOM_TEACACHE_ENABLERS, "Own", own_enabler)
    model = FakeTransformer()
    part = SimpleNamespace(dit=model) if name == "Own" else model
    named = {"language_model": ToyTransformer(), "_dit_modules": ["language_model"]}
    pipeline = pipeline_of(name, **{attribute: part}, **({} if name == "Own" else named))
    made = backend()
    made.enable(pipeline)
    Loop(steps=4).run(model)
    made.refresh(pipeline, 8)
    assert not omni_cache.summary(model).trajectories
    assert not recwarn
    made.disable(pipeline)
    assert not is_enabled(model)
    assert not hasattr(pipeline, "_tea_cache_modules")


@pytest.mark.filterwarnings("ignore:the hook 'teacache' was registered before")
def test_a_transformer_that_is_uncached_beside_others_is_told() -> None:
    pipeline, made = FakePipeline(experts=True), backend(coefficients=IDENTITY)
    made.enable(pipeline)
    replaced, pipeline.transformer_2 = pipeline.transformer_2, ToyTransformer()
    with pytest.warns(UncachedWarning, match="not enabled on ToyTransformer of FakePipeline"):
        made.refresh(pipeline, 8)
    made.enable(pipeline)
    assert is_enabled(pipeline.transformer_2)
    assert not is_enabled(replaced)
    omni_cache.disable(pipeline.transformer)
    with pytest.warns(UncachedWarning, match="not enabled on FakeTransformer of FakePipeline"):
        made.refresh(pipeline, 8)


def test_all_transformers_are_hooked_or_none() -> None:
    pipeline, made = FakePipeline(experts=True), backend(coefficients=IDENTITY)
    HookRegistry.get_or_create(pipeline.transformer_2).register_hook("mine", ModelHook())
    with pytest.raises(RuntimeError, match="mine"):
        made.enable(pipeline)
    assert not is_enabled(pipeline.transformer)
    pipeline.transformer_2._hook_registry.remove_hook("mine")
    made.enable(pipeline)
    made.config = backend(coefficients=IDENTITY, inner="bogus").config
    with pytest.raises(ValueError, match="inner"), pytest.warns(UserWarning, match="replaced"):
        made.enable(pipeline)
    assert not made.is_enabled()
    assert not is_enabled(pipeline.transformer)
    assert not is_enabled(pipeline.transformer_2)


def test_a_compiled_transformer_is_hooked_itself() -> None:
    model = FakeTransformer()
    pipeline = SimpleNamespace(transformer=torch.compile(model, backend="eager"))
    made = backend(coefficients=IDENTITY)
    made.enable(pipeline)
    assert config_of(model).coefficients == IDENTITY
    made.refresh(pipeline, 8)
    model(gaussian(0, 1, TOKENS, CHANNELS), torch.tensor([900.0]), gaussian("p", 1, 5, CHANNELS))
    assert omni_cache.summary(model).computed_steps == 1
