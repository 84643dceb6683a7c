"""What summary tells of a generation: every call with its decision and the reason."""

from __future__ import annotations

import pytest
import torch
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    MAGCACHE,
    TEACACHE,
    TOKENS,
    Loop,
    ToyTransformer,
    compiled,
    gaussian,
)

import omni_cache

pytestmark = pytest.mark.usefixtures("no_grad")


def test_teacache_records_distance_and_accumulated_change() -> None:
    model = ToyTransformer()
    Loop(("cond", "uncond")).run(compiled(model, **TEACACHE))
    summary = omni_cache.summary(model)

    assert [each.branch for each in summary.trajectories] == ["branch 0", "branch 1"]
    for trajectory in summary.trajectories:
        assert [step.timestep for step in trajectory.steps] == Loop().timesteps
        first, *others = trajectory.steps
        assert (first.computed, first.reason) == (True, "first step")
        assert (first.distance, first.accumulated) == (None, None)
        since = 0.0
        for step in others:
            assert step.distance is not None
            assert step.distance > 0
            since += step.distance
            assert step.accumulated == pytest.approx(since)
            assert step.computed == (since >= TEACACHE["rel_l1_thresh"])
            assert step.reason == ("threshold reached" if step.computed else "below threshold")
            since = 0.0 if step.computed else since


def test_magcache_gives_the_reason_of_every_step() -> None:
    model = ToyTransformer()
    Loop().run(compiled(model, **{**MAGCACHE, "retention_ratio": 0.25}))
    (trajectory,) = omni_cache.summary(model).trajectories

    assert [(step.computed, step.reason) for step in trajectory.steps] == [
        (True, "first step"),
        (True, "retention"),
        (False, "below threshold"),
        (False, "below threshold"),
        (True, "threshold reached"),
        (False, "below threshold"),
        (False, "below threshold"),
        (True, "max_skip_steps"),
    ]


def test_counts_add_up() -> None:
    model = ToyTransformer()
    Loop(("cond", "uncond"), steps=5).run(compiled(model, **{**TEACACHE, "rel_l1_thresh": 0.3}))
    summary = omni_cache.summary(model)

    assert summary.computed_steps + summary.reused_steps == 10
    assert summary.computed_steps == sum(each.computed_steps for each in summary.trajectories)
    assert summary.reused_steps == sum(each.reused_steps for each in summary.trajectories)
    assert 0 < summary.reused_steps < 10
    for each in summary.trajectories:
        assert each.computed_steps == sum(step.computed for step in each.steps)
        assert each.reused_steps == 5 - each.computed_steps


def test_it_covers_the_latest_generation() -> None:
    model = ToyTransformer()
    cached = compiled(model)
    Loop(steps=8).run(cached)
    Loop(steps=3).run(cached)

    for target in (model, cached):
        (trajectory,) = omni_cache.summary(target).trajectories
        assert len(trajectory.steps) == 3


def test_it_is_a_value_that_later_calls_leave_alone() -> None:
    model = ToyTransformer()
    cached = compiled(model)
    loop = Loop(steps=3).predictions(cached)
    next(loop)
    summary = omni_cache.summary(model)
    list(loop)

    assert summary.computed_steps + summary.reused_steps == 1


def test_the_table_shows_one_line_per_call() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    with omni_cache.generation():
        for step in range(2):
            for name in ("cond", "uncond"):
                with omni_cache.branch(name):
                    latents = gaussian(step, 1, TOKENS, CHANNELS)
                    prompt = gaussian(name, 1, 5, CHANNELS)
                    cached(latents, torch.tensor([900.0 - 50 * step]), prompt)

    summary = omni_cache.summary(model)
    text = str(summary)

    assert "2 of 4 steps computed" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if row]
    distance, change = (
        f"{value:.4g}"
        for value in (
            summary.trajectories[0].steps[1].distance,
            summary.trajectories[0].steps[1].accumulated,
        )
    )
    assert rows[:3] == [
        ["cond", "0", "900", "computed", "", "", "first step"],
        ["0.0 MiB held", "", "", "", "", "", ""],
        ["", "1", "850", "reused", distance, change, "below threshold"],
    ]
    assert rows[3][:4] == ["uncond", "0", "900", "computed"]
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "\x1b" not in text


def test_before_the_first_generation_it_says_so() -> None:
    model = ToyTransformer()
    compiled(model)
    summary = omni_cache.summary(model)

    assert summary.trajectories == ()
    assert (summary.computed_steps, summary.reused_steps, summary.memory_bytes) == (0, 0, 0)
    assert str(summary) == "no cached generation yet"


def test_a_target_that_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"target=int .* must be a torch\.nn\.Module"):
        omni_cache.summary(3)
