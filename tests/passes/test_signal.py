"""The signal is known before the body, computed once, and moves nothing that it does not need."""

from __future__ import annotations

from typing import Any

import made_up_models as made_up
import pytest
import torch
from made_up_models import IMAGE, WIDTH, Block, Model, inputs
from omni_cache.passes import RegionError, Signal, analyse, find_timestep
from omni_cache.passes.names import argument_name, module_path
from omni_cache.passes.signal import find_latents
from torch import Tensor
from torch.fx import Graph, Node
from tracing import Trace, trace
from twelve import captured


def signal_of(traced: Trace) -> Signal:
    signal = traced.guarded.analysis.signal
    assert signal is not None
    return signal


def value_of(traced: Trace, node: Node) -> Tensor:
    value = traced.values()[node.name]
    assert isinstance(value, Tensor)
    return value


@pytest.mark.parametrize("kind", [Model, made_up.PerTokenModulation])
def test_it_is_the_modulated_input_of_the_first_block(kind: type[Model]) -> None:
    model: Any = kind()
    given = inputs()
    received: list[Tensor] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    with torch.no_grad():
        model(**given)
    traced = trace(kind(), **given)
    signal = signal_of(traced)
    assert signal.kind == "modulated input"
    assert torch.equal(value_of(traced, signal.node), received[0])


class Rejoined(Model):
    """Image and text are one within each block, and apart between them."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Any:
            joint = super().forward(torch.cat([text, x], dim=1), time)
            return joint[:, text.shape[1] :], joint[:, : text.shape[1]]

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x, text = block(x, time, text)
        return x


@pytest.mark.parametrize("kind", [made_up.ViewsAtTheSeams, Rejoined])
def test_it_has_the_shape_that_the_block_gives_to_the_stream(kind: type[Model]) -> None:
    signal = signal_of(trace(kind(), **inputs()))
    assert signal.kind == "modulated input"
    assert not any("attention" in node.name for node in signal.moved)


def test_only_what_it_needs_moves_to_the_prologue() -> None:
    traced = trace(Model(), **inputs())
    moved = signal_of(traced).moved
    assert {module_path(node)[:3] for node in moved} <= {
        ("blocks", "0"),
        ("blocks", "0", "modulation"),
        ("blocks", "0", "norm1"),
    }
    assert not any("attention" in node.name for node in moved)


def test_pieces_of_a_moved_tuple_move_along() -> None:
    traced = trace(Model(), **inputs())
    analysis = traced.guarded.analysis
    prologue = set(analysis.region.prologue)
    for node in analysis.region.body:
        if "getitem" in str(node.target) and isinstance(node.args[0], Node):
            assert not (node.args[0] in prologue and "chunk" in node.args[0].name)


def test_a_later_block_is_not_taken_for_the_first() -> None:
    class LateTime(Model):
        """Time reaches only the last block."""

        class block(Block):  # noqa: N801
            def forward(self, x: Tensor, time: Tensor, late: bool = False) -> Tensor:
                x = super().forward(x, time) if late else x + self.attn(self.norm1(x))
                return x + self.mlp(self.norm2(x))

        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            for index, block in enumerate(self.blocks):
                x = block(x, time, late=index > 0)
            return x

    signal = signal_of(trace(LateTime(), **inputs()))
    assert (signal.kind, signal.moved) == ("hidden states", ())


def test_a_cast_after_the_modulation_belongs_to_it() -> None:
    class Narrow(Model):
        class block(Block):  # noqa: N801
            def forward(self, x: Tensor, time: Tensor) -> Tensor:
                shift, scale, gate = self.modulation(time)[:, None].chunk(3, dim=-1)
                modulated = (self.norm1(x.double()) * (1 + scale) + shift).type_as(x)
                return x + gate * self.attn(modulated)

        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks:
                block.norm1.double()

    traced = trace(Narrow(), **inputs())
    assert value_of(traced, signal_of(traced).node).dtype == torch.float32


def test_without_a_timestep_it_is_the_hidden_states() -> None:
    traced = trace(made_up.NoTimestep(), latents=inputs()["latents"])
    analysis = traced.guarded.analysis
    signal = signal_of(traced)
    assert analysis.timestep is None
    assert (signal.kind, signal.moved) == ("hidden states", ())
    assert signal.node in analysis.region.prologue
    assert value_of(traced, signal.node).shape == (2, IMAGE, WIDTH)


def test_there_need_be_none() -> None:
    traced = trace(Model(), **inputs(), signal=None)
    assert traced.guarded.signal is None
    assert traced.guarded.analysis.signal_bytes() == 0
    assert "if gate() ==" in traced.after
    assert torch.equal(traced.computed()[0], traced.whole()[0])


# --- a module's output ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["blocks.0.norm1", "blocks.1.norm2", "embed", "blocks.0.attn"])
def test_it_can_be_what_a_module_returns(path: str) -> None:
    model = Model()
    given = inputs()
    returned: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda _, args, output: returned.append(output)
    )
    with torch.no_grad():
        model(**given)
    hook.remove()
    traced = trace(model, **given, signal=path)
    signal = signal_of(traced)
    assert signal.kind == "module output"
    assert torch.equal(value_of(traced, signal.node), returned[0])
    assert torch.equal(traced.computed()[0], traced.whole()[0])


def test_of_several_outputs_it_is_the_largest() -> None:
    traced = trace(made_up.DualStream(), **inputs(), signal="blocks.0")
    signal = signal_of(traced)
    assert value_of(traced, signal.node).shape[1] == IMAGE


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (
            "blocks.0.norm3",
            r"signal='blocks.0.norm3': no 'blocks.0.norm3' runs in the graph",
        ),
        ("project", r"signal='project': that module runs after the block loop"),
        ("blocks.1", r"the signal needs the whole block loop"),
    ],
)
def test_a_module_that_cannot_be_it_is_refused(path: str, reason: str) -> None:
    with pytest.raises(RegionError, match=reason):
        trace(Model(), **inputs(), signal=path)


# --- the timestep embedding ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("flux", (2, 32)),
        ("wan", (2, 6, 48)),
        ("cogvideox", (2, 40)),
        ("hunyuan_video", (2, 32)),
        ("pixart", (2, 6 * 32)),
    ],
)
def test_a_timestep_embedding_descends_from_time_and_not_from_latents(
    name: str, shape: tuple[int, ...]
) -> None:
    traced = captured(name)
    analysis = traced.guarded.analysis
    signal = analyse(analysis.graph, signal="timestep_embedding").signal
    assert signal is not None
    assert (signal.kind, signal.moved) == ("timestep embedding", ())
    assert value_of(traced, signal.node).shape == shape


def test_a_text_that_knows_the_time_is_not_the_timestep_embedding() -> None:
    """The refined text is larger than the embedding, and is a stream of its own."""
    traced = trace(made_up.RefinedText(), **inputs(), signal="timestep_embedding")
    assert value_of(traced, signal_of(traced).node).shape == (2, WIDTH)


def test_what_mixes_time_and_latents_is_not_the_timestep_embedding() -> None:
    class Weighted(Model):
        class block(Block):  # noqa: N801
            def forward(self, x: Tensor, time: Tensor, weights: Tensor | None = None) -> Tensor:
                return super().forward(x, time) + self.attn(x) * weights

        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            weights = (x * time[:, None]).sigmoid()
            for block in self.blocks:
                x = block(x, time, weights)
            return x

    traced = trace(Weighted(), **inputs(), signal="timestep_embedding")
    assert value_of(traced, signal_of(traced).node).shape == (2, WIDTH)


def test_a_timestep_embedding_needs_a_timestep() -> None:
    with pytest.raises(RegionError, match=r"no graph input is a timestep .*named timestep, "):
        trace(made_up.NoTimestep(), latents=inputs()["latents"], signal="timestep_embedding")


def test_a_timestep_embedding_must_enter_the_loop() -> None:
    with pytest.raises(RegionError, match=r"no timestep embedding enters"):
        trace(made_up.Untimed(), **inputs(), signal="timestep_embedding")


# --- the timestep --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "wan", "z_image", "pixart"])
def test_the_timestep_is_known_by_its_name(name: str) -> None:
    timestep = captured(name).guarded.analysis.timestep
    assert timestep is not None
    assert argument_name(timestep) in ("timestep", "t")


class Positional(Model):
    """Its `forward` is wrapped in one that only knows `*args`, as decorators do."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return Model.forward(self, *args, **kwargs)


