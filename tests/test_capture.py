"""A model is captured whole where it can be, and in as few pieces as there must be elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cross_section import also
from omni_cache.passes import Analysis, Part, split
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.fx import GraphModule
from toy_transformer import ALWAYS_REUSE, CHANNELS, TOKENS, WIDTH, Block, ToyTransformer, gaussian

import omni_cache
from omni_cache.capture.function import CapturedFunction
from omni_cache.dynamo import GRAPHS


class Counter:
    """A Dynamo backend that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward


def whole(x: Tensor, mask: Tensor) -> Tensor:
    for _ in range(2):
        x = x + x[mask].sum()
    return x[: int(mask.sum())]


def broken(x: Tensor, mask: Tensor) -> Tensor:
    x = x * 2 if x.sum() > 0 else x * 3
    for _ in range(2):
        x = x + x[mask].sum()
    return x


X, MASK = gaussian("x", 6), torch.tensor([True, False, True, True, False, False])


def test_a_function_over_sizes_that_depend_on_data_is_one_graph() -> None:
    counter = Counter()
    captured = CapturedFunction(whole, backend=counter)
    assert torch.equal(captured(X, MASK), whole(X, MASK))
    assert len(counter.graphs) == 1


def test_behind_a_break_the_rest_is_one_graph() -> None:
    counter = Counter()
    captured = CapturedFunction(broken, backend=counter)
    assert torch.equal(captured(X, MASK), broken(X, MASK))
    assert len(counter.graphs) == 2


def test_a_function_that_breaks_only_later_goes_on_in_pieces() -> None:
    def sometimes(x: Tensor, mask: Tensor, breaks: bool) -> Tensor:
        return broken(x, mask) if breaks else whole(x, mask)

    counter = Counter()
    captured = CapturedFunction(sometimes, backend=counter)
    for breaks, graphs in ((False, 1), (True, 3), (True, 3)):
        assert torch.equal(captured(X, MASK, breaks), sometimes(X, MASK, breaks))
        assert len(counter.graphs) == graphs


def test_a_mistaken_call_is_no_break() -> None:
    def entry(*args: Tensor) -> Tensor:
        return whole(*args)

    counter = Counter()
    captured = CapturedFunction(entry, backend=counter)
    with pytest.raises(TypeError, match="mask"):
        captured(X)
    assert torch.equal(captured(X, MASK), whole(X, MASK))
    assert len(counter.graphs) == 1


def test_fullgraph_raises_at_a_break() -> None:
    captured = CapturedFunction(broken, fullgraph=True, backend=Counter())
    with pytest.raises(Unsupported):
        captured(X, MASK)


def test_without_fullgraph_pieces_are_asked_for_from_the_start() -> None:
    counter = Counter()
    captured = CapturedFunction(whole, fullgraph=False, backend=counter)
    assert torch.equal(captured(X, MASK), whole(X, MASK))
    assert len(counter.graphs) > 1


