"""A region is taken only if a reused step follows its own latents, and is refused in words else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made_up_models as made_up
import pytest
import torch
from made_up_models import CHANNELS, WIDTH, Attention, Block, Model, inputs
from omni_cache.passes import RegionError
from torch import Tensor, nn
from tracing import trace

# --- what lies in a list beside its blocks -------------------------------------------------------


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.embed(x)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.project(self.norm(x))


class Layer(nn.Module):
    """One class for all that lies in a list."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.inner(x, time)


class OneList(Model):
    """All layers lie in one list, as pipeline-parallel trainers lay models out."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        angles = timestep[:, None] * torch.arange(WIDTH)
        time = self.embed_time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        x = latents if isinstance(self.layer(0), Embed) else self.embed(latents)
        for block in self.blocks:
            x = block(x, time)
        return x

    def layer(self, index: int) -> nn.Module:
        return getattr(self.blocks[index], "inner", self.blocks[index])


@pytest.mark.parametrize("wrap", [lambda layer: layer, Layer], ids=["by class", "by structure"])
@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ((Embed, Block, Block, Block, Head), [1, 2, 3]),
        ((Embed, Block, Block), [1, 2]),
        ((Block, Block, Block, Head), [0, 1, 2]),
    ],
)
def test_the_repeated_elements_of_a_list_are_its_blocks(
    wrap: Any, layers: tuple[type[nn.Module], ...], kept: list[int]
) -> None:
    traced = trace(OneList(*(wrap(layer()) for layer in layers)), **inputs())
    analysis = traced.guarded.analysis
    assert [block.index for block in analysis.loop.blocks] == kept
    assert not any(pair.held for pair in analysis.pairs)
    assert torch.equal(traced.computed()[0], traced.whole()[0])


def test_a_list_whose_stream_pairs_as_it_is_stays_whole() -> None:
    class Tail(Block):
        pass

    class Ends(Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Tail(), Block(), Block(), Tail()])

    loop = trace(Ends(), **inputs()).guarded.analysis.loop
    assert [block.class_name for block in loop.blocks] == ["Tail", "Block", "Block", "Tail"]


@pytest.mark.parametrize("named", [None, ["blocks"]])
def test_a_loop_without_a_residual_update_is_refused(named: list[str] | None) -> None:
    with pytest.raises(RegionError, match=r"whatever its latents; name .*region=\[\.\.\.\]"):
        trace(made_up.PostNorm(), **inputs(), region=named)


# --- results beside the stream -------------------------------------------------------------------


class ReturnsKeys(Model):
    """Blocks return their keys, as models do whose next chunk attends to them."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
            x = super().forward(x, time)
            keys = self.attn.qkv(x).chunk(3, dim=-1)[1]
            return x, keys

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Any:
        self.given: list[Tensor] = []
        return super().forward(latents, timestep, text), self.results()

    def results(self) -> list[Tensor]:
        return self.given

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x, keys = block(x, time)
            self.given.append(self.result(keys, x))
        return x

    def result(self, keys: Tensor, x: Tensor) -> Tensor:
        return keys


class ReturnsScaledKeys(ReturnsKeys):
    def result(self, keys: Tensor, x: Tensor) -> Tensor:
        return 2 * keys.exp()


class ReturnsCounts(ReturnsKeys):
    """An integer that depends on the stream is of an earlier step too."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
            x = super().forward(x, time)
            return x, x.argmax(dim=-1)


class KeepsStatistics(ReturnsKeys):
    """A router's statistic in an attribute, which Dynamo makes a result of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(())

    def results(self) -> list[Tensor]:
        return []

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x, keys = block(x, time)
        self.last = keys.mean()
        return x


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (ReturnsKeys, r"output 1 of the graph is what blocks\.0 "),
        (ReturnsScaledKeys, r"output 1 of the graph is what blocks\.0 "),
        (ReturnsCounts, r"output 1 of the graph is what blocks\.0 "),
        (KeepsStatistics, r"output 1 of the graph is what blocks\.1"),
    ],
)
def test_what_blocks_hand_out_beside_the_stream_is_refused(kind: type[Model], where: str) -> None:
    with pytest.raises(RegionError, match=where) as caught:
        trace(kind(), **inputs())
    assert f"{Path(__file__)}:" in str(caught.value)


class ReturnsStates(ReturnsKeys):
    """Each block's stream is a residual update, so that a reused step follows its latents."""

    def result(self, keys: Tensor, x: Tensor) -> Tensor:
        return x


class ReturnsMixtures(ReturnsKeys):
    def result(self, keys: Tensor, x: Tensor) -> Tensor:
        return keys + x


class ReturnsConditioning(ReturnsKeys):
    """What no stream reaches is computed on every step."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x, time), self.modulation(time)


@pytest.mark.parametrize("kind", [ReturnsStates, ReturnsMixtures, ReturnsConditioning])
def test_results_that_follow_the_call_are_kept(kind: type[Model]) -> None:
    traced = trace(kind(), **inputs())
    assert len(traced.whole()) == 3
    assert all(map(torch.equal, traced.computed(), traced.whole()))
    for got, wanted in zip(traced.reused(traced.values()), traced.whole(), strict=True):
        torch.testing.assert_close(got, wanted)


# --- a model in a list ---------------------------------------------------------------------------


class Experts(nn.Module):
    """Two transformers in a list, of which some run."""

    def __init__(self, running: tuple[int, ...], depth: int = 2) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Model(depth), Model(depth)])
        self.running = running

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return sum(self.experts[each](latents, timestep, text) for each in self.running)


@pytest.mark.parametrize(
    ("running", "path"),
    [((0,), "experts.0.blocks"), ((1,), "experts.1.blocks"), ((0, 1), "experts.0.blocks")],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_model_in_a_list_is_no_block(running: tuple[int, ...], path: str, named: bool) -> None:
    traced = trace(Experts(running), **inputs(), region=[path] if named else None)
    loop = traced.guarded.analysis.loop
    assert [each.path for each in loop.lists] == [path]
    assert [block.index for block in loop.blocks] == [0, 1]
    assert torch.equal(traced.computed()[0], traced.whole()[0])


class TwoAttentions(Block):
    """A block with a list of its own, both elements of which attend."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = super().forward(x, time)
        for attention in self.attentions:
            x = x + attention(x)
        return x


def test_a_list_within_blocks_is_no_block_loop() -> None:
    class Nested(Model):
        block = TwoAttentions

    loop = trace(Nested(), **inputs()).guarded.analysis.loop
    assert [each.path for each in loop.lists] == ["blocks"]
    assert [block.index for block in loop.blocks] == [0, 1]
