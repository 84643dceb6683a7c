"""The block loop is found by arithmetic, attention and streams, never by names."""

from __future__ import annotations

import operator

import made_up_models as made_up
import pytest
import torch
import torch.nn.functional as F
from made_up_models import Attention, Block, Model, inputs
from omni_cache.passes import RegionError, find_block_lists, find_block_loop
from sketch import Sketch
from torch import Tensor, nn
from torch.fx import Node
from tracing import trace

WIDTH = 8


def attention(sketch: Sketch, x: Node) -> Node:
    """``x`` plus an attention of three projections of it."""
    heads = [sketch("unsqueeze", sketch.linear(x, WIDTH), 1) for _ in range(3)]
    mixed = sketch(F.scaled_dot_product_attention, *heads)
    return sketch(torch.add, x, sketch("squeeze", mixed, 1))


def mlp(sketch: Sketch, x: Node) -> Node:
    return sketch(torch.add, x, sketch.linear(sketch.linear(x, 16 * WIDTH), WIDTH))


def blocks(sketch: Sketch, path: str, x: Node, count: int, *layers: object) -> Node:
    for index in range(count):
        with sketch.module(f"{path}.{index}"):
            for layer in layers:
                x = layer(sketch, x)  # type: ignore[operator]
    return x


@pytest.fixture
def sketch() -> Sketch:
    return Sketch()


@pytest.fixture
def x(sketch: Sketch) -> Node:
    return sketch("neg", sketch.input("x", 1, 4, WIDTH))


def found(sketch: Sketch, *results: Node) -> list[str]:
    sketch.returns(*results)
    return [each.path for each in find_block_loop(sketch.graph).lists]


def test_a_list_has_its_blocks_in_order_with_class_and_arithmetic(sketch: Sketch, x: Node) -> None:
    sketch.returns(blocks(sketch, "blocks", x, 3, attention))
    (only,) = find_block_lists(sketch.graph)
    assert only.path == "blocks"
    assert only.has_attention
    assert [block.index for block in only.blocks] == [0, 1, 2]
    assert {block.class_name for block in only.blocks} == {"Block"}
    projections, products = 3 * 2 * 4 * WIDTH * WIDTH, 2 * 2 * 4 * 4 * WIDTH
    assert {block.arithmetic for block in only.blocks} == {projections + products}
    assert [len(block.nodes) for block in only.blocks] == [9, 9, 9]


def test_the_main_list_is_the_one_with_the_most_arithmetic(sketch: Sketch, x: Node) -> None:
    few = blocks(sketch, "few", x, 1, attention)
    many = blocks(sketch, "many", sketch.linear(few, WIDTH), 5, attention)
    assert found(sketch, many) == ["many"]


def test_a_list_without_attention_is_no_block_loop(sketch: Sketch, x: Node) -> None:
    x = blocks(sketch, "heavy", x, 5, mlp)
    assert found(sketch, blocks(sketch, "light", x, 2, attention)) == ["light"]


def test_multiplying_activations_counts_as_attention(sketch: Sketch, x: Node) -> None:
    with sketch.module("blocks.0"):
        keys = sketch("transpose", sketch.linear(x, WIDTH), 1, 2)
        mixed = sketch(torch.matmul, sketch(operator.matmul, x, keys), x)
    assert found(sketch, sketch(torch.add, x, mixed)) == ["blocks"]


def test_multiplying_with_weights_does_not(sketch: Sketch, x: Node) -> None:
    with sketch.module("blocks.0"):
        weight = sketch("t", sketch.weight(WIDTH, WIDTH))
        result = sketch(torch.add, x, sketch(torch.matmul, x, weight))
    sketch.returns(result)
    assert not find_block_lists(sketch.graph)[0].has_attention


def test_a_list_that_the_whole_stream_runs_on_from_joins(sketch: Sketch, x: Node) -> None:
    text = sketch("neg", sketch.input("text", 1, 2, WIDTH))
    for index in range(2):
        with sketch.module(f"double.{index}"):
            x, text = attention(sketch, x), attention(sketch, text)
    joint = sketch(torch.cat, [text, x], dim=1)
    assert found(sketch, blocks(sketch, "single", joint, 4, attention)) == ["double", "single"]


