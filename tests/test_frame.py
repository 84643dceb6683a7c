"""Which module a captured graph is taken for, and what its inputs are called."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cross_section import also
from torch import Tensor, nn
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    TOKENS,
    Block,
    ToyTransformer,
    compiled,
    gaussian,
)

import omni_cache
from omni_cache.pipelines.enable import states_of
from omni_cache.runtime.calls import Call, bind

FLAGS = {"cache": "teacache", "inner": "eager", "rel_l1_thresh": 1e9}


class Wrapper(nn.Module):
    """Takes whatever its model takes, and has a list of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(2))
        self.core = nn.Module()
        self.core.model = ToyTransformer()
        self.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.core.model(*args, **kwargs)


class Scattered(ToyTransformer):
    """Keeps its blocks in a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.blocks = self.blocks
        del self.blocks

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        x = self.embed(hidden_states)
        time = self.embed_prompt(prompt).mean(1) + self.embed_time(timestep[:, None] / 500)
        for block in self.body.blocks:
            x = block(x, time, None)
        return self.project(x)


def step(vae: nn.Module, transformer: nn.Module, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    return transformer(vae(x), t, prompt)


def called(call: Callable[..., Any]) -> list[str]:
    """Runs a loop over it, and returns what was warned of."""
    prompt = gaussian("p", 1, 3, CHANNELS)
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        for index in range(4):
            call(gaussian(index, 1, TOKENS, CHANNELS), torch.tensor([900.0 - index]), prompt)
    return [str(each.message) for each in seen]


def test_a_wrapped_model_is_the_one_whose_call_runs_the_blocks() -> None:
    for wrapper in (
        torch.compile(Wrapper(), backend="omni_cache", options=FLAGS),
        omni_cache.enable(Wrapper(), **FLAGS),
    ):
        (told,) = called(wrapper)
        assert "no coefficients are published for ToyTransformer;" in told
        assert omni_cache.summary(wrapper).reused_steps > 0


def by_method(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


def by_arguments(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


class ByMethod(ToyTransformer):
    forward = by_method(ToyTransformer.forward)


class ByArguments(ToyTransformer):
    forward = by_arguments(ToyTransformer.forward)


class ByName(ToyTransformer):
    """Whose decorator names the first argument."""

    @functools.wraps(ToyTransformer.forward)
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, *args, **kwargs)


def naming(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states, *args, **kwargs)

    return wrapper


class ByNaming(ToyTransformer):
    forward = naming(ToyTransformer.forward)


class ByBoth(ToyTransformer):
    forward = by_method(by_arguments(by_method(ToyTransformer.forward)))


class ByOneThatIsNotTraced(ToyTransformer):
    forward = torch.compiler.disable(by_method(ToyTransformer.forward), recursive=False)


def on_an_instance() -> nn.Module:
    """As accelerate puts its hooks around a module's forward."""

    def hooked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return ToyTransformer.forward(module, *args, **kwargs)  # type: ignore[arg-type]

    model = ToyTransformer()
    patched = functools.partial(hooked, model)
    model.forward = functools.update_wrapper(patched, model.forward)  # type: ignore[method-assign]
    return model


def by_a_function() -> nn.Module:
    """What an instance has for its forward is not called with the module."""
    model = ToyTransformer()
    own = model.forward

    def patched(*args: Any, **kwargs: Any) -> Tensor:
        return own(*args, **kwargs)

    model.forward = patched  # type: ignore[method-assign]
    return model


DECORATED = (
    ByMethod,
    ByArguments,
    ByName,
    ByNaming,
    ByBoth,
    ByOneThatIsNotTraced,
    on_an_instance,
)


@pytest.mark.parametrize("make", DECORATED)
def test_a_decorated_forward_is_the_models_own(make: Callable[[], nn.Module]) -> None:
    """Most transformers of diffusers have a decorator, whose code is named ``wrapper``."""
    model = make().requires_grad_(False)
    flags = {"cache": "easycache", "threshold": 1e9, "retention_steps": 1, "inner": "eager"}
    cached = torch.compile(model, backend="omni_cache", options=flags)
    with omni_cache.generation(4), omni_cache.branch("cond"):
        assert called(cached) == []
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.timestep for step in trajectory.steps] == [900.0, 899.0, 898.0, 897.0]
    assert omni_cache.summary(model).reused_steps == 1


def test_a_function_for_a_forward_is_the_models_own() -> None:
    model = by_a_function().requires_grad_(False)
    flags = {"cache": "stepcache", "sim_thresholds": (-1.0,), "skip_countdowns": (9,)}
    flags["inner"] = "eager"
    cached = torch.compile(model, backend="omni_cache", options=flags)
    with omni_cache.generation(4), omni_cache.branch("cond"):
        assert called(cached) == []
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.computed for step in trajectory.steps] == [True, True, False, False]


