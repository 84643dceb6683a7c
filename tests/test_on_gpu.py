"""A tiny FLUX on a GPU, through Inductor: outputs, copies of the history, CUDA graphs, reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers_models import CASES
from torch import Tensor

import omni_cache

pytestmark = pytest.mark.gpu

STEPS = 8
EVERY_OTHER: dict[str, Any] = {
    "cache": "magcache",
    "mag_ratios": [1.0] * STEPS,
    "retention_ratio": 0.0,
    "max_skip_steps": 1,
    "num_inference_steps": STEPS,
}
TEACACHE: dict[str, Any] = {"cache": "teacache", "coefficients": [1.0, 0.0], "rel_l1_thresh": 0.1}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        yield
    torch.set_float32_matmul_precision(before)


def calls_on_gpu() -> list[dict[str, Any]]:
    """Inputs of every step; what stays is one tensor in all of them, as in a loop."""
    calls: list[dict[str, Any]] = []
    for step in range(STEPS):
        inputs = CASES["flux"].inputs(step)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                first = calls[0][name] if calls else None
                stays = first is not None and torch.equal(first.cpu(), value)
                inputs[name] = first if stays else value.cuda()
        calls.append(inputs)
    return calls


def generation(flags: dict[str, Any], generations: int = 1) -> tuple[list[Tensor], list[bool]]:
    """Outputs and computed steps of the last one; CUDA graphs are replayed from the third on."""
    model: Any = CASES["flux"].build().cuda()
    omni_cache.enable(model, strict=True, **flags)
    calls = calls_on_gpu()
    for _ in range(generations):
        outputs = []
        with omni_cache.generation(STEPS):
            for call in calls:
                with omni_cache.branch("cond"):
                    outputs.append(model(**call)[0].clone())
    (trajectory,) = omni_cache.summary(model).trajectories
    return outputs, [step.computed for step in trajectory.steps]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_inductor_computes_and_reuses_what_eager_does() -> None:
    expected, schedule = generation({**EVERY_OTHER, "inner": "eager"})
    found, own = generation(EVERY_OTHER)
    assert own == schedule == [True, False] * (STEPS // 2)
    assert_near(found, expected)


def test_a_history_on_the_host_gives_the_same_bits() -> None:
    flags = {**EVERY_OTHER, "inner": "eager"}
    expected, _ = generation(flags)
    found, schedule = generation({**flags, "history_device": "cpu"})
    assert schedule == [True, False] * (STEPS // 2)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("forecast", ["hold", "newton"])
def test_a_history_of_eight_bits_is_near_the_exact_one(forecast: str) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton has no float8_e4m3fn below compute capability 8.9")
    flags = {**EVERY_OTHER, "forecast": forecast, "history_dtype": "float8_e4m3fn"}
    expected, schedule = generation({**flags, "inner": "eager"})
    found, own = generation(flags)
    assert own == schedule == [True, False] * (STEPS // 2)
    assert_near(found, expected)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("flags", [EVERY_OTHER, TEACACHE], ids=["magcache", "teacache"])
def test_what_is_hoisted_changes_nothing(flags: dict[str, Any], inner: str) -> None:
    flags = {**flags, "inner": inner}
    expected, schedule = generation(flags)
    found, own = generation({**flags, "hoist": True})
    assert own == schedule
    if inner == "eager":
        assert all(map(torch.equal, found, expected))
    else:
        assert_near(found, expected)


@pytest.mark.parametrize("flags", [EVERY_OTHER, TEACACHE], ids=["magcache", "teacache"])
def test_cuda_graphs_leave_the_history_alone(flags: dict[str, Any]) -> None:
    expected, schedule = generation({**flags, "inner": "eager"}, generations=3)
    found, own = generation({**flags, "mode": "reduce-overhead"}, generations=3)
    assert own == schedule
    assert 0 < sum(schedule) < STEPS
    assert_near(found, expected)


@pytest.mark.parametrize(
    ("flags", "most"), [(EVERY_OTHER, 0), (TEACACHE, 1)], ids=["magcache", "teacache"]
)
def test_a_call_waits_for_the_device_as_rarely_as_it_can(flags: dict[str, Any], most: int) -> None:
    model: Any = CASES["flux"].build().cuda()
    omni_cache.enable(model, inner="eager", strict=True, **flags)
    calls = calls_on_gpu()
    for is_warm in (False, True):
        with omni_cache.generation(STEPS):
            for step, call in enumerate(calls):
                with warnings.catch_warnings(record=True) as caught, omni_cache.branch("cond"):
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn" if is_warm else "default")
                    try:
                        model(**call)
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                # Switching the mode on warns too, that it overlooks "synchronizing operations".
                waits = [each for each in caught if "called a synchronizing" in str(each.message)]
                # A branch learns from its first calls which inputs change, by their contents.
                allowed = max(most, int(step < 3))
                assert len(waits) <= allowed, [str(each.message) for each in waits]
