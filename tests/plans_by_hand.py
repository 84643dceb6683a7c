"""Plans that nobody has tuned: inner products of smooth curves, and weights that fit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from toy_transformer import CHANNELS, TOKENS, Loop, ToyTransformer

from omni_cache.pipelines.identity import owner_of
from omni_cache.planning.gram import Gram
from omni_cache.planning.search import COMPUTE, REUSE, SKIP, Schedule
from omni_cache.strategies import Plan
from omni_cache.strategies.plans import Content, Made, Point, Quality, Signature
from omni_cache.strategies.retiming import fitted

SIGNS = {"c": COMPUTE, "r": REUSE, "s": SKIP}


def curves(times: Sequence[float], seed: int = 0, width: int = 24) -> np.ndarray:
    """(T, width): smooth functions of time."""
    draw = np.random.default_rng(seed)
    powers = np.stack([np.asarray(times) ** power for power in range(4)], axis=1)
    return powers @ draw.normal(size=(4, width)) * 0.5 + draw.normal(size=width)


def gram(times: Sequence[float], seed: int = 0) -> Gram:
    """Inner products of curves."""
    residuals, inputs, outputs = (curves(times, 3 * seed + each) for each in range(3))
    return Gram(
        residuals @ residuals.T, inputs @ residuals.T, inputs @ inputs.T, outputs @ outputs.T
    )


def quality(psnr: float) -> Quality:
    return Quality(psnr, psnr - 2.0, 0.9, 0.8)


def content(
    actions: str = "ccrcrcrr", branches: Sequence[str] = ("cond",), depth: int = 2, **fields: Any
) -> Content:
    """What a plan of the toy holds, with one point that is followed and one that computes more.

    Args:
        actions: a letter for each step: compute, reuse, skip.
        branches: names of the guidance branches.
        depth: how many residuals are weighed.
        fields: of the signature, in place of those of the toy's loops.
    """
    steps = len(actions)
    sigmas = tuple(1.0 - step / steps for step in range(steps))
    grams = {"": {name: gram(sigmas, seed) for seed, name in enumerate(branches)}}
    owner = owner_of("", ToyTransformer())
    signature = Signature(
        transformers={"": (owner.classes[0], owner.digest)},
        scheduler=None,
        sigmas=(*sigmas, 0.0),
        timesteps=tuple(Loop(steps=steps).timesteps),
        owners=("",) * steps,
        size=(TOKENS, CHANNELS),
        dtype=str(torch.float32),
        guidance=None,
        versions={"torch": torch.__version__},
    )
    signature = replace(signature, **fields)
    made = Made("2026-11-26T12:00:00+00:00", "default", 16, 16, 250.5, 2.0, {"psnr": 40.0})
    points = []
    for letters, psnr, seconds in ((actions, 41.0, 1.0), (actions.replace("r", "c", 1), 47.0, 1.5)):
        schedule = Schedule(tuple(SIGNS[letter] for letter in letters), 0.0)
        point: Point = fitted(schedule, grams, signature.owners, depth, with_input=False)
        points.append(
            replace(point, predicted=quality(psnr), judged=quality(psnr - 0.5), seconds=seconds)
        )
    return Content(
        signature,
        made,
        grams,
        sensitivity=tuple(1.0 + step for step in range(steps)),
        output_sensitivity=(),
        frontier=tuple(points),
        chosen=0,
        spread=tuple(1.1 + step / 100 for step in range(steps)),
    )


def plan(*args: Any, guardrail: float | None = None, **fields: Any) -> Plan:
    """A plan of the toy, without a guardrail unless one is given."""
    return Plan(content=content(*args, **fields), guardrail=guardrail)
