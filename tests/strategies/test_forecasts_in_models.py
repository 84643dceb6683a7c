"""Every forecast with every gate and span, in models: exact without reuse, as told with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers_models import CASES, sample
from torch import Tensor
from toy_transformer import (
    CHANNELS,
    MAGCACHE,
    TOKENS,
    ToyTransformer,
    compiled,
    computed,
    gaussian,
    same,
)

import omni_cache
from omni_cache.strategies.forecasts import FORECASTS

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 8
DIFFUSERS = ("flux", "wan")

GATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "teacache": (
        {"coefficients": [1.0, 0.0], "rel_l1_thresh": 0.0},
        {"coefficients": [1.0, 0.0], "rel_l1_thresh": 1e9, "start": 0.5},
    ),
    "magcache": (
        {"mag_ratios": [2.0], "threshold": 0.0},
        {"mag_ratios": [1.0], "max_skip_steps": 2, "retention_ratio": 0.5},
    ),
    "first_block_cache": ({"threshold": 0.0}, {"threshold": 1e9, "start": 0.5}),
    "dbcache": (
        {"residual_diff_threshold": 0.0},
        {
            "residual_diff_threshold": 1e9,
            "max_warmup_steps": 4,
            "max_continuous_cached_steps": 2,
        },
    ),
    "taylorseer": (
        {"cache_interval": 1},
        {"cache_interval": 3, "disable_cache_before_step": 4},
    ),
    "seacache": ({"threshold": 0.0}, {"threshold": 1e9, "retention_steps": 4}),
    "easycache": ({"threshold": 0.0}, {"threshold": 1e9, "retention_steps": 4}),
    "dicache": ({"threshold": 0.0}, {"threshold": 1e9, "retention_ratio": 0.3}),
    "stepcache": (
        {"sim_thresholds": (2.0, 2.0)},
        {"sim_thresholds": (-2.0, -2.0), "skip_countdowns": (1, 1), "start": 0.5},
    ),
}
"""For each strategy the flags with which it reuses nothing, and those that make it reuse."""

SPANS: dict[str, list[dict[str, Any]]] = {
    "dbcache": [
        {"fn_compute_blocks": first, "bn_compute_blocks": last}
        for first, last in ((1, 0), (2, 0), (1, 1))
    ],
    "dicache": [{"probe_depth": 1}, {"probe_depth": 2}],
}
"""The spans of those strategies that take flags for them."""

FEW: list[Any] = ["hold", "newton", "dmd"]
"""One residual, several weighed by rule, and several weighed by what they hold."""

COMPOSED = [(gate, span) for gate in GATES for span in SPANS.get(gate, [{}])]
FITTED = {step: [1.25, -0.25] for step in range(STEPS)}
ALL: list[Any] = [*FORECASTS, FITTED]
AS_DEEP_AS_THE_ONE_BEFORE = ("taylor", "hermite", "adams")
"""They share what is compiled, whatever weighs the residuals."""


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def toy() -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    prompt = gaussian("cond", 2, 5, CHANNELS)
    calls = [
        {
            "hidden_states": gaussian(step, 2, TOKENS, CHANNELS),
            "timestep": torch.full((2,), 1000.0 - 100 * step),
            "prompt": prompt,
        }
        for step in range(STEPS)
    ]
    return ToyTransformer(blocks=4), calls


def of_diffusers(name: str) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    case = CASES[name].deep
    first = case.inputs()
    moved = {"hidden_states", "latents", "sample", case.timestep_argument}
    calls = [
        {key: each if key in moved else first[key] for key, each in case.inputs(step).items()}
        for step in range(STEPS)
    ]
    return case.build(), calls


def run(model: torch.nn.Module, calls: list[dict[str, Any]]) -> list[Tensor]:
    with omni_cache.generation(STEPS), omni_cache.branch("cond"):
        return [sample(model(**each)).clone() for each in calls]


class Counting:
    """An inner compiler that counts what it compiles."""

    def __init__(self) -> None:
        self.parts = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.parts += 1
        return gm.forward


def test_any_forecast_goes_with_a_gate() -> None:
    go_together("teacache", {}, "toy", ALL, alike=3)


@pytest.mark.parametrize(("gate", "span"), COMPOSED, ids=str)
def test_any_gate_and_span_goes_with_a_forecast_of_each_kind(
    gate: str, span: dict[str, Any]
) -> None:
    # A DMD of two residuals, where DiCache leaves no more, is a newton.
    go_together(gate, span, "toy", FEW, alike=int(gate == "dicache"))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["toy", *DIFFUSERS])
@pytest.mark.parametrize(("gate", "span"), COMPOSED, ids=str)
def test_any_forecast_goes_with_any_gate_and_span(
    gate: str, span: dict[str, Any], model: str
) -> None:
    go_together(gate, span, model, ALL, alike=3)


def go_together(
    gate: str, span: dict[str, Any], model: str, forecasts: list[Any], alike: int
) -> None:
    """Without reuse a model computes what it computes alone, bit for bit.

    At most so many pairs of forecasts are alike: those that are of one order.
    """
    module, calls = toy() if model == "toy" else of_diffusers(model)
    expected = [sample(module(**each)) for each in calls]
    never, often = GATES[gate]
    inner = Counting()
    flags: dict[str, Any] = {"cache": gate, "inner": inner, "strict": True, **span}
    found: list[list[Tensor]] = []
    made = 0
    for forecast in forecasts:
        omni_cache.enable(module, **flags, forecast=forecast, **never)
        assert same(run(module, calls), expected), forecast
        assert computed(module) == [[True] * STEPS]
        omni_cache.enable(module, **flags, forecast=forecast, **often)
        found.append(run(module, calls))
        assert 2 <= sum(computed(module)[0]) < STEPS, forecast
        assert all(each.isfinite().all() for each in found[-1])
        if forecast in AS_DEEP_AS_THE_ONE_BEFORE:
            assert inner.parts == made, forecast
        made = inner.parts
    assert sum(same(one, other) for one, other in itertools.combinations(found, 2)) <= alike
    omni_cache.disable(module)


def test_each_sample_is_forecast_as_if_it_were_alone() -> None:
    """By a forecast that looks at residuals: they have another course in each sample."""
    flags = {**MAGCACHE, "threshold": 9.0, "num_inference_steps": 16, "max_skip_steps": 1}
    both = Batch(("cond", "uncond"))
    predictions = both.run(compiled(ToyTransformer(), **flags, forecast="dmd"))
    for place, name in enumerate(both.prompts):
        alone = Batch((name,)).run(compiled(ToyTransformer(), **flags, forecast="dmd"))
        for one, other in zip(predictions, alone, strict=True):
            torch.testing.assert_close(one[place : place + 1], other, rtol=0, atol=1e-5)
    polynomial = both.run(compiled(ToyTransformer(), **flags, forecast="taylor"))
    moved = [(a - b).abs().max() for a, b in zip(predictions, polynomial, strict=True)]
    assert max(moved[9:]) > 1e-4  # it was not the polynomial that stands in until it can be fitted


class Batch:
    """A loop over samples with prompts of their own, in one batch."""

    def __init__(self, prompts: tuple[str, ...]) -> None:
        self.prompts = prompts

    def run(self, model: Callable[..., Tensor]) -> list[Tensor]:
        prompt = torch.cat([gaussian(name, 1, 5, CHANNELS) for name in self.prompts])
        latents = torch.cat([gaussian(f"x{name}", 1, TOKENS, CHANNELS) for name in self.prompts])
        predictions = []
        with omni_cache.generation(16), omni_cache.branch("all"):
            for step in range(16):
                moment = torch.full((len(self.prompts),), 1000.0 * (1 - step / 16))
                predictions.append(model(latents, moment, prompt))
                latents = latents - predictions[-1] / 16
        return predictions
