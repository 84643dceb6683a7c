"""What a package holds decides and computes as the runtime does, before AOTInductor compiles it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
    TEACACHE,
    TOKENS,
    Loop,
    ToyTransformer,
    gaussian,
    same,
)

import omni_cache
from omni_cache import RegionError
from omni_cache.deployment.loader import Branch, Model
from omni_cache.deployment.writing import Written, write

pytestmark = pytest.mark.usefixtures("_without_gradients")


@pytest.fixture
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def example(timestep: float = 1000.0) -> dict[str, Any]:
    """A call of the toy."""
    return {
        "hidden_states": gaussian(0, 1, TOKENS, CHANNELS),
        "timestep": torch.tensor([timestep]),
        "prompt": gaussian("cond", 1, 5, CHANNELS),
    }


def written(module: nn.Module | None = None, inputs: Any = None, **flags: Any) -> Written:
    return write(module or ToyTransformer(), inputs or example(), **with_steps(flags))


@cache
def default() -> Model:
    """A package of the toy that the tests of calls share."""
    return loaded(written(**TEACACHE))


def with_steps(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags with what a strategy has to know besides."""
    given = {"cache": "teacache", "num_inference_steps": 8, **flags}
    if given["cache"] == "none" or isinstance(given["cache"], omni_cache.Plan):
        del given["num_inference_steps"]
    return given


def loaded(package: Written) -> Model:
    """A package as the loader sees it, with graphs that run as they were exported."""

    def runner(program: Any) -> Any:
        graph = program.module()
        return lambda flat: list(graph(*flat))

    manifest = json.loads(json.dumps(package.manifest))
    return Model(manifest, {name: runner(each) for name, each in package.programs.items()})


def enabled(module: nn.Module, **flags: Any) -> nn.Module:
    omni_cache.enable(module, inner="eager", **with_steps(flags))
    return module


def actions(branch: Branch) -> list[str]:
    return [step.action for step in branch.steps]


def dispatched(module: nn.Module) -> list[list[str]]:
    return [
        [step.action for step in each.steps] for each in omni_cache.summary(module).trajectories
    ]


