"""Prologue, body and epilogue are the graph; prologue and reuse are it with other residuals."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import made_up_models as made_up
import pytest
import torch
from diffusers_models import REPRESENTATIVES
from made_up_models import Block, Model, control, inputs
from omni_cache.passes import FINITE, WEIGHTS, GuardedGraph, Part, RegionError
from omni_cache.passes.build import is_guard
from omni_cache.passes.names import module_path
from omni_cache.passes.order import memory_root
from omni_cache.passes.views import Cat, Leaf, Permute, Reshape, Slice, View
from torch import Tensor, nn
from torch.fx import Node
from tracing import Trace, run, trace
from twelve import captured

MADE_UP = (
    made_up.CastsBetweenBlocks,
    made_up.WidenedByBlocks,
    made_up.NarrowedByBlocks,
    made_up.Controlled,
    made_up.DualStream,
    made_up.InPlaceAcrossTheCut,
    made_up.InPlaceAfter,
    made_up.InPlaceWithin,
    made_up.InjectedPerBlock,
    made_up.JointTail,
    made_up.LongSkips,
    made_up.Masked,
    made_up.PerTokenModulation,
    made_up.PiecesAcrossTheCut,
    made_up.PositionInFirstBlock,
    made_up.TextPostNorm,
    made_up.TextPostNormWrittenOver,
    made_up.SplitTail,
    made_up.TakingTurns,
    made_up.TimeFromABlock,
    made_up.TwoOutputs,
    made_up.ViewsAtTheSeams,
    made_up.VmappedMask,
    made_up.WholeJointStream,
)


@cache
def made_up_trace(kind: type[Model]) -> Trace:
    extra: dict[type[Model], dict[str, Any]] = {
        made_up.Controlled: {"control": control()},
        made_up.Masked: {"keep": made_up.keep()},
    }
    return trace(kind(), **inputs(), **extra.get(kind, {}))


TRACES: dict[str, Callable[[], Trace]] = {
    **{name: partial(captured, name) for name in REPRESENTATIVES},
    **{kind.__name__: partial(made_up_trace, kind) for kind in MADE_UP},
}


@pytest.fixture(params=TRACES)
def traced(request: pytest.FixtureRequest) -> Trace:
    return TRACES[request.param]()


def parts(guarded: GuardedGraph) -> list[Part]:
    return [guarded.prologue, guarded.body, guarded.epilogue, guarded.reuse]


def evaluate(view: View, values: dict[str, Any]) -> Tensor:
    """What a view says, in plain indexing."""
    match view:
        case Leaf():
            return values[view.node.name]
        case Cat():
            return torch.cat([evaluate(part, values) for part in view.parts], view.dim)
        case Slice():
            whole = evaluate(view.of, values)
            return whole[(slice(None),) * view.dim + (slice(view.start, view.stop),)]
        case Permute():
            return evaluate(view.of, values).permute(view.dims)
        case Reshape():
            return evaluate(view.of, values).reshape(view.shape)


def test_prologue_body_and_epilogue_equal_the_graph_bit_for_bit(traced: Trace) -> None:
    for whole, computed in zip(traced.whole(), traced.computed(), strict=True):
        assert torch.equal(computed, whole)


def test_reuse_equals_the_epilogue_of_partner_plus_residual(traced: Trace) -> None:
    values = traced.values()
    for name in traced.guarded.residuals:
        values[name] = values[name] * 1.5  # of another step
    # An epilogue may write in place into what it reads.
    reused = traced.reused({name: torch.clone(value) for name, value in values.items()})
    for name, pair in zip(traced.guarded.residuals, traced.guarded.analysis.pairs, strict=True):
        value = values[name]
        partner = 0 if pair.partner is None else evaluate(pair.partner, values).to(value.dtype)
        values[pair.output.name] = partner + value
    expected = run(traced.guarded.epilogue, values)
    for got, wanted in zip(reused, expected, strict=True):
        assert torch.equal(got, wanted)
    assert not torch.equal(reused[0], traced.whole()[0])


def test_a_residual_is_what_the_body_adds_to_its_partner(traced: Trace) -> None:
    values = traced.values()
    for name, pair in zip(traced.guarded.residuals, traced.guarded.analysis.pairs, strict=True):
        value = values[pair.output.name]
        partner = 0 if pair.partner is None else evaluate(pair.partner, values).to(value.dtype)
        assert torch.equal(values[name], value - partner)
        assert values[name].dtype == value.dtype


def test_reuse_leaves_the_residuals_as_they_are(traced: Trace) -> None:
    values = traced.values()
    residuals = {name: values[name].clone() for name in traced.guarded.residuals}
    traced.reused(values)
    for name, residual in residuals.items():
        assert torch.equal(values[name], residual)


def test_every_traced_operation_runs_in_exactly_one_part(traced: Trace) -> None:
    region = traced.guarded.analysis.region
    nodes = [*region.prologue, *region.body, *region.epilogue]
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == {
        node
        for node in traced.gm.graph.nodes
        if node.op in ("call_function", "call_method") and "autocast" not in node.name
    }


def test_the_signal_is_computed_before_the_body_and_not_again_in_it(traced: Trace) -> None:
    guarded = traced.guarded
    analysis = guarded.analysis
    assert analysis.signal is not None
    assert guarded.signal == analysis.signal.node.name
    assert guarded.signal in guarded.prologue.outputs
    moved = set(analysis.signal.moved)
    assert analysis.signal.node in moved
    assert moved <= set(analysis.region.prologue)
    copied = {
        node.name
        for node in guarded.body.module.graph.nodes
        if node.op != "placeholder" and not is_guard(node)
    }
    assert copied.isdisjoint(node.name for node in moved)


def test_traced_values_describe_what_crosses_the_cuts(traced: Trace) -> None:
    """Shape, strides and dtype: an inner compiler relies on them without looking again."""
    values = traced.values()
    for part in parts(traced.guarded):
        for name, traced_value in zip(part.inputs, part.example_inputs, strict=True):
            real = traced.hold() if name == WEIGHTS else values[name]
            assert isinstance(traced_value, Tensor)
            assert (real.shape, real.dtype) == (traced_value.shape, traced_value.dtype), name
            assert real.stride() == traced_value.stride(), name


def test_no_part_takes_what_it_does_not_read(traced: Trace) -> None:
    for part in parts(traced.guarded):
        for node in part.module.graph.nodes:
            assert node.op != "placeholder" or node.users


def test_the_captured_graph_is_left_as_it_is(traced: Trace) -> None:
    assert "residual" not in str(traced.gm.graph)
    assert not any("omni" in key for node in traced.gm.graph.nodes for key in node.meta)


@pytest.mark.parametrize(
    ("kind", "lists"),
    [
        (made_up.InjectedPerBlock, ["blocks", "singles"]),
        (made_up.LongSkips, ["blocks"]),
        (made_up.Masked, ["blocks"]),
        (made_up.TakingTurns, ["blocks", "others"]),
        (made_up.TimeFromABlock, ["blocks"]),
        (made_up.VmappedMask, ["blocks"]),
    ],
)
def test_the_one_output_is_a_residual_update_of_the_hidden_states(
    kind: type[Model], lists: list[str]
) -> None:
    analysis = made_up_trace(kind).guarded.analysis
    assert [each.path for each in analysis.loop.lists] == lists
    (pair,) = analysis.pairs
    assert isinstance(pair.partner, Leaf)
    assert module_path(pair.partner.node)[:1] == ("embed",)


class Noisy(Model):
    """Draws noise within its blocks and after them, of the same shape."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return super().forward(x, time) + torch.randn_like(x)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return super().loop(x, time, text) + torch.randn_like(text).mean()


