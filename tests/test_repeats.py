"""A block that is copied is what it would have been traced as; what cannot be copied is traced."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from cross_section import cross_section
from diffusers_models import CASES, ModelCase, sample
from torch import Tensor, nn
from torch.fx import GraphModule

from omni_cache.dynamo import NoGraphError, compiled
from omni_cache.repeats import traced_once

WIDTH = 4
X = torch.linspace(-1, 1, 2 * 3 * WIDTH).reshape(2, 3, WIDTH)

looks: list[str] = []
"""One entry for each block that Dynamo has traced."""


@torch.compiler.assume_constant_result
def look() -> int:
    """Run by Dynamo while it traces, and by nothing else that is compiled."""
    looks.append("looked")
    return 0


class Block(nn.Module):
    """A block with something of everything: weights, a norm, a number, a function, a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = 0.5
        self.steps = 1
        self.activation = nn.functional.gelu
        self.table = {"shift": 0.25}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        look()
        y = self.activation(self.linear(self.norm(x))) * self.scale + self.table["shift"]
        return x + y * self.steps


class Model(nn.Module):
    """Blocks in a list, called in turn."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


@dataclass
class Captured:
    """What one trace of a module has come to."""

    gm: GraphModule
    guards: Counter[str]
    looks: int
    result: Any


def captured(
    model: nn.Module, inputs: Mapping[str, Any], once: bool, changing: int | None = None
) -> Captured:
    """Trace a call anew and run it.

    Args:
        model: whose call it is.
        inputs: what it is called with.
        once: whether blocks that are alike are traced once.
        changing: the dimension whose size may change, of all inputs.
    """
    torch._dynamo.reset()
    looks.clear()
    made: list[Captured] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        tx = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx()
        guards = Counter(f"{each.name}: {each.create_fn_name()}" for each in tx.output.guards)
        made.append(Captured(gm, guards, len(looks), None))
        return gm.forward

    around = partial(traced_once, model if once else None)
    call = compiled(model.forward, backend, True, None, around=around)
    with torch.no_grad():
        torch.manual_seed(1)
        own = {name: copy.deepcopy(each) for name, each in inputs.items()}
        for each in own.values() if changing is not None else ():
            torch._dynamo.mark_dynamic(each, changing)
        result = call(**own)
    [found] = made
    found.result = result
    return found


def facts(value: Any) -> Any:
    """What a compiler may read off an example value."""
    if isinstance(value, Tensor):
        flags = (value._version, value._is_view(), value.requires_grad)
        return (*map(str, (value.size(), value.stride(), value.dtype, value.device)), *flags)
    return [*map(facts, value)] if isinstance(value, tuple | list) else value


def described(graph: Any) -> list[Any]:
    """A graph without the numbers in its names, and without the order of its inputs."""
    place = {node: f"%{at}" for at, node in enumerate(reversed(graph.nodes))}
    inputs = graph.find_nodes(op="placeholder")
    place.update((node, node.target) for node in inputs)
    inner = [node for node in graph.nodes if node.op != "placeholder"]

    def argument(value: Any) -> Any:
        return torch.fx.node.map_arg(value, place.__getitem__)

    def origin(node: Any) -> Any:
        """The code that a node was traced in; an input of the call may be read sooner by a copy."""
        is_weight = "_parameters_" in str(node.target) or "_buffers_" in str(node.target)
        is_told = is_weight or node.op != "placeholder"
        return (node.meta.get("nn_module_stack"), node.stack_trace) if is_told else None

    return [
        (
            node.op,
            str(node.target),
            str(argument(node.args)),
            str(argument(node.kwargs)),
            facts(node.meta.get("example_value")),
            origin(node),
            [str(function) for _, function in node.meta.get("source_fn_stack", ())],
            node.meta.get("custom"),
        )
        for node in [*sorted(inputs, key=lambda node: str(node.target)), *inner]
    ]


def assert_same(model: nn.Module, inputs: Mapping[str, Any], changing: int | None = None) -> int:
    """Check a graph with copies against the one without; returns how many blocks were traced."""
    plain = captured(model, inputs, once=False, changing=changing)
    copied = captured(model, inputs, once=True, changing=changing)
    assert described(copied.gm.graph) == described(plain.gm.graph)
    torch.testing.assert_close(copied.result, plain.result, rtol=0, atol=0)
    return copied.looks


def test_blocks_that_are_alike_are_traced_once() -> None:
    assert assert_same(Model(), {"x": X}) == 1
    assert captured(Model(), {"x": X}, once=False).looks == 4


def test_a_copied_block_is_guarded_as_a_traced_one() -> None:
    plain, copied = (captured(Model(), {"x": X}, once).guards for once in (False, True))
    own = {each for each in plain if "blocks" in each and "__class__" not in each}
    assert own
    missing = {each for each in own - copied.keys() if not each.startswith(("type(", "dict(type("))}
    assert not missing


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number": lambda block: setattr(block, "scale", 2.0),
    "an integer": lambda block: setattr(block, "steps", 3),
    "an item": lambda block: block.table.update(shift=1.0),
    "a function": lambda block: setattr(block, "activation", nn.functional.silu),
    "a module": lambda block: setattr(block, "norm", nn.Identity()),
    "no bias": lambda block: setattr(block.linear, "bias", None),
    "another weight": lambda block: setattr(block, "linear", nn.Linear(WIDTH, WIDTH)),
    "a number of a module": lambda block: setattr(block.norm, "eps", 10.0),
    "a method": lambda block: setattr(block, "forward", lambda x: x * 3),
    "a weight in place": lambda block: block.linear.weight.data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("at", [1, 3])
def test_a_change_of_a_copied_block_is_seen(change: Callable[[Any], Any], at: int) -> None:
    model = Model()
    call = compiled(
        model.forward, lambda gm, _: gm.forward, True, False, around=partial(traced_once, model)
    )
    with torch.no_grad():
        assert torch.equal(call(X), model(X))
        before = model(X)
        change(model.blocks[at])
        expected = model(X)
        assert not torch.equal(before, expected)
        assert torch.equal(call(X), expected)


# --- blocks that are not all alike ----------------------------------------------------------------


HOOKS: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda block: block.linear.register_forward_hook(lambda m, i, y: y * 2),
    "a hook of the block": lambda block: block.register_forward_hook(lambda m, i, y: y + 1),
}
"""Dynamo looks at these while it traces, and at no later call."""


@pytest.mark.parametrize("change", (CHANGES | HOOKS).values(), ids=(CHANGES | HOOKS).keys())
def test_a_block_that_differs_is_traced(change: Callable[[Any], Any]) -> None:
    model = Model()
    change(model.blocks[2])
    is_alike = change in (CHANGES["another weight"], CHANGES["a weight in place"])
    replaces = change is CHANGES["a method"]
    assert assert_same(model, {"x": X}) == (1 if is_alike or replaces else 2)


class Numbered(Block):
    """Blocks that know their place."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.index = Numbered.count
        Numbered.count += 1

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) * (self.index + 1)


