"""What a plan reaches, on samples that made it and on others, and which of several is chosen.

Knows qualities and targets; nothing of how plans are found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from omni_cache.planning.search import COMPUTE, REUSE, SKIP
from omni_cache.quality import Fidelity, percentile_of, quality_of
from omni_cache.strategies.base import is_count, is_number, require
from omni_cache.strategies.plans import Point, Quality
from omni_cache.tuning.rehearse import Rehearsal
from omni_cache.tuning.results import Result

MARGIN = {"psnr": 0.5, "ssim": 0.0005}
"""By how much the prediction has to be better than the target."""


@dataclass(frozen=True)
class Target:
    """What is asked of a plan: one of these, or nothing.

    Attributes:
        psnr: in dB.
        ssim: from 0 to 1.
        speedup: of the whole loop, in seconds.
        computed_steps: how many steps are computed; several numbers ask for a plan of each.
        confidence: the share of samples that have to meet a quality; None for half of them.

    Raises:
        ValueError: more than one is given, or a value is not allowed.
    """

    psnr: float | None = None
    ssim: float | None = None
    speedup: float | None = None
    computed_steps: int | Sequence[int] | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        given: dict[str, Any] = {key: each for key, each in self.given.items() if each is not None}
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are given; give at most one of {', '.join(self.given)}"
            )
        for name, value in given.items():
            positive = is_number(value) and value > 0
            allowed = {
                "psnr": (positive, "a positive number of decibels"),
                "ssim": (positive and value <= 1, "a number above 0 and at most 1"),
                "speedup": (is_number(value) and value > 1, "a number above 1"),
                "computed_steps": (
                    bool(self.counts) and all(is_count(each, 1) for each in self.counts),
                    "an integer >= 1, or several",
                ),
            }
            require(allowed[name][0], name, value, allowed[name][1])
        share = self.confidence
        if share is not None:
            fits = is_number(share) and 0 < share < 1
            require(fits, "confidence", share, "a number between 0 and 1, or None")
            if not self.is_quality:
                raise ValueError("confidence is given without psnr or ssim, which it refers to")

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of computed steps that were asked for."""
        several: Any = self.computed_steps
        if isinstance(several, Sequence) and not isinstance(several, str):
            return tuple(several)
        return () if several is None else (several,)

    @property
    def named(self) -> dict[str, float | tuple[float, ...]]:
        """What was asked for, by the name of the argument."""
        asked = {**self.given, "confidence": self.confidence}
        return {
            name: tuple(map(float, value)) if isinstance(value, Sequence) else float(value)
            for name, value in asked.items()
            if value is not None
        }

    @property
    def given(self) -> dict[str, float | int | Sequence[int] | None]:
        """The targets by name."""
        return {
            "psnr": self.psnr,
            "ssim": self.ssim,
            "speedup": self.speedup,
            "computed_steps": self.computed_steps,
        }

    @property
    def is_quality(self) -> bool:
        """Whether a quality was asked for."""
        return self.psnr is not None or self.ssim is not None

    def is_met(self, fidelities: Sequence[Fidelity], margin: bool = False) -> bool:
        """Whether a quality is reached, by the median or by as many as confidence asks for."""
        reached = self.reached(fidelities)
        for name, wanted in (("psnr", self.psnr), ("ssim", self.ssim)):
            if wanted is not None:
                limit = wanted + (MARGIN[name] if margin else 0.0)
                return reached is None or reached >= min(limit, 1.0 if name == "ssim" else limit)
        return True

    def reached(self, fidelities: Sequence[Fidelity]) -> float | None:
        """What the target's quality comes to; None for identical results."""
        values = [each.ssim if self.ssim is not None else each.psnr for each in fidelities]
        return percentile_of(values, 0.5 if self.confidence is None else 1 - self.confidence)


@dataclass(frozen=True)
class Played:
    """A plan on some samples: how near each result came, and how long it took.

    Attributes:
        fidelities: to the uncached results, sample by sample.
        seconds: of a whole ``generate``, the median.
    """

    fidelities: tuple[Fidelity, ...]
    seconds: float

    @property
    def quality(self) -> Quality:
        """Median and 5th percentile."""
        median_, fifth = quality_of(self.fidelities).median, quality_of(self.fidelities).fifth
        psnr, low = (math.inf if each.psnr is None else each.psnr for each in (median_, fifth))
        return Quality(psnr, low, median_.ssim, fifth.ssim)

    def less(self, decibels: float) -> Played:
        """What it would be if all results were off by so much more; SSIM falls with the error."""
        factor = 10 ** (decibels / 10)
        fidelities = tuple(
            Fidelity(
                None if each.psnr is None else each.psnr - decibels,
                None if each.ssim is None else 1 - factor * (1 - each.ssim),
            )
            for each in self.fidelities
        )
        return replace(self, fidelities=fidelities)