def test_a_timestep_without_a_name_is_known_by_its_position() -> None:
    given = tuple(inputs().values())
    names = ("latents", "timestep", "text")
    traced = trace(Positional(), *given, parameters=names)
    assert traced.guarded.analysis.timestep is not None
    assert signal_of(traced).kind == "modulated input"
    assert trace(Positional(), *given).guarded.analysis.timestep is None


def test_the_size_of_a_timestep_is_not_the_timestep() -> None:
    given = inputs(batch=3)
    for value in given.values():
        torch._dynamo.mark_dynamic(value, 0)
    timestep = trace(Model(), **given).guarded.analysis.timestep
    assert timestep is not None
    assert isinstance(timestep.meta["example_value"], Tensor)


def test_a_timestep_may_be_a_number() -> None:
    class Number(Model):
        def forward(self, latents: Tensor, timestep: int, text: Tensor) -> Tensor:
            return super().forward(latents, torch.full((2,), timestep) / 1000, text)

    traced = trace(Number(), **{**inputs(), "timestep": 999}, dynamic=True)
    timestep = find_timestep(traced.gm.graph)
    assert timestep is not None
    assert timestep.meta["example_value"].node.hint == 999
    assert torch.equal(traced.computed()[0], traced.whole()[0])


# --- latents --------------------------------------------------------------------------------------


def test_latents_are_the_input_of_the_shape_of_the_result() -> None:
    signal = signal_of(trace(Model(), **inputs(), signal="latents"))
    assert (signal.kind, argument_name(signal.node), signal.moved) == ("latents", "latents", ())


@pytest.mark.parametrize(
    ("shape", "alike"),
    [
        ((1, 6, 8), True),
        ((1, 12, 4), False),
        ((1, 6), False),
        ((1, 9, 4, 4), False),
    ],
)
def test_latents_may_have_other_channels(shape: tuple[int, ...], alike: bool) -> None:
    graph = Graph()
    given = graph.placeholder("x")
    given.meta["example_value"] = torch.empty(shape)
    made = graph.call_function(torch.relu, (given,))
    made.meta["example_value"] = torch.empty(1, 6, 4)
    graph.output((made,))
    if alike:
        assert find_latents(graph, None) is given
    else:
        with pytest.raises(RegionError, match="no input has the shape of what the model returns"):
            find_latents(graph, None)


def test_channels_of_pictures_may_be_second() -> None:
    graph = Graph()
    nodes = []
    for name, shape in (("t", (1,)), ("control", (1, 9, 8, 6)), ("x", (1, 9, 4, 4))):
        nodes.append(graph.placeholder(name))
        nodes[-1].meta["example_value"] = torch.empty(shape)
    made = graph.call_function(torch.relu, (nodes[-1],))
    made.meta["example_value"] = torch.empty(1, 3, 4, 4)
    graph.output((made,))
    assert find_latents(graph, nodes[0]) is nodes[-1]
    assert find_latents(graph, None) is nodes[-1]