def test_blocks_that_know_their_place_are_traced() -> None:
    Numbered.count = 0
    assert assert_same(Model(Numbered), {"x": X}) == 4


class Labelled(Block):
    """Blocks with a number, a text and an item that no code reads, but one that does."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        Labelled.count += 1
        self.layer = Labelled.count
        self.name = f"block {Labelled.count}"
        self.notes = {"place": Labelled.count, "shift": 0.5}
        self.options = {"first": 1.0, "place": 2.0}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x) + self.notes["shift"]


def test_a_place_that_no_code_reads_is_no_difference() -> None:
    Labelled.count = 0
    model = Model(Labelled)
    assert assert_same(model, {"x": X}) == 1
    model.blocks[2].notes["shift"] = 3.0
    assert assert_same(model, {"x": X}) == 2
    model.blocks[2].notes["shift"] = 0.5
    model.blocks[2].layer = None
    assert assert_same(model, {"x": X}) == 2


def test_blocks_with_adapters_are_copied_and_watched() -> None:
    """LoRA layers of peft know by name what they stand in place of."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    model = inject_adapter_in_model(config, Model())
    assert assert_same(model, {"x": X}) == 1
    call = compiled(
        model.forward, lambda gm, _: gm.forward, True, None, around=partial(traced_once, model)
    )
    with torch.no_grad():
        before = call(X)
        model.blocks[2].linear.scaling["default"] = 7.0
        assert not torch.equal(call(X), before)
        assert torch.equal(call(X), model(X))
        model.blocks[3].linear.enable_adapters(False)
        assert torch.equal(call(X), model(X))


