"""Which step a scheduler tells, whatever timesteps look like, and whose loop it rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor, nn
from toy_pipeline import ToyModel, ToyPipeline
from toy_transformer import ALWAYS_REUSE, CHANNELS, TOKENS, ToyTransformer, gaussian, reasons

import omni_cache

FLOW = FlowMatchEulerDiscreteScheduler


def unipc() -> Any:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )


# Scheduler, steps, and what the pipeline hands its transformer for a timestep (1,).
FORMS: dict[str, tuple[Callable[[], Any], int, Callable[[Tensor], Tensor]]] = {
    "one for each token, the first frame's at 0": (
        unipc,
        50,
        lambda t: torch.cat([torch.zeros(1, 1), t.expand(1, 20)], 1),
    ),
    "bfloat16": (lambda: FLOW(shift=12.0), 50, lambda t: t.bfloat16()),
    "a share in bfloat16": (lambda: FLOW(shift=3.158), 100, lambda t: t.bfloat16() / 1000),
    "a share that rises": (lambda: FLOW(shift=3.0), 30, lambda t: (1000 - t) / 1000),
}


class Transformed(ToyPipeline):
    """Hands its transformer what some pipelines make of the scheduler's timesteps."""

    form: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, steps: int) -> None:  # type: ignore[override]
        words, latents = gaussian("fox", 1, 5, CHANNELS), gaussian(0, 1, TOKENS, CHANNELS)
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            with self.transformer.cache_context("cond"):
                noise = self.transformer(latents, self.form(timestep.float().reshape(1)), words)
            (latents,) = self.scheduler.step(noise, timestep, latents, return_dict=False)


@pytest.mark.parametrize("name", FORMS)
def test_a_scheduler_that_counts_is_believed_whatever_the_timestep_looks_like(name: str) -> None:
    make, steps, form = FORMS[name]
    pipe = Transformed(scheduler=make())
    pipe.form = form
    omni_cache.enable(pipe, inner="eager", **ALWAYS_REUSE)
    pipe(steps)
    (trajectory,) = omni_cache.summary(pipe).trajectories
    assert [step.index for step in trajectory.steps] == list(range(steps))
    assert sum(step.computed for step in trajectory.steps) == 1


def own_loop(model: Any, steps: int) -> None:
    """A loop of the caller's own, past the pipeline and its scheduler."""
    words, latents = gaussian("hen", 1, 5, CHANNELS), gaussian(1, 1, TOKENS, CHANNELS)
    with torch.no_grad(), omni_cache.generation(steps):
        for step in range(steps):
            with omni_cache.branch("cond"):
                latents = latents - model(latents, torch.tensor([900.0 - step]), words) / steps


def test_the_scheduler_of_a_finished_run_does_not_rule_a_loop_of_ones_own() -> None:
    pipe = ToyPipeline(scheduler=FLOW())
    omni_cache.enable(pipe, inner="eager", **ALWAYS_REUSE)
    pipe(steps=4)
    own_loop(pipe.transformer, 12)
    assert reasons(pipe) == [["first step", *["below threshold"] * 11]]


class Fresh(FlowMatchEulerDiscreteScheduler):
    """Makes its timesteps anew whenever it is asked for them."""

    @property
    def timesteps(self) -> Tensor:
        return self._kept.clone()

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self._kept = value


def test_timesteps_that_are_made_anew_are_one_loop() -> None:
    pipe = ToyPipeline(scheduler=Fresh())
    omni_cache.enable(pipe, inner="eager", **ALWAYS_REUSE)
    pipe(steps=8)
    found = [
        sum(not step.computed for step in each.steps)
        for each in omni_cache.summary(pipe).trajectories
    ]
    assert min(found) >= 6


def test_an_owner_without_a_scheduler_is_no_pipeline_and_runs() -> None:
    class Holder:
        def __init__(self) -> None:
            self.transformer = ToyModel()

    holder = Holder()
    omni_cache.enable(holder, inner="eager", **ALWAYS_REUSE)
    own_loop(holder.transformer, 4)
    assert reasons(holder) == [["first step", *["below threshold"] * 3]]


def test_an_owner_that_cannot_be_referred_to_is_refused_before_anything_is_touched() -> None:
    class Slotted:
        __slots__ = ("transformer",)

    owner = Slotted()
    owner.transformer = ToyModel()
    with pytest.raises(TypeError, match="weak reference"):
        omni_cache.enable(owner, inner="eager")
    assert "_compiled_call_impl" not in {
        name for name, value in vars(owner.transformer).items() if value is not None
    }


class Wrapper(nn.Module):
    """Hands all on by position, behind a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ToyTransformer()

    def forward(self, *args: Tensor) -> Any:
        torch._dynamo.graph_break()
        return self.inner(*args)


def test_inputs_of_star_args_behind_a_graph_break_are_looked_at() -> None:
    model, plain = Wrapper().eval(), ToyTransformer()
    omni_cache.enable(model, inner="eager", **ALWAYS_REUSE)
    with torch.no_grad(), omni_cache.generation(6):
        for step in range(6):
            words = gaussian("fox" if step < 3 else "hen", 1, 5, CHANNELS)
            args = gaussian(step, 1, TOKENS, CHANNELS), torch.tensor([900.0 - step]), words
            with omni_cache.branch("cond"):
                found = model(*args)
            if step in (0, 3):
                assert torch.equal(found, plain(*args))
    assert reasons(model)[0][3] == "inputs changed"
