"""No way leads past the cache in silence: a call is cached, or it is told once why it is not.

Under ``enable`` the ways are closed; where ``torch.compile`` alone cannot close one, it is told.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    TOKENS,
    WIDTH,
    Block,
    ToyTransformer,
    compiled,
    gaussian,
    same,
)

import omni_cache
from omni_cache import RegionError, UncachedWarning, dynamo

CACHED = [True] + [False] * 7
"""Which of eight steps are computed."""


def enabled(model: Any, **flags: Any) -> Any:
    return omni_cache.enable(model, **{"inner": "eager", **ALWAYS_REUSE, **flags})


def computed(model: Any) -> list[list[bool]]:
    found = omni_cache.summary(model).trajectories
    return [[step.computed for step in each.steps] for each in found]


def is_cached(model: Any) -> bool:
    """Whether every call went through the cache, and was reused from the third on at the latest."""
    (steps,) = computed(model)
    return len(steps) == 8 and not any(steps[2:])


@contextmanager
def in_silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncachedWarning)
        yield


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- methods beside __call__ ----------------------------------------------------------------------


class ClassConditional(ToyTransformer):
    """Guides itself in a method of its own, as the class-conditional DiTs do."""

    def guided(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        both = self.forward(torch.cat([x, x]), timestep.expand(2), torch.cat([prompt, -prompt]))
        cond, uncond = both.chunk(2)
        return uncond + 2 * (cond - uncond)


def run(call: Callable[..., Any], **named: Any) -> list[Tensor]:
    """A loop over something that is called as the toy is."""
    x, prompt, seen = gaussian("x", 1, TOKENS, CHANNELS), gaussian("p", 1, 3, CHANNELS), []
    for step in range(8):
        seen.append(call(x, torch.tensor([1000.0 - 100 * step]), prompt, **named))
        x = x - seen[-1] / 8
    return seen


@pytest.mark.parametrize("name", ["guided", "forward", "__call__"])
@pytest.mark.parametrize("fullgraph", [None, True, False])
def test_a_method_that_runs_the_forward_is_cached(name: str, fullgraph: bool | None) -> None:
    flags = {} if fullgraph is None else {"fullgraph": fullgraph}
    model = enabled(ClassConditional(), **flags)
    with in_silence():
        predictions = run(getattr(model, name))
    assert is_cached(model)
    plain = run(getattr(ClassConditional(), name))
    assert torch.allclose(predictions[0], plain[0], atol=1e-5)
    assert not torch.allclose(predictions[7], plain[7], atol=1e-5)


def test_another_compiled_function_that_runs_the_forward_leaves_it_to_the_cache() -> None:
    model = enabled(ToyTransformer())
    run(torch.compile(lambda *args: model.forward(*args) * 1.5, backend="eager"))
    assert computed(model) == [CACHED]


def test_a_forward_kept_from_before_disable_is_the_plain_one() -> None:
    model = enabled(ToyTransformer())
    kept = model.forward
    run(kept)
    omni_cache.disable(model)
    assert "forward" not in vars(model)
    assert same(run(kept), run(ToyTransformer()))
    assert computed(model) == []


def test_hooks_of_the_module_run_around_its_call_alone() -> None:
    model, seen = enabled(ToyTransformer()), []
    model.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    run(model)
    assert len(seen) == 8
    run(model.forward)
    assert len(seen) == 8


class Doubling(ModelHook):
    """Doubles what the model returns."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * 2


@pytest.mark.parametrize("hooked_first", [False, True])
@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_a_hook_that_replaces_the_forward_runs_once_and_all_is_cached(
    hooked_first: bool, name: str
) -> None:
    model = ToyTransformer()
    if hooked_first:
        add_hook_to_module(model, Doubling())
    enabled(model)
    if not hooked_first:
        add_hook_to_module(model, Doubling())
    predictions = run(getattr(model, name))
    assert computed(model) == [CACHED]
    assert torch.allclose(predictions[0], 2 * run(ToyTransformer())[0], atol=1e-5)


@pytest.mark.parametrize("hooked_first", [False, True])
def test_a_hook_may_come_and_go_meanwhile(hooked_first: bool) -> None:
    """Pipelines with offloading take their hooks off and put them on after every generation."""
    model = ToyTransformer()
    plain = run(model)
    if hooked_first:
        add_hook_to_module(model, Doubling())
    enabled(model)
    for _ in range(2):
        add_hook_to_module(model, Doubling())
        run(model)
        assert computed(model) == [CACHED]
        remove_hook_from_module(model)
        run(model)
        assert computed(model) == [CACHED]
    omni_cache.disable(model)
    assert same(run(model), plain)
    assert same(run(model.forward), plain)


