"""What ``enable`` adds to a pipeline or module, what it leaves alone, what ``disable`` leaves."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from tiny_pipelines import PIPELINES, transformer
from torch import Tensor, nn
from toy_pipeline import STEPS, ToyModel, ToyPipeline
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    MAGCACHE,
    TEACACHE,
    Block,
    Loop,
    ToyTransformer,
    compiled,
    computed,
    gaussian,
    interrupted,
    reasons,
    same,
)

import omni_cache
from omni_cache import RegionError, UncachedWarning


class Counting:
    """A compiler that leaves graphs as they are and counts them, and their calls."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return gm.forward(*args)

        return run


def enabled(target: Any, **flags: Any) -> Any:
    return omni_cache.enable(target, **{"inner": "eager", **(flags or ALWAYS_REUSE)})


def fresh(*args: Any, **flags: Any) -> Tensor:
    """What a new pipeline generates, over which nothing went before."""
    return enabled(ToyPipeline(), **flags)(*args)


# --- what it leaves alone -------------------------------------------------------------------------


def test_after_disable_everything_is_as_it_was() -> None:
    pipe = ToyPipeline()
    plain = pipe()
    before = [dict(vars(each)) for each in (pipe, pipe.transformer, pipe.scheduler)]
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}

    enabled(pipe)
    assert type(pipe.transformer) is ToyModel
    assert pipe.transformer.state_dict().keys() == weights.keys()
    assert vars(pipe.scheduler).keys() == before[2].keys()
    pipe()
    omni_cache.disable(pipe)

    after = [dict(vars(each)) for each in (pipe, pipe.transformer, pipe.scheduler)]
    for then, now in zip(before, after, strict=True):
        assert now.keys() == then.keys()
    assert all(now is before[1][name] for name, now in after[1].items())
    assert all(map(torch.equal, pipe.transformer.state_dict().values(), weights.values()))
    assert torch.equal(pipe(), plain)
    assert omni_cache.disable(pipe) is pipe
    assert vars(pipe.transformer).keys() == before[1].keys()


def test_the_users_own_compilation_rests_meanwhile() -> None:
    own = Counting()
    pipe = ToyPipeline()
    pipe.transformer.compile(backend=own)
    compiled_before = pipe.transformer._compiled_call_impl

    enabled(pipe)
    pipe()
    assert own.graphs == 0
    omni_cache.disable(pipe)

    assert pipe.transformer._compiled_call_impl is compiled_before
    pipe()
    assert (own.graphs, own.calls) == (1, 2 * STEPS)


def test_a_transformer_that_is_wrapped_by_torch_compile() -> None:
    own = Counting()
    pipe = ToyPipeline()
    model = pipe.transformer
    wrapped = pipe.transformer = torch.compile(model, backend=own)

    enabled(pipe)
    assert torch.equal(pipe(), fresh())
    assert own.graphs == 0
    assert computed(pipe) == [[True] + [False] * (STEPS - 1)] * 2
    assert pipe.transformer is wrapped
    omni_cache.disable(wrapped)

    pipe()
    assert (own.graphs, own.calls) == (1, 2 * STEPS)
    assert model._compiled_call_impl is None


@torch.no_grad()
def test_copies_of_an_enabled_model_are_plain_models() -> None:
    pipe = enabled(ToyPipeline())
    pipe()
    model = pipe.transformer
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not omni_cache.pipelines.is_enabled(duplicate)
        plain = ToyPipeline(duplicate)
        assert torch.equal(plain(), ToyPipeline()())
        # And may be enabled on their own.
        assert torch.equal(enabled(plain)(), fresh())
        omni_cache.disable(plain)
        assert torch.equal(plain(), ToyPipeline()())
    assert omni_cache.pipelines.is_enabled(model)
    assert torch.equal(pipe(), fresh())


def test_a_copy_outlives_the_model_that_it_was_made_from() -> None:
    model = enabled(ToyPipeline()).transformer
    duplicate = copy.deepcopy(model)
    del model

    assert torch.equal(ToyPipeline(duplicate)(), ToyPipeline()())


@torch.no_grad()
def test_an_enabled_model_can_be_saved(tmp_path: Any) -> None:
    model = transformer("wan", {"num_layers": 1})
    enabled(model).save_pretrained(tmp_path)

    loaded = type(model).from_pretrained(tmp_path)

    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