STRATEGIES: dict[str, dict[str, Any]] = {
    "teacache": TEACACHE,
    "teacache, taylor": {**TEACACHE, "forecast": "taylor", "forecast_order": 2},
    "teacache, newton over timesteps": {**TEACACHE, "forecast": "newton", "forecast_order": 2},
    "teacache within": {**TEACACHE, "start": 0.4, "end": 0.8, "history_dtype": "bfloat16"},
    "first_block_cache": {"cache": "first_block_cache", "threshold": 0.3},
    "dbcache": {
        "cache": "dbcache",
        "fn_compute_blocks": 1,
        "max_warmup_steps": 2,
        "residual_diff_threshold": 0.3,
    },
    "magcache": MAGCACHE,
    "magcache, adams": {**MAGCACHE, "forecast": "adams"},
    "taylorseer": {"cache": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2},
    "teacache in 8 bits": {**TEACACHE, "forecast": "newton", "history_dtype": "float8_e4m3fn"},
    "magcache in 8 bits": {**MAGCACHE, "history_dtype": "float8_e4m3fn"},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_schedule_distances_and_outputs_are_those_of_dispatch(name: str) -> None:
    flags, loop = STRATEGIES[name], Loop(explicit=True)
    branch = loaded(written(**flags)).branch()
    found = loop.run(branch)
    module = enabled(ToyTransformer(), **flags)
    expected = loop.run(module)
    assert [actions(branch)] == dispatched(module)
    assert {"computed", "reused"} == set(actions(branch))
    (trajectory,) = omni_cache.summary(module).trajectories
    measures = branch.model.manifest["kind"] == "cond"
    if measures:
        distances = [step.distance for step in trajectory.steps]
        assert [step.distance for step in branch.steps] == pytest.approx(distances, abs=1e-9)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-6


@pytest.mark.parametrize("letters", ["ccrcrcrr", "ccrcscss"])
def test_a_plan_is_followed_in_its_branches_with_forwards_that_are_skipped(letters: str) -> None:
    tuned = plan(letters, branches=("cond", "uncond"))
    loop = Loop(prompts=("cond", "uncond"), explicit=True)
    with pytest.warns(UserWarning, match="sigmas, guidance are checked by omni_cache.enable alone"):
        model = loaded(written(cache=tuned))
    assert model.manifest["branches"] == ["cond", "uncond"]
    branches = {name: model.branch(name) for name in ("cond", "uncond")}
    found = loop.run(Guided(list(branches.values())))
    module = enabled(ToyTransformer(), cache=tuned)
    expected = loop.run(module)
    assert [actions(each) for each in branches.values()] == dispatched(module)
    assert same(found, expected)


@dataclass
class Guided:
    """Calls that go to branches in turn."""

    branches: Sequence[Branch]
    calls: int = 0

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        noise: Tensor = self.branches[(self.calls - 1) % len(self.branches)](*args)
        return noise


@pytest.mark.parametrize("flags", [TEACACHE, MAGCACHE], ids=["teacache", "magcache"])
def test_branches_share_a_package_and_no_state(flags: dict[str, Any]) -> None:
    if flags is MAGCACHE:
        ratios = {"cond": flags["mag_ratios"], "uncond": [1.0, 0.8] * 4}
        flags = {**flags, "mag_ratios": ratios}
    loop = Loop(prompts=("cond", "uncond"), explicit=True)
    model = loaded(written(**flags))
    branches = [model.branch(name) for name in ("cond", "uncond")]
    found = loop.run(Guided(branches))
    module = enabled(ToyTransformer(), **flags)
    assert same(found, loop.run(module))
    assert [actions(each) for each in branches] == dispatched(module)
    assert (actions(branches[0]) != actions(branches[1])) is (flags["cache"] == "magcache")


@pytest.mark.parametrize("flags", [TEACACHE, MAGCACHE], ids=["teacache", "magcache"])
def test_after_a_reset_the_loop_comes_out_as_before(flags: dict[str, Any]) -> None:
    loop, branch = Loop(), loaded(written(**flags)).branch()
    first, steps = loop.run(branch), branch.steps
    with pytest.raises(IndexError, match=r"num_inference_steps=8. Call reset\(\) before"):
        loop.run(branch)
    branch.reset()
    assert branch.steps == []
    assert same(loop.run(branch), first)
    assert branch.steps == steps


def test_an_enabled_module_is_exported_as_it_was_and_stays_enabled() -> None:
    module, inputs = enabled(ToyTransformer(), **MAGCACHE), example()
    branch = loaded(written(module, **TEACACHE)).branch()
    assert torch.allclose(branch(**inputs), ToyTransformer()(**inputs), atol=1e-6)
    assert omni_cache.summary(module).trajectories == ()
    module(**inputs)
    assert dispatched(module) == [["computed"]]


@pytest.mark.parametrize("flags", [ALWAYS_REUSE, MAGCACHE], ids=["teacache", "magcache"])
def test_steps_may_be_given_and_one_that_is_left_out_begins_anew(flags: dict[str, Any]) -> None:
    branch = loaded(written(**flags)).branch()
    module = enabled(ToyTransformer(), **flags)
    found, expected = [], []
    with omni_cache.generation(8):
        for index in (2, 3, 4, 6, 7):
            inputs = example(1000.0 * (1 - index / 8))
            inputs["hidden_states"] = inputs["hidden_states"] * (1 - 0.05 * index)
            branch.step = index
            found.append(branch(**inputs))
            with omni_cache.branch("cond", step_index=index):
                expected.append(module(**inputs))
        assert [actions(branch)] == dispatched(module)
    assert [step.index for step in branch.steps] == [2, 3, 4, 6, 7]
    assert actions(branch)[0] == actions(branch)[3] == "computed"
    assert "reused" in actions(branch)
    assert same(found, expected)


def test_after_a_residual_that_was_not_finite_a_step_is_computed() -> None:
    flags = {**ALWAYS_REUSE, "history_dtype": "float16"}

    def overflowing() -> ToyTransformer:
        module = ToyTransformer()
        module.blocks[-1].out.weight.mul_(1e7)
        return module

    branch, module = loaded(written(overflowing(), **flags)).branch(), overflowing()
    enabled(module, **flags)
    with omni_cache.generation(8), omni_cache.branch("cond"):
        for index in range(4):
            inputs = example(1000.0 * (1 - index / 8))
            branch(**inputs)
            module(**inputs)
        assert [actions(branch)] == dispatched(module)
    assert actions(branch) == ["computed"] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    # The one is decided in the graph and the other in the loader, as the toy shows for both.
    [
        pytest.param({**TEACACHE, "rel_l1_thresh": 0.3}, id="teacache"),
        pytest.param(
            {"cache": "magcache", "mag_ratios": [1.0, 0.95, 1.05], "retention_ratio": 0.1},
            id="magcache",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_flux_decides_and_computes_as_under_dispatch(flags: dict[str, Any]) -> None:
    case = CASES["flux"]
    module = case.build()
    given = case.inputs()
    flags = {**flags, "num_inference_steps": 28}
    branch = loaded(written(module, {**given, "return_dict": True}, **flags)).branch()
    enabled(module, **flags)
    with omni_cache.generation(28), omni_cache.branch("cond"):
        for index in range(8):
            inputs = case.inputs(index)
            (expected,) = module(**inputs)
            found = branch(**{**inputs, "return_dict": True})
            assert list(found) == ["sample"]  # the model's own class is not known to a package
            assert float((found["sample"] - expected).abs().max()) < 1e-5
        assert [actions(branch)] == dispatched(module)
    assert {"computed", "reused"} == set(actions(branch))


# --- what cannot be exported ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cache": "none"}, "cache='none' is not allowed"),
        ({"cache": "seacache"}, "cache='seacache' is not allowed; a graph does not take its meas"),
        ({"cache": "stepcache"}, "it reuses the whole model, and decides by earlier results"),
        ({"cache": "easycache"}, "Choose one that compares signals by their relative L1"),
        (
            {**STRATEGIES["dbcache"], "max_continuous_cached_steps": 2},
            "cache='dbcache' is not allowed; its gate branches on what it has measured or counted",
        ),
        ({**TEACACHE, "forecast": "dmd"}, "forecast=DMD is not allowed"),
        (
            {**TEACACHE, "forecast": "chebyshev"},
            "forecast=Chebyshev is not allowed; a graph cannot",
        ),
        ({**TEACACHE, "forecast": {3: [0.5]}}, "its weights on tensors are others"),
        ({**MAGCACHE, "forecast": "newton"}, "Choose forecast_axis='step'"),
        ({**TEACACHE, "num_inference_steps": None}, "num_inference_steps=None is not allowed"),
        ({**TEACACHE, "end": 0.0}, "of so many steps cache='teacache' reuses none"),
        ({**TEACACHE, "coefficients": {"cond": [1.0, 0.0], "uncond": [2.0, 0.0]}}, "for each bran"),
        ({**TEACACHE, "inner": "eager"}, "inner='eager' is not allowed; inner must be left out"),
        ({**TEACACHE, "history_device": "cpu"}, "history_device='cpu' is not allowed"),
        ({**TEACACHE, "hoist": True}, "hoist=True is not allowed; hoist must be left out"),
        ({**TEACACHE, "mode": "reduce-overhead"}, "mode='reduce-overhead' is not allowed"),
        ({**TEACACHE, "branches": "cond"}, "branches='cond' is not allowed"),
        ({"cache": plan(size=(TOKENS + 1, CHANNELS))}, "size is"),
        ({"cache": plan(), "branches": ["uncond"]}, "the plan has 'cond'"),
    ],
    ids=str,
)
def test_what_a_package_cannot_do_is_refused_by_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        written(**flags)


class Broken(ToyTransformer):
    """Takes a decision from a tensor."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        noise = super().forward(*args, **kwargs)
        return noise if noise.sum() > 0 else -noise


class Plain(nn.Module):
    """Has no blocks."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return hidden_states + prompt.mean() + timestep


class Remembering(ToyTransformer):
    """Leaves its result in an attribute."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.last = super().forward(*args, **kwargs) * 2
        return self.last / 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Broken(), "Broken cannot be exported: Dynamo cannot capture it as one graph"),
        (Plain(), "block"),
        (Remembering(), "leaves tensors in attributes"),
    ],
)
def test_a_module_that_cannot_be_guarded_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(RegionError, match=message):
        written(module)


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        ("toy", example(), "module=str is not allowed"),
        (
            ToyTransformer(),
            torch.zeros(1),
            "example_inputs=Tensor is not allowed",
        ),
        (ToyTransformer(), (), "example_inputs do not fit ToyTransformer.forward: missing a requi"),
        (ToyTransformer(), {**example(), "mask": object()}, "mask is a object"),
        (ToyTransformer(), {**example(), "timestep": 3.0}, "timestep=3.0 is a number, and would"),
    ],
)
def test_what_is_no_module_or_no_call_of_it_is_refused(
    module: Any, inputs: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        write(module, inputs, "teacache", num_inference_steps=8)


@pytest.mark.parametrize("path", ["model.so", "no/such/folder/model.pt2", 3])
def test_a_path_is_refused_before_anything_runs(path: Any) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        omni_cache.export(ToyTransformer(), example(), path, num_inference_steps=8)


# --- calls of a package ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"prompt": None}, TypeError, "prompt=None is not allowed; prompt must be a tensor"),
        ({"prompt": ...}, TypeError, "prompt is missing"),
        ({"prompts": 1}, TypeError, "prompts is not an argument of the package; these are: hidden"),
        ({"return_dict": True}, ValueError, "it was exported with False, which is a constant"),
        ({"prompt": torch.zeros(1, 6, CHANNELS)}, ValueError, "was exported for shape [1, 5, 4]"),
        ({"prompt": torch.zeros(1, 5, CHANNELS).double()}, ValueError, "torch.float64, on cpu is"),
    ],
    ids=str,
)
def test_a_call_that_does_not_fit_is_refused_and_no_step(
    change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    branch = default().branch()
    inputs = {key: each for key, each in {**example(), **change}.items() if each is not ...}
    with pytest.raises(kind, match=re.escape(message)):
        branch(**inputs)
    assert (branch.step, branch.steps) == (0, [])


def test_arguments_go_by_position_or_by_name_and_one_given_twice_is_refused() -> None:
    model, inputs = default(), example()
    by_name = model.branch()(**inputs)
    assert torch.equal(model.branch()(*inputs.values(), return_dict=False), by_name)
    with pytest.raises(TypeError, match="hidden_states was given twice"):
        model.branch()(*inputs.values(), hidden_states=inputs["hidden_states"])
    with pytest.raises(TypeError, match="6 positional arguments were given"):
        model.branch()(*inputs.values(), None, False, 3)
    with pytest.raises(
        ValueError, match=r"name='other' is not allowed; name must be one of 'cond'"
    ):
        model.branch("other")


def test_tensors_laid_out_otherwise_are_the_same_arguments() -> None:
    inputs = example()
    expected = default().branch()(**inputs)
    turned = inputs["hidden_states"].mT.contiguous().mT
    shifted = torch.cat([torch.zeros(1), inputs["prompt"].flatten()])[1:].view(1, 5, CHANNELS)
    assert not turned.is_contiguous()
    assert shifted.data_ptr() % 16 > 0
    assert torch.equal(default().branch()(turned, inputs["timestep"], shifted), expected)


def test_one_tensor_as_two_arguments_stays_two_inputs() -> None:
    latents = gaussian(0, 1, TOKENS, CHANNELS)
    both = {"hidden_states": latents, "timestep": torch.tensor([500.0]), "prompt": latents}
    branch = loaded(written(inputs=both)).branch()
    other = {**both, "prompt": gaussian(1, 1, TOKENS, CHANNELS)}
    assert torch.allclose(branch(**other), ToyTransformer()(**other), atol=1e-6)