def test_disable_gives_back_the_forward_that_an_instance_had() -> None:
    model = ToyTransformer()
    own = vars(model)["forward"] = lambda *args: ToyTransformer.forward(model, *args) * 3
    enabled(model)
    assert torch.allclose(run(model)[0], 3 * run(ToyTransformer())[0], atol=1e-5)
    assert computed(model) == [CACHED]
    omni_cache.disable(model)
    assert vars(model)["forward"] is own


def test_copies_run_their_own_forward() -> None:
    model = enabled(ToyTransformer())
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in duplicate.parameters():
            parameter.zero_()
        assert not run(duplicate.forward)[0].any()
        assert not run(duplicate)[0].any()


# --- compilations of others -----------------------------------------------------------------------


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_model_that_is_compiled_after_it_was_enabled(fullgraph: bool) -> None:
    model = enabled(ToyTransformer())
    model.compile(backend="eager", fullgraph=fullgraph)
    own = model._compiled_call_impl
    with in_silence():
        run(model)
    assert computed(model) == [CACHED]
    omni_cache.disable(model)
    assert model._compiled_call_impl is own


class WideBlock(Block):
    """With weights of more than a bucket holds."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(WIDTH, 20_000), nn.Linear(20_000, WIDTH)

    def forward(self, x: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        return super().forward(x, time, mask) + self.narrow(self.widen(x).relu())


def wide() -> ToyTransformer:
    model = ToyTransformer()
    model.blocks = nn.ModuleList(WideBlock() for _ in range(3)).eval().requires_grad_(True)
    return model


@contextmanager
def parallel(model: nn.Module, path: Any) -> Iterator[DistributedDataParallel]:
    dist.init_process_group("gloo", f"file://{path}/store", rank=0, world_size=1)
    try:
        yield DistributedDataParallel(model, bucket_cap_mb=2)
    finally:
        dist.destroy_process_group()


def test_where_gradients_are_off_their_buckets_cut_nothing(tmp_path: Any) -> None:
    with parallel(wide(), tmp_path) as wrapped, in_silence():
        model = enabled(wrapped.module, strict=True)
        run(wrapped)
        assert computed(model) == [CACHED]


def test_with_gradients_one_warning_says_why_whatever_the_buckets(tmp_path: Any) -> None:
    with parallel(wide(), tmp_path) as wrapped:
        enabled(wrapped.module)
        with torch.enable_grad(), pytest.warns(UncachedWarning, match="gradients are en") as seen:
            run(wrapped)
    assert len(seen) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_buckets_under_torch_compile_alone_are_told(tmp_path: Any, strict: bool) -> None:
    reason = "cuts its graph at gradient buckets.*optimize_ddp = False"
    options = {**ALWAYS_REUSE, "inner": "eager", "strict": strict}
    with parallel(wide(), tmp_path) as wrapped:
        wrapped.module.compile(backend="omni_cache", options=options)
        if strict:
            with pytest.raises(RegionError, match=reason):
                run(wrapped)
        else:
            with pytest.warns(UncachedWarning, match=f"ToyTransformer.*{reason}") as seen:
                run(wrapped)
            assert len(seen) == 1


# --- code that several models share ---------------------------------------------------------------


class MaybeBroken(ToyTransformer):
    """Some instances have a graph break at every block, as hooks on the blocks make them."""

    broken = False

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        x = self.embed(hidden_states)
        time = self.embed_prompt(prompt).mean(1) + self.embed_time(timestep[:, None] / 500)
        for block in self.blocks:
            if self.broken:
                torch._dynamo.graph_break()
            x = block(x, time, None)
        return self.project(x)


def broken(seed: int = 1) -> MaybeBroken:
    model = MaybeBroken(seed)
    model.broken = True
    return model


def test_a_break_of_another_model_of_the_class_leaves_an_enabled_one_cached() -> None:
    model = enabled(MaybeBroken())
    run(model)
    run(torch.compile(broken(), backend="eager"))
    with pytest.warns(UncachedWarning, match="a graph break keeps"):
        run(enabled(broken()))
    with in_silence():
        run(model)
        assert computed(model) == [CACHED]
        later = enabled(MaybeBroken(2))
        run(later)
        assert computed(later) == [CACHED]


def test_a_model_that_another_ones_break_leaves_uncached_says_so_once() -> None:
    models = [MaybeBroken(seed) for seed in (0, 2)]
    cached = [compiled(each, **ALWAYS_REUSE) for each in models]
    for model, call in zip(models, cached, strict=True):
        run(call)
        assert computed(model) == [CACHED]
    run(torch.compile(broken(), backend="eager"))
    for model, call in zip(models, cached, strict=True):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            predictions = [run(call), run(call)]
        (told,) = (str(each.message) for each in seen if each.category is UncachedWarning)
        assert told.startswith("MaybeBroken runs uncached: Dynamo compiles its blocks one by one")
        assert all(same(each, run(copy.deepcopy(model))) for each in predictions)
        assert computed(model) == []


def test_strict_refuses_a_model_that_runs_block_by_block() -> None:
    call = compiled(MaybeBroken(), strict=True, **ALWAYS_REUSE)
    run(call)
    run(torch.compile(broken(), backend="eager"))
    for _ in range(2):
        with pytest.raises(RegionError, match="one by one"):
            run(call)


# --- more graphs than Dynamo makes ----------------------------------------------------------------


GRAPHS = 3
"""As many as an enabled model has here, where PyTorch allows one; fewer than it has otherwise."""


@pytest.fixture
def few_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dynamo, "GRAPHS", GRAPHS)
    with torch._dynamo.config.patch(recompile_limit=1):
        yield


class Counting(ToyTransformer):
    """Counts its calls, as patched models do."""

    calls = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(hidden_states, timestep, prompt)


class Named(ToyTransformer):
    """Has a graph for each of its names."""

    name = ""

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, prompt) * len(self.name + "a")


class NamedInPieces(Named):
    """Likewise, behind a graph break."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(hidden_states, timestep, prompt)