def summed(block: Any, x: Tensor) -> Tensor:
    return x + sum(block.options.values())


def looked_up(block: Any, x: Tensor) -> Tensor:
    for name, value in block.options.items():
        x = x * value if name == "place" else x
    return x


def by_name(block: Any, x: Tensor) -> Tensor:
    return x * getattr(block, "layer") * vars(block)["layer"]  # noqa: B009


def by_text(block: Any, x: Tensor) -> Tensor:
    return x * len(block.name) if block.name.endswith("3") else x


def unpacked(block: Any, x: Tensor) -> Tensor:
    return with_options(x, **block.options)


def with_options(x: Tensor, first: float, place: float) -> Tensor:
    return x * first + place


@pytest.mark.parametrize("read", [summed, looked_up, by_name, by_text, unpacked])
def test_a_place_that_code_reads_is_one(read: Callable[[Any, Tensor], Tensor]) -> None:
    class Reading(Labelled):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return read(self, super().forward(x))

    Labelled.count = 0
    model = Model(Reading)
    model.blocks[2].options["place"] = 5.0
    assert assert_same(model, {"x": X}) > 1


def test_two_kinds_are_traced_once_each() -> None:
    class Other(Block):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(x) * 2

    model = Model()
    for _ in range(3):
        model.blocks.append(Other())
    assert assert_same(model, {"x": X}) == 2


def test_a_block_may_be_called_twice() -> None:
    model = Model()
    model.blocks[3] = model.blocks[1]
    assert assert_same(model, {"x": X}) == 1
    model.blocks[0] = model.blocks[1]
    assert_same(model, {"x": X})


def test_weights_that_blocks_share_are_read_once() -> None:
    model = Model()
    for block in model.blocks[1:]:
        block.linear = model.blocks[0].linear
    assert_same(model, {"x": X})
    two = Model()
    two.blocks[3].linear = two.blocks[1].linear
    assert_same(two, {"x": X})


