"""``omni_cache.tune``: from a quality, a speedup or a number of steps to a plan that was verified.

calibrate -> sensitivity -> schedules -> refine, closed loop -> judge -> choose
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omni_cache.strategies.base import DEFAULT_STEPS, is_count, one_of, require
from omni_cache.strategies.plans import Plan
from omni_cache.tuning.budget import EFFORTS, Budget, Effort, Progress
from omni_cache.tuning.judge import Target
from omni_cache.tuning.rehearse import Generate, rehearsing

DEPTH = 3
"""How many computed steps a plan keeps."""


def tune(
    target: Any,
    generate: Generate | None = None,
    *,
    psnr: float | None = None,
    ssim: float | None = None,
    speedup: float | None = None,
    computed_steps: int | None = None,
    confidence: float | None = None,
    samples: int = 16,
    judged: int = 16,
    effort: Effort = "default",
    prompts: Sequence[str] | None = None,
    num_inference_steps: int = DEFAULT_STEPS,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **flags: Any,
) -> Plan:
    """Make a plan: for each step of the loop whether to compute, to reuse or to skip, and how.

    At most one of ``psnr``, ``ssim``, ``speedup`` and ``computed_steps`` is given; without any the
    whole frontier is made alike, and the plan that computes most is chosen.

    Args:
        target: a diffusers pipeline or a module, enabled or not; it is left as it was.
        generate: runs the whole loop for a sample, the same every time, and returns what quality
            is judged on: a tensor, an array, a PIL image, or a list of them. Samples ``0`` to
            ``samples - 1`` calibrate, the next ``judged`` ones judge.
        psnr: decibels that the median of the results has to reach.
        ssim: what the median of the SSIM has to reach.
        speedup: how many times faster than uncached ``generate`` has to be.
        computed_steps: how many steps may be computed.
        confidence: with ``psnr`` or ``ssim``, the share of the results that have to reach it, such
            as 0.9, in place of half of them.
        samples: how many samples calibrate, at least 2.
        judged: how many other samples judge, at least 2.
        effort: "low" fits to uncached loops alone and runs at most 4 loops for each calibration
            sample; "default" refines plans by what they do to the results, at most 25; "high" as
            long as that helps.
        prompts: for a pipeline, in place of ``generate``: sample i is drawn with prompt
            ``i % len(prompts)`` from the noise of ``seed + i``.
        num_inference_steps: steps of a loop, with ``prompts``.
        arguments: what the pipeline's call gets besides, with ``prompts``.
        seed: of the noise, with ``prompts``.
        progress: is told of every run; by default a line on stderr says what is being done.
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
        generate = _drawing(target, prompts or (), num_inference_steps, arguments or {}, seed)
    budget = Budget(effort, samples, progress or _Lines())
    with rehearsing(target, generate, flags, budget) as rehearsal:
        return _Tuning(rehearsal, wanted, samples, judged).plan()
