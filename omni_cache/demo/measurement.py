"""Time and judge cached generations against uncached ones, prompt by prompt and in turn.

Knows pipelines and the public functions of omni_cache; knows nothing of how results are shown.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import omni_cache
from omni_cache.demo import demo_arguments, demo_pipeline_path
from omni_cache.pipelines.folder import Folder, Picture
from omni_cache.quality import Fidelity, fidelity_to, quality_of

if TYPE_CHECKING:
    from diffusers import FluxPipeline


@dataclass(frozen=True)
class Variant:
    """One strategy at one threshold.

    Attributes:
        strategy: as people write it.
        cache: as ``enable`` takes it.
        threshold: how much change the gate lets pass.
        flags: further flags for ``enable``, the threshold among them.
    """

    strategy: str
    cache: Literal["teacache", "magcache"]
    threshold: float
    flags: dict[str, Any]

    @property
    def label(self) -> str:
        """Strategy and threshold."""
        return f"{self.strategy} {self.threshold:g}"


@dataclass(frozen=True)
class StepTrace:
    """What the gate did on one step of a generation."""

    computed: bool
    distance: float | None
    accumulated: float | None
    reason: str


@dataclass(frozen=True)
class Generation:
    """One picture: how long it took, and how near it came to the uncached one.

    ``baseline`` is the uncached model run with only as many steps as the strategy computed.
    """

    prompt: str
    seconds: float
    steps: tuple[StepTrace, ...]
    fidelity: Fidelity
    baseline_seconds: float
    baseline_fidelity: Fidelity
    picture: Picture

    @property
    def computed_steps(self) -> int:
        """How many steps ran the block loop."""
        return sum(step.computed for step in self.steps)


@dataclass(frozen=True)
class VariantResult:
    """All generations of one variant, in the prompts' order; medians over them."""

    variant: Variant
    compile_seconds: float
    generations: tuple[Generation, ...]

    @property
    def seconds(self) -> float:
        """Median wall time of a whole generation."""
        return median(each.seconds for each in self.generations)

    @property
    def computed_steps(self) -> float:
        """Median number of computed steps."""
        return median(each.computed_steps for each in self.generations)

    @property
    def fidelity(self) -> Fidelity:
        """Median fidelity."""
        return quality_of([each.fidelity for each in self.generations]).median

    @property
    def baseline_seconds(self) -> float:
        """Median wall time of the uncached model with as many steps as were computed."""
        return median(each.baseline_seconds for each in self.generations)

    @property
    def baseline_fidelity(self) -> Fidelity:
        """Median fidelity of the uncached model with as many steps as were computed."""
        return quality_of([each.baseline_fidelity for each in self.generations]).median


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured in one run."""

    num_inference_steps: int
    prompts: tuple[str, ...]
    uncached_compile_seconds: float
    uncached_seconds: tuple[float, ...]
    uncached_pictures: tuple[Picture, ...]
    results: tuple[VariantResult, ...]

    def speedup(self, result: VariantResult) -> float:
        """Uncached wall time over the variant's, both medians over the prompts."""
        return median(self.uncached_seconds) / result.seconds

    def best_at(self, psnr: float) -> VariantResult | None:
        """The fastest variant with at least this PSNR in dB, if there is one."""
        good = [
            each
            for each in self.results
            if each.fidelity.psnr is None or each.fidelity.psnr >= psnr
        ]
        return min(good, key=lambda each: each.seconds, default=None)


def calibrated_variants(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    num_inference_steps: int,
    rel_l1_thresholds: Sequence[float],
    magnitude_thresholds: Sequence[float],
) -> list[Variant]:
    """Estimate TeaCache's coefficients and MagCache's ratios on a pipeline, for several thresholds.

    Args:
        prompts: what to generate for it; other prompts than those measured later.
    """

    def generate() -> None:
        for seed, prompt in enumerate(prompts):
            draw(pipe, prompt, seed, num_inference_steps)

    estimate = omni_cache.calibration
    coefficients = estimate.estimate_coefficients(
        pipe, generate, num_inference_steps, inner="eager"
    )
    ratios = estimate.estimate_mag_ratios(pipe, generate, num_inference_steps, inner="eager")
    return [
        Variant(
            "TeaCache",
            "teacache",
            threshold,
            {"rel_l1_thresh": threshold, "coefficients": coefficients},
        )
        for threshold in rel_l1_thresholds
    ] + [
        Variant(
            "MagCache",
            "magcache",
            threshold,
            {"threshold": threshold, "mag_ratios": ratios["cond"]},
        )
        for threshold in magnitude_thresholds
    ]


