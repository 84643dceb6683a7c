"""The compile-time flags: what each does, and how a wrong one is answered."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from diffusers_models import CASES, sample
from one_trace import OneTrace, cached
from torch import Tensor, nn
from torch._dynamo import list_backends
from torch._dynamo.exc import BackendCompilerFailed

import omni_cache
from omni_cache import MagCache, RegionError, TeaCache, UncachedWarning
from omni_cache.options import FLAGS, CompileOptions
from omni_cache.strategies import STRATEGIES
from omni_cache.strategies.calibrations import BranchNumbers, Calibration, TransformerNumbers
from omni_cache.strategies.forecasts import Taylor

parse = CompileOptions.parse


CALIBRATION = Calibration(
    strategy="magcache",
    num_inference_steps=1,
    generations=1,
    transformers={"transformer": TransformerNumbers("Toy", {"cond": BranchNumbers((1.0,), 0.0)})},
    date="today",
    versions={},
)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def fails_with(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


# --- what the flags mean -------------------------------------------------------------------------


def test_no_flags_mean_teacache_on_inductor() -> None:
    strategy = TeaCache()
    expected = CompileOptions(guard=strategy.guard(), strategy=strategy, blocks="rolled")
    assert parse() == parse({}) == expected
    assert parse().inner == "inductor"
    assert not parse().strict


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_chosen_by_name(name: str) -> None:
    assert parse({"cache": name}).strategy == STRATEGIES[name]()


def test_no_strategy_is_chosen_by_none() -> None:
    found = parse({"cache": "none"})
    assert (found.guard, found.strategy) == (None, None)


def test_a_guard_alone_leaves_the_strategy_to_the_bound_call() -> None:
    guard = TeaCache(forecast="newton").guard()
    found = parse({"cache": guard, "inner": "eager"})
    assert (found.guard, found.strategy, found.inner) == (guard, None, "eager")


@pytest.mark.parametrize(
    ("cache", "field", "value"),
    [
        ("teacache", "rel_l1_thresh", 0.3),
        ("teacache", "coefficients", (1.0, 2.0)),
        ("teacache", "variant", "FLUX.1-dev"),
        ("teacache", "calibration", replace(CALIBRATION, strategy="teacache")),
        ("teacache", "num_inference_steps", 30),
        ("teacache", "force_last_step", True),
        ("magcache", "threshold", 0.1),
        ("magcache", "max_skip_steps", 2),
        ("magcache", "retention_ratio", 0.3),
        ("magcache", "num_inference_steps", 30),
        ("magcache", "mag_ratios", (1.0, 1.1)),
        ("magcache", "variant", "FLUX.1-dev"),
        ("magcache", "calibration", CALIBRATION),
        ("first_block_cache", "num_inference_steps", 30),
        ("first_block_cache", "threshold", 0.1),
        ("dbcache", "num_inference_steps", 30),
        ("dbcache", "fn_compute_blocks", 1),
        ("dbcache", "bn_compute_blocks", 2),
        ("dbcache", "residual_diff_threshold", 0.2),
        ("dbcache", "max_accumulated_residual_diff_threshold", 1.0),
        ("dbcache", "max_warmup_steps", 4),
        ("dbcache", "warmup_interval", 2),
        ("dbcache", "max_cached_steps", 9),
        ("dbcache", "max_continuous_cached_steps", 3),
        ("dbcache", "steps_computation_mask", "fast"),
        ("dbcache", "force_refresh_step_hint", 8),
        ("dbcache", "force_refresh_step_policy", "repeat"),
        ("taylorseer", "num_inference_steps", 30),
        ("taylorseer", "cache_interval", 3),
        ("taylorseer", "disable_cache_before_step", 2),
        ("taylorseer", "disable_cache_after_step", 20),
        ("seacache", "num_inference_steps", 30),
        ("seacache", "threshold", 0.1),
        ("seacache", "power_exp", 2.0),
        ("seacache", "max_consecutive_cached", 0),
        ("seacache", "retention_steps", 4),
        ("seacache", "cache_end_steps", 0),
        ("seacache", "grid", (4, 6)),
        ("stepcache", "num_inference_steps", 30),
        ("stepcache", "sim_thresholds", (0.9, 0.8)),
        ("stepcache", "skip_countdowns", (2, 1)),
        ("easycache", "num_inference_steps", 30),
        ("easycache", "threshold", 0.1),
        ("easycache", "retention_steps", 3),
        ("easycache", "force_last_step", False),
        ("dicache", "num_inference_steps", 30),
        ("dicache", "threshold", 0.1),
        ("dicache", "probe_depth", 3),
        ("dicache", "retention_ratio", 0.0),
        ("dicache", "force_last_step", False),
        *(
            (cache, field, value)
            for cache in STRATEGIES
            for field, value in (
                ("start", 0.1),
                ("end", 0.9),
                ("forecast", "hold" if cache == "seacache" else "newton"),
                ("forecast", Taylor(2)),
                ("forecast_order", 2 if cache == "taylorseer" else 0),
                ("forecast_axis", "sigma" if cache == "seacache" else "step"),
            )
        ),
    ],
)
def test_every_field_of_a_strategy_is_a_flag(cache: str, field: str, value: Any) -> None:
    default = STRATEGIES[cache]()
    assert getattr(default, field) != value
    found, expected = parse({"cache": cache, field: value}), type(default)(**{field: value})
    assert (found.strategy, found.guard) == (expected, expected.guard())


def test_every_field_of_a_strategy_is_tried_above() -> None:
    (tried,) = [
        mark.args[1]
        for mark in test_every_field_of_a_strategy_is_a_flag.pytestmark  # type: ignore[attr-defined]
    ]
    for name, kind in STRATEGIES.items():
        expected = {*kind.field_names()} - {"steps_computation_policy"}  # needs a mask beside it
        assert {field for cache, field, _ in tried if cache == name} == expected


def test_flags_beside_a_strategy_object_override_its_fields() -> None:
    strategy = MagCache(threshold=0.1, max_skip_steps=2)
    assert parse({"cache": strategy}).strategy == strategy
    changed = parse({"cache": strategy, "max_skip_steps": 4}).strategy
    assert changed == MagCache(threshold=0.1, max_skip_steps=4)
    assert strategy.max_skip_steps == 2


def test_the_options_of_a_user_are_left_as_they_are() -> None:
    options = {"cache": "magcache", "threshold": 0.1, "inner": "eager", "mode": None}
    before = dict(options)
    parse(options)
    assert options == before


def test_inner_takes_every_registered_backend_and_callables() -> None:
    for name in set(list_backends(exclude_tags=())) - {"omni_cache"}:
        assert parse({"inner": name}).inner == name
    compiler = lambda graph, example_inputs: graph  # noqa: E731
    assert parse({"inner": compiler}).inner is compiler


def test_mode_and_inner_options_are_kept() -> None:
    for inner, extra in (("inductor", {"epilogue_fusion": False}), ("eager", {"depth": 2})):
        found = parse({"inner": inner, "mode": "max-autotune", "inner_options": extra})
        assert (found.mode, found.inner_options) == ("max-autotune", extra)
    assert parse({}, "max-autotune").mode == "max-autotune"
    assert parse({"mode": "default"}, "max-autotune").mode == "default"


@pytest.mark.parametrize(
    ("options", "reuses"),
    [
        ({}, False),
        ({"mode": "default"}, False),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"inner": "cudagraphs"}, True),
        ({"inner_options": {"triton.cudagraphs": True}}, True),
        ({"inner_options": {"triton.cudagraphs": False}}, False),
    ],
)
def test_modes_with_cuda_graphs_are_known(options: dict[str, Any], reuses: bool) -> None:
    assert parse(options).inner_reuses_memory is reuses


@pytest.mark.parametrize(
    ("options", "reuses"),
    [
        ({}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, True),
        ({"inner": lambda gm, inputs: gm}, True),
        ({"inner": "eager"}, False),
        ({"inner_options": {"triton.cudagraphs": False}}, False),
    ],
)
def test_cuda_graphs_that_inductors_own_configuration_asks_for_are_known(
    options: dict[str, Any], reuses: bool
) -> None:
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert parse(options).inner_reuses_memory is reuses


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", None),
        ("blocks", ("blocks",)),
        (["first", "second"], ("first", "second")),
        (("first", "second"), ("first", "second")),
    ],
)
def test_region_takes_auto_or_names(given: Any, expected: Any) -> None:
    assert parse({"region": given}).region == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("half", torch.float16),
        ("float64", torch.float64),
        (torch.float32, torch.float32),
        ("float8_e4m3fn", torch.float8_e4m3fn),
    ],
)
def test_history_dtype_takes_a_floating_dtype_or_its_name(given: Any, expected: Any) -> None:
    assert parse({"history_dtype": given}).history_dtype == expected


@pytest.mark.parametrize("given", [None, "cpu", "cuda:1", torch.device("meta")])
def test_history_device_takes_a_device_or_its_name(given: Any) -> None:
    expected = None if given is None else torch.device(given)
    assert parse({"history_device": given}).history_device == expected


# --- wrong flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("rel_l1_tresh", "rel_l1_thresh"),
        ("coeficients", "coefficients"),
        ("iner", "inner"),
        ("stict", "strict"),
        ("num_inference_step", "num_inference_steps"),
        ("forcast", "forecast"),
        ("history_dtyp", "history_dtype"),
        ("history_devise", "history_device"),
    ],
)
def test_a_misspelt_flag_is_told_the_closest_name(flag: str, meant: str) -> None:
    with fails_with(f"unknown flag {flag!r}, did you mean {meant!r}?"):
        parse({flag: 1})


def test_an_unknown_flag_is_told_what_there_is() -> None:
    listed = ", ".join((*FLAGS, *TeaCache.field_names()))
    with fails_with(f"unknown flag 'zzz'; allowed are: {listed}"):
        parse({"zzz": 1})


@pytest.mark.parametrize(
    ("cache", "name", "flag", "owner"),
    [
        ("teacache", "teacache", "threshold", "magcache"),
        ("magcache", "magcache", "rel_l1_thresh", "teacache"),
        (MagCache(), "magcache", "rel_l1_thresh", "teacache"),
        ("none", "none", "threshold", "magcache"),
    ],
)
def test_a_flag_of_another_strategy_is_told_its_owner(
    cache: Any, name: str, flag: str, owner: str
) -> None:
    with fails_with(
        f"unknown flag {flag!r} for cache={name!r} (it belongs to cache={owner!r}); allowed are: "
    ):
        parse({"cache": cache, flag: 0.1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "teacach"}, "cache='teacach' is not allowed (did you mean 'teacache'?); cache"),
        ({"cache": None}, "cache=None is not allowed (did you mean 'none'?); cache must be one of"),
        ({"cache": TeaCache}, "or a strategy object"),
        ({"inner": "inducto"}, "inner='inducto' is not allowed (did you mean 'inductor'?)"),
        ({"inner": 1}, "inner=1 is not allowed; inner must be one of "),
        ({"inner": "omni_cache"}, "inner='omni_cache' is not allowed"),
        ({"inner_options": 1}, "inner_options=1 is not allowed; it must be a dict"),
        ({"lowering": "kond"}, "lowering='kond' is not allowed (did you mean 'cond'?)"),
        ({"blocks": "all"}, "blocks='all' is not allowed; blocks must be one of 'rolled', 'unr"),
        ({"hoist": "yes"}, "hoist='yes' is not allowed; hoist must be one of True, False, 'modul"),
        ({"signal": ""}, "signal='' is not allowed; signal must be 'auto', 'timestep_embedding'"),
        ({"signal": 3}, "signal=3 is not allowed"),
        ({"region": []}, "region=[] is not allowed; region must be 'auto' or the names"),
        ({"region": [1]}, "region=[1] is not allowed"),
        ({"region": 5}, "region=5 is not allowed"),
        ({"region": ""}, "region='' is not allowed"),
        ({"strict": "yes"}, "strict='yes' is not allowed; strict must be one of True, False"),
        ({"strict": 1}, "strict=1 is not allowed"),
        ({"mode": "max"}, "mode='max' is not allowed; mode must be one of 'default', "),
        ({"mode": "max-autotun"}, "mode='max-autotun' is not allowed (did you mean 'max-autotune'"),
        ({"mode": 3}, "mode=3 is not allowed; mode must be a string or None"),
        ({"inner": "eager", "mode": 3}, "mode=3 is not allowed; mode must be a string or None"),
        (
            {"inner_options": {"epilogue_fusio": True}},
            "inner_options: inductor has no option 'epilogue_fusio', did you mean 'epil",
        ),
        ({"rel_l1_thresh": -1}, "rel_l1_thresh=-1 is not allowed; rel_l1_thresh must be a finite"),
        ({"cache": MagCache(), "threshold": -1}, "threshold=-1 is not allowed"),
        *(
            (
                {"history_dtype": given},
                f"history_dtype={given!r} is not allowed; history_dtype must",
            )
            for given in (
                "flot32",
                "int8",
                "float8_e5m2",
                "",
                "nn",
                torch.int32,
                3,
                True,
                [],
                float,
            )
        ),
        (
            {"history_dtype": "int8"},
            "None or one of 'float64', 'float32', 'bfloat16', 'float16', 'float8_e4m3fn'",
        ),
        *(
            ({"history_device": given}, f"history_device={given!r} is not allowed; history_device")
            for given in ("gpu", "", 1.5, [], torch.float32)
        ),
        ({"history_device": "gpu"}, "history_device must be None or a device, such as 'cpu'"),
        ({"forecast": "newtn"}, "forecast='newtn' is not allowed; forecast must be one of 'hold'"),
        ({"forecast_order": 2}, "forecast_order=2 is not allowed; forecast_order must be 0 for"),
        ({"forecast": "taylor", "forecast_order": 0}, "forecast_order=0 is not allowed; forecast_"),
        ({"forecast_axis": "time"}, "forecast_axis='time' is not allowed; forecast_axis must be"),
        ({"start": 2}, "start=2 is not allowed; start must be a number from 0 to 1"),
        ({"end": -1}, "end=-1 is not allowed; end must be a number from 0 to 1"),
        ({"start": 0.9, "end": 0.1}, "start=0.9 is not allowed; start must be at most end, 0.1"),
        ({3: 4}, "unknown flag 3"),
    ],
)
def test_a_wrong_value_names_the_flag_and_what_is_allowed(
    options: dict[Any, Any], message: str
) -> None:
    with fails_with(message):
        parse(options)


def test_how_much_is_hoisted() -> None:
    for given in (True, "modulations"):
        assert parse({"hoist": given}).hoist == given
    assert parse({}).hoist is False


def test_blocks_are_rolled_for_inductor_and_wherever_that_is_asked_for() -> None:
    assert parse({}).blocks == "rolled"
    assert parse({"inner": "eager"}).blocks == "unrolled"
    assert parse({"inner": "eager", "blocks": "rolled"}).blocks == "rolled"
    assert parse({"blocks": "unrolled"}).blocks == "unrolled"


def test_a_graph_that_decides_is_for_its_strategy_whatever_the_number_of_steps() -> None:
    guards = [
        parse({"lowering": "cond", "rel_l1_thresh": each, "num_inference_steps": steps}).guard
        for each, steps in ((0.1, 8), (0.1, 9), (0.2, 8))
    ]
    assert guards[0] == guards[1] != guards[2]
    assert parse({"lowering": "cond"}).blocks == "unrolled"
    assert parse({"lowering": "cond", "cache": "none"}).guard is None
    assert parse({"lowering": "dispatch", "rel_l1_thresh": 0.1}).guard == parse({}).guard


def test_enable_checks_flags_before_it_touches_anything() -> None:
    model = nn.Linear(2, 2)
    with fails_with("unknown flag 'treshold', did you mean 'threshold'?"):
        omni_cache.enable(model, cache="magcache", treshold=1)
    assert model._compiled_call_impl is None


def test_enable_takes_tensors_for_numbers_and_compares_them() -> None:
    case = CASES["pixart"]
    models = [case.build(seed) for seed in (0, 1)]
    for model in (*models, models[0]):
        ratios = torch.tensor([1.0, 1.1])  # another tensor each time, of the same numbers
        omni_cache.enable(model, cache="magcache", mag_ratios=ratios, inner="eager")
        model(**case.inputs())
    # The third call changed nothing, so that the first model's generation went on.
    assert [omni_cache.summary(model).computed_steps for model in models] == [2, 1]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"iner": "eager"}, ValueError, "unknown flag 'iner', did you mean 'inner'"),
        ({"rel_l1_thresh": -1}, ValueError, "rel_l1_thresh=-1 is not allowed"),
        ({"strict": True}, RegionError, "no list of repeated blocks"),
    ],
)
def test_a_compiled_model_raises_it_at_its_first_call(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="omni_cache", options=options)
    with pytest.raises(kind, match=message) as raised:
        compiled(torch.zeros(1, 2))
    assert not isinstance(raised.value, BackendCompilerFailed)


def test_missing_ratios_are_a_value_error_too() -> None:
    case = CASES["pixart"]
    compiled = torch.compile(
        case.build(), backend="omni_cache", options={"cache": "magcache", "inner": "eager"}
    )
    with pytest.raises(ValueError, match="no magnitude ratios are published for PixArt"):
        compiled(**case.inputs())


# --- flags at work -------------------------------------------------------------------------------


class Attentionless(nn.Module):
    """Nothing here looks like a stack of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


