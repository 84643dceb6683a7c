"""What every test of parity needs: one loop for us and for the peers, and what has to be the same.

Each peer gets a model of its own, so that none disturbs another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from diffusers_models import ModelCase, sample
from one_trace import OneTrace, cached
from torch import Tensor, nn

import omni_cache


class Found(NamedTuple):
    """What a loop has left: whether each step was computed, and the outputs."""

    computed: list[bool]
    outputs: list[Tensor]


@torch.no_grad()
def denoise(model: Callable[..., Any], case: ModelCase, steps: int) -> list[Tensor]:
    """The outputs of an Euler loop, in which an error made at one step reaches all later ones."""
    inputs, outputs = case.inputs(), []
    begin = inputs["timestep"]
    for step in range(steps):
        outputs.append(sample(model(**inputs)))
        moved = inputs["hidden_states"] - outputs[-1] / steps
        timestep = begin * (1 - (step + 1) / steps)
        inputs = {**inputs, "hidden_states": moved, "timestep": timestep}
    return outputs


def ours(case: ModelCase, steps: int, **flags: Any) -> Found:
    """The loop with omni-cache."""
    model = case.build()
    omni_cache.enable(model, inner="eager", strict=True, **flags)
    with omni_cache.generation(steps), omni_cache.branch("cond"):
        outputs = denoise(model, case, steps)
    (trajectory,) = omni_cache.summary(model).trajectories
    return Found([step.computed for step in trajectory.steps], outputs)


def ours_of_all(
    case: ModelCase, steps: int, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Found]:
    """The loop with omni-cache for each of several sets of flags, after one capture."""
    model = case.build()
    trace = OneTrace({name: cached(strict=True, **flags) for name, flags in settings.items()})
    compiled = torch.compile(model, backend=trace, fullgraph=True)
    found = {}
    for name in settings:
        trace.chosen = name
        omni_cache.refresh(model)
        with omni_cache.generation(steps), omni_cache.branch("cond"):
            outputs = denoise(compiled, case, steps)
        (trajectory,) = omni_cache.summary(model).trajectories
        found[name] = Found([step.computed for step in trajectory.steps], outputs)
    return found


def of_diffusers(
    case: ModelCase, steps: int, config: Any, prepare: Callable[[Any], object] | None = None
) -> Found:
    """The loop with hooks of diffusers; ``prepare`` changes the model before they are put on it."""
    model: Any = case.build()
    watched = query_of(blocks_of(model, case)[-1])
    if prepare is not None:
        prepare(model)
    model.enable_cache(config)
    scale = 1000 if case.inputs()["timestep"].max() > 1 else 1
    step = iter(range(steps))

    def call(**inputs: Any) -> Any:
        sigma = float(inputs["timestep"][0]) / scale
        place = {"step_index": next(step), "sigma": sigma, "num_inference_steps": steps}
        with model.cache_context("cond", **place):
            return model(**inputs)

    return watch(watched, call, case, steps)


def of_cache_dit(case: ModelCase, steps: int, calibrator: Any = None, **config: Any) -> Found:
    """The loop with cache-dit's DBCache, and with one of its calibrators."""
    import cache_dit

    model = case.build()
    watched = query_of(blocks_of(model, case)[config["Fn_compute_blocks"]])
    settings = cache_dit.DBCacheConfig(
        num_inference_steps=steps, enable_separate_cfg=False, **config
    )
    cache_dit.enable_cache(model, cache_config=settings, calibrator_config=calibrator)
    try:
        return watch(watched, model, case, steps)
    finally:
        cache_dit.disable_cache(model)


def blocks_of(model: Any, case: ModelCase) -> list[nn.Module]:
    """The blocks of the block loop, in order."""
    return list(chain(*(getattr(model, name) for name in case.block_lists)))


def query_of(block: Any) -> nn.Module:
    """A layer that runs where its block is computed: peers replace blocks and whole attentions."""
    attention = getattr(block, "attn", None) or block.attn1
    layer: nn.Module = attention.to_q
    return layer


def watch(layer: nn.Module, model: Callable[..., Any], case: ModelCase, steps: int) -> Found:
    """The loop, with the steps in which a layer runs."""
    computed: list[bool] = []
    layer.register_forward_hook(lambda *_: computed.__setitem__(-1, True))

    def call(**inputs: Any) -> Any:
        computed.append(False)
        return model(**inputs)

    outputs = denoise(call, case, steps)
    return Found(computed, outputs)


def farthest(mine: Found, theirs: Found) -> float:
    """How far two outputs of one step are apart at most."""
    pairs = zip(mine.outputs, theirs.outputs, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


def assert_same(mine: Found, theirs: Found, atol: float = 1e-4) -> None:
    """The same schedule and outputs, with at least five steps of either kind."""
    assert mine.computed == theirs.computed
    assert farthest(mine, theirs) <= atol
    assert 5 <= sum(mine.computed) <= len(mine.computed) - 5, sum(mine.computed)
