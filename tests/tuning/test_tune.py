"""From a target to a plan on a toy: what is asked is met or said, and nothing is left behind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toy_transformer import CHANNELS, TOKENS, ToyTransformer, gaussian

import omni_cache
from omni_cache import tune
from omni_cache.pipelines import enabled_flags, is_enabled
from omni_cache.strategies.plans import Content

STEPS = 10


def denoised(
    model: Any,
    sample: int,
    branches: tuple[str, ...] = ("cond",),
    steps: int = STEPS,
    loudness: float = 1.0,
) -> Tensor:
    """The latents at the end of a loop, with prompts that are so many times as large as usual."""
    latents = gaussian(sample, 1, TOKENS, CHANNELS)
    prompts = {name: loudness * gaussian(f"{name} {sample}", 1, 5, CHANNELS) for name in branches}
    with torch.no_grad(), omni_cache.generation(steps):
        for step in range(steps):
            timestep = torch.tensor([1000.0 * (1 - step / steps)])
            noises = []
            for name, prompt in prompts.items():
                with omni_cache.branch(name):
                    noises.append(model(latents, timestep, prompt))
            latents = latents - torch.stack(noises).sum(0) / steps
    return latents


def tuned(model: Any, generate: Callable[[int], Any] | None = None, **arguments: Any) -> Any:
    settings = {"samples": 3, "judged": 2, "inner": "eager", "progress": lambda *_: None}
    return tune(model, generate or (lambda i: denoised(model, i)), **{**settings, **arguments})


def median_psnr(references: list[Tensor], results: list[Tensor]) -> float:
    """Of latents, whose peak is how far the reference reaches; of equal ones it is infinite."""
    found = []
    for one, other in zip(references, results, strict=True):
        error = float(((one - other) ** 2).mean())
        reach = float(one.max() - one.min())
        found.append(20 * math.log10(reach) - 10 * math.log10(error) if error else math.inf)
    return float(np.median(found))


def test_a_plan_does_what_it_says() -> None:
    model = ToyTransformer()
    plan = tuned(model, computed_steps=4)
    assert plan.point.computed_steps == 4
    assert [each.computed_steps for each in plan.frontier] == sorted(
        each.computed_steps for each in plan.frontier
    )
    samples = [3, 4]
    uncached = [denoised(model, each) for each in samples]
    omni_cache.enable(model, plan, guardrail=None, inner="eager")
    followed = [denoised(model, each) for each in samples]
    assert omni_cache.summary(model).computed_steps == 4
    assert plan.point.judged.psnr == pytest.approx(median_psnr(uncached, followed), abs=1e-3)
    assert plan.point.judged.ssim is None  # latents are no pictures


@pytest.mark.parametrize(("loudness", "gain"), [(100.0, 1.0), (1.0, 3.0)])
def test_the_guardrail_reaches_what_was_planned_on_loud_prompts_and_off_weights(
    loudness: float, gain: float
) -> None:
    """A plan keeps to its quality on what no sample was like, and not without a guardrail."""
    model, samples = ToyTransformer(), range(20, 28)
    plan = tuned(
        model,
        lambda i: denoised(model, i, steps=20),
        computed_steps=9,
        effort="low",
        samples=8,
        judged=8,
    )
    for block in model.blocks:
        block.qkv.weight.mul_(gain)

    def drawn() -> list[Tensor]:
        return [denoised(model, i, steps=20, loudness=loudness) for i in samples]

    uncached, reached = drawn(), {}
    for guardrail in (plan.guardrail, None):
        omni_cache.enable(model, plan, guardrail=guardrail, inner="eager")
        reached[guardrail] = median_psnr(uncached, drawn())
        inserted = omni_cache.summary(model).computed_steps > 9
        assert inserted == (guardrail is not None)
        omni_cache.disable(model)
    assert reached[plan.guardrail] > plan.point.judged.psnr - 3
    assert reached[None] < plan.point.judged.psnr - 10


def test_several_numbers_of_computed_steps_share_one_tuning(tmp_path: Path) -> None:
    model, stages = ToyTransformer(), []
    plan = tuned(
        model, computed_steps=[5, 3], samples=2, progress=lambda stage, *_: stages.append(stage)
    )
    assert {each.computed_steps for each in plan.frontier} <= {3, 5}
    assert plan.point is plan.frontier[-1]
    for count in (3, 5):
        assert f"tries schedules of {count} computed steps" in stages
    changes = [
        stage for stage, before in zip(stages, ["", *stages], strict=False) if stage != before
    ]
    assert sum("sensitive" in each for each in changes) == 1
    plan.save(tmp_path / "plan.json")
    made = Content.load(tmp_path / "plan.json").made
    assert made == plan.content.made
    assert made.targets == {"computed_steps": (5.0, 3.0)}
    assert made.tuning_seconds is not None


def test_nothing_is_left_behind_on_a_model_that_was_not_enabled() -> None:
    model = ToyTransformer()
    before = denoised(model, 0)
    tuned(model, effort="low")
    assert not is_enabled(model)
    assert torch.equal(denoised(model, 0), before)


def test_an_enabled_model_keeps_its_cache_also_where_tuning_fails() -> None:
    model = ToyTransformer()
    flags = {"cache": "teacache", "coefficients": [1.0, 0.0], "inner": "eager"}
    omni_cache.enable(model, **flags)
    cached, found = denoised(model, 0), enabled_flags(model)

    def failing(sample: int) -> Tensor:
        if sample == 1:
            raise InterruptedError
        return denoised(model, sample)

    with pytest.raises(InterruptedError):
        tuned(model, failing)
    assert enabled_flags(model) == found
    assert torch.equal(denoised(model, 0), cached)
    tuned(model, effort="low")
    assert enabled_flags(model) == found
    assert torch.equal(denoised(model, 0), cached)


def test_a_generate_that_is_not_repeatable_is_refused() -> None:
    model, calls = ToyTransformer(), []

    def generate(sample: int) -> Tensor:
        calls.append(sample)
        return denoised(model, sample) + 0.25 * (len(calls) == 2)

    with pytest.raises(ValueError, match=r"not repeatable: generate\(0\).*differ by up to 0\.25"):
        tuned(model, generate)
    assert calls == [0, 0]


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = ToyTransformer()

    def generate(sample: int) -> Tensor:
        return denoised(model, sample) * (float("nan") if sample == 2 else 1.0)

    with pytest.raises(ValueError, match=r"generate\(2\) returned numbers that are not finite"):
        tuned(model, generate)

    with torch.no_grad():
        model.blocks[1].out.bias[0] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        tuned(model, lambda sample: denoised(model, sample).nan_to_num(0, 0, 0))


def test_a_generate_that_runs_nothing_is_refused() -> None:
    with pytest.raises(RuntimeError, match="ran no step of the target through the cache"):
        tuned(ToyTransformer(), lambda sample: torch.zeros(3))


def test_loops_of_different_length_are_refused() -> None:
    model = ToyTransformer()
    with pytest.raises(ValueError, match=r"generate\(1\) runs another loop than generate\(0\)"):
        tuned(model, lambda sample: denoised(model, sample, steps=STEPS + sample))


def test_loops_with_other_branches_are_refused() -> None:
    model, both = ToyTransformer(), ("cond", "uncond")
    for more in (0, 1):
        with pytest.raises(ValueError, match=r"generate\(1\) has the branches .* first loop has"):
            tuned(model, lambda i, more=more: denoised(model, i, both if i == more else both[:1]))


def test_a_branch_of_a_part_of_the_loop_is_refused() -> None:
    model = ToyTransformer()

    def generate(sample: int) -> Tensor:
        latents, prompt = gaussian(sample, 1, TOKENS, CHANNELS), gaussian("p", 1, 5, CHANNELS)
        with torch.no_grad(), omni_cache.generation(4):
            for step in range(4):
                for name in ("cond", "uncond")[: 1 + (step < 2)]:
                    with omni_cache.branch(name):
                        latents = latents - model(latents, torch.tensor([900.0 - step]), prompt)
        return latents

    with pytest.raises(
        ValueError, match=r"different steps, {'cond': \[0, 1, 2, 3\], 'uncond': \[0, 1\]}"
    ):
        tuned(model, generate)


def test_guidance_by_a_batch_of_two_that_ends_in_the_middle_is_refused() -> None:
    model = ToyTransformer()

    def generate(sample: int) -> Tensor:
        latents, prompt = gaussian(sample, 1, TOKENS, CHANNELS), gaussian("p", 1, 5, CHANNELS)
        with torch.no_grad(), omni_cache.generation(4):
            for step in range(4):
                size, moment = 2 if step < 2 else 1, torch.tensor([900.0 - step])
                given = (each.repeat(size, 1, 1) for each in (latents, prompt))
                entered, asked = given
                with omni_cache.branch("cond"):
                    noise = model(entered, moment.repeat(size), asked)
                latents = latents - noise[:1]
        return latents

    with pytest.raises(ValueError, match=r"step 2 of the model, cond, adds tensors of the shapes"):
        tuned(model, generate)


def test_ssim_is_not_asked_of_latents() -> None:
    with pytest.raises(ValueError, match=r"ssim=0\.9 is asked of what is no picture"):
        tuned(ToyTransformer(), ssim=0.9)


def test_two_loops_for_a_sample_are_refused() -> None:
    model = ToyTransformer()
    with pytest.raises(ValueError, match="generate runs 2 loops for a sample"):
        tuned(model, lambda sample: [denoised(model, sample), denoised(model, sample + 9)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 1}, "samples=1 is not allowed; samples must be an integer >= 2"),
        ({"judged": 0}, "judged=0 is not allowed"),
        ({"effort": "hihg"}, r"did you mean 'high'\?"),
        ({"psnr": 40.0, "speedup": 2.0}, "psnr and speedup are given; give at most one of"),
        ({"psnr": -1.0}, "psnr=-1.0 is not allowed"),
        ({"ssim": 1.5}, "ssim=1.5 is not allowed"),
        ({"speedup": 1.0}, "speedup=1.0 is not allowed; speedup must be a number above 1"),
        ({"computed_steps": 2.5}, "computed_steps=2.5 is not allowed"),
        ({"computed_steps": []}, r"computed_steps=\[\] is not allowed; .* >= 1, or several"),
        ({"computed_steps": [3, 0]}, r"computed_steps=\[3, 0\] is not allowed"),
        ({"psnr": 40.0, "confidence": 1.0}, "confidence=1.0 is not allowed"),
        ({"confidence": 0.9}, "confidence is given without psnr or ssim"),
        ({"minutes": 0}, "minutes=0 is not allowed; minutes must be a number of minutes > 0"),
        ({"num_inference_steps": 4}, "num_inference_steps=4 is not allowed; .* left out with gen"),
        ({"arguments": {}}, "arguments={} is not allowed; arguments must be left out with gen"),
        ({"seed": 0}, "seed=0 is not allowed; seed must be left out with generate"),
        ({"prompts": ["a fox"]}, "give either generate or, for a pipeline, prompts"),
        ({"inner": "eager", "depht": 2}, "depht"),
    ],
)
def test_arguments_that_are_not_allowed_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned(ToyTransformer(), **arguments)


@pytest.mark.parametrize(
    ("effort", "most", "samples", "target"),
    [
        ("low", 4, 2, {}),
        ("low", 4, 4, {"computed_steps": 5}),
        ("default", 25, 2, {"computed_steps": 4}),
    ],
)
def test_the_budget_is_kept_and_counted(
    effort: str, most: int, samples: int, target: dict[str, Any]
) -> None:
    model, told = ToyTransformer(), []
    plan = tuned(
        model,
        **target,
        effort=effort,
        samples=samples,
        progress=lambda stage, loops, planned: told.append((stage, loops, planned)),
    )
    assert told[0][1:] == (0.0, most * samples)
    judging = next(loops for stage, loops, _ in told if stage.startswith("judges"))
    assert judging <= most * samples
    # One uncached loop for each judged sample, and the share that each plan computes.
    shares = sum(each.computed_steps for each in plan.frontier) / STEPS
    assert plan.content.made.loops >= judging + 2 * (1 + shares) - 1e-9
    assert plan.content.made.effort == effort


@pytest.mark.parametrize("computed_steps", [None, 28])
def test_low_effort_keeps_its_budget_on_a_long_loop(computed_steps: int | None) -> None:
    """Counted by what runs: each computed step has one part that holds both blocks."""
    model, ran, judging_from = ToyTransformer(), [0], []

    def counting(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        attends = any("scaled_dot_product" in str(node.target) for node in gm.graph.nodes)

        def run(*args: Any) -> Any:
            ran[0] += attends
            return gm.forward(*args)

        return run

    def told(stage: str, loops: float, planned: float) -> None:
        if stage.startswith("judges") and not judging_from:
            judging_from.append((ran[0] / 28, loops, planned))

    tuned(
        model,
        lambda sample: denoised(model, sample, steps=28),
        effort="low",
        computed_steps=computed_steps,
        samples=2,
        inner=counting,
        progress=told,
    )
    ((counted, loops, planned),) = judging_from
    assert planned == 8
    assert counted == pytest.approx(loops)
    assert counted <= planned


def test_guidance_branches_share_actions_and_have_weights_of_their_own() -> None:
    model = ToyTransformer()
    plan = tuned(
        model,
        lambda sample: denoised(model, sample, ("cond", "uncond")),
        computed_steps=4,
        effort="low",
    )
    assert set(plan.point.weights[""]) == {"cond", "uncond"}
    cond, uncond = plan.point.weights[""].values()
    assert cond.keys() == uncond.keys()
    assert cond != uncond
    omni_cache.enable(model, plan, guardrail=None, inner="eager")
    denoised(model, 0, ("cond", "uncond"))
    assert omni_cache.summary(model).computed_steps == 8


def test_a_quality_that_nothing_reaches_is_said() -> None:
    model = ToyTransformer()
    with pytest.warns(UserWarning, match="no plan reaches psnr=500 with a margin; the one that"):
        plan = tuned(model, psnr=500.0, effort="low")
    assert plan.point is plan.frontier[-1]


def test_the_cheapest_plan_that_meets_a_quality_is_chosen() -> None:
    model = ToyTransformer()
    frontier = tuned(model, effort="low").frontier
    wanted = (frontier[0].predicted.psnr + frontier[-1].predicted.psnr) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = tuned(model, psnr=wanted, effort="low")
    assert plan.point.predicted.psnr >= wanted + 0.5
    assert plan.point.judged.psnr >= wanted
    assert plan.content.chosen > 0


def test_a_quality_that_little_meets_takes_the_fewest_steps() -> None:
    model = ToyTransformer()
    plan = tuned(model, lambda i: denoised(model, i, steps=28), psnr=1.0, effort="low")
    assert plan.point.computed_steps == 1
    least, *_ = tuned(model, lambda i: denoised(model, i, steps=28), effort="low").frontier
    assert least.computed_steps == 4


def test_pictures_are_judged_as_floats() -> None:
    """As uint8, a difference of 255 levels would wrap around to 1, and read as 48 dB."""
    model = ToyTransformer()

    def generate(sample: int) -> Image.Image:
        latents = denoised(model, sample)
        wide = latents.abs().repeat(1, 8, 8)[0, :32, :30].reshape(32, 10, 3)
        return Image.fromarray((wide.clamp(0, 1) * 255).byte().numpy())

    plan = tuned(model, generate, computed_steps=2, effort="low")
    assert plan.point.computed_steps == 2
    assert plan.point.judged.ssim is not None
    uncached = [np.asarray(generate(each), dtype=np.float64) / 255 for each in (3, 4)]
    omni_cache.enable(model, plan, guardrail=None, inner="eager")
    followed = [np.asarray(generate(each), dtype=np.float64) / 255 for each in (3, 4)]
    pairs = zip(uncached, followed, strict=True)
    psnr = [-10 * math.log10(((a - b) ** 2).mean()) for a, b in pairs]
    assert plan.point.judged.psnr == pytest.approx(np.median(psnr), abs=0.05)


def test_a_tuning_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    model, kept = ToyTransformer(), tmp_path / "plan.partial"
    settings: dict[str, Any] = {"samples": 2, "resume": kept}

    written = set()

    def until(stage: str, loops: float, planned: float) -> None:
        if stage.startswith(("tries schedules of 2", "refines the plan of 3")):
            written.add(kept.with_name("plan.partial.npz").stat().st_ino)
        if stage.startswith("refines the plan of 3"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tuned(model, progress=until, **settings)
    before = Content.load(kept)
    assert [each.computed_steps for each in before.frontier] == [1, 2]
    assert len(written) == 1  # results do not change, and so are written once
    results = kept.with_name("plan.partial.npz").read_bytes()

    told: list[tuple[str, float]] = []
    ran: list[int] = []

    def generate(sample: int) -> Tensor:
        ran.append(sample)
        return denoised(model, sample)

    def show(stage: str, loops: float, planned: float) -> None:
        told.append((stage, loops))
        if stage.startswith("tries schedules") and "refining" not in told[0][0]:
            told.insert(0, (f"refining after {ran}", 0.0))

    plan = tuned(model, generate, progress=show, **settings)
    assert told[0][0] == "refining after [0, 0]"  # one sample says that it is the same tuning
    stages = [stage for stage, _ in told]
    assert not any("sensitive" in stage or "plan of 2" in stage for stage in stages)
    assert any("plan of 3" in stage for stage in stages)
    assert plan.content.made.loops > before.made.loops + 3
    assert plan.frontier[0].actions == before.frontier[0].actions
    assert plan.frontier[0].weights == before.frontier[0].weights
    assert not kept.exists()

    assert list(tmp_path.iterdir()) == []

    before.save(kept)
    kept.with_name("plan.partial.npz").write_bytes(results)
    with pytest.raises(ValueError, match="of a tuning with another samples and targets"):
        tuned(model, samples=3, psnr=40.0, resume=kept)

    with pytest.raises(ValueError, match="of a tuning with another generate, prompts or seed"):
        tuned(model, lambda sample: denoised(model, sample + 50), **settings)


def test_a_tuning_that_ends_before_it_refines_goes_on(tmp_path: Path) -> None:
    model, kept = ToyTransformer(), tmp_path / "plan.partial"

    def until(stage: str, loops: float, planned: float) -> None:
        if stage.startswith("tries schedules"):
            raise InterruptedError

    settings: dict[str, Any] = {"samples": 2, "resume": kept, "computed_steps": 3}
    with pytest.raises(InterruptedError):
        tuned(model, progress=until, **settings)
    stages: list[str] = []
    plan = tuned(model, progress=lambda stage, *_: stages.append(stage), **settings)
    assert not any("sensitive" in each for each in stages)
    assert plan.point.computed_steps == 3

    kept.with_name("plan.partial.npz").write_bytes(b"PK")
    plan.save(kept)
    with pytest.raises(ValueError, match=r"plan\.partial\.npz is broken"):
        tuned(model, **settings)


def test_a_speedup_skips_forwards_and_is_followed() -> None:
    model = ToyTransformer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing of a toy is fast
        plan = tuned(model, speedup=1.5, effort="low")
    assert any(each.skipped_steps for each in plan.frontier)
    place = next(place for place, each in enumerate(plan.frontier) if each.skipped_steps)
    followed = plan.at_point(place)
    assert f"{followed.point.skipped_steps} skipped" in repr(followed)
    assert followed.point.judged is not None
    uncached = [denoised(model, sample) for sample in (3, 4)]
    omni_cache.enable(model, followed, guardrail=None, inner="eager")
    found = [denoised(model, sample) for sample in (3, 4)]
    assert omni_cache.summary(model).skipped_steps == followed.point.skipped_steps
    assert omni_cache.summary(model).computed_steps == followed.point.computed_steps
    psnr = [
        20 * math.log10(float(a.max() - a.min())) - 10 * math.log10(float(((a - b) ** 2).mean()))
        for a, b in zip(uncached, found, strict=True)
    ]
    assert followed.point.judged.psnr == pytest.approx(np.median(psnr), abs=1e-2)


class InPieces(ToyTransformer):
    """Two block loops with a graph break between them: each is a region of its own."""

    def __init__(self) -> None:
        super().__init__(blocks=4)
        self.more, self.blocks = self.blocks[2:], self.blocks[:2]

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:  # type: ignore[override]
        x, time = self.embed(x), self.embed_prompt(prompt).mean(1)
        for block in self.blocks:
            x = block(x, time + timestep[:, None] / 500, None)
        torch._dynamo.graph_break()
        for block in self.more:
            x = block(x, time, None)
        return self.project(x)


def test_a_model_in_pieces_follows_what_was_tuned_on_it() -> None:
    model = InPieces()
    plan = tuned(model, computed_steps=4, effort="low")
    omni_cache.enable(model, plan, guardrail=None, inner="eager")
    denoised(model, 4)
    assert [each.computed_steps for each in omni_cache.summary(model).trajectories] == [4, 4]


def test_a_model_in_pieces_is_tuned_to_a_speed_without_skipping() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = tuned(InPieces(), speedup=1.5, effort="low")
    assert not any(each.skipped_steps for each in plan.frontier)
