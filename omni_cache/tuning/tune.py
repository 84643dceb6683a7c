"""``omni_cache.tune``: from a quality, a speedup or a number of steps to a plan that was verified.

calibrate -> sensitivity -> schedules -> refine, closed loop -> judge -> choose
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from omni_cache.pipelines.folder import Folder
from omni_cache.strategies import Guard, Plan
from omni_cache.strategies.base import DEFAULT_STEPS, is_count, is_number, one_of, require
from omni_cache.strategies.plans import Content, Made, Point
from omni_cache.tuning.budget import EFFORTS, Budget, Effort, Progress
from omni_cache.tuning.calibrate import calibrate
from omni_cache.tuning.drafts import Drafts
from omni_cache.tuning.gather import mean, spread
from omni_cache.tuning.improve import improved
from omni_cache.tuning.judge import Candidate, Target, choose, played, undominated
from omni_cache.tuning.refine import Refiner
from omni_cache.tuning.rehearse import Generate, Rehearsal, rehearsing
from omni_cache.tuning.sensitivity import measure
from omni_cache.tuning.unfinished import Unfinished

DEPTH = 3
"""How many computed steps a plan keeps."""


def tune(
    target: Any,
    generate: Generate | None = None,
    *,
    psnr: float | None = None,
    ssim: float | None = None,
    speedup: float | None = None,
    computed_steps: int | Sequence[int] | None = None,
    confidence: float | None = None,
    samples: int = 16,
    judged: int = 16,
    effort: Effort = "default",
    minutes: float | None = None,
    prompts: Sequence[str] | None = None,
    num_inference_steps: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    resume: str | Path | None = None,
    **flags: Any,
) -> Plan:
    """Make a plan: for each step of the loop whether to compute or to reuse, and by what weights.

    At most one of ``psnr``, ``ssim``, ``speedup`` and ``computed_steps`` is given; without any the
    whole frontier is made alike, and the plan that computes most is chosen.

    Args:
        target: a diffusers pipeline or a module, enabled or not; it is left as it was.
        generate: runs the whole loop for a sample, the same every time, and returns what quality
            is judged on: a tensor, an array, a PIL image, or a list of them. Samples ``0`` to
            ``samples - 1`` calibrate, the next ``judged`` ones judge.
        psnr: decibels that the median of the results has to reach.
        ssim: what the median of the SSIM has to reach.
        speedup: how many times faster than uncached ``generate`` has to be, by times measured here.
            Such plans also skip forwards, where that hardly costs quality.
        computed_steps: how many steps may be computed. Several numbers ask for a plan of each and
            for no others: they share calibration and refinement, and the largest is chosen.
        confidence: with ``psnr`` or ``ssim``, the share of the results that have to reach it, such
            as 0.9, in place of half of them.
        samples: how many samples calibrate, at least 2.
        judged: how many other samples judge, at least 2.
        effort: "low" fits to uncached loops alone and runs at most 4 loops for each calibration
            sample; "default" refines plans by what they do to the results, at most 25; "high" as
            long as that helps.
        minutes: how long it may take at most, judging included and what was interrupted too. Where
            this is less than the effort would take, plans are refined less; calibration and
            judging are run in any case.
        prompts: for a pipeline, in place of ``generate``: sample i is drawn with prompt
            ``i % len(prompts)`` from the noise of ``seed + i``.
        num_inference_steps: steps of a loop, with ``prompts`` alone; 50 where it is left out.
        arguments: what the pipeline's call gets besides, with ``prompts`` alone.
        seed: of the noise, with ``prompts`` alone; 0 where it is left out.
        progress: is told of every run; by default a line on stderr says what is being done.
        resume: a file that is kept while plans are refined. Where it is there, from the same
            arguments, its plans are taken over. It is removed at the end.
        flags: further flags for ``enable``, such as ``inner`` or ``history_dtype``.

    Returns:
        The plan, with its whole frontier.

    Raises:
        TypeError: ``target`` is not a module and has no transformer, or ``generate`` returns what
            has no numbers.
        ValueError: an argument is not allowed; ``generate`` is not repeatable; or numbers are not
            finite.
        RuntimeError: ``generate`` ran no step through the cache.
    """
    wanted = Target(psnr, ssim, speedup, computed_steps, confidence)
    require(is_count(samples, 2), "samples", samples, "an integer >= 2")
    require(is_count(judged, 2), "judged", judged, "an integer >= 2")
    one_of("effort", effort, EFFORTS)
    if (generate is None) == (prompts is None):
        raise ValueError("give either generate or, for a pipeline, prompts")
    if generate is None:
        steps = DEFAULT_STEPS if num_inference_steps is None else num_inference_steps
        require(is_count(steps, 1), "num_inference_steps", steps, "an integer >= 1")
        generate = _drawing(target, prompts or (), steps, arguments or {}, seed or 0)
    else:
        drawing = {"num_inference_steps": num_inference_steps, "arguments": arguments, "seed": seed}
        for name, given in drawing.items():
            allowed = "left out with generate, which runs the loop itself"
            require(given is None, name, given, allowed)
    allowed = "a number of minutes > 0, or None"
    require(minutes is None or (is_number(minutes) and minutes > 0), "minutes", minutes, allowed)
    seconds = math.inf if minutes is None else 60 * minutes
    budget = Budget(effort, samples, progress or _Lines(), limit_seconds=seconds, judged=judged)
    # Results that are kept cost memory, and what skips a forward is worse than what reuses blocks.
    compiled_for = Guard(None, DEPTH, inputs=True, skips=speedup is not None)
    with rehearsing(target, generate, flags, compiled_for, budget) as rehearsal:
        unfinished = Unfinished(None if resume is None else Path(resume))
        plan = _Tuning(rehearsal, wanted, samples, judged, unfinished).plan()
    unfinished.remove()
    return plan


class _Tuning:
    """One tuning, stage by stage."""

    def __init__(
        self,
        rehearsal: Rehearsal,
        target: Target,
        samples: int,
        judged: int,
        unfinished: Unfinished,
    ) -> None:
        self._unfinished = unfinished
        self._rehearsal, self._budget, self._target = rehearsal, rehearsal.budget, target
        self._samples = range(samples)
        self._others = range(samples, samples + judged)

    def plan(self) -> Plan:
        """All stages."""
        budget = self._budget
        budget.begin(f"calibrates: {budget.announcement}")
        before = self._unfinished.read()
        # What was interrupted is known; that it goes on is checked by one sample.
        calibrated = calibrate(self._rehearsal, self._samples[: None if before is None else 1])
        if self._target.ssim is not None and not calibrated.references[0].is_picture:
            raise ValueError(
                f"ssim={self._target.ssim!r} is asked of what is no picture: generate has to "
                "return RGB pictures with numbers in [0, 1], or ask for psnr"
            )
        made = Made(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            effort=budget.effort,
            samples=len(self._samples),
            judged=len(self._others),
            loops=budget.loops,
            seconds=calibrated.seconds,
            targets=self._target.named,
        )
        grams = mean(calibrated.grams)
        content = Content(
            calibrated.signature, made, grams, (), (), (), 0, spread(calibrated.grams)
        )
        self._rehearsal.content = content
        references = calibrated.references
        if before is None:
            budget.begin("measures how sensitive the result is")
            held = _held(budget, len(calibrated.signature.owners))
            found = measure(self._rehearsal, calibrated.grams, held)
            content = replace(
                content,
                sensitivity=tuple(found.residuals.tolist()),
                output_sensitivity=tuple(found.outputs.tolist()),
            )
        else:
            self._unfinished.check(before, content, references[0])
            made = replace(made, seconds=before.content.made.seconds)
            content, references = replace(before.content, made=made), before.references
            self._rehearsal.content = content
            budget.earlier = before.content.made.loops
            budget.earlier_seconds = before.content.made.tuning_seconds or 0.0
        done = {each.computed_steps: each for each in content.frontier}

        def keep(*points: Point) -> None:
            done.update({each.computed_steps: each for each in points})
            spent = replace(made, loops=budget.loops, tuning_seconds=budget.seconds)
            self._unfinished.keep(replace(content, made=spent, frontier=tuple(done.values())))

        if before is None:
            self._unfinished.begin(references)
        keep()
        refiner = Refiner(self._rehearsal, references, content.grams)
        drafts = Drafts(content, DEPTH, skips=self._rehearsal.compiled_for.skips)
        points = improved(refiner, drafts, self._target, made.seconds or 1.0, dict(done), keep)
        budget.begin("plays every plan on the samples that made it")
        predicted = [
            played(self._rehearsal, each, self._samples, references).less(each.optimism)
            for each in points
        ]
        budget.begin("judges every plan on other samples", judges=True)
        uncached = [self._rehearsal.play(None, each) for each in self._others]
        others = [each.result for each in uncached]
        seconds = median(each.seconds for each in uncached)
        candidates = undominated(
            [
                Candidate(point, prediction, played(self._rehearsal, point, self._others, others))
                for point, prediction in zip(points, predicted, strict=True)
            ],
            seconds,
        )
        chosen, unmet = choose(candidates, self._target, seconds)
        if unmet is not None:
            warnings.warn(f"omni-cache: {unmet}.", stacklevel=3)
        made = replace(
            made,
            loops=budget.loops + budget.judging,
            seconds=seconds,
            tuning_seconds=budget.seconds,
        )
        frontier = tuple(each.finished for each in candidates)
        return Plan(content=replace(content, made=made, frontier=frontier, chosen=chosen))


def _drawing(
    pipeline: Any,
    prompts: Sequence[str],
    num_inference_steps: int,
    arguments: Mapping[str, Any],
    seed: int,
) -> Generate:
    """What draws sample i with its prompt and noise."""
    fits = not isinstance(prompts, str) and len(prompts) > 0
    require(fits, "prompts", prompts, "a list of at least one string")
    folder = Folder(Path(), arguments)

    def generate(sample: int) -> Any:
        prompt = prompts[sample % len(prompts)]
        return folder.draw(pipeline, prompt, seed + sample, num_inference_steps)[0]

    return generate


def _held(budget: Budget, steps: int) -> list[range]:
    """The steps that each sample holds alone, within a quarter of what is left.

    Two samples share them, or more where that may be spent. Each costs a loop and half a loop for
    every step.
    """
    samples, stride = {"low": 2, "default": 4, "high": 8}[budget.effort], 2
    while samples > 1 and samples * (1 + steps / stride / 2) > budget.left / 4:
        samples -= 1
    while stride < steps and samples * (1 + steps / stride / 2) > budget.left / 4:
        stride += 1
    samples = min(samples, budget.samples)
    return [range(1 + number % stride, steps, stride) for number in range(samples)]


class _Lines:
    """Says on stderr what is being done, a line for each stage."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, stage: str, loops: float, planned: float) -> None:
        if stage != self._stage:
            self._stage = stage
            print(f"omni-cache tune: {stage} ({loops:.0f} loops so far)", file=sys.stderr)
