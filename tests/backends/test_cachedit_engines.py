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


UNSAID = 20
"""Steps of a request that does not say how many."""


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
    engine: str, name: str, config: dict[str, Any], requests: Sequence[int | None]
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
        outputs = denoise(call, case, steps or UNSAID, seed=number)
        if engine == "graph":
            found = omni_cache.summary(pipeline.transformer).trajectories
            assert len(found) == branches
            yield Request([[step.computed for step in each.steps] for each in found], outputs)
        else:
            yield Request([computed[each::branches] for each in range(branches)], outputs)
    backend.disable(pipeline)


def farthest(one: Request, other: Request) -> float:
    """How far two outputs of one step are apart at most."""
    pairs = zip(one.outputs, other.outputs, strict=True)
    return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)


# For each model what all its settings share, so that it is compiled once; then the settings, and
# the steps of their requests, None where nobody says how many there will be.
SETTINGS: dict[str, tuple[dict[str, Any], list[tuple[dict[str, Any], Sequence[int | None]]]]] = {
    "flux": (
        {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.3},
        [
            ({"max_warmup_steps": 6, "max_continuous_cached_steps": 2}, (20, 12)),
            (
                {
                    "max_warmup_steps": 2,
                    "max_cached_steps": 5,
                    "max_continuous_cached_steps": -1,
                },
                (20, 16),
            ),
            ({"scm_steps_mask_policy": "slow", "scm_steps_policy": "static"}, (20,)),
            ({"scm_steps_mask_policy": "medium"}, (20, 5, None, 6)),
        ],
    ),
    "wan": (
        {
            "Fn_compute_blocks": 4,
            "Bn_compute_blocks": 2,
            "residual_diff_threshold": 0.12,
            "enable_taylorseer": True,
            "taylorseer_order": 2,
        },
        [
            ({"max_warmup_steps": 4, "force_refresh_step_hint": 10}, (20, 20)),
            ({"scm_steps_mask_policy": "fast", "scm_steps_policy": "static"}, (20,)),
        ],
    ),
    "qwen_image": (
        {
            "Fn_compute_blocks": 1,
            "residual_diff_threshold": 0.9,
            "enable_taylorseer": True,
            "max_warmup_steps": 2,
        },
        [
            ({"scm_steps_mask_policy": "ultra", "max_continuous_cached_steps": 2}, (20,)),
            ({"force_refresh_step_hint": 6, "force_refresh_step_policy": "repeat"}, (20, 20)),
        ],
    ),
}


FEW = ("flux", "wan")
"""One without guidance and one with it; holding and forecasting."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in SETTINGS
    ],
)
def test_the_engines_agree(model: str) -> None:
    shared, settings = SETTINGS[model]
    for own, requests in settings:
        config = {**shared, **own}
        mine = served("graph", model, config, requests)
        theirs = served("library", model, config, requests)
        for steps, one, other in zip(requests, mine, theirs, strict=True):
            assert one.computed == other.computed, (own, steps)
            assert farthest(one, other) <= 1e-4, (own, steps)
            if steps == requests[0]:
                for branch in one.computed:
                    assert 4 <= sum(branch) <= len(branch) - 4, (own, steps, branch)