def test_random_draws_keep_their_order() -> None:
    traced = trace(Noisy(), **inputs())
    torch.manual_seed(0)
    whole = traced.whole()
    torch.manual_seed(0)
    assert all(map(torch.equal, traced.computed(), whole))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_reported_and_never_kept(bad: float) -> None:
    traced = made_up_trace(made_up.DualStream)
    values = traced.values()
    assert values[FINITE].item() is True
    latents = next(name for name in traced.inputs if "latents" in name)
    broken = Trace(
        traced.gm,
        traced.guarded,
        "",
        "",
        {**traced.inputs, latents: traced.inputs[latents].index_fill(1, torch.tensor(0), bad)},
    )
    values = broken.values()
    assert values[FINITE].item() is False
    for name in traced.guarded.residuals:
        assert values[name].isfinite().all()


def test_a_partner_that_is_no_region_input_is_composed_once_in_the_prologue() -> None:
    traced = made_up_trace(made_up.WholeJointStream)
    (pair,) = traced.guarded.analysis.pairs
    assert isinstance(pair.partner, Cat)
    partner = traced.guarded.prologue.outputs[-1]
    assert partner in traced.guarded.body.inputs
    assert partner in traced.guarded.reuse.inputs
    for part in (traced.guarded.body, traced.guarded.reuse):
        cats = [node for node in part.module.graph.nodes if node.target is torch.cat]
        assert not any(node.meta.get("omni_cache_guard") for node in cats)