def test_a_model_without_a_block_loop_runs_uncached_and_says_why_once() -> None:
    model, x = Attentionless(), torch.ones(1, 4)
    compiled = torch.compile(model, backend="omni_cache", options={"inner": "eager"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = [compiled(x) for _ in range(3)]
    assert all(torch.equal(output, model(x)) for output in outputs)
    (warning,) = caught
    assert warning.category is UncachedWarning
    assert "Attentionless runs uncached: " in str(warning.message)
    assert omni_cache.summary(model).trajectories == ()


def test_with_gradients_a_model_runs_uncached_and_gets_its_gradients() -> None:
    case = CASES["pixart"]
    model = case.build()
    compiled = torch.compile(model, backend="omni_cache", options={"inner": "eager"})
    with torch.enable_grad(), pytest.warns(UncachedWarning, match="gradients are enabled"):
        sample(compiled(**case.inputs())).sum().backward()
    assert all(parameter.grad is not None for parameter in case.blocks(model)[0].parameters())
    assert omni_cache.summary(model).trajectories == ()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"region": ["transformer_blocks", "single"]}, "no 'single' runs in the graph; there are"),
        ({"region": "transformer_block"}, "did you mean 'transformer_blocks'?"),
        (
            {"signal": "transformer_blocks.0.nrom1"},
            "signal='transformer_blocks.0.nrom1': .*did you mean 'transformer_blocks.0.norm1'?",
        ),
    ],
)
def test_a_name_that_the_model_does_not_know_is_a_value_error(
    flags: dict[str, Any], message: str
) -> None:
    case = CASES["pixart"]
    options = {"inner": "eager", "coefficients": (1.0, 0.0), **flags}
    compiled = torch.compile(case.build(), backend="omni_cache", options=options)
    with torch.no_grad(), pytest.raises(ValueError, match=message.replace("?", r"\?")):
        compiled(**case.inputs())