def test_a_list_that_only_part_of_the_stream_runs_on_from_does_not(sketch: Sketch, x: Node) -> None:
    text = sketch("neg", sketch.input("text", 1, 2, WIDTH))
    text = blocks(sketch, "refiner", text, 2, attention)
    joint = sketch(torch.cat, [text, x], dim=1)
    assert found(sketch, blocks(sketch, "single", joint, 4, attention)) == ["single"]


def test_an_addition_to_the_stream_between_two_lists_keeps_them_together(
    sketch: Sketch, x: Node
) -> None:
    control = sketch.input("control", 1, 4, WIDTH)
    between = sketch(torch.add, control, blocks(sketch, "one", x, 2, attention))
    assert found(sketch, blocks(sketch, "two", between, 3, attention)) == ["one", "two"]


def test_a_stream_that_a_list_only_shifts_is_another(sketch: Sketch, x: Node) -> None:
    one = blocks(sketch, "one", x, 2, attention)
    shift = sketch(operator.getitem, one, (slice(None), slice(0, 1)))
    between = sketch(torch.add, sketch.linear(x, WIDTH), shift)
    assert found(sketch, blocks(sketch, "two", between, 3, attention)) == ["two"]


def test_a_list_with_a_small_share_of_the_work_does_not(sketch: Sketch, x: Node) -> None:
    x = blocks(sketch, "light", x, 2, attention)
    assert found(sketch, blocks(sketch, "heavy", x, 2, attention, mlp, mlp, mlp)) == ["heavy"]


def test_a_list_after_the_main_one_joins_too(sketch: Sketch, x: Node) -> None:
    x = blocks(sketch, "first", x, 4, attention)
    x = blocks(sketch, "second", sketch("contiguous", x), 2, attention)
    assert found(sketch, x) == ["first", "second"]


def test_lists_can_be_named(sketch: Sketch, x: Node) -> None:
    x = blocks(sketch, "first", x, 4, attention)
    sketch.returns(blocks(sketch, "second", x, 2, attention))
    for names in (["first"], ["second"], ["second", "first"]):
        lists = find_block_loop(sketch.graph, names).lists
        assert [each.path for each in lists] == sorted(names)


def test_a_name_that_is_no_list_is_refused_with_those_that_are(sketch: Sketch, x: Node) -> None:
    sketch.returns(blocks(sketch, "blocks", x, 2, attention))
    with pytest.raises(RegionError, match=r"no 'block' runs .*\['blocks'\]"):
        find_block_loop(sketch.graph, ["block"])


def test_without_attention_the_refusal_names_the_lists_that_there_are(
    sketch: Sketch, x: Node
) -> None:
    sketch.returns(blocks(sketch, "second", blocks(sketch, "first", x, 2, mlp), 2, mlp))
    with pytest.raises(RegionError, match=r"no list .* attention .*first, second.*region=\["):
        find_block_loop(sketch.graph)


def test_without_lists_the_refusal_says_so(sketch: Sketch, x: Node) -> None:
    sketch.returns(attention(sketch, x))
    with pytest.raises(RegionError, match=r"lists found: none"):
        find_block_loop(sketch.graph)


# --- structure -----------------------------------------------------------------------------------


def scaled(factor: float) -> object:
    return lambda sketch, x: sketch(torch.mul, x, factor)


def structures(sketch: Sketch, *results: Node) -> list[str]:
    sketch.returns(*results)
    return [block.structure for each in find_block_lists(sketch.graph) for block in each.blocks]


def test_blocks_that_do_the_same_have_one_structure(sketch: Sketch, x: Node) -> None:
    assert len(set(structures(sketch, blocks(sketch, "blocks", x, 3, attention, mlp)))) == 1


def test_lists_of_other_names_have_one_structure_too(sketch: Sketch, x: Node) -> None:
    x = blocks(sketch, "first", x, 1, attention)
    assert len(set(structures(sketch, blocks(sketch, "second", x, 1, attention)))) == 1