def test_names_of_the_model_do_not_clash_with_those_of_the_guard() -> None:
    class Clash(Model):
        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            x_9_residual = text.mean(dim=1, keepdim=True)
            finite = text.amax(dim=1, keepdim=True)
            x = super().loop(x, time, text)
            return x + x_9_residual + finite

    traced = trace(Clash(), **inputs())
    assert traced.guarded.residuals != ("x_9_residual",)
    assert "x_9_residual" in traced.guarded.epilogue.inputs
    assert "finite" in traced.guarded.epilogue.inputs
    assert torch.equal(traced.computed()[0], traced.whole()[0])


# --- modes ---------------------------------------------------------------------------------------


class InModes(Model):
    """Opens a mode around the whole loop and beyond, in each block, and after the loop."""

    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        with self.mode():
            result = super().forward(latents, timestep, text)
        with self.mode():
            return result + self.project(self.norm(self.embed(latents)))


class ModeInBlocks(InModes):
    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return Model.forward(self, latents, timestep, text)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            with self.mode():
                update = block(x, time) - x
            x = x + update
        return x


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def math_attention() -> Any:
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


@pytest.mark.parametrize("kind", [InModes, ModeInBlocks])
def test_autocast_holds_in_every_part(kind: type[InModes]) -> None:
    traced = trace(kind(bfloat16), **inputs())
    with torch.no_grad():
        plain = kind(torch.no_grad)(**inputs())
    assert torch.equal(traced.computed()[0], traced.whole()[0])
    assert not torch.equal(traced.whole()[0], plain)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", [InModes, ModeInBlocks])
@pytest.mark.parametrize("mode", [torch.enable_grad, math_attention])
def test_a_switch_is_set_and_set_back_in_every_part(
    kind: type[InModes], mode: Callable[[], Any]
) -> None:
    traced = trace(kind(mode), **inputs())
    with torch.no_grad():
        assert torch.equal(traced.computed()[0], traced.whole()[0])
        assert not torch.is_grad_enabled()

    def state(nodes: Any) -> list[tuple[str, Any]]:
        """For each attention, and each linear layer, what the switch was last set to."""
        last, found = None, []
        for node in nodes:
            if "_set_grad_enabled" in node.name or node.name.startswith("_sdpa_kernel"):
                last = [getattr(each, "args", each) for each in _flat(node.args)]
            elif "attention" in str(node.target) or node.target is nn.functional.linear:
                found.append((node.name, last))
        return found

    whole = dict(state(traced.gm.graph.nodes))
    ambient = next(iter(whole.values())) if kind is ModeInBlocks else None
    for part in parts(traced.guarded):
        for name, last in state(part.module.graph.nodes):
            assert last == whole[name] or (last is None and whole[name] in (None, ambient))


