"""A history of 8 bits: every strategy goes on as it does in float32, but for the rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from float8 import rounded
from omni_cache.passes import RegionError
from torch import Tensor
from toy_transformer import (
    CHANNELS,
    MAGCACHE,
    TOKENS,
    WIDTH,
    ToyTransformer,
    compiled,
    computed,
    gaussian,
    same,
)

import omni_cache
from omni_cache.lowering.dispatch import check_history_dtype
from omni_cache.lowering.program import Computed
from omni_cache.options import CompileOptions
from omni_cache.runtime.contexts import Observed, observing
from omni_cache.runtime.history import Kept
from omni_cache.runtime.model_state import states_of_module

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 10
FLOAT8 = torch.float8_e4m3fn
EVERY_THIRD = {"cache": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 4}
DBCACHE = {"cache": "dbcache", "fn_compute_blocks": 1, "max_warmup_steps": 2}
MAG = {**MAGCACHE, "mag_ratios": [1.0], "retention_ratio": 0.3}

STRATEGIES: dict[str, dict[str, Any]] = {
    "hold": MAG,
    "on the host": {**EVERY_THIRD, "history_device": "cpu:0"},
    "feeds back": {**EVERY_THIRD, "forecast": "foca"},
    "reads products": {**EVERY_THIRD, "forecast": "dmd", "forecast_order": 2},
    "looks back at results": {"cache": "stepcache", "skip_countdowns": (2, 1)},
    "looks back at changes": {"cache": "easycache", "threshold": 0.2, "retention_steps": 2},
    "compares what blocks add": {**DBCACHE, "residual_diff_threshold": 0.2},
}


def run(model: Any) -> list[Tensor]:
    """The predictions of a loop that ends a step early, so that what is kept is not yet freed."""
    prompt, latents = gaussian("cond", 2, 5, CHANNELS), gaussian(0, 2, TOKENS, CHANNELS)
    predictions = []
    with omni_cache.generation(STEPS + 1), omni_cache.branch("cond"):
        for step in range(STEPS):
            timestep = torch.full((2,), 1000.0 - 90 * step)
            predictions.append(model(latents, timestep, prompt).clone())
            latents = latents - predictions[-1] / STEPS
        model.kept = kept_by(model)
    return predictions


def kept_by(model: torch.nn.Module) -> list[Kept]:
    (state,) = states_of_module(getattr(model, "_orig_mod", model))
    assert state.latest is not None
    (trajectory,) = state.latest.trajectories.values()
    return list(trajectory.history.kept)


def far(found: list[Tensor], expected: list[Tensor]) -> float:
    """The relative difference of all predictions together."""
    one, other = torch.cat(found), torch.cat(expected)
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_differs_from_float32_by_the_rounding_alone(name: str) -> None:
    precise, coarse = ToyTransformer(blocks=4), ToyTransformer(blocks=4)
    expected = run(compiled(precise, **STRATEGIES[name]))
    cached = compiled(coarse, history_dtype=FLOAT8, **STRATEGIES[name])
    found = run(cached)
    assert computed(coarse) == computed(precise)
    ((*schedule,),) = computed(coarse)
    assert 2 < sum(schedule) < STEPS
    assert 0 < far(found, expected) < 0.03
    for kept in cached.kept:
        assert [each.dtype for each in kept.stored] == [FLOAT8, torch.float32]
        (residual,) = kept.residuals
        assert residual.dtype == torch.float32
        torch.testing.assert_close(rounded(residual), residual, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_inductor_fuses_what_eager_computes() -> None:
    flags = {**EVERY_THIRD, "forecast": "newton", "history_dtype": FLOAT8}
    eager, cached = ToyTransformer(), ToyTransformer()
    expected = run(compiled(eager, **flags))
    found = run(compiled(cached, **flags, inner="inductor"))
    assert computed(cached) == computed(eager)
    assert far(found, expected) < 1e-3  # an element at the edge may be rounded the other way


def test_observers_see_numbers_and_may_tell_them_to_another_run() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.known: dict[int, Computed] = {}
            self.recalls = False

        def __call__(self, step: Observed) -> None:
            if step.finite is None:
                assert step.residuals == ()
                return
            (residual,) = step.residuals
            assert (residual.dtype, residual.shape) == (torch.float32, (2, TOKENS, WIDTH))
            made = Computed([each.clone() for each in step.result], step.stored, step.finite)
            self.known[step.at.index] = made

        def recall(self, region: object, branch: str, at: Any) -> Computed | None:
            return self.known[at.index] if self.recalls else None

    recorder = Recorder()
    cached = compiled(ToyTransformer(), history_dtype=FLOAT8, **EVERY_THIRD)
    with observing(recorder):
        first = run(cached)
        recorder.recalls = True
        assert same(run(cached), first)


def test_a_plan_is_tuned_and_followed_in_it() -> None:
    model = ToyTransformer()

    def generate(sample: int) -> Tensor:
        latents = gaussian(sample, 1, TOKENS, CHANNELS)
        with torch.no_grad(), omni_cache.generation(STEPS):
            for step in range(STEPS):
                prompt = gaussian(f"cond {sample}", 1, 5, CHANNELS)
                timestep = torch.tensor([1000.0 * (1 - step / STEPS)])
                latents = latents - model(latents, timestep, prompt) / STEPS
        return latents

    flags = {"inner": "eager", "history_dtype": "float8_e4m3fn"}
    plan = omni_cache.tune(
        model, generate, computed_steps=5, samples=3, judged=2, progress=lambda *_: None, **flags
    )
    omni_cache.enable(model, plan, **flags)
    generate(3)
    assert omni_cache.summary(model).computed_steps == 5


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_gpus_that_inductor_compiles_no_float8_for_are_refused(
    inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = CompileOptions.parse({"history_dtype": FLOAT8, "inner": inner})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    check_history_dtype(flags, [torch.device("cpu"), torch.device("cuda:0")])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
    devices = [torch.device("cuda:9"), torch.device("cuda:0")]
    if inner == "eager":
        check_history_dtype(flags, devices)
    else:
        with pytest.raises(RegionError, match="cuda:0 is older; use history_dtype='bfloat16'"):
            check_history_dtype(flags, devices)
