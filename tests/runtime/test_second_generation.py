"""A generation never sees anything of the one before, whatever became of that.

Every test runs a loop after something else went over the same compiled model, and holds it against
the same loop over a new model, over which nothing went before, bit for bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_transformer
from torch._dynamo.utils import counters
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    STRATEGIES,
    TOKENS,
    FlakyCompiler,
    Loop,
    ToyTransformer,
    alone,
    compiled,
    computed,
    digest,
    gaussian,
    interrupted,
    reasons,
    same,
)

import omni_cache

BRANCHES = {1: ("cond",), 2: ("cond", "uncond"), 3: ("cond", "uncond", "reference")}

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=["timestep", "contexts"])
def loop(request: pytest.FixtureRequest) -> Loop:
    """A loop that leaves its place to be inferred, and one that names it."""
    return Loop(explicit=request.param == "contexts")


def another(loop: Loop) -> Loop:
    """The loop with other prompts and other noise."""
    return replace(loop, prompts=[f"another {each}" for each in loop.prompts], seed=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("branches", BRANCHES)
def test_after_whole_generations(loop: Loop, branches: int, strategy: str) -> None:
    loop = replace(loop, prompts=BRANCHES[branches])
    expected = alone(loop, **STRATEGIES[strategy])
    model = ToyTransformer()
    cached = compiled(model, **STRATEGIES[strategy])

    for before in (loop, another(loop), loop):
        predictions = before.run(cached)

    assert same(predictions, expected)
    schedules = computed(model)
    assert len(schedules) == branches
    assert all(0 < sum(each) < loop.steps for each in schedules)


@pytest.mark.parametrize("branches", BRANCHES)
def test_after_one_that_was_abandoned_between_calls(loop: Loop, branches: int) -> None:
    loop = replace(loop, prompts=BRANCHES[branches])
    # A threshold that reuses everything reuses a foreign residual too, if there is one.
    expected = alone(loop, **ALWAYS_REUSE)
    cached = compiled(ToyTransformer(), **ALWAYS_REUSE)

    for calls in range(1, 3 * branches):
        with interrupted():
            replace(another(loop), calls=calls).run(cached)
        assert same(loop.run(cached), expected), f"abandoned after {calls} calls"


@pytest.mark.parametrize("branches", [1, 2])
def test_after_one_that_was_abandoned_inside_the_model(loop: Loop, branches: int) -> None:
    loop = replace(loop, prompts=BRANCHES[branches])
    inner = FlakyCompiler()
    expected = alone(loop, inner=inner)
    cached = compiled(ToyTransformer(), inner=inner)

    for parts in range(12):
        inner.remaining = parts
        with interrupted():
            another(loop).run(cached)
        assert same(loop.run(cached), expected), f"raised after {parts} parts of the model"


def test_after_several_that_were_abandoned_at_the_first_step(loop: Loop) -> None:
    loop = replace(loop, prompts=BRANCHES[2])
    expected = alone(loop, **ALWAYS_REUSE)
    cached = compiled(ToyTransformer(), **ALWAYS_REUSE)

    for calls in (1, 2, 1, 1):
        with interrupted():
            replace(another(loop), calls=calls).run(cached)

    assert same(loop.run(cached), expected)


def test_abandoned_first_step_whose_position_ids_are_used_again() -> None:
    """Some inputs are the same objects in every generation; the prompt tells them apart."""
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    mask = torch.zeros(TOKENS, TOKENS)
    latents = gaussian("latents", 1, TOKENS, CHANNELS)

    def step(timestep: float, prompt: torch.Tensor) -> torch.Tensor:
        return cached(latents, torch.tensor([timestep]), prompt, mask)

    step(1000.0, gaussian("abandoned", 1, 5, CHANNELS))
    prompt = gaussian("cond", 1, 5, CHANNELS)
    step(1000.0, prompt)
    reused = step(900.0, prompt)

    # Both calls of the first step are held apart; the one that went on is the second.
    assert computed(model) == [[True], [True, False]]
    torch._dynamo.reset()
    again = compiled(fresh := ToyTransformer(), **ALWAYS_REUSE)
    again(latents, torch.tensor([1000.0]), prompt, mask)
    assert torch.equal(reused, again(latents, torch.tensor([900.0]), prompt, mask))
    assert computed(fresh) == [[True, False]]


@pytest.mark.parametrize("prompt_is_shared", [True, False], ids=["same prompt", "new objects"])
def test_abandoned_first_step_that_nothing_tells_apart_is_not_reused(
    prompt_is_shared: bool,
) -> None:
    """Another loop, or another branch: as long as both are possible, the next step computes."""
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    prompts = [gaussian("cond", 1, 5, CHANNELS) for _ in range(4)]

    def step(seed: int, timestep: float, call: int) -> torch.Tensor:
        latents = gaussian(seed, 1, TOKENS, CHANNELS)
        prompt = prompts[0 if prompt_is_shared else call]
        plain = model(latents, torch.tensor([timestep]), prompt)
        torch.testing.assert_close(
            cached(latents, torch.tensor([timestep]), prompt), plain, rtol=0, atol=1e-6
        )
        return plain

    step(0, 1000.0, call=0)
    step(1, 1000.0, call=1)
    step(2, 900.0, call=2)


def test_same_direction_generation_with_other_prompts_starts_afresh() -> None:
    """An image-to-image loop may begin below where an abandoned loop stopped."""
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    with interrupted():
        Loop(("one",), steps=8, calls=3).run(cached)

    prompt, latents = gaussian("two", 1, 5, CHANNELS), gaussian(1, 1, TOKENS, CHANNELS)
    for timestep in (400.0, 300.0):
        prediction = cached(latents, torch.tensor([timestep]), prompt)

    assert reasons(model) == [["first step", "below threshold"]]
    fresh = compiled(ToyTransformer(), **ALWAYS_REUSE)
    for timestep in (400.0, 300.0):
        expected = fresh(latents, torch.tensor([timestep]), prompt)
    assert torch.equal(prediction, expected)


@pytest.mark.parametrize("named", [False, True], ids=["inferred", "branch"])
def test_one_stable_input_that_is_gone_is_enough_for_a_new_generation(named: bool) -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    mask, latents = torch.zeros(TOKENS, TOKENS), gaussian(0, 1, TOKENS, CHANNELS)
    one, two = (gaussian(name, 1, 5, CHANNELS) for name in ("one", "two"))

    for step, prompt in enumerate([one, one, two, two]):
        timestep = torch.tensor([1000.0 - 100 * step])
        if named:
            with omni_cache.branch("cond"):
                cached(latents.clone(), timestep, prompt, mask)
        else:
            cached(latents.clone(), timestep, prompt, mask)

    assert reasons(model) == [["first step", "below threshold"]]
    timesteps = [step.timestep for step in omni_cache.summary(model).trajectories[0].steps]
    assert timesteps == [800.0, 700.0]


def alone_at(first: float, timestep: Any, latents: torch.Tensor, prompt: torch.Tensor) -> Any:
    """What a call reuses of one at an earlier timestep, with nothing else around."""
    cached = compiled(ToyTransformer(), **ALWAYS_REUSE)
    cached(latents, torch.tensor([first]), prompt)
    return cached(latents, timestep, prompt)


def test_prompt_that_changes_in_the_middle_of_a_step_lets_no_branch_take_anothers_place() -> None:
    model = ToyTransformer()
    cached = compiled(model, **ALWAYS_REUSE)
    cond, uncond, changed = (gaussian(name, 1, 5, CHANNELS) for name in ("a", "b", "c"))
    latents = gaussian(0, 1, TOKENS, CHANNELS)

    for step in range(6):
        for prompt in (cond, uncond if step < 3 else changed):
            timestep = torch.tensor([1000.0 - 100 * step])
            prediction = cached(latents, timestep, prompt)
            if prompt is changed and step > 3:
                # The latents are the same, so that its own first residual gives what it computes.
                plain = alone_at(1000.0 - 100 * 3, timestep, latents, changed)
                torch.testing.assert_close(prediction, plain, rtol=0, atol=1e-6)

    assert computed(model) == [[True] + [False] * 5, [True, False, False], [True, False, False]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_instances_of_one_class_share_the_graph_but_no_state(strategy: str) -> None:
    loops = [Loop(BRANCHES[2]), Loop(BRANCHES[2], seed=1)]
    expected = [loop.run(compiled(ToyTransformer(), **STRATEGIES[strategy])) for loop in loops]
    torch._dynamo.reset()
    counters.clear()
    models = [ToyTransformer(), ToyTransformer()]

    first, second = (
        loop.predictions(compiled(model, **STRATEGIES[strategy]))
        for loop, model in zip(loops, models, strict=True)
    )
    in_turn = list(zip(first, second, strict=True))

    assert counters["stats"]["unique_graphs"] == 1
    assert same([a for a, _ in in_turn], expected[0])
    assert same([b for _, b in in_turn], expected[1])
    assert all(False in schedule for model in models for schedule in computed(model))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_number_of_steps_compiles_nothing(loop: Loop, strategy: str) -> None:
    model = ToyTransformer()
    cached = compiled(model, **STRATEGIES[strategy])
    loop.run(cached)
    counters.clear()

    replace(loop, steps=5).run(cached)

    assert counters["stats"]["unique_graphs"] == 0
    assert [len(schedule) for schedule in computed(model)] == [5]


NEW_PROCESS = """
import json, sys
import torch
from toy_transformer import STRATEGIES, Loop, alone, digest

torch.set_num_threads(int(sys.argv[1]))
with torch.no_grad():
    found = {
        f"{name}, explicit={explicit}": digest(
            alone(Loop(("cond", "uncond", "reference"), explicit=explicit), **flags)
        )
        for name, flags in STRATEGIES.items()
        for explicit in (False, True)
    }
print(json.dumps(found))
"""


@pytest.mark.slow
def test_second_generation_is_the_first_of_a_new_process() -> None:
    child = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(torch.get_num_threads())],
        cwd=Path(toy_transformer.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = json.loads(child.stdout.splitlines()[-1])

    found = {}
    for name, flags in STRATEGIES.items():
        for explicit in (False, True):
            loop = Loop(BRANCHES[3], explicit=explicit)
            cached = compiled(ToyTransformer(), **flags)
            another(loop).run(cached)
            found[f"{name}, explicit={explicit}"] = digest(loop.run(cached))

    assert found == expected
    assert len(set(found.values())) > 1
