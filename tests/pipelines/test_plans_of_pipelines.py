"""A plan of a pipeline is for its scheduler, its sigmas, its guidance and its transformers."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from plans_by_hand import content, gram
from torch import Tensor
from toy_pipeline import STEPS, ToyModel, ToyPipeline

import omni_cache
from omni_cache import Plan
from omni_cache.pipelines.identity import owner_of

ACTIONS = "ccrcrcrr"
SCHEDULE = [each == "c" for each in ACTIONS]


class GuidedPipeline(ToyPipeline):
    """One that says its guidance scale, as those of diffusers do."""

    guidance_scale = 3.0


class TwoExperts(GuidedPipeline):
    """The first half of the loop is one transformer's, the second another one's."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_2 = ToyModel(seed=1)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        whole, calls = self.transformer, 0

        class Both:
            def __call__(own, *given: Any) -> Tensor:  # noqa: N805
                nonlocal calls
                calls += 1
                return (whole if calls <= STEPS else self.transformer_2)(*given)

            def cache_context(own, name: str) -> Any:  # noqa: N805
                return (whole if calls < STEPS else self.transformer_2).cache_context(name)

        self.transformer = Both()
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.transformer = whole


def sigmas(steps: int = STEPS) -> tuple[float, ...]:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return tuple(scheduler.sigmas.double().tolist())


def planned(actions: str = ACTIONS, guardrail: float | None = None, **fields: Any) -> Plan:
    model = ToyModel()
    own = owner_of("transformer", model)
    signature = {
        "transformers": {"transformer": ("ToyModel", own.digest)},
        "owners": ("transformer",) * len(actions),
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "sigmas": sigmas(len(actions)),
        "timesteps": None,
        "guidance": 3.0,
    }
    made = content(actions, ("cond", "uncond"))
    return Plan(
        content=replace(
            made,
            signature=replace(made.signature, **{**signature, **fields}),
            grams={"transformer": made.grams[""]},
            frontier=tuple(
                replace(each, weights={"transformer": each.weights[""]}) for each in made.frontier
            ),
        ),
        guardrail=guardrail,
    )


def enabled(cache: Any, pipe: Any = None) -> Any:
    return omni_cache.enable(pipe or GuidedPipeline(), cache, inner="eager")


def computed(pipe: Any) -> dict[str, list[bool]]:
    return {
        f"{each.model} {each.branch}": [step.computed for step in each.steps]
        for each in omni_cache.summary(pipe).trajectories
    }


def test_a_pipeline_follows_its_plan_in_both_branches_and_again() -> None:
    pipe = enabled(planned())
    first = pipe()
    expected = {"transformer cond": SCHEDULE, "transformer uncond": SCHEDULE}
    assert computed(pipe) == expected
    assert torch.equal(pipe(), first)
    assert computed(pipe) == expected
    assert not torch.equal(first, GuidedPipeline()())


