"""From a pipeline to a file and back: measured, saved, read by enable and by a bare compile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from toy_pipeline import ToyModel, ToyPipeline
from toy_transformer import CHANNELS, TOKENS, Loop, ToyTransformer, computed, gaussian, same
from typer.testing import CliRunner

import omni_cache
from omni_cache.calibration import Calibration, calibrate, estimate_mag_ratios
from omni_cache.cli import app

STEPS = 8


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Experts(ToyPipeline):
    """A pipeline whose second transformer takes over in the middle."""

    def __init__(self) -> None:
        super().__init__(ToyModel())
        self.transformer_2 = ToyModel(seed=1)

    def __call__(self) -> Tensor:  # type: ignore[override]
        latents = gaussian("noise", 1, TOKENS, CHANNELS)
        self.scheduler.set_timesteps(STEPS)
        for step, timestep in enumerate(self.scheduler.timesteps):
            expert = self.transformer if step < STEPS // 2 else self.transformer_2
            with expert.cache_context("cond"):
                noise = expert(latents, timestep.expand(1))
            (latents,) = self.scheduler.step(noise, timestep, latents, return_dict=False)
        return latents


def measured(pipe: Any, strategy: str, **arguments: Any) -> Calibration:
    def generate() -> None:
        for seed in range(2):
            pipe(seed=seed, **arguments)

    return calibrate(pipe, generate, strategy, STEPS, degree=1, inner="eager")


@pytest.mark.parametrize("strategy", ["teacache", "magcache"])
def test_enable_reads_what_was_measured(strategy: str, tmp_path: Path) -> None:
    pipe = ToyPipeline()
    calibration = measured(pipe, strategy)
    (transformer,) = calibration.transformers.values()
    assert transformer.model_class == "ToyModel"
    assert list(transformer.branches) == ["cond", "uncond"]
    assert calibration.schedule is not None
    assert calibration.schedule.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    calibration.save(tmp_path / "file.json")

    flag = "coefficients" if strategy == "teacache" else "mag_ratios"
    numbers = {name: each.numbers for name, each in transformer.branches.items()}
    assert numbers["cond"] != numbers["uncond"]
    threshold = {"teacache": {"rel_l1_thresh": 0.3}, "magcache": {"threshold": 0.1}}[strategy]
    latents, schedules = [], []
    for own in ({"calibration": tmp_path / "file.json"}, {flag: numbers}):
        omni_cache.enable(pipe, cache=strategy, inner="eager", **threshold, **own)
        latents.append(pipe())
        schedules.append(computed(pipe))
        omni_cache.disable(pipe)
    assert schedules[0] == schedules[1]
    assert {True, False} <= {step for branch in schedules[0] for step in branch}
    assert torch.equal(*latents)


def test_a_bare_compile_reads_it_too(tmp_path: Path) -> None:
    model, loop = ToyTransformer(), Loop(explicit=True)
    found = calibrate(model, lambda: loop.run(model), "magcache", STEPS, inner="eager")
    found.save(tmp_path / "file.json")
    flags = {"cache": "magcache", "inner": "eager", "threshold": 0.1}
    outputs = []
    for own in (
        {"calibration": str(tmp_path / "file.json")},
        {"mag_ratios": found.transformers["transformer"].branches["cond"].numbers},
    ):
        options = {**flags, **own}
        outputs.append(
            loop.run(torch.compile(ToyTransformer(), backend="omni_cache", options=options))
        )
    assert same(*outputs)
    foreign = replace(
        found,
        transformers={
            "transformer": replace(found.transformers["transformer"], model_class="Other")
        },
    )
    options = {**flags, "calibration": foreign}
    with pytest.raises(ValueError, match="model_class is 'Other' in the calibration, and the"):
        loop.run(torch.compile(ToyTransformer(), backend="omni_cache", options=options))


def test_a_foreign_file_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe = ToyPipeline()
    calibration = measured(pipe, "magcache")
    own = calibration.transformers["transformer"]
    foreign = replace(calibration, transformers={"transformer": replace(own, model_class="Other")})
    foreign.save(tmp_path / "file.json")
    before = dict(vars(pipe.transformer))
    with pytest.raises(ValueError, match=r"model_class is 'Other' .* the model is 'ToyModel'"):
        omni_cache.enable(pipe, "magcache", calibration=tmp_path / "file.json")
    assert dict(vars(pipe.transformer)) == before


def test_each_expert_has_the_ratios_of_its_own_steps() -> None:
    pipe = Experts()
    together = estimate_mag_ratios(pipe, pipe, STEPS, inner="eager")["cond"]
    calibration = calibrate(pipe, pipe, "magcache", STEPS, inner="eager")
    assert list(calibration.transformers) == ["transformer", "transformer_2"]
    high, low = (each.branches["cond"].numbers for each in calibration.transformers.values())
    half = STEPS // 2
    assert high[:half] == pytest.approx(together[:half])
    assert low[half:] == pytest.approx(together[half:])
    # A step that the other one ran gets the nearest ratio.
    assert set(high[half:]) == {high[half - 1]}
    assert set(low[:half]) == {low[half]} == {1.0}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["calibrate", *arguments], catch_exceptions=False)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle on a blue background\n\na green square on a red background\n")
    return str(path)


def test_the_command_writes_a_file_and_a_plot_and_says_how_good_the_fit_is(
    tmp_path: Path, prompts: str
) -> None:
    output = tmp_path / "new" / "mag.json"
    result = invoke(
        *("demo", "--strategy", "magcache", "--prompts", prompts, "--steps", "3"),
        *("-o", str(output)),
    )
    assert result.exit_code == 0, result.output
    calibration = Calibration.load(output)
    assert (calibration.generations, calibration.num_inference_steps) == (2, 3)
    error = calibration.transformers["transformer"].branches["cond"].fit_error
    assert f"{error:.3g}" in result.output
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-folder", "--strategy", "magcache"), "model_index.json is missing"),
        (("demo", "--strategy", "dbcache"), "must be 'teacache' or 'magcache'"),
        (("demo", "--strategy", "magcache", "--arguments", "{"), "arguments='{' is not allowed"),
        (("demo", "--strategy", "magcache", "--arguments", "[]"), "must be a JSON object"),
        (("demo", "--strategy", "magcache", "--dtype", "float31"), "dtype='float31'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: tuple[str, ...], message: str, prompts: str) -> None:
    result = invoke(*arguments, "--prompts", prompts, "--steps", "3")
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.output)


def test_another_scheduler_warns_and_the_same_one_does_not(recwarn: Any) -> None:
    pipe = ToyPipeline()
    calibration = measured(pipe, "magcache")
    recwarn.clear()
    omni_cache.enable(pipe, "magcache", calibration=calibration, inner="eager")
    assert not [each for each in recwarn if "calibration" in str(each.message)]

    class Other(FlowMatchEulerDiscreteScheduler):
        pass

    pipe.scheduler = Other()
    with pytest.warns(UserWarning, match="the pipeline has 'Other'"):
        omni_cache.enable(pipe, "magcache", calibration=calibration, inner="eager")
