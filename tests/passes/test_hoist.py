"""What a graph need not compute at every step is taken out of it, and the rest is as it was."""

from __future__ import annotations

from typing import Any

import made_up_models as made_up
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from made_up_models import IMAGE, TEXT, WIDTH, Model, attend, inputs
from omni_cache.passes import hoist, roll
from omni_cache.passes.cost import arithmetic
from omni_cache.passes.names import module_path, op_name
from omni_cache.passes.order import computation
from omni_cache.passes.values import nbytes
from random_transformers import Description, Transformer, descriptions
from random_transformers import inputs as random_inputs
from torch import Tensor, nn
from tracing import Trace, run, trace


class CrossBlock(made_up.Block):
    """Attends to the text besides, with the keys normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_key = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, time: Tensor, text: Tensor | None = None) -> Tensor:
        assert text is not None
        x = super().forward(x, time)
        return x + attend(self.query(x), self.norm_key(self.key(text)), self.value(text))


class CrossAttention(Model):
    """Blocks that attend to the text, each with keys and values of its own."""

    block = CrossBlock

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time, text)
        return x


def hoisted(model: nn.Module, how: bool | str = True, **extra: Any) -> Trace:
    with torch.no_grad():
        return trace(model, **{**inputs(), **extra}, hoist=how)


def is_exact(traced: Trace) -> None:
    """All parts together are the graph bit for bit, rolled and unrolled."""
    values = traced.values()
    for whole, computed in zip(traced.whole(), traced.computed(), strict=True):
        assert torch.equal(computed, whole)
    guarded = traced.guarded
    for part in (guarded.constants, guarded.modulations, guarded.body):
        if part is not None:
            for plain, rolled in zip(run(part, values), run(roll(part), values), strict=True):
                assert torch.equal(rolled, plain)


def made_by(traced: Trace, cut: str = "constants") -> list[str]:
    return [op_name(node) for node in getattr(traced.guarded.analysis.hoisted, cut).results]


def read_by(traced: Trace, cut: str) -> set[str]:
    """The inputs of the graph that a part reads."""
    part = getattr(traced.guarded, cut)
    return {name for name in part.inputs if name in traced.inputs and "self" not in name}


def test_keys_and_values_of_every_block_are_constants() -> None:
    traced = hoisted(CrossAttention(depth=3))
    is_exact(traced)
    # Keys as they are normalised, values as they are projected; neither split into heads.
    assert sorted(made_by(traced)) == ["layer_norm"] * 3 + ["linear"] * 3
    assert read_by(traced, "constants") == {"l_text_"}
    cut = traced.guarded.analysis.hoisted.constants
    # The projection of the text, and two linear layers in each block.
    batch = inputs()["text"].shape[0]
    assert cut.arithmetic == (1 + 2 * 3) * 2 * batch * TEXT * WIDTH * WIDTH
    assert cut.weight_elements == (1 + 2 * 3) * (WIDTH * WIDTH + WIDTH) + 3 * 2 * WIDTH


def test_the_bytes_that_are_foretold_are_those_of_the_tensors() -> None:
    traced = hoisted(CrossAttention(depth=3), "modulations")
    values, guarded = traced.values(), traced.guarded
    parts = (guarded.constants, guarded.modulations)
    for part, cut in zip(parts, guarded.analysis.hoisted.taken, strict=True):
        assert sum(values[name].nbytes for name in part.outputs) == cut.held_bytes > 0


def test_blocks_with_keys_and_values_for_operands_are_of_one_structure() -> None:
    traced = hoisted(CrossAttention(depth=4), "modulations")
    body = traced.guarded.body
    calls = [
        node for node in roll(body).module.graph.nodes if "invoke_subgraph" in str(node.target)
    ]
    # The first block has given up its modulated input to the prologue.
    assert len(calls) == 3
    assert len({str(node.args[1]) for node in calls}) == 1


def test_modulations_depend_on_the_timestep_and_what_is_constant() -> None:
    traced = hoisted(CrossAttention(depth=3), "modulations")
    is_exact(traced)
    assert made_by(traced, "modulations") == ["linear"] * 3
    assert read_by(traced, "modulations") == {"l_timestep_"}
    without = hoisted(CrossAttention(depth=3)).guarded
    assert without.modulations is None
    assert without.constants.outputs == traced.guarded.constants.outputs


def test_nothing_is_held_that_mixes_tokens_by_the_timestep() -> None:
    class TextByTime(CrossAttention):
        """The text is modulated by the time before the blocks, as refiners do."""

        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            return super().loop(x, time, self.embed_text(text * time[:, None]))

    traced = hoisted(TextByTime(), "modulations")
    is_exact(traced)
    results = traced.guarded.analysis.hoisted.modulations.results
    assert results
    assert all(node.meta["example_value"].dim() == 2 for node in results)


def test_without_hoisting_nothing_is_taken_out() -> None:
    guarded = hoisted(CrossAttention(), False).guarded
    assert guarded.analysis.hoisted is None
    assert guarded.constants is None


def test_a_view_or_cast_of_an_input_stays_with_its_readers() -> None:
    class Cheap(Model):
        def loop(self, x: Tensor, time: Tensor, text: Tensor, row: Tensor | None = None) -> Tensor:
            assert row is not None
            wide = row[:, :1].expand(-1, IMAGE, -1).double().repeat(1, 1, 1).float()
            return super().loop(x, time, text) + wide

    traced = hoisted(Cheap(), row=torch.randn(2, 3, WIDTH))
    is_exact(traced)
    assert made_by(traced) == []
    assert traced.guarded.constants is None


def test_what_several_read_is_held_in_its_smallest_form() -> None:
    class Repeated(Model):
        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            one = text.mean(1, keepdim=True)
            # Larger copies and light work on it are made anew.
            return super().loop(x + one.repeat(1, IMAGE, 1), time, text) * (1 + one) - (one - 2)

    traced = hoisted(Repeated())
    is_exact(traced)
    assert made_by(traced) == ["mean"]


def test_a_rotary_table_is_a_constant_and_a_few_frequencies_are_not() -> None:
    class Rotary(Model):
        def loop(self, x: Tensor, time: Tensor, text: Tensor, ids: Tensor | None = None) -> Tensor:
            assert ids is not None
            frequencies = torch.exp(-torch.arange(WIDTH) / WIDTH)
            table = (ids[:, None] * frequencies).sin()
            return super().loop(x + x.mean() * table.sum(0) * frequencies.cos(), time, text)

    ids = torch.arange(hoist.WORTHWHILE, dtype=torch.float32)
    traced = hoisted(Rotary(), ids=ids)
    is_exact(traced)
    assert made_by(traced) == ["sum"]
    assert read_by(traced, "constants") == {"l_extra_ids_"}


def test_what_is_made_of_weights_alone_stays() -> None:
    class Quantised(Model):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(64 * WIDTH, 1), requires_grad=False)
            self.stored = nn.Parameter(torch.rand(64 * WIDTH, WIDTH), requires_grad=False)

        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            weight = self.stored * self.scale
            text = F.linear(F.linear(text, weight), weight.T)  # of which it makes constants
            y = F.linear(F.linear(x, weight), weight.T)
            return super().loop(y + text.mean(1, keepdim=True), time, text)

    traced = hoisted(Quantised())
    is_exact(traced)
    assert made_by(traced) == ["mean"]


class WritesIntoText(CrossAttention):
    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        text = text * 2
        text += time[:, None]
        return super().loop(x, time, text)


class DrawsForText(CrossAttention):
    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return super().loop(x, time, F.dropout(text, 0.5, training=True))


class MapsText(CrossAttention):
    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return super().loop(x, time, torch.vmap(lambda each: self.embed_text(each))(text))


@pytest.mark.parametrize("kind", [WritesIntoText, DrawsForText, MapsText])
def test_what_cannot_run_at_another_time_stays_with_all_that_is_made_of_it(
    kind: type[Model],
) -> None:
    traced = hoisted(kind())
    if kind is not DrawsForText:
        is_exact(traced)
    # The projection of the text may go, and nothing behind the obstacle.
    assert made_by(traced) in ([], ["linear"])
    nodes = computation(traced.gm.graph)
    behind = [node for node in nodes if module_path(node)[-1:] in (("key",), ("value",))]
    assert len(behind) == 4
    assert set(behind) <= set(traced.guarded.analysis.region.body)


def test_a_size_that_depends_on_data_stays_with_all_that_is_made_of_it() -> None:
    class CutsText(CrossAttention):
        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            return super().loop(x + text[text[..., 0] > 0].exp().sum(0), time, text)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        traced = hoisted(CutsText())
    is_exact(traced)
    constants = traced.guarded.constants
    names = {op_name(node) for node in computation(constants.module.graph)}
    assert names.isdisjoint({"exp", "sum"})
    assert "layer_norm" in names


def test_autocast_holds_for_what_was_taken_out_of_its_scope() -> None:
    class Cast(CrossAttention):
        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().loop(x, time, text)

    traced = hoisted(Cast())
    is_exact(traced)
    values = traced.values()
    held = [values[name] for name in traced.guarded.constants.outputs]
    assert torch.bfloat16 in {each.dtype for each in held}


def test_what_is_handed_out_is_never_held() -> None:
    class ReturnsText(CrossAttention):
        def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Any:
            noise = super().forward(latents, timestep, text)
            projected = self.embed_text(text)
            return noise, projected.transpose(0, 1), projected[0], text.softmax(-1).sum(0)

    traced = hoisted(ReturnsText())
    is_exact(traced)
    values = traced.values()
    held = {values[name].untyped_storage().data_ptr() for name in traced.guarded.constants.outputs}
    returned = {each.untyped_storage().data_ptr() for each in traced.computed()}
    assert held
    assert held.isdisjoint(returned)


def test_a_stream_that_is_a_constant_is_the_partner_that_it_was() -> None:
    for how in (True, "modulations"):
        traced = hoisted(made_up.JointTail(), how)
        is_exact(traced)
        plain = hoisted(made_up.JointTail(), False)
        # An older residual, on both.
        values = {name: value.clone() for name, value in traced.values().items()}
        others = {name: value.clone() for name, value in plain.values().items()}
        for name, other in zip(traced.guarded.residuals, plain.guarded.residuals, strict=True):
            values[name] = others[other] = values[name] * 1.5
        for one, other in zip(traced.reused(values), plain.reused(others), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "kind",
    [
        made_up.Controlled,
        made_up.DualStream,
        made_up.InPlaceAcrossTheCut,
        made_up.InPlaceAfter,
        made_up.InPlaceWithin,
        made_up.InjectedPerBlock,
        made_up.LongSkips,
        made_up.Masked,
        made_up.PiecesAcrossTheCut,
        made_up.TextPostNormWrittenOver,
        made_up.TimeFromABlock,
        made_up.VmappedMask,
        made_up.WholeJointStream,
    ],
)
def test_every_kind_of_stream_stays_exact(kind: type[Model]) -> None:
    extra: dict[type[Model], dict[str, Any]] = {
        made_up.Controlled: {"control": made_up.control()},
        made_up.Masked: {"keep": made_up.keep()},
    }
    is_exact(hoisted(kind(), "modulations", **extra.get(kind, {})))


def test_a_whole_model_gives_up_its_constants_too() -> None:
    with torch.no_grad():
        traced = trace(CrossAttention(), **inputs(), signal="latents", whole=True, hoist=True)
    is_exact(traced)
    assert len(made_by(traced)) == 4


def test_the_report_says_what_is_taken_out_and_what_it_takes() -> None:
    traced = hoisted(CrossAttention(), "modulations")
    cut = traced.guarded.analysis.hoisted.constants
    total = sum(map(arithmetic, computation(traced.gm.graph)))
    share = f"{100 * cut.arithmetic / total:.1f}% of the arithmetic"
    line = next(each for each in traced.after.splitlines() if "once in a generation" in each)
    assert share in line
    assert cut.held_bytes == 1024
    assert "constants 1.0 KiB" in traced.after
    assert "# modulations: " in traced.after
    assert "hoisted, changes with the timestep alone" in traced.after
    assert "not hoisted, changes with the timestep alone" in hoisted(CrossAttention()).after
    assert "hoisted" not in hoisted(CrossAttention(), False).after


def random_transformers_are_exact(examples: int, how: bool | str) -> tuple[int, int]:
    """How many graphs there were, and out of how many of them something was taken."""
    counts = [0, 0]

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(descriptions())
    def check(described: Description) -> None:
        if not described.is_residual:
            return
        with torch.no_grad():
            traced = trace(Transformer(described), **random_inputs(described), hoist=how)
            is_exact(traced)
        cut = traced.guarded.analysis.hoisted
        counts[0] += 1
        counts[1] += bool(cut.constants.results) and (how is True or bool(cut.modulations.results))
        held = (each.meta["example_value"] for each in cut.constants.results)
        assert sum(map(nbytes, held)) == cut.constants.held_bytes

    check()
    return counts[0], counts[1]


@pytest.mark.parametrize("how", [True, "modulations"])
def test_random_transformers_stay_exact(how: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hoist, "WORTHWHILE", 1)
    graphs, telling = random_transformers_are_exact(8, how)
    assert telling > graphs / 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", [True, "modulations"])
def test_hundreds_of_random_transformers_stay_exact(
    how: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hoist, "WORTHWHILE", 1)
    graphs, telling = random_transformers_are_exact(300, how)
    assert telling > graphs / 2