def test_a_scheduler_stays_a_plain_object() -> None:
    """Pipelines copy their scheduler for a second stream, and look at its signatures."""
    pipe = enabled(ToyPipeline())
    duplicate = copy.deepcopy(pipe.scheduler)
    duplicate.set_timesteps(3)
    pipe.scheduler.set_timesteps(5)

    assert (len(duplicate.timesteps), len(pipe.scheduler.timesteps)) == (3, 5)
    assert len(pickle.loads(pickle.dumps(pipe.scheduler)).timesteps) == 5


# --- what it hears --------------------------------------------------------------------------------


def test_a_pipeline_is_heard() -> None:
    pipe = enabled(ToyPipeline(), **MAGCACHE)
    with pytest.raises(InterruptedError):
        pipe("an owl", 1, stop=5)

    assert torch.equal(pipe(steps=20), fresh("a fox", 0, 20, **MAGCACHE))
    trajectories = omni_cache.summary(pipe).trajectories
    assert [(each.model, each.branch) for each in trajectories] == [
        ("transformer", "cond"),
        ("transformer", "uncond"),
    ]
    # A tenth of 20 steps is always computed.
    assert reasons(pipe)[0][:3] == ["first step", "retention", "below threshold"]


@pytest.mark.parametrize("names_branches", [True, False], ids=["named", "inferred"])
def test_a_second_order_scheduler_tells_steps_that_the_timestep_does_not(
    names_branches: bool,
) -> None:
    """Heun evaluates the model at the first timestep once, and at every other twice."""
    pipe = ToyPipeline(scheduler=FlowMatchHeunDiscreteScheduler(), names_branches=names_branches)
    enabled(pipe)

    for steps in (4, 3):
        pipe(steps=steps)
        assert computed(pipe) == [[True] + [False] * (2 * steps - 2)] * 2


def test_a_scheduler_may_be_replaced() -> None:
    other = FlowMatchHeunDiscreteScheduler()
    expected = enabled(ToyPipeline(scheduler=other), **MAGCACHE)("a fox", 0, 10)
    pipe = enabled(ToyPipeline(), **MAGCACHE)
    with pytest.raises(InterruptedError):
        pipe("an owl", 1, stop=7)

    pipe.scheduler = FlowMatchHeunDiscreteScheduler()

    assert torch.equal(pipe("a fox", 0, 10), expected)
    # Heun's method takes 19 calls for 10 steps, and a tenth of these is always computed.
    assert len(reasons(pipe)[0]) == 19
    assert reasons(pipe)[0][:3] == ["first step", "retention", "below threshold"]


def test_a_scheduler_that_has_not_been_set_announces_nothing() -> None:
    """As made, a scheduler has the thousand timesteps of its training."""
    pipe = enabled(ToyPipeline(), **MAGCACHE)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with torch.no_grad():
        Loop().run(pipe.transformer)

    assert False in computed(pipe)[0]


def test_two_pipelines_with_one_transformer_are_both_heard() -> None:
    first = enabled(ToyPipeline())
    second = enabled(ToyPipeline(first.transformer))
    for _ in range(2):
        with pytest.raises(InterruptedError):
            first("an owl", 1, stop=5)
        assert torch.equal(second("a fox"), fresh("a fox"))
        assert torch.equal(first("a fox"), fresh("a fox"))


