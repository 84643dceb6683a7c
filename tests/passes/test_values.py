"""Facts about values: what is static, and how a value is described."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omni_cache.passes.values import describe_value, is_static_input
from sketch import Sketch


@pytest.fixture
def sketch() -> Sketch:
    return Sketch()


def test_weights_and_buffers_are_static(sketch: Sketch) -> None:
    buffer = sketch.input("buffer", 1)
    buffer.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    assert is_static_input(sketch.weight(1))
    assert is_static_input(buffer)
    assert not is_static_input(sketch.input("latents", 1))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(1, 24, 64), "f32[1, 24, 64]"),
        (torch.empty(2, dtype=torch.bfloat16), "bf16[2]"),
        (torch.empty((), dtype=torch.int64), "i64[]"),
        (torch.empty(3, dtype=torch.bool), "bool[3]"),
        (3, "3"),
    ],
)
def test_values_are_described_shortly(value: Any, text: str) -> None:
    assert describe_value(value) == text
