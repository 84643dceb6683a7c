"""Uncached loops of all calibration samples: what they return, and what their steps have in common.

Also checks that ``generate`` can be tuned at all: it has to be repeatable, to run the model through
the cache, and to give finite numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import torch

from omni_cache.pipelines.enable import models_of
from omni_cache.pipelines.identity import owner_of
from omni_cache.strategies.base import is_number
from omni_cache.strategies.plans import Signature
from omni_cache.tuning.gather import Grams, Vectors
from omni_cache.tuning.rehearse import Rehearsal
from omni_cache.tuning.results import Result


@dataclass(frozen=True)
class Calibrated:
    """What uncached loops have told.

    Attributes:
        signature: of the loops.
        grams: of each sample.
        references: of each sample, what it returned.
        seconds: of one loop, the median.
    """

    signature: Signature
    grams: list[Grams]
    references: list[Result]
    seconds: float


def calibrate(rehearsal: Rehearsal, samples: Sequence[int]) -> Calibrated:
    """Run every sample uncached, and the first of them twice.

    Raises:
        ValueError: two runs of one sample differ, loops of two samples have other steps, or
            something is not finite.
        RuntimeError: nothing ran through the cache.
    """
    grams: list[Grams] = []
    references: list[Result] = []
    seconds: list[float] = []
    signature: Signature | None = None
    for sample in samples:
        vectors = Vectors()
        played = rehearsal.play(None, sample, observer=vectors)
        if not vectors.times and rehearsal.compiled_for.skips:
            # A model in pieces, or one with an extractor: its forwards cannot be skipped.
            rehearsal.compiled_for = replace(rehearsal.compiled_for, skips=False)
            played = rehearsal.play(None, sample, observer=vectors)
        if not vectors.times:
            raise RuntimeError(
                "generate ran no step of the target through the cache; it has to call the target, "
                "or the pipeline, in this thread and under torch.no_grad()"
            )
        if not played.result.is_finite:
            raise ValueError(f"generate({sample}) returned numbers that are not finite")
        names = rehearsal.names()
        found = _signature(rehearsal.target, vectors, {run: names[run] for run in vectors.runs})
        if signature is None:
            signature = found
            rehearsal.budget.calls = played.ran
            _check_repeatable(rehearsal, sample, played.result)
        elif found.owners != signature.owners or found.size != signature.size:
            raise ValueError(
                f"generate({sample}) runs another loop than generate({samples[0]}): "
                f"{len(found.owners)} steps with results of shape {found.size}, and "
                f"{len(signature.owners)} with {signature.size}; a plan is for loops that are alike"
            )
        grams.append(vectors.products(names, len(signature.owners)))
        _check_branches(grams[0], grams[-1], f"generate({sample})")
        references.append(played.result)
        seconds.append(played.seconds)
    assert signature is not None  # there is a sample
    return Calibrated(signature, grams, references, median(seconds))


def _check_repeatable(rehearsal: Rehearsal, sample: int, result: Result) -> None:
    again = rehearsal.play(None, sample).result
    largest = float(np.abs(again.difference(result)).max())
    if largest > 0:
        raise ValueError(
            f"generate is not repeatable: generate({sample}) returned results that differ by up to "
            f"{largest:.3g} when it was called twice; let it seed all noise by the sample's number"
        )


def _check_branches(first: Grams, found: Grams, called: str) -> None:
    """Raise ValueError where a loop has other branches than the first, or one of a part of it."""
    branches, others = (
        {name: sorted(each) for name, each in one.items()} for one in (found, first)
    )
    if branches != others:
        raise ValueError(
            f"{called} has the branches {branches}, where the first loop has {others}; a plan is "
            "for loops that are alike"
        )
    for grams in found.values():
        ran = {name: np.flatnonzero(gram.present).tolist() for name, gram in grams.items()}
        if len({tuple(steps) for steps in ran.values()}) > 1:
            raise ValueError(
                f"{called} runs its branches at different steps, {ran}; a plan is for loops whose "
                "branches run together"
            )


def _signature(target: Any, vectors: Vectors, names: Mapping[Any, str]) -> Signature:
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"generate runs {len(names)} loops for a sample; a plan is for one, so let generate "
            "run one, with a batch where it makes several results"
        )
    owners: dict[int, str] = {
        step: names[run]
        for run, branches in vectors.runs.items()
        for calls in branches.values()
        for step in calls
    }
    steps = range(max(owners) + 1)
    missing = [step for step in steps if step not in owners]
    if missing:
        raise ValueError(
            f"generate skips step {missing[0]} of {len(steps)}; a plan is for whole loops"
        )
    scheduler = getattr(target, "scheduler", None)
    identities = {
        name: owner_of(name, module, scheduler) for name, module in models_of(target).items()
    }
    guidance: Any = getattr(target, "guidance_scale", None)
    times = [vectors.times[step] for step in steps]
    known = [each for each in times if each is not None]
    return Signature(
        transformers={
            name: (each.classes[0], each.digest)
            for name, each in identities.items()
            if name in owners.values()
        },
        scheduler=None if scheduler is None else type(scheduler).__name__,
        sigmas=_sigmas(scheduler),
        timesteps=tuple(known) if len(known) == len(times) else None,
        owners=tuple(owners[step] for step in steps),
        size=vectors.size,
        dtype=vectors.dtype,
        guidance=float(guidance) if is_number(guidance) else None,
        versions={name: version(name) for name in ("torch", "diffusers", "omni-cache")},
    )


def _sigmas(scheduler: Any) -> tuple[float, ...] | None:
    listed = getattr(scheduler, "sigmas", None)
    listed = getattr(scheduler, "timesteps", None) if listed is None else listed
    if listed is None:
        return None
    return tuple(torch.as_tensor(listed, dtype=torch.float64).flatten().tolist())