def test_a_signal_for_a_strategy_without_one_is_refused() -> None:
    with pytest.raises(ValueError, match="signal='auto' is not allowed; cache='magcache' decides"):
        parse({"cache": "magcache", "signal": "auto"})


def test_numbers_of_numpy_are_numbers() -> None:
    numbers = {"rel_l1_thresh": np.float32(0.25), "num_inference_steps": np.int64(7)}
    assert (
        parse(numbers).strategy == parse({"rel_l1_thresh": 0.25, "num_inference_steps": 7}).strategy
    )


def test_flags_reach_the_gate() -> None:
    """Step counts, signal and region, in one trace of the smallest model."""
    case = CASES["pixart"]
    model = case.build()
    always = {"cache": "teacache", "coefficients": (1.0, 0.0), "rel_l1_thresh": 1e6}
    time = {**always, "signal": "timestep_embedding"}
    norm = {**always, "signal": "transformer_blocks.0.norm1"}
    mag = {"cache": "magcache", "mag_ratios": [1.0], "retention_ratio": 0.5}
    backends = {
        "last": cached(**always, force_last_step=True, num_inference_steps=4),
        "time": cached(**time),
        "norm": cached(**norm),
        "half": cached(**mag, num_inference_steps=4),
        "28": cached(**mag),
        "named": cached(**always, region=["transformer_blocks"], strict=True),
        "within": cached(**always, start=0.5, end=0.75, num_inference_steps=4),
    }
    trace = OneTrace(backends)
    compiled = torch.compile(model, backend=trace, fullgraph=True)

    def run(name: str) -> tuple[list[bool], list[float | None]]:
        trace.chosen = name
        with omni_cache.generation(), omni_cache.branch("cond"):
            for step in range(4):
                compiled(**case.inputs(step))
        (trajectory,) = omni_cache.summary(model).trajectories
        return (
            [step.computed for step in trajectory.steps],
            [step.distance for step in trajectory.steps],
        )

    assert run("last")[0] == [True, False, False, True]
    assert run("half")[0] == [True, True, False, False]
    assert run("28")[0] == [True] * 4
    assert run("named")[0] == [True, False, False, False]
    assert run("within")[0] == [True, True, False, True]

    signals: dict[str, list[Tensor]] = {"time": [], "norm": []}
    modules = {
        "time": model.get_submodule("adaln_single"),
        "norm": model.get_submodule("transformer_blocks.0.norm1"),
    }
    for name, module in modules.items():
        module.register_forward_hook(
            lambda module, args, output, name=name: signals[name].append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    for step in range(4):
        model(**case.inputs(step))
    for name, seen in signals.items():
        expected = [
            float((now - before).abs().mean() / before.abs().mean())
            for before, now in pairwise(seen)
        ]
        assert run(name)[1][1:] == pytest.approx(expected, rel=1e-4)
