"""Texts are short, say what runs when, and change only where the model does."""

from __future__ import annotations

import re

import made_up_models as made_up
import pytest
import torch
from made_up_models import Block, Model, inputs
from omni_cache.passes import analyse, graph_text, guarded_text, split
from sketch import deep_transformer
from torch import Tensor, nn
from tracing import trace


def lines(text: str, *words: str) -> list[str]:
    """The lines that hold all of the words, without indentation and comment column."""
    return [
        re.sub(r" {2,}", "  ", line.strip())
        for line in text.splitlines()
        if all(word in line for word in words)
    ]


def test_a_deep_model_fits_on_a_screen() -> None:
    gm = deep_transformer(40)
    text = graph_text(gm.graph)
    assert lines(text, "blocks") == [
        "add = blocks[0..39](cos, sin, linear, linear_1)  # Block ×40, 63 ops each"
    ]
    assert len(text.splitlines()) < 15
    assert len(guarded_text(split(gm, analyse(gm.graph))).splitlines()) < 40


def test_the_block_that_gives_the_signal_is_listed_apart() -> None:
    gm = deep_transformer(40)
    text = guarded_text(split(gm, analyse(gm.graph)))
    assert [line.split("  # ")[1] for line in lines(text, "= blocks[")] == [
        "Block, 12 ops",
        "Block, 51 ops",
        "Block ×39, 63 ops each",
    ]


def test_blocks_of_different_structure_are_listed_apart() -> None:
    class Mixed(Model):
        class block(Block):  # noqa: N801
            def forward(self, x: Tensor, time: Tensor, twice: bool = False) -> Tensor:
                x = super().forward(x, time)
                return super().forward(x, time) if twice else x

        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            for index, block in enumerate(self.blocks):
                x = block(x, time, twice=index == 2)
            return x

    text = trace(Mixed(depth=5), **inputs()).before
    assert [re.search(r"blocks\[[\d.]+\]", line)[0] for line in lines(text, "= blocks[")] == [
        "blocks[0..1]",
        "blocks[2]",
        "blocks[3..4]",
    ]


def test_what_the_model_does_between_its_blocks_folds_with_them() -> None:
    class Sliced(Model):
        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            times = time[None].repeat(len(self.blocks), 1, 1)
            for index, block in enumerate(self.blocks):
                x = block(x, times[index])
            return x

    text = trace(Sliced(depth=4), **inputs()).before
    (line,) = lines(text, "blocks[")
    assert line.startswith("x = blocks[0..3](")
    assert line.endswith("ops each, 3 more between them")


def test_a_module_between_two_blocks_keeps_them_apart() -> None:
    class Normed(Model):
        def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + self.norm(block(x, time))
            return x

    text = trace(Normed(), **inputs(), region=["blocks"]).before
    assert len(lines(text, "= blocks[")) == 2


def test_parameters_are_left_out_and_inputs_have_the_callers_names() -> None:
    before = trace(Model(), **inputs()).before
    assert "weight" not in before.split("def forward")[1]
    assert "def forward(\n    timestep: f32[2],\n    latents: f32[2, 6, 3],\n" in before


def test_every_value_has_a_name_of_its_own() -> None:
    for text in (trace(made_up.SplitTail(), **inputs()).after, trace(Model(), **inputs()).before):
        named = [
            name
            for line in text.splitlines()
            if (match := re.match(r"\s*([\w, ]+) = ", line))
            for name in match[1].split(", ")
        ]
        # Both sides of the guard give the region's outputs.
        outputs = set(re.findall(r"(\w+) = \w+ \+ weights", text))
        assert outputs or "residual" not in text
        assert len(named) == len(set(named)) + len(outputs)


def test_a_change_in_one_module_changes_its_line_alone() -> None:
    class Longer(Model):
        class block(Block):  # noqa: N801
            def __init__(self) -> None:
                super().__init__()
                self.mlp.append(nn.Tanh())

    one, other = (trace(kind(), **inputs()).after.splitlines() for kind in (Model, Longer))
    changed = [line.strip() for line in other if line not in one]
    assert changed
    assert all("blocks[" in line or line.startswith("#") for line in changed)