def test_calls_beyond_the_last_graph_run_as_they_are_and_the_others_in_their_graphs() -> None:
    counter = Counter()
    captured = CapturedFunction(lambda x: x.sin() + x.shape[0], backend=counter, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            for size in range(2, 2 + GRAPHS + 2):
                x = gaussian("x", size)
                torch.testing.assert_close(captured(x), x.sin() + size)
            assert len(counter.graphs) == GRAPHS


class Selecting(ToyTransformer):
    """Reorders the prompt by its mask before the blocks, after a branch on data."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, mask: Tensor) -> Any:
        if torch.all(prompt == 0):
            mask = torch.zeros_like(mask)
        ordered = []
        for words, valid in zip(prompt, mask, strict=True):
            ordered.append(torch.cat([words[valid], words[~valid]]))
        text = self.embed_prompt(torch.stack(ordered))
        time = self.embed_time(timestep[:, None] / 500) + text.mean(1)
        x = self.embed(hidden_states)
        for block in self.blocks:
            x = block(x, time, None)
        return self.project(x)


@torch.no_grad()
def test_an_enabled_model_that_selects_by_a_mask_behind_a_break_is_cached() -> None:
    model = Selecting()
    prompt, mask = gaussian("prompt", 1, 6, CHANNELS), MASK[None]
    latents = gaussian("latents", 1, TOKENS, CHANNELS)
    omni_cache.enable(model, inner="eager", **ALWAYS_REUSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", omni_cache.UncachedWarning)
        for timestep in (900.0, 600.0, 300.0):
            model(latents, torch.tensor([timestep]), prompt, mask)
    summary = omni_cache.summary(model)
    assert (summary.computed_steps, summary.reused_steps) == (1, 2)


def test_explain_captures_as_enable_does() -> None:
    latents = gaussian("latents", 1, TOKENS, CHANNELS)
    prompt = gaussian("prompt", 1, 6, CHANNELS)
    found = omni_cache.explain(Selecting(), latents, torch.tensor([900.0]), prompt, MASK[None])
    assert found.cached
    assert len(found.graphs) == 2
    assert [each.analysis is not None for each in found.graphs] == [False, True]


# --- sizes that are only known when the graph runs -----------------------------------------------


class MatmulBlock(Block):
    """Attention in plain matrix products, which asks nothing about its sizes."""

    def forward(self, x: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        scale, shift = self.modulation(time)[:, None].chunk(2, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).split(WIDTH, -1)
        return x + self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Joint(nn.Module):
    """Two streams in one sequence; the text's length, and where it is cut off, depend on data."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Linear(CHANNELS, WIDTH)
            self.embed_time = nn.Linear(1, WIDTH)
            self.blocks = nn.ModuleList(MatmulBlock() for _ in range(depth))
            self.project = nn.Linear(WIDTH, CHANNELS)
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, mask: Tensor) -> Any:
        time = self.embed_time(timestep[:, None] / 500)
        x = self.embed(hidden_states)
        text = self.embed(prompt)[:, : int(mask.sum())]
        for block in self.blocks:
            length = text.shape[1]
            joint = block(torch.cat([x, text], 1), time, None)
            x, text = joint[:, :-length], joint[:, -length:]
        return self.project(x)


def parts_of(analysis: Analysis) -> list[Part]:
    guarded = split(GraphModule(nn.Module(), analysis.graph), analysis)
    return [guarded.prologue, guarded.body, guarded.epilogue, guarded.reuse]


def symbols_of(values: list[object]) -> set[Any]:
    """The symbolic sizes that tensors are laid out by."""
    tensors = [each for each in values if isinstance(each, Tensor)]
    sizes = [size for each in tensors for size in (*each.shape, *each.stride())]
    symbolic = [size for size in sizes if isinstance(size, torch.SymInt)]
    return {symbol for size in symbolic for symbol in size.node.expr.free_symbols}


@torch.no_grad()
@pytest.mark.parametrize("length", [also(1), 3, also(6)])
def test_a_stream_cut_off_by_a_length_of_data_is_paired_and_exact(length: int) -> None:
    model, prompt = Joint(), gaussian("prompt", 1, 6, CHANNELS)
    mask = torch.arange(6) < length
    inputs = [
        (gaussian(step, 1, TOKENS, CHANNELS), torch.tensor([900.0 - 100 * step]), prompt, mask)
        for step in range(3)
    ]
    expected = [model(*each) for each in inputs]

    found = omni_cache.explain(model, *inputs[0])
    (graph,) = found.graphs
    assert graph.analysis is not None
    (pair,) = graph.analysis.pairs
    assert not pair.held
    assert pair.additions == len(model.blocks)

    # No part is given a tensor that is laid out by a number that it is not given.
    for part in parts_of(graph.analysis):
        given = [each for each in part.example_inputs if isinstance(each, torch.SymInt)]
        known = {symbol for each in given for symbol in each.node.expr.free_symbols}
        assert symbols_of(part.example_inputs) <= known

    omni_cache.enable(model, inner="eager", **{**ALWAYS_REUSE, "rel_l1_thresh": 0.0})
    assert all(map(torch.equal, (model(*each) for each in inputs), expected))
    omni_cache.enable(model, inner="eager", **ALWAYS_REUSE)
    got = [model(*each) for each in inputs]
    assert omni_cache.summary(model).reused_steps == 2
    # What a reused step must be: this step's tokens, plus what the blocks added to the first ones.
    embedded = [model.embed(each[0]) for each in inputs]
    for step in (1, 2):
        moved = (embedded[step] - embedded[0]) @ model.project.weight.T
        torch.testing.assert_close(got[step], expected[0] + moved, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got[step], expected[step], atol=1e-3)