def test_a_generation_follows_a_plan_that_its_pipeline_is_not_enabled_with() -> None:
    pipe = omni_cache.enable(
        GuidedPipeline(), "taylorseer", forecast="newton", forecast_order=1, inner="eager"
    )
    with omni_cache.generation(cache=planned()):
        found = pipe()
    assert torch.equal(found, enabled(planned())())
    other = planned(transformers={"transformer": ("ToyModel", "another")})
    with (
        pytest.raises(ValueError, match=r"transformers\.transformer\.digest is 'another'"),
        omni_cache.generation(cache=other),
    ):
        pipe()


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "scheduler": ({"scheduler": "DDIMScheduler"}, "scheduler is 'DDIMScheduler' in the plan"),
    "sigmas": (
        {"sigmas": tuple(each**0.9 for each in sigmas())},
        r"sigmas\[1\] is 0\.8\d+ in the plan, and the run has 0\.85\d+",
    ),
    "guidance": ({"guidance": 5.0}, "guidance is 5.0 in the plan, and the run has 3.0"),
    "steps": ({"actions": "ccrcrc"}, "num_inference_steps is 6 in the plan, and the run has 8"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_differs_is_named(name: str) -> None:
    fields, message = MISMATCHES[name]
    with pytest.raises(ValueError, match=message):
        enabled(planned(**fields))()
    followed = replace(planned(**fields), on_mismatch="compute")
    pipe = enabled(followed)
    with pytest.warns(UserWarning, match=message):
        found = pipe()
    assert set(computed(pipe)["transformer cond"]) == {True}
    assert torch.equal(found, GuidedPipeline()())


def test_another_scheduler_is_refused_before_anything_is_enabled() -> None:
    pipe = GuidedPipeline(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="scheduler is 'FlowMatchEulerDiscreteScheduler'"):
        enabled(planned(), pipe)
    assert not omni_cache.pipelines.is_enabled(pipe)


def test_a_retimed_plan_runs_with_its_sigmas() -> None:
    pipe = GuidedPipeline()
    pipe.scheduler.set_timesteps(12)
    other = planned().retimed(pipe.scheduler.sigmas)
    enabled(other, pipe)
    pipe(steps=12)
    assert sum(computed(pipe)["transformer cond"]) == 6  # of 12, as 4 of 8
    with pytest.raises(ValueError, match="num_inference_steps is 12"):
        pipe(steps=8)


def test_experts_have_steps_and_weights_of_their_own() -> None:
    actions = "crccccrr"
    made = planned(actions).content
    models = {"transformer": ToyModel(), "transformer_2": ToyModel(seed=1)}
    owners = ("transformer",) * 4 + ("transformer_2",) * 4
    grams = {name: {b: gram(sigmas()[:-1]) for b in ("cond", "uncond")} for name in models}

    def own(name: str, weights: Any) -> Any:
        return {
            branch: {step: each for step, each in steps.items() if owners[step] == name}
            for branch, steps in weights["transformer"].items()
        }

    two = replace(
        made,
        signature=replace(
            made.signature,
            owners=owners,
            transformers={
                name: ("ToyModel", owner_of(name, each).digest) for name, each in models.items()
            },
        ),
        grams=grams,
        frontier=tuple(
            replace(each, weights={name: own(name, each.weights) for name in models})
            for each in made.frontier
        ),
    )
    followed = Plan(content=two, guardrail=None)
    pipe = enabled(followed, TwoExperts())
    pipe()
    first, second = ([each == "c" for each in part] for part in ("crcc", "ccrr"))
    assert computed(pipe) == {
        "transformer cond": first,
        "transformer uncond": first,
        "transformer_2 cond": second,
        "transformer_2 uncond": second,
    }
    with pytest.raises(
        ValueError, match=r"transformers are transformer, transformer_2 in the plan"
    ):
        omni_cache.enable(ToyModel(), followed, inner="eager")


@pytest.mark.parametrize("target", [{"computed_steps": 4}, {"speedup": 1.2}])
def test_experts_are_tuned_together_and_get_plans_of_their_own(target: dict[str, float]) -> None:
    pipe = TwoExperts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing of a toy is fast
        plan = omni_cache.tune(
            pipe,
            lambda sample: pipe(seed=sample),
            samples=2,
            judged=2,
            effort="low",
            inner="eager",
            progress=lambda *_: None,
            **target,
        )
    signature, names = plan.content.signature, ["transformer", "transformer_2"]
    assert signature.owners == ("transformer",) * 4 + ("transformer_2",) * 4
    assert sorted(signature.transformers) == sorted(plan.content.grams) == names
    for place, point in enumerate(plan.frontier):
        # The first step of each is computed, and what stands in for others is its own.
        assert point.actions[0] == point.actions[4] == "compute"
        assert point.computed_steps >= 2
        for name in names:
            own = [step for step in range(8) if signature.owners[step] == name]
            expected = [step for step in own if point.actions[step] != "compute"]
            for branch in ("cond", "uncond"):
                assert list(point.weights.get(name, {}).get(branch, {})) == expected
        enabled(replace(plan.at_point(place), guardrail=None), pipe)
        pipe(seed=3)
        found = computed(pipe)
        for name, part in (
            ("transformer", point.actions[:4]),
            ("transformer_2", point.actions[4:]),
        ):
            assert found[f"{name} cond"] == [each == "compute" for each in part]
            assert found[f"{name} uncond"] == found[f"{name} cond"]
        omni_cache.disable(pipe)


def test_an_expert_that_the_plan_does_not_know_is_refused_when_it_runs() -> None:
    pipe = TwoExperts()
    enabled(planned(), pipe)  # it may be one that no loop runs
    with pytest.raises(ValueError, match="the run has 'transformer_2'"):
        pipe()
    enabled(replace(planned(), on_mismatch="compute"), pipe)
    with pytest.warns(UserWarning, match="the run has 'transformer_2'"):
        pipe()
    assert set(computed(pipe)["transformer_2 cond"]) == {True}


def test_a_configuration_that_holds_objects_is_the_same_in_every_process() -> None:
    class Rotary:
        pass

    class Configured(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"rope": Rotary(), "act": lambda x: x, "kinds": {"a", "b", "c"}}

    one, other = owner_of("", Configured()), owner_of("", Configured())
    assert one.digest == other.digest
    changed = Configured()
    changed.config["kinds"] = {"a", "b"}
    assert owner_of("", changed).digest != one.digest