def measure(
    pipe: FluxPipeline,
    variants: Sequence[Variant],
    prompts: Sequence[str],
    num_inference_steps: int,
    inner: str,
    seed: int,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Generate every prompt uncached and with every variant, in turn.

    All variants of a prompt run one after another, each time in another order, so that a machine
    that slows down or speeds up does so for all of them. Compilation and one warm-up are timed
    apart. Prompt i is drawn from the noise of ``seed + i`` throughout.

    Args:
        inner: the inner compiler, of the uncached model also.
        on_progress: called with a word on what was done after each compilation and each prompt of
            each variant: ``(len(variants) + 1) * (len(prompts) + 1)`` times.
    """
    uncached = _copy(pipe)
    uncached.transformer.compile(backend=inner)
    uncached_compile_seconds = _warm_up(uncached, prompts[0], num_inference_steps)
    on_progress("compiled: uncached")
    cached = []
    for variant in variants:
        own = _copy(pipe)
        omni_cache.enable(own, cache=variant.cache, inner=inner, **variant.flags)
        cached.append((own, _warm_up(own, prompts[0], num_inference_steps)))
        on_progress(f"compiled: {variant.label}")

    uncached_seconds: list[float] = []
    references: list[Picture] = []
    generations: list[list[Generation]] = [[] for _ in variants]
    for number, prompt in enumerate(prompts):
        timed: dict[int, tuple[Picture, float]] = {}
        traces: dict[int, tuple[StepTrace, ...]] = {}
        for index in _rotated(range(-1, len(variants)), number):
            own = uncached if index < 0 else cached[index][0]
            timed[index] = draw(own, prompt, seed + number, num_inference_steps)
            if index >= 0:
                traces[index] = _trace(own)
            on_progress("uncached" if index < 0 else variants[index].label)
        reference, seconds = timed[-1]
        references.append(reference)
        uncached_seconds.append(seconds)
        shortened = {
            count: draw(uncached, prompt, seed + number, count)
            for count in sorted({sum(step.computed for step in trace) for trace in traces.values()})
        }
        for index, trace in traces.items():
            picture, seconds = timed[index]
            baseline, baseline_seconds = shortened[sum(step.computed for step in trace)]
            generations[index].append(
                Generation(
                    prompt=prompt,
                    seconds=seconds,
                    steps=trace,
                    fidelity=fidelity_to(reference, picture),
                    baseline_seconds=baseline_seconds,
                    baseline_fidelity=fidelity_to(reference, baseline),
                    picture=picture,
                )
            )
    return Measurement(
        num_inference_steps=num_inference_steps,
        prompts=tuple(prompts),
        uncached_compile_seconds=uncached_compile_seconds,
        uncached_seconds=tuple(uncached_seconds),
        uncached_pictures=tuple(references),
        results=tuple(
            VariantResult(variant, compile_seconds, tuple(each))
            for variant, (_, compile_seconds), each in zip(
                variants, cached, generations, strict=True
            )
        ),
    )


def _copy(pipe: FluxPipeline) -> FluxPipeline:
    """The same pipeline with a transformer and a scheduler of its own, to be compiled apart."""
    own = {name: copy.deepcopy(getattr(pipe, name)) for name in ("transformer", "scheduler")}
    copied = type(pipe)(**{**pipe.components, **own})
    copied.default_sample_size = pipe.default_sample_size
    copied.set_progress_bar_config(disable=True)
    return copied


def draw(
    pipe: FluxPipeline, prompt: str, seed: int, num_inference_steps: int
) -> tuple[Picture, float]:
    """Generate one picture in floating point; also returns the seconds that it took."""
    return Folder(demo_pipeline_path(), demo_arguments()).draw(
        pipe, prompt, seed, num_inference_steps
    )


def _warm_up(pipe: FluxPipeline, prompt: str, num_inference_steps: int) -> float:
    """Generate twice, to compile and to touch what stays; return the seconds of the first."""
    _, seconds = draw(pipe, prompt, 0, num_inference_steps)
    draw(pipe, prompt, 0, num_inference_steps)
    return seconds


def _trace(pipe: FluxPipeline) -> tuple[StepTrace, ...]:
    (trajectory,) = omni_cache.summary(pipe).trajectories
    return tuple(
        StepTrace(step.computed, step.distance, step.accumulated, step.reason)
        for step in trajectory.steps
    )


def _rotated(indices: Sequence[int], by: int) -> Iterator[int]:
    for position in range(len(indices)):
        yield indices[(position + by) % len(indices)]
