"""The twelve diffusers transformers, each captured once for all tests that look at it."""

from __future__ import annotations

from functools import cache

from diffusers_models import CASES
from torch import nn
from tracing import Trace, trace


@cache
def model(name: str) -> nn.Module:
    """The model of the case of that name."""
    return CASES[name].build()


@cache
def captured(name: str) -> Trace:
    """It, captured at the first step of a generation."""
    return trace(model(name), **CASES[name].inputs(batch=2))