class Given(nn.Module):
    """Calls its blocks as it is told."""

    def __init__(self, call: Callable[..., Any], block: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.outer = nn.Linear(WIDTH, WIDTH)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


class Taking(Block):
    """Takes a tensor, a number, a tuple, a dictionary and a module."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(x)
        for each in (*args, *kwargs.values()):
            if isinstance(each, tuple | list):
                y = y * each[0] + each[1]
            elif isinstance(each, dict):
                y = y * each["a"]
            elif isinstance(each, nn.Module):
                y = each(y)
            elif each is not None:
                y = y + each
        return y


def alike(self: Any, x: Tensor) -> Tensor:
    emb = self.outer(x)
    rotary = (emb.sin(), emb.cos())
    for block in self.blocks:
        x = block(x, emb, 0.5, None, rotary, more={"a": emb})
    return x


def a_module_around(self: Any, x: Tensor) -> Tensor:
    for block in self.blocks:
        x = block(x, module=self.outer)
    return x


def other_numbers(self: Any, x: Tensor) -> Tensor:
    for at, block in enumerate(self.blocks):
        x = block(x, float(at))
    return x


def other_numbers_of_arguments(self: Any, x: Tensor) -> Tensor:
    for at, block in enumerate(self.blocks):
        x = block(x, *([x] * (at % 2)))
    return x


def other_names(self: Any, x: Tensor) -> Tensor:
    for at, block in enumerate(self.blocks):
        x = block(x, **{"ab"[at % 2]: x})
    return x


def other_sizes(self: Any, x: Tensor) -> Tensor:
    for at, block in enumerate(self.blocks):
        x = block(x, x[:, :1] if at % 2 else x)
    return x


def the_same_tensor_twice(self: Any, x: Tensor) -> Tensor:
    for at, block in enumerate(self.blocks):
        x = block(x, x if at % 2 else x + 0)
    return x


def other_modes(self: Any, x: Tensor) -> Tensor:
    for at, block in enumerate(self.blocks):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=at % 2 == 0):
            x = block(x).float()
    return x


def other_layouts(self: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    for block in self.blocks:
        x = block(x)
    return x


CALLS: dict[Callable[..., Any], int] = {
    alike: 1,
    a_module_around: 4,
    other_numbers: 4,
    other_numbers_of_arguments: 2,
    other_names: 2,
    other_sizes: 2,
    the_same_tensor_twice: 2,
    other_modes: 2,
    other_layouts: 1,
}


@pytest.mark.parametrize(("call", "traced"), CALLS.items(), ids=[each.__name__ for each in CALLS])
def test_calls_that_differ_are_traced(call: Callable[..., Any], traced: int) -> None:
    assert assert_same(Given(call, Taking), {"x": X}) == traced


# --- what a block may do --------------------------------------------------------------------------


def returning(give: Callable[..., Any], take: Callable[..., Any]) -> nn.Module:
    """A model whose blocks return what `give` makes of their output, of which `take` makes x."""

    class Returning(Block):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return give(self, x, super().forward(x))

    def call(self: Any, x: Tensor) -> Any:
        for block in self.blocks:
            x = take(block(x))
        return x

    return Given(call, Returning)


RETURNS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "a tuple": (lambda b, x, y: (y, x), lambda r: r[0] + r[1], 1),
    "a list": (lambda b, x, y: [y, None], lambda r: r.pop(0), 1),
    "views of one tensor": (
        lambda b, x, y: (y[:, :1], y[:, 1:]),
        lambda r: torch.cat(r, 1),
        1,
    ),
    "one tensor twice": (lambda b, x, y: (y, y), lambda r: r[0] * r[1], 1),
    "nested": (lambda b, x, y: ((y,), 2), lambda r: r[0][0] * r[1], 1),
    "what it was given": (lambda b, x, y: x, lambda r: r, 1),
    "chunks": (lambda b, x, y: y.chunk(2, -1), lambda r: torch.cat(r, -1), 1),
    "a write into its input": (lambda b, x, y: x.mul_(2) + y, lambda r: r, 1),
    "a write into its output": (lambda b, x, y: y.add_(x), lambda r: r.mul_(2), 1),
    "a draw": (lambda b, x, y: y + torch.rand_like(y), lambda r: r, 1),
    "a literal": (lambda b, x, y: y * torch.tensor([0.5]), lambda r: r, 1),
    "a shape": (lambda b, x, y: y.reshape(x.shape), lambda r: r, 1),
    "a dictionary": (lambda b, x, y: {"y": y}, lambda r: r["y"], 4),
    "a weight": (lambda b, x, y: b.linear.bias + y, lambda r: r, 1),
    "its own scope": (lambda b, x, y: in_bfloat16(b, y), lambda r: r.float(), 1),
    "a scope that it leaves open": (lambda b, x, y: left_open(b, y), lambda r: closed(r), 4),
    "an item that it writes": (lambda b, x, y: with_item(y, x), lambda r: r, 1),
    "an item of what it is given": (lambda b, x, y: with_item(x, y) + y, lambda r: r, 1),
    "an item of data": (lambda b, x, y: y * x[0, 0, 0], lambda r: r, 1),
    "an annotation": (lambda b, x, y: annotated(y), lambda r: r, 4),
}


def in_bfloat16(block: Any, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return block.linear(y)


def annotated(y: Tensor) -> Tensor:
    with torch.fx.traceback.annotate({"stage": 1}):
        return y * 2


def left_open(block: Any, y: Tensor) -> Tensor:
    torch.set_grad_enabled(True)
    return y


def closed(y: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    return y


def with_item(x: Tensor, y: Tensor) -> Tensor:
    x[..., ::2] = y[..., ::2]
    x[0, 0] = 1.0
    return x


@pytest.mark.parametrize(("give", "take", "traced"), RETURNS.values(), ids=RETURNS.keys())
def test_what_a_block_returns_and_does(
    give: Callable[..., Any], take: Callable[..., Any], traced: int
) -> None:
    assert assert_same(returning(give, take), {"x": X}) == traced


@pytest.mark.parametrize("draw", [lambda: random.uniform(1.0, 2.0), lambda: random.randint(1, 5)])
def test_blocks_that_draw_python_s_random_numbers_are_traced(draw: Callable[[], float]) -> None:
    model = returning(lambda b, x, y: y * draw(), lambda r: r)
    assert captured(model, {"x": X}, once=True).looks == 4


class Counting(Block):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(x) * self.calls


def test_a_block_that_changes_itself_is_traced() -> None:
    model = Model(Counting)
    call = compiled(
        model.forward, lambda gm, _: gm.forward, True, False, around=partial(traced_once, model)
    )
    looks.clear()
    with torch.no_grad():
        call(X)
        assert len(looks) == 4
        call(X)
    assert [block.calls for block in model.blocks] == [2, 2, 2, 2]


class Keeping(Block):
    """Puts what it has computed into a list that it is given."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(x)
        args[0].append(y)
        return y


def test_a_block_that_changes_what_it_is_given_is_traced() -> None:
    def call(self: Any, x: Tensor) -> Any:
        kept: list[Tensor] = []
        for block in self.blocks:
            x = block(x, kept)
        return x + kept[0] + kept[-2]

    assert assert_same(Given(call, Keeping), {"x": X}) == 4


def test_what_changed_in_between_is_seen() -> None:
    class Reading(Block):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(x) * args[0].factor

    def call(self: Any, x: Tensor) -> Any:
        for at, block in enumerate(self.blocks):
            self.factor = float(at)
            x = block(x, self)
        return x

    assert assert_same(Given(call, Reading), {"x": X}) == 4


def relating(block: Any, x: Tensor, y: Tensor) -> Tensor:
    """Asks how two sizes relate."""
    return y.repeat(1, 2, 1) if y.shape[1] < 8 else y + y.shape[1]


@pytest.mark.parametrize(
    ("model", "traced"),
    {
        "the same": (Model(), 1),
        "a size in its arithmetic": (returning(lambda b, x, y: y * x.shape[1], lambda r: r), 1),
        "a view": (returning(lambda b, x, y: y.reshape(-1, WIDTH), lambda r: r[None]), 2),
        "a question": (returning(relating, lambda r: r), 4),
        "arguments alike": (Given(alike, Taking), 1),
        "of data": (returning(lambda b, x, y: y[y[..., 0] < 9][None], lambda r: r), 4),
    }.values(),
)
def test_sizes_that_may_change(model: nn.Module, traced: int) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert assert_same(model, {"x": X}, changing=1) == traced


def test_another_size_is_seen() -> None:
    model = Model()
    made = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        made.append(gm)
        return gm.forward

    call = compiled(model.forward, backend, True, None, around=partial(traced_once, model))
    with torch.no_grad():
        for size in (3, 5, 7):
            x = torch.linspace(-1, 1, 2 * size * WIDTH).reshape(2, size, WIDTH)
            assert torch.equal(call(x), model(x))
    assert len(made) == 2


def test_blocks_in_blocks_are_copied_with_them() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.inner:
                x = block(x)
            return x

    assert assert_same(Model(Nested), {"x": X}) == 2


places: dict[Any, float] = {}
"""What the blocks of a test are told by who they are."""


FINDS: dict[str, Callable[..., Any]] = {
    "its identity": lambda b, x, y: y * places[id(b)],
    "itself as a key": lambda b, x, y: y * places[b],
}


@pytest.mark.parametrize("find", FINDS.values(), ids=FINDS.keys())
def test_a_block_that_asks_who_it_is_is_traced(find: Callable[..., Any]) -> None:
    model: Any = returning(find, lambda r: r)
    places.clear()
    for at, block in enumerate(model.blocks):
        places[block if find is FINDS["itself as a key"] else id(block)] = at + 1.0
    assert assert_same(model, {"x": X}) == 4


def test_a_block_that_finds_itself_in_what_it_is_given_is_traced() -> None:
    class Finding(Block):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            y = super().forward(x)
            return y * 2 if args[0].blocks[0] is self else y

    def call(self: Any, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x, self)
        return x

    assert_same(Given(call, Finding), {"x": X})


def test_the_first_block_s_weight_is_given_to_all() -> None:
    def call(self: Any, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x, self.blocks[0].linear.bias)
        return x

    assert_same(Given(call, Taking), {"x": X})


def test_what_is_noted_on_a_tensor_is_seen() -> None:
    class Reading(Block):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(x) * x.factor  # type: ignore[attr-defined]

    def call(self: Any, x: Tensor) -> Any:
        for at, block in enumerate(self.blocks):
            x = x + 0
            x.factor = float(at)  # type: ignore[attr-defined]
            x = block(x)
        return x

    assert assert_same(Given(call, Reading), {"x": X}) == 4


def test_what_a_block_notes_on_a_tensor_is_seen() -> None:
    def give(block: Any, x: Tensor, y: Tensor) -> Tensor:
        y.factor = 2.0  # type: ignore[attr-defined]
        return y

    assert assert_same(returning(give, lambda r: r * r.factor), {"x": X}) == 4


def test_a_list_that_is_another_s_or_in_two_places_is_traced() -> None:
    def twice(block: Any, x: Tensor, y: Tensor) -> Any:
        own = [y]
        return own, own

    def take(result: Any) -> Any:
        result[0].append(2.0)
        return result[1][0] * result[1][-1]

    assert_same(returning(twice, take), {"x": X})

    def call(self: Any, x: Tensor) -> Any:
        for block in self.blocks:
            x, kept = block(x)
        kept.append(3.0)
        return x

    parts: Any = returning(lambda b, x, y: (y, b.kept), take).blocks
    model: Any = Given(call, type(parts[0]))
    for block in model.blocks:
        block.kept = [2.0]
    captured(model, {"x": X}, once=True)
    assert [len(block.kept) for block in model.blocks] == [1, 1, 1, 2]


def test_a_block_that_turns_what_it_is_given_is_traced() -> None:
    def turn(block: Any, x: Tensor, y: Tensor) -> Tensor:
        return x.unsqueeze_(0) if x.dim() == 3 else x * y

    def call(self: Any, x: Tensor) -> Any:
        x = x + 0
        for block in self.blocks:
            x = block(x)
        return x

    parts: Any = returning(turn, call).blocks
    assert_same(Given(call, type(parts[0])), {"x": X})


@pytest.mark.parametrize("once", [False, True])
def test_numbers_that_change_need_no_more_graphs(once: bool) -> None:
    torch._dynamo.reset()
    model: Any = Model()
    made: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        made.append(gm)
        return gm.forward

    around = partial(traced_once, model if once else None)
    call = compiled(model.forward, backend, True, None, around=around)
    with torch.no_grad():
        for scale in (0.5, 0.25, 0.75, 2.0):
            for block in model.blocks:
                block.scale = scale
            torch.testing.assert_close(call(X), model(X))
    assert len(made) == 2


def test_a_trace_that_begins_anew_forgets_what_it_has_traced() -> None:
    model = Model()
    first = captured(model, {"x": X}, once=True)
    second = captured(model, {"x": X}, once=True)
    assert (first.looks, second.looks) == (1, 1)
    assert described(first.gm.graph) == described(second.gm.graph)


def test_nothing_is_copied_outside() -> None:
    model = Model()
    captured(model, {"x": X}, once=True)
    torch._dynamo.reset()
    looks.clear()
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(X)
    assert len(looks) == 4


def test_no_model_no_blocks() -> None:
    for model in (None, nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])):
        with traced_once(model):
            pass


# --- the transformers -----------------------------------------------------------------------------

FEW = ("flux", "wan", "hunyuan_video", "z_image")


@pytest.mark.parametrize("case", cross_section(CASES, FEW))
def test_a_transformer_s_graph_is_the_same(case: ModelCase) -> None:
    model = case.deep.build()
    try:
        plain = captured(model, case.inputs(), once=False)
    except NoGraphError:  # it is captured in pieces, of which nothing is copied
        with pytest.raises(NoGraphError):
            captured(model, case.inputs(), once=True)
        return
    copied = captured(model, case.inputs(), once=True)
    assert described(copied.gm.graph) == described(plain.gm.graph)
    torch.testing.assert_close(
        sample(copied.result), sample(plain.result), rtol=0, atol=0, equal_nan=True
    )
