"""Reuse is a weighted sum over the residuals of earlier steps, whatever their dtype and number."""

from __future__ import annotations

import itertools
from typing import Any

import made_up_models as made_up
import pytest
import torch
from float8 import rounded
from made_up_models import Block, Model, inputs
from omni_cache.passes import FINITE, WEIGHTS, RegionError, analyse, split
from omni_cache.passes.storage import scaled
from sketch import Sketch
from torch import Tensor
from tracing import Trace, run, trace

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cast(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in given.items()}


def entries(traced: Trace, values: dict[str, Any]) -> list[dict[str, Tensor]]:
    """A history of other numbers, newest first: what each output's residual is in each entry."""
    generator = torch.Generator().manual_seed(0)
    history = []
    for names in traced.guarded.history:
        entry = {}
        for name, newest in zip(names, traced.guarded.residuals, strict=True):
            kept = values[newest]
            if kept.is_floating_point() or kept.is_complex():
                noise = torch.randn(kept.shape, generator=generator, dtype=torch.float64)
                entry[name] = noise.to(kept.dtype)
            else:
                entry[name] = torch.randint(0, made_up.WIDTH, kept.shape, generator=generator)
        history.append(entry)
    return history


def reused(traced: Trace, values: dict[str, Any], history: Any, weights: Tensor) -> Tensor:
    known = {**values, **{name: value for entry in history for name, value in entry.items()}}
    return traced.reused(known, weights)[0]


def partner(traced: Trace, values: dict[str, Any]) -> Tensor:
    (pair,) = traced.guarded.analysis.pairs
    assert pair.partner is not None
    return values[pair.partner.node.name]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_newest_residual_alone_is_added_bit_for_bit(dtype: torch.dtype) -> None:
    traced = trace(Model().to(dtype), **cast(inputs(), dtype))
    values = traced.values()
    (pair,), (entry,) = traced.guarded.analysis.pairs, entries(traced, values)
    (residual,) = entry.values()
    assert residual.dtype == dtype
    values[pair.output.name] = partner(traced, values) + residual
    wanted = run(traced.guarded.epilogue, values)[0]
    assert torch.equal(reused(traced, values, [entry], traced.hold()), wanted)


FEW = [
    *((torch.float32, depth, 1) for depth in (1, 2, 3, 4)),
    *((torch.bfloat16, 2, 2), (torch.float16, 4, 1), (torch.float64, 3, 2), (torch.float32, 2, 2)),
]
"""Every depth, every dtype, and weights for all samples and for each, though not all together."""


@pytest.mark.parametrize(
    ("dtype", "depth", "rows"),
    [
        each if each in FEW else pytest.param(*each, marks=pytest.mark.exhaustive)
        for each in itertools.product(DTYPES, (1, 2, 3, 4), (1, 2))
    ],
)
def test_the_forecast_is_the_weighted_sum_over_the_history(
    dtype: torch.dtype, depth: int, rows: int
) -> None:
    traced = trace(Model().to(dtype), **cast(inputs(), dtype), depth=depth, per_sample=rows > 1)
    values = traced.values()
    history = entries(traced, values)
    assert len(history) == depth
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.randn(rows, depth, generator=torch.Generator().manual_seed(1), dtype=precise)
    forecast = sum(
        weights[:, age, None, None] * residual
        for age, entry in enumerate(history)
        for residual in entry.values()
    )
    (pair,) = traced.guarded.analysis.pairs
    values[pair.output.name] = (partner(traced, values) + forecast).to(dtype)
    wanted = run(traced.guarded.epilogue, values)[0]
    torch.testing.assert_close(reused(traced, values, history, weights), wanted)
    (described,) = (
        value
        for name, value in zip(
            traced.guarded.reuse.inputs, traced.guarded.reuse.example_inputs, strict=True
        )
        if name == WEIGHTS
    )
    assert (tuple(described.shape), described.dtype) == ((rows, depth), precise)


def test_a_weight_of_zero_stands_for_a_missing_entry() -> None:
    traced = trace(Model(), **inputs(), depth=3)
    values = traced.values()
    history = entries(traced, values)
    weights = torch.tensor([[1.5, 0.0, 0.0]])
    expected = reused(traced, values, history, weights)
    newest = dict(zip(traced.guarded.history[0], history[0].values(), strict=True))
    missing = [dict(zip(names, newest.values(), strict=True)) for names in traced.guarded.history]
    assert torch.equal(reused(traced, values, missing, weights), expected)
    assert not torch.equal(reused(traced, values, missing, weights + 0.5), expected)


def test_the_sum_comes_first_in_reuse() -> None:
    """A compiler can then fuse it with what reads it."""
    traced = trace(Model(), **inputs(), depth=2)
    nodes = traced.guarded.reuse.module.graph.nodes
    targets = [node.target for node in nodes if node.op != "placeholder"]
    first = targets[: targets.index(torch.nn.functional.layer_norm)]
    assert first.count(torch.mul) == 2
    assert [first[-1], *first[:2]] == [torch.add, torch.select, torch.select]


