"""A skipped call of an enabled model is known by its arguments, and Dynamo is not asked for it."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from test_skipped_forwards import SKIPPED, expected_of, followed, run, taken
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_transformer import (
    CHANNELS,
    TOKENS,
    AbandonedError,
    Loop,
    ToyTransformer,
    gaussian,
    interrupted,
    same,
)

import omni_cache
from omni_cache.capture.function import CapturedFunction
from omni_cache.pipelines.enable import states_of
from omni_cache.runtime import skipping

pytestmark = pytest.mark.usefixtures("no_grad")

PLAN = "cccsss"
"""Once a branch has learned which of its inputs move, three steps are skipped."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """For each call of a model so far, "asked" where Dynamo was, and "known" where it was not."""
    said: list[str] = []
    skip, call = skipping.SkippedCalls.skip, CapturedFunction.__call__

    def noted(self: skipping.SkippedCalls, of: Any) -> Any:
        said.append("known")
        return skip(self, of)

    def asking(self: CapturedFunction, *args: Any, **kwargs: Any) -> Any:
        said[-1] = "asked"
        return call(self, *args, **kwargs)

    monkeypatch.setattr(skipping.SkippedCalls, "skip", noted)
    monkeypatch.setattr(CapturedFunction, "__call__", asking)
    return said


def enabled(model: nn.Module, plan: str = PLAN, **flags: Any) -> nn.Module:
    omni_cache.enable(model, cache=followed(plan), inner="eager", strict=True, **flags)
    return model


def loop(
    model: nn.Module,
    steps: int = len(PLAN),
    before: Callable[[int], object] = lambda step: None,
    around: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext(),
    **given: Any,
) -> list[Any]:
    """A loop with something before and around its calls."""
    prompt, made = gaussian("prompt", 1, 5, CHANNELS), []
    with omni_cache.generation(steps + 1), omni_cache.branch("cond"):
        for step in range(steps):
            before(step)
            x = gaussian(step, 1, TOKENS, CHANNELS)
            with around(step):
                made.append(model(x, torch.tensor([900.0 - 50 * step]), prompt, **given))
    return made


# --- what is known --------------------------------------------------------------------------------


def test_only_calls_that_run_something_ask_for_the_model(asked: list[str]) -> None:
    model = enabled(ToyTransformer(), "cccssrcs")
    made = run(model)
    assert taken(model) == ["cccssrcs"]
    assert asked == [*["asked"] * 3, *["known"] * 2, *["asked"] * 2, "known"]
    for step, expected in expected_of(made, "cccssrcs").items():
        torch.testing.assert_close(made[step], expected, rtol=1e-6, atol=1e-6)
    assert same(run(model), made)


def test_two_branches_are_skipped_by_their_own_results(asked: list[str]) -> None:
    model = enabled(ToyTransformer(), "cccssrcs")
    made = Loop(("cond", "uncond"), explicit=True).run(model)
    assert asked.count("known") == 6
    for branch in (made[::2], made[1::2]):
        for step, expected in expected_of(branch, "cccssrcs").items():
            torch.testing.assert_close(branch[step], expected, rtol=1e-6, atol=1e-6)


def test_branches_with_prompts_of_different_lengths_are_both_known(asked: list[str]) -> None:
    model = enabled(ToyTransformer(), dynamic=True)
    with omni_cache.generation(len(PLAN) + 1):
        for step in range(len(PLAN)):
            for name, length in (("cond", 5), ("uncond", 3)):
                with omni_cache.branch(name):
                    x = gaussian((name, step), 1, TOKENS, CHANNELS)
                    prompt = gaussian(name, 1, length, CHANNELS)
                    model(x, torch.tensor([900.0 - step]), prompt)
    assert asked == [*["asked"] * 6, *["known"] * 6]


def test_a_timestep_that_is_a_number_is_known_in_the_next_generation(asked: list[str]) -> None:
    """Dynamo may have a graph for each number; a call whose number is new is not known."""
    model = enabled(ToyTransformer())

    def generate() -> list[Tensor]:
        prompt = gaussian("prompt", 1, 5, CHANNELS)
        with omni_cache.generation(len(PLAN) + 1), omni_cache.branch("cond"):
            return [
                model(gaussian(step, 1, TOKENS, CHANNELS), 900.0 - step, prompt)
                for step in range(len(PLAN))
            ]

    generate()
    assert asked == ["asked"] * len(PLAN)
    asked.clear()
    assert len({each.shape for each in generate()}) == 1
    assert asked == [*["asked"] * 3, *["known"] * 3]


class Forms(ToyTransformer):
    """Returns its noise in one of several forms."""

    def forward(self, *args: Any, form: str = "tuple", **kwargs: Any) -> Any:
        noise = super().forward(*args, **kwargs)
        if form == "output":
            return Transformer2DModelOutput(sample=noise)
        more = noise.mean(-1)
        return {
            "tuple": (noise, more),
            "list": [noise, (more,)],
            "dict": {"noise": noise, "more": [more, None], "kind": "noise"},
            "ordered": OrderedDict(noise=noise, more=more),
            "twice": (noise, more, noise),
        }[form]


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "ordered", "output", "twice"])
def test_a_result_is_of_the_form_that_the_model_gives_it(form: str, asked: list[str]) -> None:
    def flat(value: Any) -> list[Any]:
        items = value.values() if isinstance(value, dict) else value
        if isinstance(value, list | tuple | dict):
            return [each for item in items for each in flat(item)]
        return [value]

    made = loop(enabled(Forms()), form=form)
    assert asked[3:] == ["known"] * 3
    assert [type(each) for each in made] == [type(made[0])] * len(PLAN)
    for each in made[3:]:
        assert len(flat(each)) == len(flat(made[0]))
        for skipped, computed in zip(flat(each), flat(made[0]), strict=True):
            assert type(skipped) is type(computed)
            if not isinstance(skipped, Tensor):
                assert skipped == computed
    # New objects each time, which callers may change.
    assert made[4] is not made[5]
    if form == "twice":
        assert made[4][0] is made[4][2]


def test_a_caller_may_write_into_what_it_gets(asked: list[str]) -> None:
    def generate(spoil: bool) -> list[Tensor]:
        model, made = enabled(ToyTransformer(), "cccsssss"), []

        def spoiling(*args: Tensor, **given: Any) -> Tensor:
            output = model(*args, **given)
            made.append(output.clone())
            if spoil:
                output.fill_(torch.nan)
                args[0].fill_(torch.nan)
            return output

        loop(spoiling, 8)  # type: ignore[arg-type]
        return made

    assert same(generate(True), generate(False))
    assert asked.count("known") == 10


TABLES: dict[str, Tensor] = {}
"""A graph that uses one of these takes it as an input that is no argument and no weight."""


class Rotary(ToyTransformer):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states + TABLES["table"], *args, **kwargs)


@pytest.fixture
def table() -> Iterator[None]:
    TABLES["table"] = gaussian("table", TOKENS, CHANNELS)
    yield
    TABLES.clear()


@pytest.mark.usefixtures("table")
def test_a_tensor_that_is_no_argument_is_not_held(asked: list[str]) -> None:
    model = enabled(Rotary())
    made = loop(model)
    assert asked[3:] == ["known"] * 3
    assert same(loop(model), made)
    before = weakref.ref(TABLES["table"])
    TABLES["table"] = gaussian("another", TOKENS, CHANNELS)
    gc.collect()
    assert before() is None
    asked.clear()
    other = loop(model)
    assert asked == [*["asked"] * 3, *["known"] * 3]
    assert not same(other, made)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("is_freed", [False, True])
def test_another_tensor_that_is_no_argument_is_met_when_the_model_is_asked(
    is_freed: bool, asked: list[str]
) -> None:
    model, kept = enabled(Rotary()), []

    def replaced(step: int) -> None:
        if step == 4:
            kept.append(None if is_freed else TABLES["table"])
            TABLES["table"] = gaussian("another", TOKENS, CHANNELS)
            gc.collect()

    loop(model, before=replaced)
    assert asked[3:5] == ["known", "asked" if is_freed else "known"]
    asked.clear()
    again = loop(model)
    assert asked == [*["asked"] * 3, *["known"] * 3]
    assert same(again, loop(enabled(Rotary())))


def test_nothing_is_held_of_a_call_that_is_known() -> None:
    model = enabled(ToyTransformer())
    seen: list[weakref.ref[Tensor]] = []

    def watched(x: Tensor, *args: Any, **given: Any) -> Any:
        seen.append(weakref.ref(x))
        output = model(x, *args, **given)
        seen.append(weakref.ref(output))
        return output.clone()

    gc.collect()
    gc.disable()
    try:
        loop(watched)  # type: ignore[arg-type]
        assert [each() for each in seen] == [None] * len(seen)
    finally:
        gc.enable()


def test_so_many_kinds_are_known(monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    monkeypatch.setattr(skipping, "MAX_KINDS", 2)
    model = enabled(ToyTransformer(), "ccccsss", dynamic=True)
    for tokens in (4, 5, 6):
        run(model, 7, tokens=tokens)
    assert asked.count("known") == 9
    # The first size came before the others, and has been forgotten.
    asked.clear()
    run(model, 7, tokens=4)
    assert asked == [*["asked"] * 4, *["known"] * 3]
    assert len(vars(model)["_compiled_call_impl"].skipped._known) <= 2


# --- where the model is asked ---------------------------------------------------------------------


def test_a_change_of_the_model_counts_from_the_next_step_that_runs_it(asked: list[str]) -> None:
    class Scaled(ToyTransformer):
        scale = 1.0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * self.scale

    def changed(step: int) -> None:
        model.scale = 1.0 if step < 4 else 2.0

    model = enabled(Scaled(), "cccsscsss")
    made = loop(model, 9, before=changed)
    assert taken(model) == ["cccsscsss"]
    assert asked == [*["asked"] * 3, *["known"] * 2, "asked", *["known"] * 3]
    plain = Scaled()
    plain.scale = 2.0
    assert torch.equal(made[5], loop(plain, 9)[5])
    # Results of the graph before stand in for nothing that this one returns.
    assert torch.equal(made[6], SKIPPED[0] * made[5])


@dataclass
class Counter:
    calls: int = 0


def test_what_a_forward_does_beside_returning_is_done_at_every_call(asked: list[str]) -> None:
    class Counting(ToyTransformer):
        def __init__(self) -> None:
            super().__init__()
            self.counter = Counter()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.counter.calls += 1
            return super().forward(*args, **kwargs)

    model = enabled(Counting())
    loop(model)
    assert asked == ["asked"] * len(PLAN)
    # The count is an integer of the graph, which only a step that runs something makes.
    assert taken(model) == ["cccrrr"]
    assert model.counter.calls == len(PLAN)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_hook_is_called_at_every_call(place: str, asked: list[str]) -> None:
    model, seen, called = ToyTransformer(), Counter(), []

    def note(*_: Any) -> None:
        seen.calls = 1

    def before(step: int) -> None:
        called.append(seen.calls)
        seen.calls = 0

    register = {"before": model.register_forward_pre_hook, "after": model.register_forward_hook}
    register[place](note)
    loop(enabled(model), before=before)
    assert asked == ["asked"] * len(PLAN)
    assert [*called[1:], seen.calls] == [1] * len(PLAN)
    assert taken(model) == [PLAN]


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "eager": lambda: torch.compiler.set_stance("force_eager"),
    "functions": Passing,
    "operators": Watching,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_another_mode_makes_the_model_be_asked(name: str, asked: list[str]) -> None:
    model = enabled(ToyTransformer(), PLAN)
    loop(model)
    asked.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        omni_cache.enable(model, cache=followed(PLAN), inner="eager", strict=True)
        with suppress(omni_cache.RegionError, RuntimeError):  # Dynamo may know nothing to do
            loop(model, around=lambda step: CONTEXTS[name]() if step == 4 else nullcontext())
    assert asked[3:5] == ["known", "asked"]


@pytest.mark.parametrize(
    ("change", "step"),
    [
        (lambda x: {"hidden_states": x.expand(2, -1, -1).contiguous()}, 4),
        (lambda x: {"hidden_states": x.mT.contiguous().mT}, 4),
        (lambda x: {"hidden_states": x.double().float().requires_grad_()}, 4),
        (lambda x: {"hidden_states": nn.Parameter(x, requires_grad=False)}, 4),
        (lambda x: {"return_dict": True}, 4),
        (lambda x: {"mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool)}, 4),
    ],
    ids=["batch", "strides", "gradients", "parameter", "form", "another"],
)
def test_other_arguments_make_the_model_be_asked(
    change: Callable[[Tensor], dict[str, Any]], step: int, asked: list[str]
) -> None:
    model = enabled(ToyTransformer(), dynamic=True)
    prompt = gaussian("prompt", 1, 5, CHANNELS)
    with omni_cache.generation(len(PLAN) + 1), omni_cache.branch("cond"):
        for index in range(len(PLAN)):
            given = {
                "hidden_states": gaussian(index, 1, TOKENS, CHANNELS),
                "timestep": torch.tensor([900.0 - index]),
                "prompt": prompt,
            }
            if index == step:
                given |= change(given["hidden_states"])
            model(**given)
    assert asked[3:5] == ["known", "asked"]


class Options:
    """An object of which nobody knows whether it has changed."""

    factor = 1.0


class Optional(ToyTransformer):
    def forward(self, *args: Any, options: Any = None, **kwargs: Any) -> Any:
        noise = super().forward(*args, **kwargs)
        if isinstance(options, Options):
            return noise * options.factor
        return noise if options is None else noise * options["factor"]


def test_an_argument_of_an_unknown_type_makes_the_model_be_asked(asked: list[str]) -> None:
    loop(enabled(Optional()), options=Options())
    assert asked == ["asked"] * len(PLAN)


def test_numbers_within_containers_tell_calls_apart(asked: list[str]) -> None:
    model = enabled(Optional())
    options = {"factor": 2, "names": ["a", ("b", None)]}
    loop(model, options=options)
    assert asked[3:] == ["known"] * 3

    def changed(step: int) -> None:
        options["factor"] = 2 if step < 4 else 3

    asked.clear()
    loop(model, options=options, before=changed)
    assert asked[3:5] == ["known", "asked"]


def test_a_number_of_another_type_is_another_number(asked: list[str]) -> None:
    model = enabled(Optional())
    options: dict[str, Any] = {"factor": 1}
    loop(model, options=options)

    def changed(step: int) -> None:
        options["factor"] = 1 if step < 4 else True

    asked.clear()
    loop(model, options=options, before=changed)
    assert asked[3:5] == ["known", "asked"]


def test_one_tensor_in_two_places_makes_the_model_be_asked(asked: list[str]) -> None:
    """Dynamo has a graph for it, which two equal tensors are not for, and the other way round."""
    model = enabled(ToyTransformer())
    with omni_cache.generation(len(PLAN) + 1), omni_cache.branch("cond"):
        for step in range(len(PLAN)):
            x = gaussian(step, 1, TOKENS, CHANNELS)
            model(x, torch.tensor([900.0 - step]), x if step == 4 else x.clone())
    assert asked[3:5] == ["known", "asked"]


def test_a_result_that_is_no_tensor_makes_the_model_be_asked(asked: list[str]) -> None:
    class Numbered(ToyTransformer):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states, *args, **kwargs), hidden_states.shape[1]

    loop(enabled(Numbered(), dynamic=True))
    assert asked == ["asked"] * len(PLAN)


def test_an_argument_that_is_returned_makes_the_model_be_asked(asked: list[str]) -> None:
    class Returning(ToyTransformer):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states, *args, **kwargs), hidden_states

    model = enabled(Returning())
    given: list[Tensor] = []

    def keeping(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(x)
        return model(x, *args, **kwargs)

    made = loop(keeping)  # type: ignore[arg-type]
    assert all(each[1] is x for each, x in zip(made, given, strict=True))
    assert asked == ["asked"] * len(PLAN)


@pytest.mark.parametrize("named", [False, True])
def test_a_call_that_is_not_skipped_after_all_has_left_nothing(named: bool) -> None:
    """Nobody names the generation: what a call leaves tells the loops and branches apart."""
    model = enabled(ToyTransformer(), "cccssrcs")
    prompts = [gaussian(name, 1, 5, CHANNELS) for name in range(10)]

    def generate() -> list[Tensor]:
        made = []
        for step in range(8):
            for number, prompt in enumerate(prompts):
                x = gaussian(step, 1, TOKENS, CHANNELS)
                with omni_cache.branch(str(number)) if named else nullcontext():
                    made.append(model(x, torch.tensor([900.0 - 50 * step]), prompt))
        return made

    (state,) = (state for _, state in states_of(model))
    held = []
    for _ in range(4):
        generate()
        assert taken(model) == ["cccssrcs"] * len(prompts)
        names = [each.branch for each in omni_cache.summary(model).trajectories]
        expected = map(str, range(10)) if named else (f"branch {place}" for place in range(10))
        assert names == [*expected]
        runs = [run for each in state.inferred for run in each.runs.values()]
        assert [len(run.courses) for run in runs] == [len(prompts)] * len(runs)
        held.append(sum(len(each.history.kept) for r in runs for each in r.trajectories.values()))
    assert len({*held[1:]}) == 1


class Weighing(ToyTransformer):
    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Any) -> Any:
        noise = super().forward(hidden_states, timestep, prompt)
        return noise * prompt.weight if hasattr(prompt, "weight") else noise


def test_what_somebody_has_set_on_a_tensor_tells_calls_apart(asked: list[str]) -> None:
    model = enabled(Weighing())
    with omni_cache.generation(len(PLAN) + 1), omni_cache.branch("cond"):
        for step in range(len(PLAN)):
            prompt: Any = gaussian("prompt", 1, 5, CHANNELS)
            prompt.weight = 2.0 if step < 4 else 3.0
            model(gaussian(step, 1, TOKENS, CHANNELS), torch.tensor([900.0 - step]), prompt)
    assert asked == ["asked"] * len(PLAN)
    assert taken(model) == ["cccscs"]


class Ignoring(ToyTransformer):
    def forward(self, *args: Any, extra: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    "extra",
    [
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.eye(3).to_sparse(),
        {torch.ones(2): 1},
    ],
    ids=["nested", "sparse", "keys"],
)
def test_an_argument_that_is_like_no_other_makes_the_model_be_asked(
    extra: Any, asked: list[str]
) -> None:
    loop(enabled(Ignoring()), extra={"extra": extra})
    assert asked == ["asked"] * len(PLAN)


NOTED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "an output": (lambda output: output, lambda made: made),
    "within another": (lambda output: {"outputs": [output]}, lambda made: made["outputs"][0]),
    "a tensor": (lambda output: output.sample, lambda made: made),
}
"""What is noted on, what the model returns of it, and where it is there."""


@pytest.mark.parametrize("what", NOTED)
def test_what_a_result_has_beside_its_leaves_is_there_at_every_call(
    what: str, asked: list[str]
) -> None:
    give, find = NOTED[what]

    class Noting(ToyTransformer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output: Any = Transformer2DModelOutput(sample=super().forward(*args, **kwargs))
            given = give(output)
            find(given).note = "n"
            return given

    made = loop(enabled(Noting()))
    assert [find(each).note for each in made] == ["n"] * len(PLAN)
    assert asked == ["asked"] * len(PLAN)


def test_a_number_that_changes_keeps_no_step_from_being_skipped(asked: list[str]) -> None:
    """Nothing that is returned is a number, so that earlier results stand in for all of it."""
    model = enabled(Optional(), dynamic=True)
    options = {"factor": 2}

    def changed(step: int) -> None:
        options["factor"] = 2 + step

    loop(model, options=options, before=changed)
    assert taken(model) == [PLAN]
    assert asked == ["asked"] * len(PLAN)


def test_a_step_whose_place_is_not_known_asks_for_the_model(asked: list[str]) -> None:
    """A loop of another length goes on, and nothing is held for its first steps."""
    model = enabled(ToyTransformer())
    loop(model)
    asked.clear()
    prompt = gaussian("prompt", 1, 5, CHANNELS)
    for step in (0, 2, 4):
        with omni_cache.generation(9), omni_cache.branch("cond", step_index=step):
            model(gaussian(step, 1, TOKENS, CHANNELS), torch.tensor([900.0 - step]), prompt)
    assert asked == ["asked"] * 3
    assert taken(model) == ["c"]


def test_a_call_that_failed_is_not_learnt_from(asked: list[str]) -> None:
    fails: list[int] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def ran(*args: Any) -> Any:
            if fails:
                raise AbandonedError
            return gm.forward(*args)

        return ran

    model = ToyTransformer()
    omni_cache.enable(model, cache=followed("sss"), inner=inner)
    fails.append(1)
    with interrupted():
        loop(model, 1)
    fails.clear()
    loop(model, 3)
    assert asked == ["asked", "asked", "known", "known"]
    assert taken(model) == ["css"]


def test_other_flags_begin_anew(asked: list[str]) -> None:
    model = enabled(ToyTransformer())
    first = loop(model)
    asked.clear()
    omni_cache.enable(model, cache=followed("crcrcr"), inner="eager")
    loop(model)
    assert asked == ["asked"] * len(PLAN)
    omni_cache.disable(model)
    asked.clear()
    loop(model)
    assert asked == []
    assert same(loop(enabled(model)), first)
