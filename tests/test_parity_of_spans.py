"""Blocks that always run: the same schedules and outputs as the peers, live."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import cache_dit
import pytest
import torch
from cross_section import also
from diffusers import hooks as peer
from diffusers_models import CASES, ModelCase, sample
from parity import Found, assert_same, of_cache_dit, of_diffusers, ours_of_all
from torch import Tensor

import omni_cache

pytestmark = pytest.mark.slow

STEPS = 20
MODELS = {name: CASES[name].deep for name in ("flux", "wan", "qwen_image")}


FIRST_BLOCK = {"flux": 0.3, "wan": 0.07, "qwen_image": 0.4}


@pytest.mark.parametrize(("model", "threshold"), FIRST_BLOCK.items())
def test_first_block_cache_is_that_of_diffusers(model: str, threshold: float) -> None:
    theirs = of_diffusers(MODELS[model], STEPS, peer.FirstBlockCacheConfig(threshold=threshold))
    assert_same(ours_at_once(model)["first block"], theirs)


# model, fn_compute_blocks, bn_compute_blocks, residual_diff_threshold
SPANS = [
    ("flux", 1, 0, 0.3),
    ("flux", 4, 2, 0.3),
    ("wan", 1, 0, 0.08),
    ("wan", 4, 3, 0.1),
    ("qwen_image", 3, 2, 0.4),
]


# By default each model once, and blocks at one end or at both.
@pytest.mark.parametrize(
    ("model", "first", "last", "threshold"),
    [also(*SPANS[0]), SPANS[1], SPANS[2], also(*SPANS[3]), SPANS[4]],
)
def test_dbcache_is_that_of_cache_dit(model: str, first: int, last: int, threshold: float) -> None:
    mine = ours_at_once(model)[str((first, last))]
    flags: dict[str, Any] = {"residual_diff_threshold": threshold, "max_warmup_steps": 2}
    span = {"Fn_compute_blocks": first, "Bn_compute_blocks": last}
    assert_same(mine, of_cache_dit(MODELS[model], STEPS, **span, **flags))


TWELVE = {
    "flux": replace(
        CASES["flux"], config={**CASES["flux"].config, "num_layers": 5, "num_single_layers": 7}
    ),
    "wan": replace(CASES["wan"], config={**CASES["wan"].config, "num_layers": 12}),
}
# model, fn_compute_blocks, bn_compute_blocks, residual_diff_threshold
OF_TWELVE = [("flux", 8, 0, 0.3), ("flux", 4, 4, 0.3), ("wan", 8, 0, 0.1), ("wan", 4, 4, 0.1)]


def spans_of(
    spans: list[tuple[str, int, int, float]], model: str, **flags: Any
) -> dict[str, dict[str, Any]]:
    """The flags for each span that a model is tested with, under its numbers."""
    return {
        str((first, last)): {
            "cache": "dbcache",
            "fn_compute_blocks": first,
            "bn_compute_blocks": last,
            "residual_diff_threshold": threshold,
            **flags,
        }
        for name, first, last, threshold in spans
        if name == model
    }


@cache
def ours_of_twelve(model: str) -> dict[str, Found]:
    """What each span of twelve blocks leaves here."""
    return ours_of_all(TWELVE[model], STEPS, spans_of(OF_TWELVE, model, max_warmup_steps=3))


# By default the cut lies within a list for both, in Flux behind the place where two streams join.
@pytest.mark.parametrize(
    ("model", "first", "last", "threshold"),
    [OF_TWELVE[0], also(*OF_TWELVE[1]), also(*OF_TWELVE[2]), OF_TWELVE[3]],
)
def test_dbcache_is_that_of_cache_dit_on_twelve_blocks(
    model: str, first: int, last: int, threshold: float
) -> None:
    mine = ours_of_twelve(model)[str((first, last))]
    flags: dict[str, Any] = {"residual_diff_threshold": threshold, "max_warmup_steps": 3}
    span = {"Fn_compute_blocks": first, "Bn_compute_blocks": last}
    assert_same(mine, of_cache_dit(TWELVE[model], STEPS, **span, **flags))


FAST = cache_dit.steps_mask(total_steps=STEPS, mask_policy="fast")
KNOBS: dict[str, dict[str, Any]] = {
    "warm-up": {"max_warmup_steps": 6},
    "warm-up with gaps": {"max_warmup_steps": 12, "warmup_interval": 2},
    "so many in all": {"max_cached_steps": 7},
    "so many in a row": {"max_continuous_cached_steps": 2},
    "accumulated": {"max_accumulated_residual_diff_threshold": 3.0},
    "all of them": {
        "max_warmup_steps": 4,
        "warmup_interval": 3,
        "max_cached_steps": 9,
        "max_continuous_cached_steps": 3,
        "max_accumulated_residual_diff_threshold": 5.0,
        "residual_diff_threshold": 0.45,
    },
    "mask": {"steps_computation_mask": FAST, "residual_diff_threshold": 0.45},
    "mask and limit": {"steps_computation_mask": FAST, "max_continuous_cached_steps": 1},
    "static mask": {"steps_computation_mask": FAST, "steps_computation_policy": "static"},
    "refresh": {"force_refresh_step_hint": 9, "residual_diff_threshold": 0.45},
    "refresh again and again": {
        "force_refresh_step_hint": 6,
        "force_refresh_step_policy": "repeat",
        "max_continuous_cached_steps": 2,
    },
    "mask and refresh": {
        "steps_computation_mask": FAST,
        "steps_computation_policy": "static",
        "force_refresh_step_hint": 11,
    },
}


# model, name of the knobs, further knobs
WITH_KNOBS = [
    *(("qwen_image", name, {}) for name in KNOBS),
    ("flux", "mask", {"residual_diff_threshold": 0.3}),
    ("flux", "mask and limit", {"residual_diff_threshold": 0.3}),
    ("flux", "static mask", {}),
    ("flux", "mask and refresh", {}),
]


def knobs_of(name: str, further: dict[str, Any]) -> dict[str, Any]:
    return {"max_warmup_steps": 2, "residual_diff_threshold": 0.9, **KNOBS[name], **further}


@cache
def ours_at_once(model: str) -> dict[str, Found]:
    """What first-block caching, each span, all knobs and a named mask leave here."""
    first: dict[str, Any] = {"cache": "dbcache", "fn_compute_blocks": 1}
    settings = spans_of(SPANS, model, max_warmup_steps=2)
    settings["first block"] = {"cache": "first_block_cache", "threshold": FIRST_BLOCK[model]}
    for name, knobs, further in WITH_KNOBS:
        if name == model:
            settings[knobs] = {**first, **knobs_of(knobs, further)}
    named = {"steps_computation_policy": "static", "steps_computation_mask": "fast"}
    return ours_of_all(MODELS[model], STEPS, {**settings, "named mask": {**first, **named}})


# The knobs see steps and distances, so that one model is enough by default.
@pytest.mark.parametrize(
    ("model", "name", "further"),
    [each if each[0] == "qwen_image" else also(*each) for each in WITH_KNOBS],
)
def test_every_knob_is_that_of_cache_dit(model: str, name: str, further: dict[str, Any]) -> None:
    span = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0}
    theirs = of_cache_dit(MODELS[model], STEPS, **span, **knobs_of(name, further))
    assert_same(ours_at_once(model)[name], theirs)


def test_a_mask_may_be_named() -> None:
    named = ours_at_once("qwen_image")["named mask"]
    assert named.computed == [bool(each) for each in FAST]


@torch.no_grad()
def guided(
    model: Callable[..., Any], case: ModelCase, branch: Callable[[str], AbstractContextManager[Any]]
) -> list[Tensor]:
    """An Euler loop over two guidance branches, which take turns."""
    cond, uncond, outputs = case.inputs(), case.inputs(seed=1), []
    begin = cond["timestep"]
    for step in range(STEPS):
        with branch("cond"):
            outputs.append(sample(model(**cond)))
        uncond["hidden_states"] = cond["hidden_states"]
        with branch("uncond"):
            outputs.append(sample(model(**uncond)))
        velocity = outputs[-1] + 4 * (outputs[-2] - outputs[-1])
        cond["hidden_states"] = cond["hidden_states"] - velocity / STEPS
        cond["timestep"] = uncond["timestep"] = begin * (1 - (step + 1) / STEPS)
    return outputs


# The second is the first with a refresh.
@pytest.mark.parametrize("hint", [also(None), 9])
def test_branches_are_as_separate_as_with_cache_dit(hint: int | None) -> None:
    """cache-dit counts calls where it refreshes, and so two for each step; here steps count."""
    case = MODELS["qwen_image"]
    flags: dict[str, Any] = {"max_warmup_steps": 2, "residual_diff_threshold": 0.5}
    model: Any = case.build()
    mine: Any = {"cache": "dbcache", "fn_compute_blocks": 1, "inner": "eager", "strict": True}
    omni_cache.enable(model, force_refresh_step_hint=hint, **mine, **flags)
    with omni_cache.generation(STEPS):
        outputs = guided(model, case, omni_cache.branch)
    found = {
        each.branch: [step.computed for step in each.steps]
        for each in omni_cache.summary(model).trajectories
    }
    peer_model: Any = case.build()
    computed: list[bool] = []
    skipped = peer_model.transformer_blocks[1].attn
    skipped.register_forward_hook(lambda *_: computed.__setitem__(-1, True))
    peer_model.register_forward_pre_hook(lambda *_: computed.append(False))
    cache_dit.enable_cache(
        peer_model,
        cache_config=cache_dit.DBCacheConfig(
            num_inference_steps=STEPS,
            enable_separate_cfg=True,
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            force_refresh_step_hint=None if hint is None else 2 * hint,
            **flags,
        ),
    )
    try:
        theirs = guided(peer_model, case, lambda name: nullcontext())
    finally:
        cache_dit.disable_cache(peer_model)
    assert found == {"cond": computed[::2], "uncond": computed[1::2]}
    assert all(5 <= sum(each) <= STEPS - 5 for each in found.values())
    for one, other in zip(outputs, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