# --- what has no partner -------------------------------------------------------------------------


class HandsOver(Model):
    """The last block gives more than the stream: a mean, a rotation and an index."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            x = super().forward(x, time)
            mean = x.mean(dim=1, keepdim=True)
            rotation = torch.complex(mean.cos(), mean.sin())
            return x, mean, rotation, mean.argmax(dim=-1)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x, mean, rotation, index = block(x, time)
        return x + mean + rotation.imag + index[..., None]


def test_values_are_weighed_too_and_integers_are_those_of_the_newest_entry() -> None:
    traced = trace(HandsOver(), **inputs(), depth=2)
    analysis, values = traced.guarded.analysis, traced.values()
    assert [pair.held for pair in analysis.pairs] == [False, True, True, True]
    history = entries(traced, values)
    weights = torch.tensor([[1.5, -0.5]])
    kept = [list(entry.values()) for entry in history]
    for place, pair in enumerate(analysis.pairs):
        new, old = kept[0][place], kept[1][place]
        value = new if new.dtype == torch.int64 else 1.5 * new - 0.5 * old
        known = 0 if pair.partner is None else values[pair.partner.node.name]
        values[pair.output.name] = known + value
        assert values[pair.output.name].dtype == new.dtype
    wanted = run(traced.guarded.epilogue, values)[0]
    torch.testing.assert_close(reused(traced, values, history, weights), wanted)
    integer = traced.guarded.history[1][3]
    assert integer not in traced.guarded.reuse.inputs


def test_a_number_for_the_whole_batch_has_no_weight_for_each_sample() -> None:
    class Scalar(HandsOver):
        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            return super().loop(x, time, text)

        class block(Block):  # noqa: N801
            def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
                x = super().forward(x, time)
                return x, x.mean(), torch.complex(x.mean(), x.std()), x.argmax()[None]

    traced = trace(Scalar(), **inputs())
    assert torch.equal(traced.reused(traced.values())[0], traced.reused(traced.values())[0])
    with pytest.raises(RegionError, match="no batch dimension in common"):
        trace(Scalar(), **inputs(), per_sample=True)


def test_residuals_of_two_devices_are_weighed_where_they_lie() -> None:
    sketch = Sketch()
    streams = []
    for name, device in (("x", "cpu"), ("y", "meta")):
        node = sketch.input(name, 2, 6, 8)
        node.meta["example_value"] = torch.empty(2, 6, 8, device=device)
        streams.append(node)
    with sketch.module("blocks.0"):
        query, other = sketch("exp", streams[0]), sketch("sin", streams[1])
        query = sketch(torch.nn.functional.scaled_dot_product_attention, query, query, query)
        left = [sketch("add", streams[0], query), sketch("add", streams[1], other)]
    gm = sketch.returns(*(sketch("tanh", each) for each in left))
    analysis = analyse(gm.graph)
    assert len(analysis.pairs) == 2
    nodes = split(gm, analysis).reuse.module.graph.nodes
    sums = [node.meta["example_value"] for node in nodes if node.target is torch.add]
    assert [value.device.type for value in sums] == ["cpu", "meta"]


# --- kept in another dtype -----------------------------------------------------------------------


@pytest.mark.parametrize("history_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_residuals_are_kept_in_the_dtype_of_the_history(history_dtype: torch.dtype) -> None:
    plain = trace(HandsOver(), **inputs())
    traced = trace(HandsOver(), **inputs(), history_dtype=history_dtype)
    values, others = traced.values(), plain.values()
    for name, other in zip(traced.guarded.residuals, plain.guarded.residuals, strict=True):
        expected = others[other]
        if expected.is_floating_point():
            expected = expected.to(history_dtype)
        assert values[name].dtype == expected.dtype
        assert torch.equal(values[name], expected)
    assert torch.equal(traced.computed()[0], plain.computed()[0])
    got, wanted = traced.reused(values)[0], plain.reused(others)[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=5e-2)
    analysis = traced.guarded.analysis
    held = sum(values[name].nbytes for name in traced.guarded.residuals)
    assert analysis.residual_bytes(history_dtype=history_dtype) == held
    assert analysis.residual_bytes(3, history_dtype) == 3 * held
    assert f"to({history_dtype}".replace("torch.", "") in traced.after


class Large(Model):
    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return x + 1e5 * super().forward(x, time)


def test_an_overflow_in_the_cast_is_seen() -> None:
    for history_dtype, finite in ((None, True), (torch.bfloat16, True), (torch.float16, False)):
        traced = trace(Large(), **inputs(), history_dtype=history_dtype)
        values = traced.values()
        assert values[FINITE].item() is finite
        for name in traced.guarded.residuals:
            assert values[name].isfinite().all()


# --- kept in 8 bits ------------------------------------------------------------------------------


def in_8_bits(model: type[Model], given: dict[str, Tensor], **options: Any) -> Trace:
    return trace(model(), **given, history_dtype=torch.float8_e4m3fn, **options)


def test_all_residuals_of_8_bits_have_scales_and_integers_have_none() -> None:
    plain = trace(HandsOver(), **inputs())
    traced = in_8_bits(HandsOver, inputs())
    values, others = traced.values(), plain.values()
    names = traced.guarded.residuals
    for name, other in zip(names, plain.guarded.residuals, strict=False):
        wanted = others[other]
        if not wanted.is_floating_point():
            assert torch.equal(values[name], wanted)
            continue
        scale = values[traced.guarded.scales[name]]
        assert (values[name].dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        assert scale.shape == (*wanted.shape[:-1], 1)
        assert torch.equal(values[name].float() * scale, rounded(wanted))
        assert float((rounded(wanted) - wanted).norm() / wanted.norm()) < 0.05
    assert sorted(traced.guarded.scales.values()) == sorted(names[len(plain.guarded.residuals) :])
    assert len(traced.guarded.scales) == 2
    held = sum(values[name].nbytes for name in names)
    assert traced.guarded.analysis.residual_bytes(2, torch.float8_e4m3fn) == 2 * held


@pytest.mark.parametrize("rows", [1, 2])
def test_residuals_of_8_bits_are_weighed_in_float32(rows: int) -> None:
    traced = in_8_bits(Model, inputs(), depth=2, per_sample=rows > 1)
    values = traced.values()
    (pair,) = traced.guarded.analysis.pairs
    newest = [values[name] for name in traced.guarded.history[0]]
    older = [newest[0].float().flip(1).to(newest[0].dtype), newest[1].flip(1)]
    values.update(zip(traced.guarded.history[1], older, strict=True))
    weights = torch.tensor([[1.5, -0.5], [0.3, 0.9]])[:rows]
    column = weights[:, :, None, None].unbind(1)
    sums = (
        w * each.float() * scale for w, (each, scale) in zip(column, (newest, older), strict=True)
    )
    forecast = partner(traced, values) + sum(sums)
    reused = traced.reused(values, weights)[0]
    values[pair.output.name] = forecast
    torch.testing.assert_close(reused, run(traced.guarded.epilogue, values)[0])
    assert "residual, scale = in_8_bits(" in traced.after
    assert "weights[:, 1] * older_residual * older_scale" in traced.after


def test_nothing_overflows_in_8_bits_and_what_is_not_finite_becomes_zero() -> None:
    traced = in_8_bits(Large, inputs())
    values = traced.values()
    (name,), (pair,) = traced.guarded.scales, traced.guarded.analysis.pairs
    added = values[pair.output.name] - partner(traced, values)
    assert float(added.abs().max()) > 1e4
    assert values[FINITE].item() is True
    kept = values[name].float() * values[traced.guarded.scales[name]]
    assert float((kept - added).norm() / added.norm()) < 0.04

    class Broken(Model):
        class block(Block):  # noqa: N801
            def forward(self, x: Tensor, time: Tensor) -> Tensor:
                out = super().forward(x, time)
                return out + out / 0

    traced = in_8_bits(Broken, inputs())
    values = traced.values()
    (name,) = traced.guarded.scales
    kept = values[name].float() * values[traced.guarded.scales[name]]
    assert values[FINITE].item() is False
    assert not kept.any()


def test_a_row_of_zeros_or_of_the_smallest_numbers_stays_what_it_is() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-40, -1e-41], [3e38, -3e38], [1.0, 1e-3]])
    kept, scale = scaled(rows)
    assert torch.equal(kept.float() * scale, rounded(rows))
    assert (kept.float() * scale).isfinite().all()
    assert not (kept[0].float() * scale[0]).any()
    torch.testing.assert_close((kept.float() * scale)[2], rows[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"depth": 0}, "depth=0 is not allowed; depth must be 1 or more"),
        ({"history_dtype": torch.int8}, "history_dtype=torch.int8 is not allowed"),
        (
            {"history_dtype": torch.float8_e5m2},
            "float8_e4m3fn or a floating-point dtype of 16 bits",
        ),
    ],
)
def test_a_history_that_cannot_be_is_refused(options: dict[str, Any], reason: str) -> None:
    sketch = Sketch()
    x = sketch.input("x", 2, 6, 8)
    with sketch.module("blocks.0"):
        mixed = sketch(torch.nn.functional.scaled_dot_product_attention, x, x, x)
        last = sketch("add", x, mixed)
    gm = sketch.returns(sketch("tanh", last))
    with pytest.raises(ValueError, match=reason):
        split(gm, analyse(gm.graph), **options)


def test_a_deeper_history_is_written_out() -> None:
    after = trace(Model(), **inputs(), depth=2).after
    assert "+ weights[:, 0] * residual + weights[:, 1] * older_residual" in after