def played(
    rehearsal: Rehearsal, point: Point, samples: Sequence[int], references: Sequence[Result]
) -> Played:
    """Play a plan on samples.

    Args:
        rehearsal: plays plans.
        point: the plan.
        samples: their numbers.
        references: what each of them returns uncached.
    """
    runs = [rehearsal.play(point, each) for each in samples]
    pairs = zip(references, runs, strict=True)
    fidelities = tuple(reference.fidelity(run.result) for reference, run in pairs)
    return Played(fidelities, median(run.seconds for run in runs))


@dataclass(frozen=True)
class Candidate:
    """A plan with what it reaches on the samples that made it, and on others."""

    point: Point
    predicted: Played
    judged: Played

    @property
    def computed(self) -> int:
        """How many steps it computes."""
        return self.point.actions.count(COMPUTE)

    @property
    def finished(self) -> Point:
        """The plan, with what it reaches written into it."""
        return replace(
            self.point,
            predicted=self.predicted.quality,
            judged=self.judged.quality,
            seconds=self.judged.seconds,
        )


def undominated(
    candidates: Sequence[Candidate], uncached_seconds: float | None = None
) -> list[Candidate]:
    """From the cheapest to the one that costs most: each is better than before.

    Seconds are noisy, so that the numbers of computed and of reused steps say what is cheaper. What
    is better the judged samples say, since a prediction flatters the plans that were refined.

    Args:
        candidates: one at least.
        uncached_seconds: of a whole ``generate``, which tells what a reused step costs; by default
            next to nothing.
    """
    share = 0.0 if uncached_seconds is None else _share_of_reused(candidates, uncached_seconds)
    kept: list[Candidate] = []

    def cost(each: Candidate) -> tuple[float, int]:
        actions = each.point.actions
        return each.computed + share * actions.count(REUSE), -actions.count(SKIP)

    for each in sorted(candidates, key=cost):
        if not kept or _decibels(each) > _decibels(kept[-1]):
            kept.append(each)
    return kept


def _share_of_reused(candidates: Sequence[Candidate], uncached_seconds: float) -> float:
    """What a reused step takes of a computed one, from 0 to 1: the median over what was played."""
    shares = []
    for each in candidates:
        actions = each.point.actions
        reused, computed_seconds = actions.count(REUSE), uncached_seconds / len(actions)
        if reused:
            shares.append((each.judged.seconds / computed_seconds - each.computed) / reused)
    return min(max(median(shares), 0.0), 1.0) if shares else 0.0


def choose(
    candidates: Sequence[Candidate], target: Target, uncached_seconds: float
) -> tuple[int, str | None]:
    """The cheapest plan that meets a target, by prediction with a margin and as judged.

    Args:
        candidates: from the cheapest on, one at least.
        target: what is asked. Without a target the last one is chosen.
        uncached_seconds: of a whole ``generate``.

    Returns:
        Its position, and what to warn of, None where the target is met.
    """
    last = len(candidates) - 1
    if target.counts:
        computed, most = [each.computed for each in candidates], max(target.counts)
        fits = [place for place, each in enumerate(computed) if each <= most]
        if fits:
            return fits[-1], None
        return 0, f"no plan computes only {most} steps; {computed[0]} is the least"
    if target.speedup is not None:
        speedups = [uncached_seconds / each.judged.seconds for each in candidates]
        fits = [place for place, each in enumerate(speedups) if each >= target.speedup]
        if fits:
            return fits[-1], None
        fastest = max(speedups)
        return speedups.index(fastest), (
            f"no plan is {target.speedup:g} times as fast as uncached; the fastest, {fastest:.2f} "
            "times, is chosen"
        )
    if target.psnr is None and target.ssim is None:
        return last, None
    for place, each in enumerate(candidates):
        predicted = target.is_met(each.predicted.fidelities, margin=True)
        if predicted and target.is_met(each.judged.fidelities):
            return place, None
    wanted = f"psnr={target.psnr:g}" if target.psnr is not None else f"ssim={target.ssim:g}"
    played = (candidates[last].predicted.fidelities, candidates[last].judged.fidelities)
    known = (target.reached(each) for each in played)
    predicted_, judged_ = ("equals uncached" if each is None else f"{each:.4g}" for each in known)
    return last, (
        f"no plan reaches {wanted} with a margin; the one that computes most, "
        f"{candidates[last].computed} steps, is chosen, and reaches {predicted_} on the samples "
        f"that made it and {judged_} on the judged ones"
    )


def _decibels(candidate: Candidate) -> float:
    return candidate.judged.quality.psnr