def test_a_function_with_the_decorator_of_a_method_is_no_method() -> None:
    @by_arguments
    def denoise(model: nn.Module, timestep: Tensor, latents: Tensor, prompt: Tensor) -> Tensor:
        return model(latents, timestep, prompt)

    model = ByArguments().requires_grad_(False)
    cached = torch.compile(denoise, backend="omni_cache", options={**ALWAYS_REUSE})
    with omni_cache.generation(4), omni_cache.branch("cond"):
        called(lambda latents, timestep, prompt: cached(model, timestep, latents, prompt))
    (trajectory,) = omni_cache.summary(model).trajectories
    # The latents are not taken for it, which would be the second of the method's.
    assert [step.timestep for step in trajectory.steps] == [None] * 4


def by_number(self: Any, hidden_states: Tensor, timestep: float, prompt: Tensor) -> Tensor:
    """A forward that takes its timestep as a number."""
    return ToyTransformer.forward(self, hidden_states, torch.full((1,), timestep), prompt)


@pytest.mark.parametrize("decorator", [by_method, by_arguments, naming])
def test_a_number_behind_a_decorator_is_known_by_its_name(decorator: Callable[..., Any]) -> None:
    class Constant(ToyTransformer):
        forward = decorator(by_number)

    model = Constant().requires_grad_(False)
    cached = compiled(model, **ALWAYS_REUSE)
    x, prompt = gaussian("x", 1, TOKENS, CHANNELS), gaussian("p", 1, 3, CHANNELS)
    with torch.no_grad():
        cached(x, 900.0, prompt)
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.timestep for step in trajectory.steps] == [900.0]


def test_of_several_wrappers_none_is_taken_for_the_model() -> None:
    outer = Wrapper()
    outer.core.model = Wrapper()
    (told,) = called(omni_cache.enable(outer, **FLAGS))
    assert "no coefficients are published for ToyTransformer;" in told


class Few(nn.Module):
    """Runs two blocks."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time, None)
        return x


class Many(Few):
    """Runs five."""


class InTwoModules(ToyTransformer):
    """Has a part of its blocks in one module, and the rest in another."""

    def __init__(self) -> None:
        super().__init__()
        del self.blocks
        self.few, self.many = Few(), Many(5)
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        time = self.embed_prompt(prompt).mean(1) + self.embed_time(timestep[:, None] / 500)
        return self.project(self.many(self.few(self.embed(hidden_states), time), time))


def test_of_two_modules_with_blocks_it_is_the_one_with_the_most() -> None:
    model = InTwoModules()
    (told,) = called(omni_cache.enable(model, **FLAGS))
    assert "no coefficients are published for Many;" in told
    assert omni_cache.summary(model).reused_steps > 0


def test_a_module_that_only_holds_the_blocks_is_not_their_model() -> None:
    model = Scattered()
    (told,) = called(omni_cache.enable(model, **FLAGS))
    assert "no coefficients are published for Scattered;" in told
    assert omni_cache.summary(model).reused_steps > 0


def test_in_a_function_over_several_modules_it_is_the_one_with_the_blocks() -> None:
    vae, model = nn.Linear(CHANNELS, CHANNELS).requires_grad_(False), ToyTransformer()
    compiled = torch.compile(step, backend="omni_cache", options=FLAGS)
    (told,) = called(lambda *args: compiled(vae, model, *args))
    assert "no coefficients are published for ToyTransformer;" in told
    assert omni_cache.summary(model).reused_steps > 0


def test_a_function_without_blocks_goes_by_its_own_name() -> None:
    def plain(module: nn.Module, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return module(x) * t

    linear = nn.Linear(CHANNELS, CHANNELS).requires_grad_(False)
    compiled = torch.compile(plain, backend="omni_cache", options=FLAGS)
    (told,) = called(lambda *args: compiled(linear, *args))
    assert told.startswith("plain() runs uncached: no list of repeated blocks")


class Core(ToyTransformer):
    """What it calls its timestep is no timestep."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, prompt)


class Positive(nn.Module):
    """Has no blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + 1


class GivenUp(nn.Module):
    """Breaks in a loop, so that Dynamo captures what it calls, module by module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Positive()
        self.core = Core()
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
        return self.core(self.first(hidden_states), timestep * 0 + 7, prompt)


