"""Every request on a pipeline as vLLM-Omni has them gives what a fresh pipeline gives."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from fake_pipeline import REQUESTS, FakePipeline, FakeRunner, Request, Tags, check_requests

import omni_cache
from omni_cache.backends.selector import get_cache_backend

CONFIG = {"rel_l1_thresh": 0.12, "coefficients": [0.0, 0.0, 0.0, 1.0, 0.0], "inner": "eager"}


def tea_cache(**config: Any) -> Any:
    return get_cache_backend("tea_cache", {**CONFIG, **config})


WAYS: list[tuple[Tags, bool]] = [
    *((tags, True) for tags in get_args(Tags)),
    ("none", False),
    ("branch ids", False),
]


@pytest.mark.parametrize(("tags", "owns_scheduler"), WAYS)
def test_every_request_gives_what_a_fresh_pipeline_gives(tags: Tags, owns_scheduler: bool) -> None:
    # A stamp says positive or negative, so it tells two branches and no more.
    requests = [each for each in REQUESTS if tags != "stamps" or len(each.others) < 2]
    check_requests(lambda: FakePipeline(tags, owns_scheduler), tea_cache, requests)


@pytest.mark.parametrize(
    "pipeline", [{"experts": True}, {"name": "denoising_transformer"}], ids=str
)
def test_two_transformers_and_one_of_another_name(pipeline: Any) -> None:
    check_requests(lambda: FakePipeline(**pipeline), tea_cache, REQUESTS[1:6])


def test_a_runner_that_never_refreshes_sees_no_request_before_either() -> None:
    check_requests(FakePipeline, tea_cache, refresh=False)


@pytest.mark.parametrize(
    ("tags", "others"),
    [
        ("none", ("blurry", "noisy")),
        ("do_true_cfg", ("blurry",)),
        ("do_true_cfg", ("blurry", "noisy")),
        ("branch ids", ("blurry", "noisy")),
        ("stamps", ("blurry",)),
    ],
)
def test_each_branch_is_reused_on_its_own(tags: Tags, others: tuple[str, ...]) -> None:
    runner = FakeRunner(FakePipeline(tags), tea_cache(rel_l1_thresh=1e9))
    runner.run(Request(others=others))
    summary = omni_cache.summary(runner.pipeline.transformer)
    # Of each branch the first step is computed, all others are reused.
    assert len(summary.trajectories) == 1 + len(others)
    assert summary.computed_steps == 1 + len(others)
    assert summary.reused_steps == 7 * (1 + len(others))


def test_reuse_is_what_is_tested() -> None:
    runner = FakeRunner(FakePipeline(), tea_cache())
    cached = runner.run(Request())
    summary = omni_cache.summary(runner.pipeline.transformer)
    assert 0 < summary.reused_steps < 7
    assert not torch.equal(cached, FakeRunner(FakePipeline(), None).run(Request()))


@pytest.mark.parametrize("steps", [0, None])
def test_a_request_of_unknown_length_forgets_the_length_of_the_one_before(steps: Any) -> None:
    runner = FakeRunner(FakePipeline(owns_scheduler=False), tea_cache(rel_l1_thresh=1e9))
    runner.run(Request(steps=4))
    runner.backend.refresh(runner.pipeline, steps)
    runner.run(Request(steps=12), refresh=False)
    assert omni_cache.summary(runner.pipeline.transformer).reused_steps == 11


def test_disabling_leaves_the_pipeline_as_it_was() -> None:
    runner = FakeRunner(FakePipeline(), tea_cache())
    runner.run(Request())
    runner.backend.disable(runner.pipeline)
    assert not runner.backend.is_enabled()
    assert torch.equal(
        runner.run(Request(), refresh=False), FakeRunner(FakePipeline(), None).run(Request())
    )


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tea_cache", CONFIG),
        ("mag_cache", {"mag_ratios": [1.0] * 28}),
        ("sea_cache", {"sea_threshold": 0.6}),
        ("cache_dit", {}),
        ("cache_dit", {"scm_steps_mask_policy": "fast"}),
    ],
)
def test_requests_of_other_lengths_compile_nothing_anew(name: str, config: dict[str, Any]) -> None:
    compiled = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compiled.append(gm)
        return gm.forward

    runner = FakeRunner(FakePipeline(), get_cache_backend(name, {**config, "inner": inner}))
    runner.run(Request(steps=8))
    parts = len(compiled)
    for steps in (12, 8, 16):
        runner.run(Request(steps=steps))
    assert len(compiled) == parts > 0
