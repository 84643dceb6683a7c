"""Strategies that skip whole models, and SeaCache, compute as the plain model does, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cross_section import cross_section
from diffusers_models import CASES, sample

import omni_cache

STEPS = (0, 7, 14, 21)
NEVER: dict[str, dict[str, Any]] = {
    "seacache": {"threshold": 0},
    "stepcache": {"sim_thresholds": (2.0, 2.0)},
    "easycache": {"threshold": 0, "retention_steps": 0},
}
ALWAYS: dict[str, dict[str, Any]] = {
    "seacache": {"threshold": 1e6, "max_consecutive_cached": 0, "cache_end_steps": 0},
    "stepcache": {"sim_thresholds": (-1.0,), "skip_countdowns": (9,)},
    "easycache": {"threshold": 1e6, "retention_steps": 0, "force_last_step": False},
}


MODELS = {name: name for name in ("flux", "wan", "qwen_image")}


# One is enough by default: whatever the blocks are, skipped is the model from its inputs to its
# prediction, and computed steps of SeaCache run the graphs that test_exactness.py compares.
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", cross_section(MODELS, ("wan",)))
def test_steps_that_are_computed_are_those_of_the_plain_model(name: str) -> None:
    case = CASES[name]
    model: Any = case.build()
    plain = [sample(model(**case.inputs(step))) for step in STEPS]
    for cache in NEVER:
        for flags, expected in (
            (NEVER, "CCCC"),
            (ALWAYS, "CRRR" if cache == "seacache" else "CCRR"),
        ):
            omni_cache.enable(model, cache=cache, inner="eager", strict=True, **flags[cache])
            with omni_cache.generation(), omni_cache.branch("cond"):
                made = [sample(model(**case.inputs(step))) for step in STEPS]
            (trajectory,) = omni_cache.summary(model).trajectories
            schedule = ["CR"[not each.computed] for each in trajectory.steps]
            assert "".join(schedule) == expected
            for what, one, other in zip(schedule, made, plain, strict=True):
                assert torch.equal(one, other) == (what == "C")
