"""A pipeline's transformers are enabled together, or stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toy_pipeline import ToyPipeline
from toy_transformer import ALWAYS_REUSE, ToyTransformer

import omni_cache
from omni_cache.pipelines import enabled_flags, is_enabled


class Extracted(ToyTransformer):
    """Has an extractor, which takes no ``region``."""


class TwoExperts(ToyPipeline):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_2 = Extracted()


@pytest.fixture
def pipe() -> Any:
    omni_cache.register_extractor(Extracted, lambda *args: None)
    yield TwoExperts()
    omni_cache.register_extractor(Extracted, None)


def attributes(pipe: Any) -> list[dict[str, Any]]:
    return [dict(vars(each)) for each in (pipe.transformer, pipe.transformer_2)]


@pytest.mark.parametrize("flags", [{"region": ["blocks"]}, {"signal": "blocks.0.norm"}])
@pytest.mark.parametrize("enabled_before", [False, True])
def test_where_the_second_one_cannot_be_enabled_the_first_is_as_before(
    pipe: Any, flags: dict[str, Any], enabled_before: bool
) -> None:
    if enabled_before:
        omni_cache.enable(pipe, inner="eager", **{**ALWAYS_REUSE, "rel_l1_thresh": 0.5})
    before, known = attributes(pipe), enabled_flags(pipe.transformer)

    with pytest.raises(ValueError, match="is not allowed"):
        omni_cache.enable(pipe, inner="eager", **ALWAYS_REUSE, **flags)

    for then, now in zip(before, attributes(pipe), strict=True):
        assert now.keys() == then.keys()
        assert all(now[name] is then[name] for name in now)
    assert is_enabled(pipe) is enabled_before
    assert enabled_flags(pipe.transformer) == known


def test_enabling_anew_keeps_what_the_module_had_before() -> None:
    model = ToyTransformer()
    model.compile(backend="eager")
    own = model._compiled_call_impl
    forward = vars(model)["forward"] = lambda *args: ToyTransformer.forward(model, *args)
    for signal in (None, "auto", "timestep_embedding"):
        flags = {} if signal is None else {"signal": signal}
        omni_cache.enable(model, inner="eager", **ALWAYS_REUSE, **flags)
    omni_cache.disable(model)
    assert model._compiled_call_impl is own
    assert vars(model)["forward"] is forward


def test_what_is_compiled_between_two_enablings_is_given_back() -> None:
    model: nn.Module = ToyTransformer()
    omni_cache.enable(model, inner="eager", **ALWAYS_REUSE)
    model.compile(backend="eager")
    own = model._compiled_call_impl
    omni_cache.enable(model, inner="eager", signal="auto", **ALWAYS_REUSE)
    assert model._compiled_call_impl is not own
    omni_cache.disable(model)
    assert model._compiled_call_impl is own
    with torch.no_grad():
        assert vars(model).get("forward") is None
