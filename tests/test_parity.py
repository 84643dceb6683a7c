"""The same schedule and the same outputs as the peers, live, on one FLUX-architecture model.

MagCache is held to diffusers' own hooks. TeaCache is not in diffusers; its published rule is
written out here, on a signal that a forward hook takes from the eager model.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import hooks as peer
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers_models import CASES, NUM_STEPS, sample
from one_trace import OneTrace, cached
from torch import Tensor, nn

import omni_cache
from omni_cache.runtime.records import TrajectorySummary

CASE = CASES["flux"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def denoise(model: Callable[..., Any], steps: int) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """An Euler loop, in which an error made at one step reaches all later ones.

    Returns:
        For each step the inputs of the model, and its output.
    """
    inputs, outputs = [CASE.inputs()], []
    for step in range(steps):
        outputs.append(sample(model(**inputs[-1])))
        moved = inputs[-1]["hidden_states"] - outputs[-1] / steps
        sigma = torch.full_like(inputs[-1]["timestep"], 1 - (step + 1) / steps)
        inputs.append({**inputs[-1], "hidden_states": moved, "timestep": sigma})
    return inputs[:-1], outputs


def trajectory_of(model: nn.Module) -> TrajectorySummary:
    (trajectory,) = omni_cache.summary(model).trajectories
    return trajectory


# --- MagCache ------------------------------------------------------------------------------------

# threshold, max_skip_steps, retention_ratio, steps
MAG_SETTINGS = [
    (0.24, 5, 0.1, 28),  # our defaults
    (0.06, 3, 0.2, 28),  # the peer's defaults
    (0.06, 1, 0.0, 28),
    (5.0, 2, 0.5, 28),
    (0.12, 4, 0.2, 20),  # ratios interpolated
    (0.12, 4, 0.2, 50),
]


def peer_denoise(settings: tuple[float, int, float, int]) -> tuple[list[bool], list[Tensor]]:
    """With the peer's hooks: whether each step was computed, and the outputs."""
    threshold, max_skip_steps, retention_ratio, steps = settings
    model: Any = CASE.build()
    model.enable_cache(
        peer.MagCacheConfig(
            threshold=threshold,
            max_skip_steps=max_skip_steps,
            retention_ratio=retention_ratio,
            num_inference_steps=steps,
            mag_ratios=FLUX_MAG_RATIOS,
        )
    )
    # The hooks replace a block's forward, so its attention runs in computed steps only.
    computed = [False] * steps
    calls = 0

    def attended(*_: Any) -> None:
        computed[calls] = True

    model.transformer_blocks[0].attn.register_forward_hook(attended)

    def call(**inputs: Any) -> Any:
        nonlocal calls
        with model.cache_context("cond"):
            output = model(**inputs)
        calls += 1
        return output

    _, outputs = denoise(call, steps)
    return computed, outputs


def test_magcache_agrees_with_diffusers_at_every_step() -> None:
    model = CASE.build()
    trace = OneTrace(
        {
            str(settings): cached(
                cache="magcache",
                variant="FLUX.1-dev",
                threshold=settings[0],
                max_skip_steps=settings[1],
                retention_ratio=settings[2],
            )
            for settings in MAG_SETTINGS
        }
    )
    compiled = torch.compile(model, backend=trace, fullgraph=True)
    schedules = []
    for settings in MAG_SETTINGS:
        computed, peer_outputs = peer_denoise(settings)
        trace.chosen = str(settings)
        with omni_cache.generation(num_inference_steps=settings[-1]):
            _, outputs = denoise(compiled, settings[-1])
        assert [step.computed for step in trajectory_of(model).steps] == computed, settings
        for output, peer_output in zip(outputs, peer_outputs, strict=True):
            torch.testing.assert_close(output, peer_output, rtol=0, atol=1e-5)
        schedules.append(computed)
    # The settings are worth comparing: they make different schedules, each of both kinds of step.
    assert len(set(map(tuple, schedules))) == len(schedules)
    assert all(5 < sum(each) < len(each) - 5 for each in schedules)


def test_calibration_measures_the_ratios_that_diffusers_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = 6
    theirs: Any = CASE.build()
    theirs.enable_cache(peer.MagCacheConfig(calibrate=True, num_inference_steps=steps))

    def call(**inputs: Any) -> Any:
        with theirs.cache_context("cond"):
            return theirs(**inputs)

    denoise(call, steps)
    lines = capsys.readouterr().out.splitlines()
    (printed,) = (line for line in lines if line.startswith("[1.0,"))
    model = CASE.build()
    ratios = omni_cache.calibration.estimate_mag_ratios(
        model, lambda: denoise(model, steps), steps, inner="eager"
    )
    assert list(ratios.values()) == [pytest.approx(ast.literal_eval(printed), rel=1e-5)]