def test_operations_constants_shapes_dtypes_and_wiring_tell_blocks_apart(
    sketch: Sketch, x: Node
) -> None:
    wide = sketch.input("wide", 1, 5, WIDTH)
    half = sketch.input("half", 1, 4, WIDTH, dtype=torch.float16)

    def twice(first: Node, second: Node) -> object:
        return lambda sketch, x: sketch(torch.sub, first or x, second or x)

    y = sketch("neg", x)
    results = [
        blocks(sketch, "scaled", x, 1, scaled(2.0)),
        blocks(sketch, "scaled_otherwise", x, 1, scaled(3.0)),
        blocks(sketch, "negated", x, 1, lambda sketch, x: sketch("neg", x)),
        blocks(sketch, "longer", wide, 1, scaled(2.0)),
        blocks(sketch, "halved", half, 1, scaled(2.0)),
        blocks(sketch, "less_itself", x, 1, lambda sketch, x: sketch(torch.sub, x, x)),
        blocks(sketch, "less_another", x, 1, lambda sketch, x: sketch(torch.sub, x, y)),
    ]
    all_structures = structures(sketch, *results)
    assert len(set(all_structures)) == len(all_structures) == 7


@torch.library.custom_op("first_namespace::scale", mutates_args=())
def first_scale(x: Tensor) -> Tensor:
    return 2 * x


@torch.library.custom_op("second_namespace::scale", mutates_args=())
def second_scale(x: Tensor) -> Tensor:
    return 3 * x


first_scale.register_fake(torch.empty_like)
second_scale.register_fake(torch.empty_like)


def test_operators_of_one_name_in_two_namespaces_are_two(sketch: Sketch, x: Node) -> None:
    for name in ("first", "second"):
        scale = getattr(torch.ops, f"{name}_namespace").scale
        for kind, target in (("packet", scale), ("overload", scale.default)):
            for place in (0, 1):
                with sketch.module(f"{name}_{kind}.{place}"):
                    x = sketch(target, x)
    found = structures(sketch, x)
    assert len(set(found)) == 4
    assert all(one == other for one, other in zip(found[::2], found[1::2], strict=True))


def test_local_functions_of_one_name_are_two(sketch: Sketch, x: Node) -> None:
    def local(factor: int) -> object:
        return lambda x: factor * x

    first, second = local(2), local(3)
    targets = (first, second, first)
    results = [
        blocks(sketch, f"list_{place}", x, 1, lambda sketch, x, target=target: sketch(target, x))
        for place, target in enumerate(targets)
    ]
    one, other, again = structures(sketch, *results)
    assert one == again
    assert one != other


def test_layouts_and_weights_of_what_comes_in_tell_blocks_apart(sketch: Sketch, x: Node) -> None:
    turned = sketch("transpose", sketch.input("turned", 1, WIDTH, 4), 1, 2)
    cpu = sketch.input("cpu", 1, 4, WIDTH)
    cpu.meta["example_value"] = torch.empty(1, 4, WIDTH)
    assert turned.meta["example_value"].shape == x.meta["example_value"].shape
    operands = [x, turned, sketch.weight(1, 4, WIDTH), cpu, sketch("exp", x)]
    found = structures(
        sketch,
        *(blocks(sketch, f"list_{i}", each, 1, scaled(2.0)) for i, each in enumerate(operands)),
    )
    assert len(set(found[:4])) == 4
    assert found[0] == found[4]


@pytest.mark.parametrize("writes", [True, False])
def test_operands_in_one_memory_matter_where_a_block_writes(sketch: Sketch, writes: bool) -> None:
    def written(first: Node, second: Node) -> object:
        target = "add_" if writes else "add"
        return lambda sketch, x: sketch(torch.mul, sketch(target, first, 1), second)

    made = sketch("exp", sketch.input("made", 2, 4, WIDTH))
    halves = [sketch("select", made, 0, index) for index in (0, 1)]
    others = [sketch("exp", sketch.input(f"other_{index}", 4, WIDTH)) for index in (0, 1)]
    results = [
        blocks(sketch, "shared", halves[0], 1, written(*halves)),
        blocks(sketch, "apart", others[0], 1, written(*others)),
        blocks(sketch, "twice", others[0], 1, written(others[0], others[0])),
    ]
    shared, apart, twice = structures(sketch, *results)
    assert (shared == apart) is not writes
    assert twice not in (shared, apart)