def test_a_model_that_counts_its_calls_is_cached() -> None:
    model = enabled(Counting())
    model.calls = 0
    for _ in range(3):
        run(model)
        assert is_cached(model)
    assert model.calls == 24


def called_in_many_ways(model: Any, ways: int) -> None:
    for way in range(ways):
        model.name = "a" * way
        run(model)


def test_a_model_that_is_called_in_more_than_eight_ways_is_cached() -> None:
    model = enabled(Named())
    with in_silence():
        for way in range(9):
            model.name = "a" * way
            run(model)
            assert is_cached(model)


@pytest.mark.usefixtures("few_graphs")
def test_models_in_pieces_share_no_limit_between_flags() -> None:
    with in_silence():
        for number in range(GRAPHS + 2):
            model = enabled(NamedInPieces(), mode=f"mode {number}", inner=ignoring_modes)
            run(model)
            assert is_cached(model)


def ignoring_modes(gm: GraphModule, example_inputs: list[Tensor], mode: str) -> Any:
    return gm.forward


@pytest.mark.usefixtures("few_graphs")
@pytest.mark.parametrize("kind", [Named, NamedInPieces])
@pytest.mark.parametrize("strict", [False, True])
def test_beyond_the_limit_the_true_cause_is_told_and_what_to_set(
    kind: type[Named], strict: bool
) -> None:
    model = enabled(kind(), strict=strict)
    reason = f"has made {GRAPHS} graphs .*name == 'a+'.* torch._dynamo.config.recompile_limit"
    if strict:
        with pytest.raises(RegionError, match=reason):
            called_in_many_ways(model, GRAPHS + 2)
    else:
        with pytest.warns(UncachedWarning, match=reason) as seen:
            called_in_many_ways(model, GRAPHS + 3)
        assert len(seen) == 1
        assert "graph break" not in str(seen[0].message)
    # What has a graph goes on with it.
    model.name = ""
    run(model)
    assert is_cached(model)


def test_under_torch_compile_alone_the_last_graph_is_told() -> None:
    model = Counting()
    call = compiled(model, **ALWAYS_REUSE)
    message = "Counting will run uncached where it needs another graph: this is the last of 8"
    with pytest.warns(UncachedWarning, match=message) as seen:
        run(call)
    assert len(seen) == 1
    assert "calls == 6" in str(seen[0].message)


