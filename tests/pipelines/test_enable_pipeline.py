"""Caching switched on and off for a real FluxPipeline, the bundled one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import omni_cache
from omni_cache.demo import load_demo_pipeline

STEPS = 8
PROMPT = "a red circle on a blue background"


@pytest.fixture
def pipe() -> Iterator[Any]:
    pipeline = load_demo_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline
    omni_cache.disable(pipeline)


def draw(pipe: Any, steps: int = STEPS, prompt: str = PROMPT, seed: int = 0) -> torch.Tensor:
    return pipe(
        prompt,
        num_inference_steps=steps,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images


def attributes(pipe: Any) -> list[set[str]]:
    return [set(vars(each)) for each in (pipe, pipe.transformer, pipe.scheduler)]


def test_with_nothing_reused_the_picture_is_the_uncached_one_bit_for_bit(pipe: Any) -> None:
    uncached = draw(pipe)
    omni_cache.enable(pipe, inner="eager", coefficients=[1.0, 0.0], rel_l1_thresh=0.0)
    assert torch.equal(draw(pipe), uncached)
    assert omni_cache.summary(pipe).computed_steps == STEPS


def test_the_pipeline_names_branch_and_number_of_steps(pipe: Any) -> None:
    omni_cache.enable(
        pipe,
        inner="eager",
        coefficients=[1.0, 0.0],
        rel_l1_thresh=1e9,
        force_last_step=True,
    )
    draw(pipe)
    (trajectory,) = omni_cache.summary(pipe).trajectories
    assert trajectory.branch == "cond"
    assert trajectory.model == "transformer"
    assert [step.computed for step in trajectory.steps] == [True] + [False] * (STEPS - 2) + [True]
    assert trajectory.steps[-1].reason == "last step"


def test_a_second_generation_is_the_first_over_again(pipe: Any) -> None:
    omni_cache.enable(pipe, inner="eager", coefficients=[1.0, 0.0], rel_l1_thresh=0.3)
    first = draw(pipe)
    assert omni_cache.summary(pipe).reused_steps > 0
    draw(pipe, prompt="a green square on a white background", seed=5)
    assert torch.equal(draw(pipe), first)


def test_another_number_of_steps_compiles_nothing(pipe: Any) -> None:
    compiled = []

    def counting(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        compiled.append(gm)
        return gm.forward

    omni_cache.enable(pipe, cache="magcache", inner=counting, mag_ratios=[1.0] * 28)
    draw(pipe)
    parts = len(compiled)
    assert parts == 4
    draw(pipe, steps=STEPS + 3)
    assert len(compiled) == parts
    summary = omni_cache.summary(pipe)
    assert summary.computed_steps + summary.reused_steps == STEPS + 3


def test_disable_leaves_the_pipeline_as_it_was(pipe: Any) -> None:
    uncached, before = draw(pipe), attributes(pipe)
    kind = type(pipe.transformer)
    omni_cache.enable(pipe, inner="eager", coefficients=[1.0, 0.0])
    assert type(pipe.transformer) is kind
    draw(pipe)
    omni_cache.disable(pipe)
    assert attributes(pipe) == before
    assert pipe.transformer._compiled_call_impl is None
    assert torch.equal(draw(pipe), uncached)
    omni_cache.disable(pipe)
    assert attributes(pipe) == before


def test_enabling_again_with_the_same_flags_changes_nothing(pipe: Any) -> None:
    flags = {"inner": "eager", "coefficients": [1.0, 0.0], "rel_l1_thresh": 0.3}
    omni_cache.enable(pipe, **flags)
    compiled = pipe.transformer._compiled_call_impl
    omni_cache.enable(pipe, **flags)
    assert pipe.transformer._compiled_call_impl is compiled
    omni_cache.enable(pipe, **{**flags, "rel_l1_thresh": 0.0})
    draw(pipe)
    assert omni_cache.summary(pipe).reused_steps == 0


def test_refresh_forgets_the_summary_and_the_state(pipe: Any) -> None:
    omni_cache.enable(pipe, inner="eager", coefficients=[1.0, 0.0])
    draw(pipe)
    assert omni_cache.summary(pipe).trajectories
    omni_cache.refresh(pipe)
    assert not omni_cache.summary(pipe).trajectories
    assert str(omni_cache.summary(pipe)) == "no cached generation yet"


def test_nothing_is_held_after_the_last_step(pipe: Any) -> None:
    omni_cache.enable(pipe, inner="eager", coefficients=[1.0, 0.0])
    draw(pipe)
    run = pipe.transformer._compiled_call_impl.state.latest
    assert run is not None
    (trajectory,) = run.trajectories.values()
    assert trajectory.memory_bytes > 0
    assert trajectory.history.kept == []
    assert trajectory.signal is None


def test_a_target_without_a_transformer_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"target=dict .*torch\.nn\.Module or a pipeline"):
        omni_cache.enable({})


def test_a_wrong_flag_is_refused_before_anything_changes(pipe: Any) -> None:
    before = attributes(pipe)
    with pytest.raises(ValueError, match="did you mean 'rel_l1_thresh'"):
        omni_cache.enable(pipe, rel_l1_tresh=0.2)
    assert attributes(pipe) == before
