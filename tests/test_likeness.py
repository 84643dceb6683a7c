"""Two modules are alike if their code could not tell them apart, and in nothing less."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni_cache.repeats.likeness import twins


class Processor:
    """An object that is no module, with attributes."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.names = {"a": [1, 2]}


class Slotted:
    """An object whose attributes lie in slots."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1


class Block(nn.Module):
    """A module with one of each kind of attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
        self.register_buffer("table", torch.arange(3))
        self.processor = Processor()
        self.activation = nn.functional.gelu
        self.size = torch.Size([2, 3])
        self.pair = (1, None, "x")


def tied() -> Block:
    block = Block()
    block.norms[1] = block.norms[0]
    return block


def changed(change: Callable[[Block], Any]) -> Block:
    block = Block()
    change(block)
    return block


def test_blocks_with_other_weights_are_alike_part_by_part() -> None:
    one, other = Block(), Block()
    found = twins(one, other)
    assert found is not None
    assert found[id(one)] is other
    assert found[id(one.linear.weight)] is other.linear.weight
    assert found[id(one.table)] is other.table
    assert found[id(one.processor)] is other.processor


def test_numbers_and_texts_that_nobody_reads_may_differ() -> None:
    one, other = Block(), Block()
    one.place, other.place = 1, 2
    one.processor.names["b"], other.processor.names["b"] = "x", "y"
    assert twins(one, other) is None
    assert twins(one, other, read={"scale"}) is not None
    for name in ("place", "b"):
        assert twins(one, other, read={name}) is None
    other.place = 2.0
    assert twins(one, other, read=set()) is None
    other.place, other.pair = 2, (2, None, "x")
    assert twins(one, other, read=set()) is None


def test_a_module_is_like_itself() -> None:
    block = tied()
    found = twins(block, block)
    assert found is not None
    assert all(id(other) == own for own, other in found.items())


def test_what_is_shared_has_to_be_shared_alike() -> None:
    assert twins(tied(), tied()) is not None
    assert twins(tied(), Block()) is None
    assert twins(Block(), tied()) is None


def test_what_lies_around_both_is_its_own_twin_and_nobody_else_s() -> None:
    one, other = Block(), Block()
    one.outer = other.outer = rotary = nn.Linear(2, 2)
    found = twins(one, other)
    assert found is not None
    assert found[id(rotary)] is rotary
    # The one has as its own what the other has as what is shared.
    other.own, one.own = rotary, nn.Linear(2, 2)
    assert twins(one, other) is None


CHANGES: dict[str, Callable[[Block], Any]] = {
    "another number": lambda block: setattr(block.processor, "scale", 2.0),
    "an integer for a float": lambda block: setattr(block.processor, "scale", 1),
    "a zero of another sign": lambda block: setattr(block.processor, "scale", -0.0),
    "another item deep inside": lambda block: block.processor.names["a"].append(3),
    "an attribute more": lambda block: setattr(block, "more", None),
    "attributes in another order": lambda block: setattr(block, "pair", vars(block).pop("pair")),
    "another function": lambda block: setattr(block, "activation", nn.functional.silu),
    "a closure": lambda block: setattr(block, "activation", lambda x: x),
    "another class": lambda block: setattr(block, "linear", nn.Bilinear(4, 4, 4)),
    "another size": lambda block: setattr(block, "linear", nn.Linear(4, 5)),
    "another dtype": lambda block: block.linear.to(torch.bfloat16),
    "another device": lambda block: block.linear.to("meta"),
    "a frozen weight": lambda block: block.linear.weight.requires_grad_(False),
    "another layout": lambda block: setattr(
        block.linear.weight, "data", block.linear.weight.data.t().contiguous().t()
    ),
    "no bias": lambda block: setattr(block.linear, "bias", None),
    "a mark on a weight": lambda block: setattr(block.linear.weight, "mark", 1),
    "a hook": lambda block: block.norms[0].register_forward_hook(lambda *_: None),
    "training": lambda block: block.norms[1].eval(),
    "a method of its own": lambda block: setattr(block, "forward", functools.partial(print)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_difference_is_seen(change: Callable[[Block], Any]) -> None:
    if change is CHANGES["attributes in another order"]:
        one, other = Block(), changed(lambda block: setattr(block, "later", 0))
        one.later = 0
        vars(other)["pair"] = vars(other).pop("pair")
    elif change is CHANGES["a zero of another sign"]:
        one = changed(lambda block: setattr(block.processor, "scale", 0.0))
        other = changed(change)
    else:
        one, other = Block(), changed(change)
    assert twins(one, other) is None
    assert twins(other, one) is None


@pytest.mark.parametrize("value", [Slotted, functools.partial(print).__class__, iter])
def test_what_cannot_be_compared_is_like_itself_only(value: Any) -> None:
    made = {Slotted: Slotted, iter: lambda: iter([1])}.get(value, lambda: functools.partial(print))
    one, other = Block(), Block()
    one.extra = other.extra = made()
    assert twins(one, other) is not None
    other.extra = made()
    assert twins(one, other) is None


def test_tensors_of_other_classes_are_like_themselves_only() -> None:
    class Packed(Tensor):
        pass

    one, other = Block(), Block()
    one.packed = torch.ones(2).as_subclass(Packed)
    other.packed = torch.ones(2).as_subclass(Packed)
    assert twins(one, other) is None
    other.packed = one.packed
    assert twins(one, other) is not None


def test_what_a_module_runs_in_place_of_its_call_is_none_of_its_code() -> None:
    one, other = Block(), Block()
    vars(one)["_compiled_call_impl"] = object()
    assert twins(one, other) is not None
    assert twins(other, one) is not None


class Words(str):
    """A string with attributes."""


class Numbers(list[float]):
    """A list with attributes."""


def test_attributes_of_strings_and_lists_count() -> None:
    for kind, content in ((Words, "a"), (Numbers, [1.0])):
        one, other = nn.Module(), nn.Module()
        for at, each in enumerate((one, other)):
            part: Any = kind(content)  # type: ignore[operator]
            part.place = at
            each.part = part
        assert twins(one, other) is None


def test_sets_are_compared_by_what_they_hold() -> None:
    one, other = nn.Module(), nn.Module()
    one.part, other.part = {1}, {True}  # type: ignore[assignment]
    assert twins(one, other) is None


def test_a_gradient_counts() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert twins(one, other) is not None
    one.bias.grad = torch.zeros(2)
    assert twins(one, other) is None