def test_threads_with_pipelines_of_their_own_may_share_one_transformer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each in its own generation; the one must not take the other's new timesteps for its own."""
    places = (("a fox", 0), ("an owl", 1))
    expected = [fresh(*place, **ALWAYS_REUSE) for place in places]
    first = enabled(ToyPipeline(), **ALWAYS_REUSE)
    second = enabled(ToyPipeline(first.transformer), **ALWAYS_REUSE)
    found: dict[str, Tensor] = {}

    def generate(pipe: ToyPipeline, prompt: str, seed: int) -> None:
        with omni_cache.generation(STEPS):
            found[prompt] = pipe(prompt, seed)

    kind = type(first.transformer._compiled_call_impl)
    original, calls = kind.__call__, itertools.count()
    begun, passed = threading.Event(), threading.Event()
    other = threading.Thread(target=generate, args=(second, *places[1]))

    def in_order(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is other:
            begun.set()  # its scheduler has new timesteps
            passed.wait(timeout=60)
        else:
            call = next(calls)
            if call == 5:
                other.start()
                begun.wait(timeout=60)
            if call == 6:
                passed.set()
                other.join()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", in_order)
    generate(first, *places[0])

    for (prompt, _), each in zip(places, expected, strict=True):
        assert torch.equal(found[prompt], each)


def test_a_pipeline_is_heard_after_its_model_was_enabled_anew() -> None:
    pipe = enabled(ToyPipeline(), **MAGCACHE)
    enabled(pipe.transformer, **{**MAGCACHE, "threshold": 0.3})
    pipe(steps=20)

    assert reasons(pipe)[0][:3] == ["first step", "retention", "below threshold"]


def test_enabling_again_adds_nothing() -> None:
    pipe = enabled(ToyPipeline())
    call, context = pipe.transformer._compiled_call_impl, pipe.transformer.cache_context
    for _ in range(2):
        assert enabled(pipe) is pipe
    assert pipe.transformer._compiled_call_impl is call
    assert pipe.transformer.cache_context is context
    assert len(call.pipelines) == 1


def test_other_thresholds_and_step_counts_compile_nothing() -> None:
    inner = Counting()
    pipe = enabled(ToyPipeline(), **{**TEACACHE, "inner": inner})
    first = pipe()
    graphs = inner.graphs
    enabled(pipe, **{**TEACACHE, "inner": inner, "rel_l1_thresh": 0.0, "force_last_step": True})
    assert omni_cache.summary(pipe).trajectories == ()
    assert torch.equal(pipe(), ToyPipeline()())
    enabled(pipe, **{**TEACACHE, "inner": inner})
    assert torch.equal(pipe(), first)
    assert inner.graphs == graphs > 0


def test_pipelines_with_other_thresholds_share_a_compilation() -> None:
    inner = Counting()
    often = enabled(ToyPipeline(), **{**MAGCACHE, "inner": inner})
    seldom = enabled(ToyPipeline(), **{**MAGCACHE, "inner": inner, "threshold": 0.0})
    often()
    graphs = inner.graphs
    assert torch.equal(seldom(), ToyPipeline()())
    assert torch.equal(often(), fresh(**MAGCACHE))
    assert inner.graphs == graphs


def test_a_loop_that_begins_in_the_middle_of_the_steps_is_counted_from_there() -> None:
    """As image-to-image pipelines do."""

    class FromTheMiddle(ToyPipeline):
        @torch.no_grad()
        def __call__(self) -> None:
            self.scheduler.set_timesteps(8)
            self.scheduler.set_begin_index(3)
            words, latents = gaussian(0, 1, 5, CHANNELS), gaussian(1, 1, 6, CHANNELS)
            for timestep in self.scheduler.timesteps[3:]:
                noise = self.transformer(latents, timestep.expand(1), words)
                (latents,) = self.scheduler.step(noise, timestep, latents, return_dict=False)

    pipe = enabled(FromTheMiddle(), **ALWAYS_REUSE, force_last_step=True)
    pipe()
    assert reasons(pipe)[0][3:] == ["below threshold", "last step"]


def test_an_unknown_flag_is_told_those_of_torch_compile_too() -> None:
    with pytest.raises(ValueError, match=r"'dynamc', did you mean 'dynamic'\?.*fullgraph"):
        enabled(ToyPipeline(), dynamc=True)


def test_other_flags_replace_the_cache() -> None:
    pipe = enabled(ToyPipeline())
    pipe()
    assert omni_cache.summary(pipe).reused_steps > 0
    enabled(pipe, **{**ALWAYS_REUSE, "rel_l1_thresh": 0.0})
    assert omni_cache.summary(pipe).trajectories == ()
    pipe()
    assert omni_cache.summary(pipe).reused_steps == 0


def test_a_loop_of_ones_own_after_the_pipelines_is_a_new_generation() -> None:
    """It names branches, but nobody has announced it."""
    pipe = enabled(ToyPipeline())
    for stop in (None, 6):
        if stop is None:
            pipe("an owl", 1)
        else:
            with pytest.raises(InterruptedError):
                pipe("an owl", 1, stop=stop)
        own = ToyPipeline(pipe.transformer)  # not enabled, with a scheduler of its own
        assert torch.equal(own("a fox"), fresh("a fox"))


def test_disable_forgets_what_was_cached() -> None:
    pipe = enabled(ToyPipeline())
    with pytest.raises(InterruptedError):
        pipe("an owl", 1, stop=5)
    omni_cache.disable(pipe)
    assert omni_cache.summary(pipe).trajectories == ()

    assert torch.equal(enabled(pipe)(), fresh())


# --- modules --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bare_module_is_cached_like_a_compiled_one() -> None:
    model = ToyTransformer()
    expected = Loop(("cond", "uncond")).run(compiled(ToyTransformer()))

    assert (
        omni_cache.enable(model, inner="eager", coefficients=[1.0, 0.0], rel_l1_thresh=0.12)
        is model
    )
    for _ in range(2):
        with interrupted():
            Loop(("one", "two"), seed=1, calls=7).run(model)
        assert same(Loop(("cond", "uncond")).run(model), expected)
    assert False in computed(model)[0]


@torch.no_grad()
def test_cache_none_compiles_only() -> None:
    inner = Counting()
    model = omni_cache.enable(ToyTransformer(), cache="none", inner=inner)
    plain = Loop().run(ToyTransformer())

    assert same(Loop().run(model), plain)
    assert (inner.graphs, inner.calls) == (1, 8)
    assert omni_cache.summary(model).trajectories == ()


@pytest.mark.parametrize("function", [omni_cache.enable, omni_cache.disable, omni_cache.refresh])
@pytest.mark.parametrize("target", [None, 3, FlowMatchEulerDiscreteScheduler()])
def test_what_has_no_transformer_is_refused(function: Any, target: Any) -> None:
    with pytest.raises(TypeError, match=rf"target={type(target).__name__} is not allowed"):
        function(target)


def test_a_pipelines_dtype_may_change() -> None:
    kind = PIPELINES["wan"]
    pipe = enabled(kind.build())
    kind.generate(pipe)
    pipe.to(torch.bfloat16)

    latents = kind.generate(pipe)

    assert pipe.transformer.dtype == torch.bfloat16
    assert torch.equal(latents, kind.generate(enabled(kind.build().to(torch.bfloat16))))
    assert omni_cache.summary(pipe).reused_steps > 0


# --- what cannot be cached ------------------------------------------------------------------------


def test_with_gradients_it_runs_uncached_and_one_warning_says_why() -> None:
    model = ToyTransformer().requires_grad_(True)
    plain = Loop().run(ToyTransformer())

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        predictions = Loop().run(enabled(model))

    (warning,) = seen
    assert warning.category is UncachedWarning
    assert "gradients are enabled" in str(warning.message)
    assert "torch.no_grad()" in str(warning.message)
    assert all(map(torch.allclose, predictions, plain))
    predictions[-1].sum().backward()
    assert model.blocks[0].qkv.weight.grad.abs().sum() > 0
    # Without gradients the same model is cached.
    with torch.no_grad():
        Loop().run(model)
    assert False in computed(model)[0]


class NoBlocks(nn.Module):
    """Nothing that could be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(CHANNELS, 8), nn.ReLU(), nn.Linear(8, CHANNELS))

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return self.layers(hidden_states) + timestep / 1000


@torch.no_grad()
def test_a_model_without_blocks_runs_uncached_and_one_warning_says_why() -> None:
    model = NoBlocks()
    expected = Loop().run(torch.compile(model, backend="eager"))

    with pytest.warns(UncachedWarning, match="NoBlocks runs uncached: no list of repeated") as seen:
        predictions = Loop().run(enabled(model))

    assert len(seen) == 1
    assert same(predictions, expected)
    assert omni_cache.summary(model).trajectories == ()


@torch.no_grad()
def test_strict_refuses_a_model_that_cannot_be_cached() -> None:
    with pytest.raises(RegionError, match="no list of repeated blocks"):
        Loop().run(enabled(NoBlocks(), strict=True, **ALWAYS_REUSE))


class Broken(ToyTransformer):
    """The toy with a graph break: before its blocks, among them or after them."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        x = self.embed(hidden_states)
        time = self.embed_prompt(prompt).mean(1) + self.embed_time(timestep[:, None] / 500)
        if self.where == "before":
            torch._dynamo.graph_break()
        x = self.blocks[0](x, time, None)
        if self.where == "among":
            torch._dynamo.graph_break()
        x = self.blocks[1](x, time, None)
        if self.where == "after":
            torch._dynamo.graph_break()
        return self.project(x)


@torch.no_grad()
@pytest.mark.parametrize("where", ["before", "among", "after"])
def test_a_graph_break_changes_no_prediction(where: str) -> None:
    expected = Loop(("cond", "uncond")).run(ToyTransformer())
    model = enabled(Broken(where), **{**ALWAYS_REUSE, "rel_l1_thresh": 0.0})

    for explicit in (False, True):
        found = Loop(("cond", "uncond"), explicit=explicit).run(model)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("explicit", [False, True])
def test_blocks_after_a_graph_break_are_placed_by_the_arguments_of_the_call(explicit: bool) -> None:
    model = enabled(Broken("before"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            Loop(("cond", "uncond"), explicit=explicit).run(model)

    assert computed(model) == [[True] + [False] * 7] * 2


@torch.no_grad()
def test_without_enable_blocks_after_a_graph_break_are_cached_in_contexts_alone() -> None:
    """Of the arguments only what is still needed comes through, and who knows what became of it."""
    model = Broken("before")
    cached = compiled(model, **ALWAYS_REUSE)
    with pytest.warns(UserWarning, match="no timestep and no context") as seen:
        Loop(("cond", "uncond")).run(cached)
    assert len(seen) == 1
    assert omni_cache.summary(model).trajectories == ()

    Loop(("cond", "uncond"), explicit=True).run(cached)
    assert computed(model) == [[True] + [False] * 7] * 2


@torch.no_grad()
def test_blocks_before_a_graph_break_are_cached_without_a_warning() -> None:
    model = enabled(Broken("after"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loop(("cond", "uncond")).run(model)

    assert computed(model) == [[True] + [False] * 7] * 2


@torch.no_grad()
def test_blocks_on_both_sides_of_a_graph_break_are_cached_in_part_and_a_warning_says_why() -> None:
    model = enabled(Broken("among"))
    message = "a part of Broken runs uncached: .* a graph break cuts the loop in two"
    with pytest.warns(UncachedWarning, match=message) as seen:
        Loop(("cond", "uncond")).run(model)

    assert len(seen) == 1
    assert computed(model) == [[True] + [False] * 7] * 2


class RefinedThenBroken(ToyTransformer):
    """Refines the prompt in a block of its own, before a graph break and the blocks behind it."""

    def __init__(self) -> None:
        super().__init__(blocks=4)
        self.refiner = nn.ModuleList([Block()]).eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        time, words = self.embed_time(timestep[:, None] / 500), self.embed_prompt(prompt)
        for block in self.refiner:
            words = block(words, time, None)
        torch._dynamo.graph_break()
        x, time = self.embed(hidden_states), time + words.mean(1)
        for block in self.blocks:
            x = block(x, time, None)
        return self.project(x)


class CutUp(ToyTransformer):
    """A graph break before every block: within the loop, so that Dynamo captures none of it."""

    def run(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x, time, None)
        return x

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        time = self.embed_prompt(prompt).mean(1) + self.embed_time(timestep[:, None] / 500)
        return self.project(self.run(self.embed(hidden_states), time))


class CutUpInForward(CutUp):
    """Likewise, so that Dynamo captures no ``forward`` either, only blocks one by one."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        x = self.embed(hidden_states)
        time = self.embed_prompt(prompt).mean(1) + self.embed_time(timestep[:, None] / 500)
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x, time, None)
        return self.project(x)


class BehindDisabled(CutUp):
    """Blocks that Dynamo is kept away from."""

    @torch.compiler.disable
    def run(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time, None)
        return x


@torch.no_grad()
@pytest.mark.parametrize("model_class", [CutUp, CutUpInForward, BehindDisabled])
def test_a_model_whose_blocks_no_graph_holds_is_told_of_once_and_refused_by_strict(
    model_class: type[ToyTransformer],
) -> None:
    expected = Loop().run(model_class())
    model = enabled(model_class())
    reason = "a graph break keeps the block loop out of every graph; omni_cache.explain"
    message = f"{model_class.__name__} runs uncached: {reason}"
    with pytest.warns(UncachedWarning, match=message) as seen:
        predictions = Loop().run(model)
    assert len(seen) == 1
    assert same(predictions, expected)
    # Another instance shares what was compiled, and is told as well.
    with pytest.warns(UncachedWarning, match=message) as seen:
        Loop().run(enabled(model_class()))
    assert len(seen) == 1

    strict = enabled(model_class(), strict=True, **ALWAYS_REUSE)
    for _ in range(2):
        with pytest.raises(RegionError, match=reason):
            Loop().run(strict)


@torch.no_grad()
def test_every_instance_is_captured_as_the_first_one_was() -> None:
    class BreakingInALoop(ToyTransformer):
        run = ToyTransformer.forward

        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Any:
            for _ in range(2):
                torch._dynamo.graph_break()
            return self.run(hidden_states, timestep, prompt)

    for seed in range(3):
        model = enabled(BreakingInALoop(seed))
        Loop().run(model)
        assert computed(model) == [[True] + [False] * 7]


@torch.no_grad()
@pytest.mark.parametrize("where", ["before", "after"])
def test_strict_takes_a_model_whose_blocks_lie_whole_in_one_of_its_graphs(where: str) -> None:
    model = enabled(Broken(where), strict=True, **ALWAYS_REUSE)
    Loop().run(model)
    assert omni_cache.summary(model).reused_steps > 0


@torch.no_grad()
def test_a_name_may_be_that_of_a_list_in_another_piece_but_not_of_none() -> None:
    model = enabled(Broken("before"), region=["blocks"], **ALWAYS_REUSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loop().run(model)
    assert computed(model) == [[True] + [False] * 7]

    enabled(model, region=["block"], **ALWAYS_REUSE)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no 'block' runs in the graph \(did you mean 'bloc"):
            Loop().run(model)


@torch.no_grad()
def test_pieces_that_were_asked_for_say_what_the_one_graph_lacks() -> None:
    model = enabled(NoBlocks(), fullgraph=False, **ALWAYS_REUSE)
    with pytest.warns(UncachedWarning, match="no list of repeated blocks") as seen:
        Loop().run(model)
    assert len(seen) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_in_pieces_is_told_of_gradients_once_and_cached_without(strict: bool) -> None:
    model = enabled(Broken("before"), strict=strict, **ALWAYS_REUSE)
    if strict:
        with torch.enable_grad(), pytest.raises(RegionError, match="gradients are enabled"):
            Loop().run(model)
    else:
        with torch.enable_grad(), pytest.warns(UncachedWarning, match="gradients") as seen:
            Loop().run(model)
        assert len(seen) == 1
    with torch.no_grad():
        Loop().run(model)
    assert computed(model) == [[True] + [False] * 7]


@torch.no_grad()
def test_a_mistaken_call_leaves_the_model_cached() -> None:
    """What it raises looks like a graph break to Dynamo."""
    graphs = Counting()
    model = enabled(ToyTransformer(), **{**ALWAYS_REUSE, "inner": graphs})
    for _ in range(2):
        with pytest.raises(TypeError, match="hidden_states"):
            model(timestep=torch.tensor([1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loop().run(model)
    assert computed(model) == [[True] + [False] * 7]


@torch.no_grad()
def test_a_model_that_leaves_its_first_block_out_is_cached() -> None:
    class Skipping(ToyTransformer):
        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            x = self.embed(hidden_states)
            time = self.embed_prompt(prompt).mean(1) + self.embed_time(timestep[:, None] / 500)
            for block in self.blocks[1:]:
                x = block(x, time, None)
            return self.project(x)

    model = enabled(Skipping(blocks=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loop().run(model)
    assert computed(model) == [[True] + [False] * 7]


@torch.no_grad()
def test_of_two_graphs_with_blocks_the_one_with_the_models_largest_list_is_cached() -> None:
    model = enabled(RefinedThenBroken())
    Loop().run(model)

    assert computed(model) == [[True] + [False] * 7]


@pytest.mark.parametrize("config", [SimpleNamespace(depth=2), "tiny", {"depth": 2}, object(), None])
def test_a_module_may_have_a_config_of_any_kind(config: Any) -> None:
    model = ToyTransformer()
    model.config = config
    omni_cache.enable(model, inner="eager", **TEACACHE)
    with torch.no_grad():
        Loop().run(model)
    assert omni_cache.summary(model).trajectories
