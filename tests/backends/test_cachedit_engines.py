"""Both engines of cache-dit: the same schedules and outputs, request after request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers_models import CASES, ModelCase, sample
from parity import blocks_of, query_of
from torch import Tensor

import omni_cache
from omni_cache.backends.cachedit import CacheDiTBackend

MODELS = {name: CASES[name].deep for name in ("flux", "wan", "qwen_image")}
TWO_BRANCHES = ("wan", "qwen_image")


class Request(NamedTuple):
    """What a request has left: whether each step was computed, by branch, and the outputs."""

    computed: list[list[bool]]
    outputs: list[Tensor]


@torch.no_grad()
def denoise(call: Callable[..., Any], case: ModelCase, steps: int, seed: int) -> list[Tensor]:
    """The outputs of an Euler loop; with guidance, those of the branches in turns."""
    seeds = (seed, seed + 100) if case.name in TWO_BRANCHES else (seed,)
    branches, outputs = [case.inputs(seed=each) for each in seeds], []
    begin, scale = branches[0]["timestep"], 4.0
    latents = branches[0]["hidden_states"]
    for step in range(steps):
        for inputs in branches:
            inputs["hidden_states"] = latents
            # In the timestep's own dtype: whole numbers stay whole.
            inputs["timestep"] = (begin * (1 - step / steps)).to(begin.dtype)
            outputs.append(sample(call(**inputs)))
        first, last = outputs[-len(branches)], outputs[-1]
        latents = latents - (last + scale * (first - last)) / steps
    return outputs


def served(
    engine: str, name: str, config: dict[str, Any], requests: Sequence[int]
) -> Iterator[Request]:
    """What requests with so many steps each have left, one after the other on one pipeline."""
    case = MODELS[name]
    pipeline = SimpleNamespace(transformer=case.build())
    extra = {"inner": "eager", "strict": True} if engine == "graph" else {}
    backend = CacheDiTBackend({**config, **extra}, engine=engine)
    computed: list[bool] = []
    watched = query_of(blocks_of(pipeline.transformer, case)[config["Fn_compute_blocks"]])
    backend.enable(pipeline)
    if engine == "library":
        watched.register_forward_hook(lambda *_: computed.__setitem__(-1, True))

    def call(**inputs: Any) -> Any:
        computed.append(False)
        return pipeline.transformer(**inputs)

    branches = 2 if name in TWO_BRANCHES else 1
    for number, steps in enumerate(requests):
        computed.clear()
        backend.refresh(pipeline, steps, verbose=False)
        outputs = denoise(call, case, steps, seed=number)
        if engine == "graph":
            found = omni_cache.summary(pipeline.transformer).trajectories
            assert len(found) == branches
            yield Request([[step.computed for step in each.steps] for each in found], outputs)
        else:
            yield Request([computed[each::branches] for each in range(branches)], outputs)
    backend.disable(pipeline)


HOLD = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "max_continuous_cached_steps": -1}
SPAN = {**HOLD, "Fn_compute_blocks": 4, "Bn_compute_blocks": 2}

# model, configuration, steps of the requests
SETTINGS: dict[str, tuple[str, dict[str, Any], Sequence[int]]] = {
    "warm-up": ("flux", {**HOLD, "residual_diff_threshold": 0.3, "max_warmup_steps": 6}, (20, 20)),
    "so many in a row": (
        "flux",
        {**HOLD, "residual_diff_threshold": 0.3, "max_continuous_cached_steps": 2},
        (20, 12),
    ),
    "blocks at both ends": ("flux", {**SPAN, "residual_diff_threshold": 0.3}, (20,)),
    "a mask that decides": (
        "flux",
        {
            **HOLD,
            "residual_diff_threshold": 0.3,
            "scm_steps_mask_policy": "slow",
            "scm_steps_policy": "static",
            "enable_taylorseer": True,
        },
        (28,),
    ),
    "so many in all": (
        "wan",
        {**HOLD, "residual_diff_threshold": 0.12, "max_cached_steps": 7},
        (20, 16),
    ),
    "TaylorSeer of order 2": (
        "wan",
        {
            **SPAN,
            "residual_diff_threshold": 0.12,
            "max_warmup_steps": 4,
            "enable_taylorseer": True,
            "taylorseer_order": 2,
        },
        (20,),
    ),
    "fast and anew once": (
        "wan",
        {
            **HOLD,
            "scm_steps_mask_policy": "fast",
            "scm_steps_policy": "static",
            "force_refresh_step_hint": 12,
        },
        (24, 24),
    ),
    "TaylorSeer of order 1": (
        "qwen_image",
        {**HOLD, "residual_diff_threshold": 0.5, "enable_taylorseer": True},
        (20,),
    ),
    "medium": (
        "qwen_image",
        {**HOLD, "residual_diff_threshold": 0.4, "scm_steps_mask_policy": "medium"},
        (28, 5, 6, 20),
    ),
    "ultra, and so many in a row": (
        "qwen_image",
        {
            **HOLD,
            "residual_diff_threshold": 0.5,
            "scm_steps_mask_policy": "ultra",
            "max_continuous_cached_steps": 2,
        },
        (28,),
    ),
    "anew again and again": (
        "qwen_image",
        {
            **HOLD,
            "residual_diff_threshold": 0.9,
            "force_refresh_step_hint": 6,
            "force_refresh_step_policy": "repeat",
        },
        (20, 20),
    ),
    "nothing is known of the steps": (
        "qwen_image",
        {**HOLD, "residual_diff_threshold": 0.4, "scm_steps_mask_policy": "fast"},
        (20, 20),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_engines_agree(setting: str) -> None:
    model, config, requests = SETTINGS[setting]
    ours = list(served("graph", model, config, requests))
    theirs = list(served("library", model, config, requests))
    assert len(ours) == len(theirs) == len(requests)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.computed == other.computed
        for one, two in zip(mine.outputs, other.outputs, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    for branch in ours[0].computed:
        assert 4 <= sum(branch) <= len(branch) - 4, branch