def _flat(args: Any) -> list[Any]:
    return [leaf for each in args for leaf in (each if isinstance(each, list) else [each])]


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [made_up.JointTail, made_up.SplitTail, made_up.SizesFromABlock])
def test_symbolic_sizes_cross_the_cuts(kind: type[Model]) -> None:
    given = inputs(batch=3)
    for name in ("latents", "text"):
        torch._dynamo.mark_dynamic(given[name], 1)
    traced = trace(kind(), **given)
    assert torch.equal(traced.computed()[0], traced.whole()[0])
    assert not any(pair.held for pair in traced.guarded.analysis.pairs)

    # The parts serve other sizes too.
    latents, text = torch.randn(3, 10, 3), torch.randn(3, 5, 8)
    other = {}
    for name, value in traced.inputs.items():
        if isinstance(value, int):
            value = 10 if value == made_up.IMAGE else 5
        elif "latents" in name:
            value = latents
        elif "text" in name and value.dim() == 3:
            value = text
        other[name] = value
    elsewhere = Trace(traced.gm, traced.guarded, "", "", other)
    assert elsewhere.whole()[0].shape[1] == 10
    assert torch.equal(elsewhere.computed()[0], elsewhere.whole()[0])


def test_a_part_takes_in_every_symbol_that_its_inputs_are_laid_out_by() -> None:
    given = inputs(batch=3)
    for name in ("latents", "text"):
        torch._dynamo.mark_dynamic(given[name], 1)
    for part in parts(trace(made_up.JointTail(), **given).guarded):
        values = part.example_inputs
        sizes = {each.node.expr for each in values if isinstance(each, torch.SymInt)}
        used = {
            symbol
            for each in values
            if isinstance(each, Tensor)
            for size in (*each.shape, *each.stride())
            if isinstance(size, torch.SymInt)
            for symbol in size.node.expr.free_symbols
        }
        assert used <= sizes


def test_a_partner_is_composed_of_inputs_of_symbolic_size() -> None:
    given = inputs(batch=3)
    torch._dynamo.mark_dynamic(given["latents"], 1)
    traced = trace(made_up.WholeJointStream(), **given)
    (pair,) = traced.guarded.analysis.pairs
    assert not pair.held
    assert torch.equal(traced.computed()[0], traced.whole()[0])


# --- in place ------------------------------------------------------------------------------------


def test_a_stream_that_blocks_write_into_is_copied_where_it_enters() -> None:
    traced = trace(made_up.InPlaceAcrossTheCut(), **inputs())
    analysis = traced.guarded.analysis
    (pair,) = analysis.pairs
    assert isinstance(pair.partner, Leaf)
    # The signal takes the first write along into the prologue.
    (copied,) = analysis.overwritten
    assert memory_root(copied) is pair.partner.node
    # The residual is what the blocks added to what entered them, before they wrote into it.
    (name,) = traced.guarded.residuals
    values = traced.values()
    assert values[name].abs().max() > 0.1
    torch.testing.assert_close(traced.reused(values)[0], traced.whole()[0], rtol=1e-4, atol=1e-5)


def test_a_write_that_is_seen_outside_the_loop_is_refused_with_its_line() -> None:
    with pytest.raises(RegionError, match=r"writes in place") as caught:
        trace(made_up.InPlaceSeenOutside(), **inputs())
    assert isinstance(caught.value.node, Node)
    assert f"node {caught.value.node.name!r}" in str(caught.value)
    source = Path(made_up.__file__)
    lines = source.read_text(encoding="utf-8").splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if "x += self.attn" in text)
    assert f"{source}:{line}" in str(caught.value)
