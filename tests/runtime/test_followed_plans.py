"""A plan is followed by the host: its schedule, its weights, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plans_by_hand import content, plan
from torch import Tensor
from toy_transformer import (
    TEACACHE,
    Loop,
    ToyTransformer,
    compiled,
    computed,
    interrupted,
    reasons,
    same,
)

import omni_cache
from omni_cache import Plan
from omni_cache.runtime.reading import Reading
from omni_cache.strategies import Time
from omni_cache.strategies.base import Errors, Matrix
from omni_cache.strategies.following import Planned

LOOP = Loop(explicit=True)
ACTIONS = "ccrcrcrr"
SCHEDULE = [each == "c" for each in ACTIONS]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def enabled(cache: Any, **flags: Any) -> ToyTransformer:
    model = ToyTransformer()
    omni_cache.enable(model, cache, inner="eager", **flags)
    return model


def by_hand(followed: Plan, loop: Loop, name: str) -> list[Tensor]:
    """What the toy predicts where a plan is followed, written out; for one branch."""
    model, residuals, inputs, computed_outputs, found = ToyTransformer(), [], [], [], []
    point, weights = followed.point, followed.point.weights[""][name]

    def step(x: Tensor, moment: Tensor, prompt: Tensor) -> Tensor:
        entered = model.embed(x)
        place = len(found)
        if point.actions[place] == "skip":
            terms = zip(weights[place].row, computed_outputs, strict=False)
            found.append(sum(weight * each for weight, each in terms))
            return found[-1]
        if point.actions[place] == "compute":
            time = model.embed_prompt(prompt).mean(1)
            time = time + model.embed_time(moment.reshape(-1, 1) / 500)
            left = entered
            for block in model.blocks:
                left = block(left, time, None)
            residuals.insert(0, left - entered)
            inputs.insert(0, entered)
            computed_outputs.insert(0, model.project(left))
        else:
            terms = zip(weights[place].row, residuals, strict=False)
            left = entered + sum(weight * each for weight, each in terms)
            left = left + weights[place].input * (entered - inputs[0])
        found.append(model.project(left))
        return found[-1]

    loop.run(step)
    return found


def weighing_inputs(followed: Plan) -> Plan:
    """The same plan with weights of the input, as large as those of residuals."""

    def weighed(point: Any) -> Any:
        steps = point.weights[""]["cond"]
        own = {step: each._replace(input=0.5 - 0.1 * step) for step, each in steps.items()}
        return replace(point, weights={"": {"cond": own}})

    made = followed.content
    points = tuple(weighed(each) for each in made.frontier)
    return replace(followed, content=replace(made, frontier=points))


@pytest.mark.parametrize(
    "followed",
    [
        plan(ACTIONS, depth=1),
        plan(ACTIONS, depth=2),
        plan(ACTIONS, depth=3),
        plan("ccrscrsr"),
        plan("ccsscssc", depth=3),
        weighing_inputs(plan(ACTIONS)),
        weighing_inputs(plan("ccrscrsr", depth=3)),
    ],
)
def test_a_plan_is_followed_to_the_letter(followed: Plan) -> None:
    model = enabled(followed)
    found = LOOP.run(model)
    actions = [action[0] for action in followed.point.actions]
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [each.action[0] for each in trajectory.steps] == actions
    for one, other in zip(found, by_hand(followed, LOOP, "cond"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # Another point of the same plan compiles nothing.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    omni_cache.enable(model, followed.at_point(1), inner="eager")
    LOOP.run(model)
    assert sum(computed(model)[0]) == min(actions.count("c") + ("r" in actions), 8)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_every_way_to_name_a_plan_does_the_same(tmp_path: Path) -> None:
    followed = plan(ACTIONS, branches=("cond", "uncond"))
    loop = replace(LOOP, prompts=("cond", "uncond"))
    followed.save(path := tmp_path / "plan.json")
    expected = loop.run(enabled(followed))
    assert same(loop.run(enabled(str(path), guardrail=None)), expected)
    assert same(loop.run(compiled(ToyTransformer(), cache=followed)), expected)
    assert same(loop.run(compiled(ToyTransformer(), cache=path, guardrail=None)), expected)
    unnamed = replace(loop, explicit=False)
    model = enabled("taylorseer", forecast="newton", forecast_order=1)
    with omni_cache.generation(8, cache=followed):
        assert same(unnamed.run(named(model, loop)), expected)
    model = enabled("none")
    with (
        pytest.raises(ValueError, match="it needs a cache"),
        omni_cache.generation(8, cache=followed),
    ):
        unnamed.run(named(model, loop))


def named(model: Callable[..., Tensor], loop: Loop) -> Callable[..., Tensor]:
    """The model, each of its calls in the context of its branch, in turn."""
    calls = 0

    def call(*args: Any) -> Tensor:
        nonlocal calls
        name = loop.prompts[calls % len(loop.prompts)]
        calls += 1
        with omni_cache.branch(name):
            return model(*args)

    return call


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "number of steps": ({"actions": "ccrcrcr"}, "num_inference_steps is 7 in the plan, .* has 8"),
    "timesteps": (
        {"timesteps": tuple(1000.0 - 100 * step for step in range(8))},
        r"timesteps\[1\] is 900\.0 in the plan, and the run has 875\.0",
    ),
    "size": ({"size": (7, 4)}, r"size is \(7, 4\) in the plan, and the run has \(6, 4\)"),
    "dtype": ({"dtype": "torch.bfloat16"}, "dtype is 'torch.bfloat16' in the plan"),
    "branches": ({"branches": ("uncond",)}, "branches is 'uncond' in the plan, .* has 'cond'"),
    "class": ({"transformers": {"": ("Other", "1")}}, "transformers..model_class is 'Other'"),
    "configuration": (
        {"transformers": {"": ("ToyTransformer", "1")}},
        "transformers..digest is '1' in the plan",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_run_that_the_plan_is_not_for_is_refused_or_computed(name: str) -> None:
    fields, message = MISMATCHES[name]
    followed = plan(**{"actions": ACTIONS, **fields})
    with pytest.raises(ValueError, match=message) as error:
        LOOP.run(enabled(followed))
    assert "on_mismatch='compute'" in str(error.value)
    model = enabled(replace(followed, on_mismatch="compute"))
    with pytest.warns(UserWarning, match=message) as told:
        found = LOOP.run(model)
    assert len(told) == 1
    assert computed(model) == [[True] * 8]
    ((_, *others),) = reasons(model)
    assert others == ["another run than the plan's"] * 7  # the sentence was told, once
    assert same(found, LOOP.run(ToyTransformer()))


def test_a_refused_call_leaves_no_trace() -> None:
    model = enabled(plan(ACTIONS, size=(7, 4)))
    for _ in range(2):
        with pytest.raises(ValueError, match="size is"):
            LOOP.run(model)
    omni_cache.enable(model, plan(ACTIONS), inner="eager")
    LOOP.run(model)
    assert computed(model) == [SCHEDULE]


def test_a_bare_model_of_another_class_is_refused() -> None:
    followed = plan(ACTIONS, transformers={"": ("Other", "1")})
    with pytest.raises(ValueError, match="model_class is 'Other' in the plan"):
        LOOP.run(compiled(ToyTransformer(), cache=followed))


def test_an_abandoned_loop_is_followed_from_its_beginning() -> None:
    model = enabled(plan(ACTIONS))
    with interrupted():
        replace(LOOP, calls=5).run(model)
    found = LOOP.run(model)
    assert computed(model) == [SCHEDULE]
    assert same(found, LOOP.run(enabled(plan(ACTIONS))))


def test_a_loop_that_begins_in_the_middle_fits_its_weights_to_what_it_has() -> None:
    """As image-to-image does. That nobody has verified it is said once."""
    model, loop = enabled(plan("ccrcrcrr")), Loop()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            with omni_cache.generation(8):
                for step in range(4, 8):
                    with omni_cache.branch("cond", step_index=step):
                        latents = torch.ones(1, 6, 4) * step
                        model(latents, torch.tensor([loop.timesteps[step]]), torch.ones(1, 5, 4))
    (message,) = [str(each.message) for each in told if "nobody has verified" in str(each.message)]
    assert "began at step 4, where the plan was made for loops that begin at step 0" in message
    assert reasons(model) == [["first step", "planned", "planned", "planned"]]
    assert computed(model) == [[True, True, False, False]]


def test_a_call_after_the_last_step_is_computed() -> None:
    model = enabled(plan(ACTIONS))
    with omni_cache.generation(), omni_cache.branch("cond"):
        for step in range(8):
            moment = torch.tensor([LOOP.timesteps[step]])
            model(torch.ones(1, 6, 4) * step, moment, torch.ones(1, 5, 4))
        with pytest.warns(UserWarning, match="after the last of 8 steps, and is computed"):
            model(torch.ones(1, 6, 4), torch.tensor([1.0]), torch.ones(1, 5, 4))
    assert computed(model) == [[*SCHEDULE, True]]


def surprising(model: ToyTransformer, step: int, size: float) -> Callable[..., Tensor]:
    """The model, given latents at a step that no other step comes near."""
    calls = 0

    def call(latents: Tensor, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return model(latents + size * (calls - 1 >= step), *args)

    return call


def tuned_to_the_toy(actions: str, **flags: Any) -> Plan:
    """A plan with the toy's own inner products, so that its expectation is right."""
    import numpy as np

    from omni_cache.planning.gram import Gram
    from omni_cache.planning.search import Schedule
    from omni_cache.strategies.retiming import fitted

    model, residuals, outputs, inputs = ToyTransformer(), [], [], []

    def step(x: Tensor, moment: Tensor, prompt: Tensor) -> Tensor:
        entered = model.embed(x)
        time = model.embed_prompt(prompt).mean(1) + model.embed_time(moment.reshape(-1, 1) / 500)
        left = entered
        for block in model.blocks:
            left = block(left, time, None)
        inputs.append(entered)
        residuals.append(left - entered)
        outputs.append(model.project(left))
        return outputs[-1]

    LOOP.run(step)
    r, h, v = (
        np.stack([each.double().flatten() for each in found])
        for found in (residuals, inputs, outputs)
    )
    own = {"": {"cond": Gram(r @ r.T, h @ r.T, h @ h.T, v @ v.T)}}
    made = content(actions)
    point = made.point
    schedule = Schedule(point.actions, 0.0)
    weighed = fitted(schedule, own, made.signature.owners, 2, with_input=False)
    return Plan(content=replace(made, grams=own, frontier=(weighed,)), **flags)