def test_a_residual_names_its_partner() -> None:
    after = trace(Model(), **inputs()).after
    (embedded,) = re.findall(r"(\w+) = embed\(latents\)", after)
    (made, partner) = re.findall(r"residual = (\w+) - (\w+)", after)[0]
    assert partner == embedded
    assert lines(after, f"{made} = {embedded} + weights[:, 0] * residual")
    assert lines(after, "residual = ", "# f32[2, 6, 8], 384 bytes; 4 residual additions")


def test_a_partner_of_another_dtype_is_cast() -> None:
    after = trace(made_up.WidenedByBlocks(), **inputs()).after
    assert re.search(r"residual = x_\d - \w+\.to\(float64\)", after)
    assert re.search(r"x_\d = \w+\.to\(float64\) \+ weights\[:, 0\] \* residual", after)


def test_a_composed_partner_is_written_out_in_the_prologue() -> None:
    after = trace(made_up.WholeJointStream(), **inputs()).after
    assert lines(after.split("if gate")[0], "partner = cat([linear_1, linear], dim=1)")
    assert lines(after, "residual = x_3 - partner") or lines(after, "- partner")


def test_a_composed_partner_is_written_out_beside_a_signal_that_is_made() -> None:
    """The prologue makes both: what enters the region, and what the first blocks have added."""
    model = made_up.WholeJointStream()
    after = trace(model, signal="first_blocks", first=1, **inputs()).after
    prologue = after.split("if gate")[0]
    assert lines(prologue, "partner = cat([")
    assert lines(prologue, "signal = ", " - ")
    assert lines(prologue, "out: ", "partner", "signal")


def test_a_slice_and_a_view_read_like_python() -> None:
    after = trace(made_up.PiecesAcrossTheCut(), **inputs()).after
    assert lines(after, "partner = linear[:, :2]")
    assert lines(after, "partner_1 = linear[:, 2:]")


def test_a_held_output_says_so() -> None:
    after = trace(made_up.TextPostNorm(), **inputs()).after
    (line,) = lines(after, "value = ")
    assert line.endswith("kept as a value: no input matches its shape")
    assert lines(after, "finite = all(isfinite(residual), isfinite(value))")


def test_the_head_says_what_was_found_and_what_it_costs() -> None:
    traced = trace(made_up.JointTail(), **inputs())
    head = traced.after.split("def forward")[0].splitlines()
    assert head[0] == "# block loop: blocks ×2, singles ×2, 2 structures in all"
    assert re.fullmatch(
        r"# region: [\d,]+ ops, 9\d\.\d% of the arithmetic, skipped on a reused step", head[1]
    )
    assert head[2] == "# timestep: timestep"
    assert head[3] == "# a trajectory holds 768 bytes: residual 384 bytes, signal 384 bytes"
    assert traced.guarded.analysis.residual_bytes() == 2 * 6 * 8 * 4


def test_every_part_says_what_it_reads_and_gives() -> None:
    traced = trace(made_up.TwoOutputs(), **inputs())
    heads = re.findall(
        r"# (prologue|body|reuse, with the epilogue|epilogue): (\d+) ops?,", traced.after
    )
    region = traced.guarded.analysis.region
    counts = [len(region.prologue), len(region.body), len(region.epilogue), len(region.epilogue)]
    assert [int(count) for _, count in heads] == counts
    assert len(re.findall(r"#     in:  ", traced.after)) == 4
    (body,) = re.findall(r"# body: .*\n.*\n\s+#     out: (.*)", traced.after)
    assert body.endswith("residual, residual_1, finite")


@pytest.mark.parametrize("kind", [Model, made_up.SplitTail, made_up.WholeJointStream])
def test_a_text_is_the_same_every_time(kind: type[Model]) -> None:
    first, again = (trace(kind(), **inputs()) for _ in range(2))
    assert (first.before, first.after) == (again.before, again.after)
    assert not re.search(r"0x[0-9a-f]{6}|\d{12}", first.before + first.after)


def test_a_text_says_the_same_when_compilation_is_over() -> None:
    traced = trace(made_up.JointTail(), **inputs())
    assert graph_text(traced.gm.graph) == traced.before
    assert guarded_text(traced.guarded) == traced.after


def test_symbolic_sizes_have_their_symbols() -> None:
    given = inputs(batch=3)
    torch._dynamo.mark_dynamic(given["latents"], 1)
    traced = trace(Model(), **given)
    (symbol,) = re.findall(r"    (s\d+): int,", traced.after)
    assert f"latents: f32[3, {symbol}, 3]" in traced.after