# --- TeaCache ------------------------------------------------------------------------------------

FLUX_COEFFICIENTS = [4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01]
"""As published: ali-vilab/TeaCache, TeaCache4FLUX."""

TEA_SETTINGS = [(0.25, False), (0.4, False), (0.6, True), (0.8, False), (1.5, True)]
"""Thresholds, and whether the last step is always computed."""


def modulated_inputs(model: Any, inputs: list[dict[str, Any]]) -> list[Tensor]:
    """What the first block's modulated norm returns at each step of the eager model."""
    signals: list[Tensor] = []
    handle = model.transformer_blocks[0].norm1.register_forward_hook(
        lambda module, args, output: signals.append(output[0])
    )
    for each in inputs:
        model(**each)
    handle.remove()
    return signals


def published_rule(
    signals: list[Tensor], threshold: float, force_last: bool
) -> tuple[list[bool], list[float], list[float]]:
    """For each step whether it is computed; from the second on, distance and accumulation."""
    rescale = np.poly1d(FLUX_COEFFICIENTS)
    computed, distances, accumulations = [True], [], []
    accumulated = 0.0
    for step in range(1, len(signals)):
        current, previous = signals[step], signals[step - 1]
        distances.append(((current - previous).abs().mean() / previous.abs().mean()).item())
        accumulated += rescale(distances[-1])
        accumulations.append(accumulated)
        is_last = force_last and step == len(signals) - 1
        computed.append(is_last or not accumulated < threshold)
        if computed[-1]:
            accumulated = 0.0
    return computed, distances, accumulations


def test_teacache_follows_the_published_rule_at_every_step() -> None:
    model = CASE.build()
    trace = OneTrace(
        {
            str(settings): cached(
                cache="teacache",
                variant="FLUX.1-dev",
                rel_l1_thresh=settings[0],
                force_last_step=settings[1],
            )
            for settings in TEA_SETTINGS
        }
    )
    compiled = torch.compile(model, backend=trace, fullgraph=True)
    schedules = []
    for settings in TEA_SETTINGS:
        trace.chosen = str(settings)
        with omni_cache.generation(num_inference_steps=NUM_STEPS):
            inputs, _ = denoise(compiled, NUM_STEPS)
        steps = trajectory_of(model).steps
        signals = modulated_inputs(model, inputs)
        computed, distances, accumulations = published_rule(signals, *settings)
        assert [step.computed for step in steps] == computed, settings
        measured = [step for step in steps[1:] if step.reason != "last step"]
        assert len(measured) == NUM_STEPS - 1 - settings[1]
        for step, distance, accumulation in zip(
            measured, distances, accumulations, strict=settings[1] is False
        ):
            assert step.distance == pytest.approx(distance, rel=1e-4)
            assert step.accumulated == pytest.approx(accumulation, rel=1e-4)
        schedules.append(computed)
    assert len(set(map(tuple, schedules))) == len(schedules)
    assert all(0 < sum(each) < NUM_STEPS for each in schedules)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        (
            "wan",
            {
                "Wan2.1-T2V-1.3B": "condition_embedder.time_embedder",
                "Wan2.1-T2V-1.3B (retain steps)": "condition_embedder.time_proj",
            },
        ),
        ("cogvideox", {"CogVideoX-5b": "time_embedding"}),
    ],
    ids=["wan", "cogvideox"],
)
def test_a_published_signal_is_what_its_module_returns(name: str, modules: dict[str, str]) -> None:
    case = CASES[name]
    model = case.build()
    expected = {}
    for variant, path in modules.items():
        signals: list[Tensor] = []
        handle = model.get_submodule(path).register_forward_hook(
            lambda module, args, output, signals=signals: signals.append(output)
        )
        for step in range(5):
            model(**case.inputs(step))
        handle.remove()
        expected[variant] = [
            float((now - before).abs().mean() / before.abs().mean())
            for before, now in pairwise(signals)
        ]
    trace = OneTrace({variant: cached(variant=variant) for variant in modules})
    compiled = torch.compile(model, backend=trace, fullgraph=True)
    for variant, distances in expected.items():
        trace.chosen = variant
        # The inputs are made anew for every step, which leaves a bare call's place in doubt.
        with omni_cache.generation(), omni_cache.branch("cond"):
            for step in range(5):
                compiled(**case.inputs(step))
        found = [step.distance for step in trajectory_of(model).steps[1:]]
        assert found == pytest.approx(distances, rel=1e-4), variant
