"""Names, defaults and errors of what all backends share: root, base, configuration, selector."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import omni_cache
import omni_cache.backends as root
from omni_cache.backends import selector
from omni_cache.backends.base import CacheBackend, CachedTransformer
from omni_cache.backends.cachedit import CacheDiTBackend
from omni_cache.backends.config import DiffusionCacheConfig
from omni_cache.backends.hooks import HookRegistry, ModelHook, StateManager
from omni_cache.backends.selector import get_cache_backend, resolve_cache_backend

ROOT = {
    "CacheBackend",
    "ExactProjectionCache",
    "CacheContext",
    "TeaCacheBackend",
    "TeaCacheConfig",
    "apply_teacache_hook",
    "PromptEmbedCache",
    "install_prompt_embed_cache",
    "resolve_prompt_embed_cache_config",
    "uninstall_prompt_embed_cache",
}


# --- the root -------------------------------------------------------------------------------------


def test_the_root_has_the_ten_names() -> None:
    assert set(root.__all__) == ROOT
    assert set(dir(root)) >= ROOT
    with pytest.raises(AttributeError, match="no attribute 'MagCacheBackend'"):
        _ = root.MagCacheBackend  # in its submodule only


@pytest.mark.parametrize("name", sorted(ROOT))
def test_names_of_the_root_are_names_of_the_package_too(name: str) -> None:
    assert name in omni_cache.__all__
    assert omni_cache._HOMES[name] == root._HOMES[name]


def test_there_is_one_cache_context() -> None:
    from omni_cache.backends.teacache import CacheContext
    from omni_cache.backends.teacache.extractors import CacheContext as OfExtractors

    assert omni_cache.CacheContext is root.CacheContext is CacheContext is OfExtractors
    names = [field.name for field in dataclasses.fields(CacheContext)]
    assert names == [
        "modulated_input",
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "run_transformer_blocks",
        "postprocess",
        "extra_states",
    ]


def test_contexts_are_checked_in_the_documented_order() -> None:
    x = torch.zeros(2, 3)
    fields: dict[str, Any] = {
        "modulated_input": None,
        "hidden_states": None,
        "encoder_hidden_states": 1,
        "temb": None,
        "run_transformer_blocks": None,
        "postprocess": None,
    }
    right = [x, x, None, x, lambda: (x,), lambda y: y]
    for name, value in zip(list(fields), right, strict=True):
        with pytest.raises(TypeError, match=f"^{name}="):
            root.CacheContext(**fields).validate()
        fields[name] = value
    root.CacheContext(**fields).validate()
    fields["modulated_input"] = x.to("meta")[:1]
    with pytest.raises(ValueError, match="batch size"):
        root.CacheContext(**fields).validate()
    fields["modulated_input"] = x.to("meta")
    with pytest.raises(ValueError, match="device"):
        root.CacheContext(**fields).validate()


# --- base -----------------------------------------------------------------------------------------


class Backend(CacheBackend):
    def enable(self, pipeline: Any) -> None:
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None:
        pass


def test_a_backend_keeps_its_config_unchecked_and_starts_off() -> None:
    backend = Backend("anything")
    assert (backend.config, backend.enabled, backend.is_enabled()) == ("anything", False, False)
    assert repr(backend) == "Backend(config=anything)"
    backend.enable(None)
    assert backend.is_enabled()


def test_enable_and_refresh_are_abstract() -> None:
    assert CacheBackend.__abstractmethods__ == {"enable", "refresh"}
    assert not hasattr(CacheBackend, "disable")
    refresh = inspect.signature(CacheBackend.refresh).parameters
    assert list(refresh) == ["self", "pipeline", "num_inference_steps", "verbose"]
    assert refresh["verbose"].default is True
    with pytest.raises(TypeError, match="abstract"):
        CacheBackend(None)  # type: ignore[abstract]


def test_a_cached_transformer_knows_how_it_is_guided() -> None:
    class Plain(CachedTransformer):
        pass

    class Together(CachedTransformer, enable_separate_cfg=False):
        pass

    assert isinstance(Plain(), nn.Module)
    assert Plain().do_true_cfg is False
    assert (Plain.enable_separate_cfg, Together.enable_separate_cfg) == (True, False)


# --- the configuration ----------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {
    "rel_l1_thresh": None,
    "coefficients": None,
    "sea_threshold": 0.25,
    "sea_residual_order": 1,
    "sea_max_consecutive_cached": 2,
    "sea_power_exp": 3.0,
    "mag_threshold": 0.24,
    "mag_max_skip_steps": 5,
    "mag_retention_ratio": 0.1,
    "mag_ratios": None,
    "mag_calibrate": False,
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "max_warmup_steps": 4,
    "max_cached_steps": -1,
    "residual_diff_threshold": 0.24,
    "max_continuous_cached_steps": 3,
    "enable_taylorseer": False,
    "taylorseer_order": 1,
    "scm_steps_mask_policy": None,
    "scm_steps_policy": "dynamic",
    "num_inference_steps": None,
    "force_refresh_step_hint": None,
    "force_refresh_step_policy": "once",
    "step_cache_dit_enabled": True,
    "velocity_sim_thresholds": [0.95, 0.93],
    "velocity_skip_countdowns": [4, 2],
    "step_cache_dit_min_history": 2,
    "step_cache_dit_max_history": 2,
    "_extra_params": {},
}


def test_every_field_has_its_default() -> None:
    config = DiffusionCacheConfig()
    assert {
        each.name: getattr(config, each.name) for each in dataclasses.fields(config)
    } == DEFAULTS
    assert DiffusionCacheConfig().velocity_sim_thresholds is not config.velocity_sim_thresholds
    assert "_extra_params" not in repr(config)


def test_from_dict_sets_fields_and_keeps_what_is_no_field() -> None:
    config = DiffusionCacheConfig.from_dict({"mag_threshold": 0.5, "threshold": 0.06, "_own": 1})
    assert (config.mag_threshold, config.threshold) == (0.5, 0.06)
    assert config._extra_params == {"threshold": 0.06, "_own": 1}
    for name in ("_own", "nowhere"):
        with pytest.raises(AttributeError, match=name):
            getattr(config, name)


@pytest.mark.parametrize("given", [None, [("rel_l1_thresh", 0.1)], DiffusionCacheConfig(), "{}"])
def test_from_dict_takes_a_dict_only(given: Any) -> None:
    with pytest.raises(TypeError, match=type(given).__name__):
        DiffusionCacheConfig.from_dict(given)


def test_a_key_that_is_nearly_a_field_is_said_to_take_no_effect() -> None:
    with pytest.warns(UserWarning, match="did you mean 'residual_diff_threshold'"):
        DiffusionCacheConfig.from_dict({"residual_diff_treshold": 0.1})


@pytest.mark.parametrize(
    "make",
    [
        DiffusionCacheConfig.from_dict,
        lambda data: get_cache_backend("tea_cache", data),
        lambda data: CacheDiTBackend(data),
    ],
)
def test_the_warning_points_at_who_gave_the_key(make: Any) -> None:
    with pytest.warns(UserWarning, match="did you mean 'rel_l1_thresh'") as caught:
        make({"rel_l1_tresh": 0.2})
    assert caught[0].filename == __file__


def test_configs_copy_pickle_and_compare() -> None:
    config = DiffusionCacheConfig.from_dict({"rel_l1_thresh": 0.3, "other": [1]})
    for same in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config
        assert same.other == [1]
    assert config != DiffusionCacheConfig(rel_l1_thresh=0.3)


# --- the selector ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "none"])
def test_no_backend_is_none_whatever_the_config(name: str | None) -> None:
    assert get_cache_backend(name, object()) is None


@pytest.mark.parametrize("name", ["cache-dit", "", "TEA_CACHE", "None", "teacache"])
def test_an_unknown_name_is_an_error_that_lists_the_five(name: str) -> None:
    with pytest.raises(ValueError, match=f"^Unsupported cache backend: {name}\\.") as caught:
        get_cache_backend(name, {})
    for known in ("cache_dit", "tea_cache", "mag_cache", "sea_cache", "step_cache"):
        assert repr(known) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "module", "class_name"),
    [
        ("cache_dit", "cachedit", "CacheDiTBackend"),
        ("tea_cache", "teacache", "TeaCacheBackend"),
        ("mag_cache", "magcache", "MagCacheBackend"),
        ("sea_cache", "seacache", "SeaCacheBackend"),
        ("step_cache", "stepcache", "StepCacheBackend"),
        ("stepcache", "stepcache", "StepCacheBackend"),
        ("step_cache_dit", "stepcache", "StepCacheBackend"),
    ],
)
def test_each_name_makes_its_backend(
    name: str, module: str, class_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ModuleType(module)
    setattr(made, class_name, Backend)
    homes = {f"omni_cache.backends.{module}": made}
    monkeypatch.setattr(selector, "import_module", homes.__getitem__)
    one, other = (get_cache_backend(name, {"mag_threshold": 0.5, "own": 1}) for _ in range(2))
    assert isinstance(one, Backend)
    assert one is not other
    assert isinstance(one.config, DiffusionCacheConfig)
    assert (one.config.mag_threshold, one.config.own) == (0.5, 1)
    given = object()
    as_it_is = get_cache_backend(name, given)
    assert as_it_is is not None
    assert as_it_is.config is given


def test_the_environment_is_asked_where_nobody_names_a_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DIFFUSION_CACHE_BACKEND", raising=False)
    monkeypatch.delenv("DIFFUSION_CACHE_ADAPTER", raising=False)
    assert resolve_cache_backend({}) == "none"
    monkeypatch.setenv("DIFFUSION_CACHE_ADAPTER", "Mag_Cache")
    assert resolve_cache_backend({}) == "mag_cache"
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "TEA_CACHE")
    assert resolve_cache_backend({}) == "tea_cache"
    assert resolve_cache_backend({"cache_backend": None}) == "none"
    assert resolve_cache_backend({"cache_backend": "cache_dit"}) == "cache_dit"


# --- hooks ----------------------------------------------------------------------------------------


class Noting(ModelHook):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.notes.append("initialized")
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.notes.append("reset")
        return module

    def remove_hook(self, module: nn.Module) -> None:
        self.notes.append("removed")


def test_only_none_stands_for_no_backend() -> None:
    assert resolve_cache_backend({"cache_backend": None}) == "none"
    assert resolve_cache_backend({"cache_backend": ""}) == ""
    with pytest.raises(ValueError, match="Unsupported cache backend"):
        get_cache_backend("", None)


def test_a_registry_has_one_hook_of_a_name_and_one_kind() -> None:
    module, first, second = nn.Linear(2, 2), Noting(), Noting()
    registry = HookRegistry.get_or_create(module)
    assert HookRegistry.get_or_create(module) is registry is module._hook_registry
    registry.register_hook("one", first)
    with pytest.warns(UserWarning, match="'one' was registered before"):
        registry.register_hook("one", second)
    assert first.notes == ["initialized", "removed"]
    with pytest.raises(RuntimeError, match="has the hook 'one'"):
        registry.register_hook("two", Noting())
    registry.reset_hook("one")
    registry.reset_hook("two")
    assert registry.get_hook("one") is second
    registry.remove_hook("one")
    assert second.notes == ["initialized", "reset", "removed"]
    assert registry.get_hook("one") is None
    x = torch.ones(1, 2)
    assert torch.equal(registry.dispatch(x), module(x))


def test_a_copy_of_a_module_has_no_hooks() -> None:
    module = nn.Linear(2, 2)
    HookRegistry.get_or_create(module).register_hook("one", Noting())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        registry = HookRegistry.get_or_create(copied)
        assert registry.get_hook("one") is None
        assert registry.module is copied


def test_states_are_made_by_name() -> None:
    manager = StateManager(dict, kwargs={"count": 0})
    with pytest.raises(ValueError, match="set_context"):
        manager.get_state()
    manager.set_context("one")
    state = manager.get_state()
    manager.set_context("two")
    assert manager.get_state() is not state
    manager.set_context("one")
    assert manager.get_state() is state == {"count": 0}
    manager.reset()
    assert manager.get_state() is not state