def test_a_module_that_is_traced_on_its_own_is_placed_by_the_call_around_it() -> None:
    model = omni_cache.enable(GivenUp(), **FLAGS, coefficients=[1.0, 0.0])
    assert called(model) == []
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.timestep for step in trajectory.steps] == [900.0, 899.0, 898.0, 897.0]
    assert [step.computed for step in trajectory.steps] == [True, False, False, False]


def test_modules_without_blocks_beside_the_one_that_has_them_are_no_matter() -> None:
    model = GivenUp()
    compiled = torch.compile(
        model, backend="omni_cache", options={**FLAGS, "coefficients": [1.0, 0.0]}
    )
    with omni_cache.generation(4), omni_cache.branch("cond"):
        assert called(compiled) == []
    assert omni_cache.summary(model).reused_steps == 3


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_model_compiled_on_its_own_is_no_part_of_an_enabled_ones_call(when: str) -> None:
    """As within a model that an extractor takes apart, whose parts are not traced."""
    around = omni_cache.enable(ToyTransformer(), **{**ALWAYS_REUSE, "rel_l1_thresh": 0.0})
    ((_, state),) = states_of(around)
    model = ToyTransformer(seed=1)
    cached = compiled(model, **ALWAYS_REUSE)
    if when == "before":
        called(cached)
    call = Call(around, state, {})
    with bind(call):
        called(cached)
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.computed for step in trajectory.steps] == [True, False, False, False]
    assert omni_cache.summary(around).trajectories == ()
    assert not call.is_cached
    assert call.refusals == []


# --- modules of one class that are captured by themselves ----------------------------------------


class Towers(nn.Module):
    """Runs the models whose names it is told, one after the other.

    Its graph breaks lie in a loop, so that Dynamo captures each model by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Core(seed=1), Core(seed=2)
        self.runs = ["first", "second"]
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
        for name in self.runs:
            hidden_states = hidden_states + getattr(self, name)(hidden_states, timestep, prompt)
        return hidden_states


def predicted(model: nn.Module, **flags: Any) -> list[Tensor]:
    """Predictions of four steps, with latents that stand still: a reused step is the first one."""
    omni_cache.enable(model, inner="eager", **flags)
    x, prompt = gaussian("x", 1, TOKENS, CHANNELS), gaussian("p", 1, 3, CHANNELS)
    with torch.no_grad(), omni_cache.generation(4), omni_cache.branch("cond"):
        return [model(x, torch.tensor([900.0 - index]), prompt) for index in range(4)]


TWO, TWICE = ["first", "second"], ["first", "first"]


# The last has both: another model in between, and the first one a second time.
@pytest.mark.parametrize("runs", [also(TWO), also(TWICE), [*TWO, "first"]], ids=" ".join)
def test_none_is_given_the_residual_of_another_or_of_another_time(runs: list[str]) -> None:
    model = Towers()
    model.runs = runs
    first, *others = predicted(model, **ALWAYS_REUSE)
    for each in others:
        torch.testing.assert_close(each, first, rtol=1e-5, atol=1e-5)
    trajectories = omni_cache.summary(model).trajectories
    assert [[step.computed for step in each.steps] for each in trajectories] == [
        [True, False, False, False]
    ] * len(runs)


def test_one_that_is_left_out_leaves_the_others_theirs() -> None:
    model = Towers()
    omni_cache.enable(model, **FLAGS, coefficients=[1.0, 0.0])
    x, prompt = gaussian("x", 1, TOKENS, CHANNELS), gaussian("p", 1, 3, CHANNELS)
    with torch.no_grad(), omni_cache.generation(4), omni_cache.branch("cond"):
        model(x, torch.tensor([900.0]), prompt)
        model.runs = ["second"]
        alone = model(x, torch.tensor([899.0]), prompt)
    # What the second tower adds to these latents, and not what the first one would.
    own = Core(seed=2).requires_grad_(False)
    with torch.no_grad():
        fresh = x + own(x, torch.tensor([899.0]), prompt)
        other = x + Core(seed=1)(x, torch.tensor([899.0]), prompt)
    assert (alone - fresh).norm() < (alone - other).norm()


def test_of_two_times_only_the_order_tells_which_a_call_is_so_that_magcache_computes() -> None:
    model = Towers()
    ratios = {"mag_ratios": [1.0], "retention_ratio": 0.0, "max_skip_steps": 9, "threshold": 9.0}
    for runs, schedule in ((TWO, [True, False, False, False]), (TWICE, [True] * 4)):
        model.runs = runs
        predicted(model, cache="magcache", **ratios)
        trajectories = omni_cache.summary(model).trajectories
        assert [[step.computed for step in each.steps] for each in trajectories] == [schedule] * 2