# --- calls that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("kind", [ToyTransformer, NamedInPieces])
def test_a_call_that_fails_while_it_is_compiled_leaves_nothing_behind(
    error: type[BaseException], kind: type[ToyTransformer]
) -> None:
    failing = [True]

    def inner(gm: GraphModule, example_inputs: list[Tensor]) -> Any:
        if failing:
            failing.pop()
            raise error("in the middle")
        return gm.forward

    model = enabled(kind(), inner=inner)
    with pytest.raises(BaseException, match="in the middle"):
        run(model)
    with in_silence():
        run(model)
    assert computed(model) == [CACHED]


def test_a_call_that_fails_is_no_reason_to_ask_for_pieces() -> None:
    class Failing(ToyTransformer):
        fails = True

        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            if self.fails:
                raise RuntimeError("on purpose")
            return super().forward(hidden_states, timestep, prompt)

    graphs: list[GraphModule] = []

    def inner(gm: GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(gm)
        return gm.forward

    model = enabled(Failing(), inner=inner)
    with pytest.raises(RuntimeError, match="on purpose"):
        run(model)
    model.fails = False
    with in_silence():
        run(model)
    assert computed(model) == [CACHED]
    assert len(graphs) == 4


# --- blocks that somebody runs past the forward ---------------------------------------------------


def block_by_block(model: Any) -> Callable[..., Tensor]:
    """A sampler's own way through the model."""

    def call(x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        x, time = model.embed(x), model.embed_prompt(prompt).mean(1)
        time = time + model.embed_time(timestep[:, None] / 500)
        for block in model.blocks:
            x = block(x, time, None)
        noise: Tensor = model.project(x)
        return noise

    return call


def forward_from_before(model: Any) -> Callable[..., Tensor]:
    return ToyTransformer.forward.__get__(model)  # what model.forward was before enable


PAST = "ToyTransformer runs uncached: its blocks are called one by one.*or its forward as it is now"


@pytest.mark.parametrize("way", [block_by_block, forward_from_before])
def test_blocks_that_run_past_the_forward_are_told_once(way: Callable[..., Any]) -> None:
    model = enabled(ToyTransformer())
    with pytest.warns(UncachedWarning, match=PAST) as seen:
        predictions = [*run(way(model)), *run(way(model))]
    assert len(seen) == 1
    assert same(predictions[:8], run(ToyTransformer()))
    with in_silence():
        run(model)
    assert computed(model) == [CACHED]


@pytest.mark.parametrize("way", [block_by_block, forward_from_before])
def test_strict_refuses_blocks_that_run_past_the_forward(way: Callable[..., Any]) -> None:
    model = enabled(ToyTransformer(), strict=True)
    for _ in range(2):
        with pytest.raises(RegionError, match="called one by one"):
            run(way(model))
    run(model)
    assert computed(model) == [CACHED]


def with_hooks_on_its_blocks() -> ToyTransformer:
    model = ToyTransformer()
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, result: None)
    return model


@pytest.mark.parametrize("make", [ToyTransformer, broken, NamedInPieces, with_hooks_on_its_blocks])
def test_blocks_that_the_forward_runs_and_layers_beside_them_are_not_told(
    make: Callable[[], Any],
) -> None:
    model = enabled(make())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.embed_time(torch.ones(1, 1))
        model.blocks[0].norm(torch.ones(1, WIDTH))
        for call in (model, model.forward):
            run(call)
    assert not any("one by one" in str(each.message) for each in seen)


def test_training_through_the_blocks_is_not_told() -> None:
    model = enabled(ToyTransformer().requires_grad_(True))
    with torch.enable_grad(), in_silence():
        run(block_by_block(model))[0].sum().backward()


def test_disable_gives_blocks_back_what_ran_them() -> None:
    model = ToyTransformer()
    model.blocks[0].compile(backend="eager")
    before = [vars(block).get("_compiled_call_impl") for block in model.blocks]
    enabled(enabled(model), strict=True)
    omni_cache.disable(model)
    assert [vars(block).get("_compiled_call_impl") for block in model.blocks] == before
    with in_silence():
        run(block_by_block(model))


def test_copies_of_a_model_or_of_its_blocks_are_not_watched() -> None:
    model = enabled(ToyTransformer(), strict=True)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        run(block_by_block(duplicate))
    block = copy.deepcopy(model.blocks)[0]
    block(torch.zeros(1, TOKENS, WIDTH), torch.zeros(1, WIDTH), None)