def test_the_guardrail_is_silent_on_what_the_plan_was_made_from() -> None:
    model = enabled(tuned_to_the_toy("cccrrcrr"))
    LOOP.run(model)
    assert computed(model) == [[each == "c" for each in "cccrrcrr"]]
    (trajectory,) = omni_cache.summary(model).trajectories
    errors = [each.errors for each in trajectory.steps]
    assert [each is not None for each in errors] == [
        False,
        True,
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    assert all(0.3 < each.excess < 1.5 for each in errors if each is not None)
    assert "expected" in str(omni_cache.summary(model))


def test_a_forecast_is_checked_once_for_each_computed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    check, checked = Planned.check, []

    def counted(self: Planned, kept: Sequence[Time], products: Matrix) -> Errors | None:
        found = check(self, kept, products)
        if found is not None:
            checked.append(kept[0].index)
        return found

    monkeypatch.setattr(Planned, "check", counted)
    LOOP.run(enabled(tuned_to_the_toy("cccrrcrr")))
    assert checked == [1, 2, 5]


def test_the_guardrail_inserts_steps_where_the_run_is_none_that_was_expected() -> None:
    schedules = []
    for flags in ({}, {"guardrail": None}, {"guardrail": 1e9}):
        model = enabled(tuned_to_the_toy("cccrrcrr", **flags))
        LOOP.run(surprising(model, 2, 5.0))
        schedules.append(computed(model)[0])
        if not flags:
            assert "guardrail" in reasons(model)[0]
            (trajectory,) = omni_cache.summary(model).trajectories
            assert max(each.errors.excess for each in trajectory.steps if each.errors) > 3
    guarded, *others = schedules
    assert others == [[each == "c" for each in "cccrrcrr"]] * 2
    assert sum(guarded) > 4


def test_a_plan_reads_nothing_of_the_device_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With tensors that count as a device's, nothing is read but what has come by itself."""
    import omni_cache.runtime.history as history
    import omni_cache.runtime.reading as reading

    monkeypatch.setattr(reading, "on_host", lambda tensor: False)
    monkeypatch.setattr(history, "on_host", lambda tensor: False)
    read: list[Reading] = []
    monkeypatch.setattr(reading, "read", lambda readings: read.extend(readings))
    monkeypatch.setattr(history, "read", lambda readings: read.extend(readings))
    model = enabled(plan(ACTIONS))
    LOOP.run(model)
    assert computed(model) == [SCHEDULE]
    assert read == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LOOP.run(model)


def test_memory_is_freed_when_the_loop_is_over() -> None:
    model = enabled(plan(ACTIONS, depth=3))
    LOOP.run(model)
    (trajectory,) = omni_cache.summary(model).trajectories
    assert trajectory.memory_bytes > 0
    state = omni_cache.pipelines.states_of(model)[0][1]
    assert all(not each.history.kept for run in state.runs for each in run.trajectories.values())


def test_teacache_in_a_graph_of_a_plan_says_what_is_missing() -> None:
    model = enabled(plan(ACTIONS))
    with (
        pytest.raises(ValueError, match="needs the signal"),
        omni_cache.generation(8, **TEACACHE),
    ):
        Loop().run(model)