class ModesDiffer(Model):
    """The middle one of three blocks runs in another mode, or inside another transform."""

    def __init__(self, mode: object) -> None:
        super().__init__(depth=4)
        self.mode = mode

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index in (1, 2):
                with self.mode():
                    update = block(x, time) - x
            else:
                update = block(x, time) - x
            x = x + update
        return x


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.enable_grad,
        lambda: nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ],
    ids=["autocast", "grad", "attention kernels"],
)
def test_modes_tell_blocks_apart(mode: object) -> None:
    traced = trace(ModesDiffer(mode), **inputs())
    first, second, third, fourth = (
        block.structure for block in traced.guarded.analysis.loop.blocks
    )
    assert second == third
    assert first == fourth
    assert first != second


def test_two_autocasts_are_two_modes() -> None:
    def structure(dtype: torch.dtype) -> str:
        traced = trace(ModesDiffer(lambda: torch.autocast("cpu", dtype)), **inputs())
        return traced.guarded.analysis.loop.blocks[1].structure

    assert structure(torch.bfloat16) == structure(torch.bfloat16)
    assert structure(torch.bfloat16) != structure(torch.float16)


def test_a_vmap_around_a_block_tells_it_apart(sketch: Sketch, x: Node) -> None:
    found = []
    functorch = torch._C._functorch
    for index, size in enumerate((0, 4, 4, 5)):
        graph = sketch.graph
        if size:
            graph.call_function(functorch._vmap_increment_nesting, (size, "error"))
        found.append(blocks(sketch, f"list_{index}", x, 1, scaled(2.0)))
        if size:
            graph.call_function(functorch._vmap_decrement_nesting, ())
    none, four, again, five = structures(sketch, *found)
    assert four == again
    assert len({none, four, five}) == 3


class Checkpointed(Model):
    """Each block calls its layers through a higher-order operator; its graph is an operand."""

    def __init__(self, factors: tuple[float, ...]) -> None:
        super().__init__(depth=len(factors))
        for block, factor in zip(self.blocks, factors, strict=True):
            block.factor = factor

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            def inner(x: Tensor) -> Tensor:
                return self.factor * self.mlp(x)

            x = x + self.attn(self.norm1(x) + time[:, None])
            return x + torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)


def test_what_a_higher_order_operator_runs_tells_blocks_apart() -> None:
    traced = trace(Checkpointed((0.25, 0.25, 0.5)), **inputs())
    one, same, other = (block.structure for block in traced.guarded.analysis.loop.blocks)
    assert one == same
    assert one != other


# --- how a model can hold and call its blocks ----------------------------------------------------


class InSequential(Model):
    """A `Sequential` is called as a whole."""

    class block(Block):  # noqa: N801
        def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
            return x + self.attn(self.norm1(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*self.blocks)

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.blocks(x)


class InPythonList(Model):
    def __init__(self) -> None:
        super().__init__()
        self.held = list(self.blocks)
        del self.blocks

    def loop(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self.held:
            x = block(x, time)
        return x


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Model()
        self.attention = nn.ModuleList([Attention()])

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "path"),
    [(InSequential(), "blocks"), (InPythonList(), "held"), (Wrapped(), "inner.blocks")],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_path_of_a_list_is_where_the_model_holds_it(model: nn.Module, path: str) -> None:
    traced = trace(model, **inputs())
    (only,) = traced.guarded.analysis.loop.lists
    assert only.path == path
    assert len(only.blocks) == 2
    assert f"# block loop: {path} ×2" in traced.after


def test_a_model_called_from_a_function_has_the_same_paths() -> None:
    model = Model()
    traced = trace(lambda latents, timestep, text: model(latents, timestep, text), **inputs())
    assert [each.path for each in traced.guarded.analysis.loop.lists] == ["blocks"]


def test_text_refined_in_blocks_of_its_own_is_no_part_of_the_loop_and_skipped_with_it() -> None:
    traced = trace(made_up.RefinedText(), **inputs())
    analysis = traced.guarded.analysis
    assert [each.path for each in analysis.loop.lists] == ["blocks"]
    lists = {each.path: each for each in find_block_lists(analysis.graph)}
    assert set(lists["refiner"].nodes) <= set(analysis.region.body)