@torch.no_grad()
# Whether the first call cuts anything decides what is captured, and aot_eager what becomes of it.
@pytest.mark.parametrize(
    ("inner", "first"), [("eager", 0), also("eager", 3), also("aot_eager", 0), ("aot_eager", 3)]
)
def test_where_nothing_is_cut_off_after_all_the_call_is_as_without_a_cache(
    first: int, inner: str
) -> None:
    """``x[:, :-0]`` is empty, and ``x[:, -0:]`` all of x."""
    model, prompt = Joint(), gaussian("prompt", 1, 6, CHANNELS)
    latents = [gaussian(step, 1, TOKENS, CHANNELS) for step in range(8)]
    lengths = [first, first, 0, 0, 0, 3, 3, 0]
    omni_cache.enable(model, inner=inner, **ALWAYS_REUSE)
    with omni_cache.generation(), omni_cache.branch("cond"):
        for step, (x, length) in enumerate(zip(latents, lengths, strict=True)):
            args = x, torch.tensor([900.0 - 100 * step]), prompt, torch.arange(6) < length
            got, expected = model(*args), Joint()(*args)
            if length == 0:
                assert torch.equal(got, expected)
            assert got.shape == expected.shape
    (trajectory,) = omni_cache.summary(model).trajectories
    computed = [step.computed for step in trajectory.steps]
    assert computed == [True, first == 0, True, True, True, True, False, True]


class CutByWhatABlockFinds(Joint):
    """The last block says how much text there is."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, mask: Tensor) -> Any:
        time = self.embed_time(timestep[:, None] / 500)
        x = torch.cat([self.embed(hidden_states), self.embed(prompt)], 1)
        for block in self.blocks:
            x = block(x, time, None)
        text = int((x[0, :, 0] > 0).sum() * 0 + mask.sum())
        return self.project(x[:, :-text])


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 3])
def test_what_cannot_be_checked_before_the_blocks_is_not_relied_on(length: int) -> None:
    model, prompt = CutByWhatABlockFinds(), gaussian("prompt", 1, 6, CHANNELS)
    omni_cache.enable(model, inner="eager", **{**ALWAYS_REUSE, "rel_l1_thresh": 0.0})
    x = gaussian("x", 1, TOKENS, CHANNELS)
    args = x, torch.tensor([900.0]), prompt, torch.arange(6) < length
    assert torch.equal(model(*args), CutByWhatABlockFinds()(*args))


class CutBehindANorm(Joint):
    """One joint sequence of a length of data goes in and comes out of the blocks."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, mask: Tensor) -> Any:
        time = self.embed_time(timestep[:, None] / 500)
        text = self.embed(prompt)[:, : (length := int(mask.sum()))]
        x = torch.cat([self.embed(hidden_states), text], 1)
        for block in self.blocks:
            x = block(x, time, None)
        return self.project(nn.functional.layer_norm(x, (WIDTH,))[:, :-length])


@torch.no_grad()
def test_a_sequence_of_a_length_of_data_crosses_the_cuts_with_its_length() -> None:
    model, prompt = CutBehindANorm(), gaussian("prompt", 1, 6, CHANNELS)
    omni_cache.enable(model, inner="inductor", **ALWAYS_REUSE)
    for length in (3, 5, 0):
        for step in range(2):
            mask, x = torch.arange(6) < length, gaussian("x", 1, TOKENS, CHANNELS)
            args = x, torch.tensor([900.0 - 100 * step]), prompt, mask
            got, expected = model(*args), CutBehindANorm()(*args)
            # The stream of the second step is as the first step's, and so its residual.
            assert got.shape == expected.shape
            assert step or torch.allclose(got, expected, atol=1e-5)
        assert omni_cache.summary(model).reused_steps == 1
