"""Tests of many classes or settings, of which the few that differ most run by default."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import pytest


def also(*values: Any) -> Any:
    """Parameters that show little beyond the others: for --exhaustive."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def cross_section(values: Mapping[str, Any], few: Container[str]) -> list[Any]:
    """Parameters named by the keys of `values`: `few` by default, all with --exhaustive."""
    return [
        pytest.param(value, id=name, marks=[] if name in few else [pytest.mark.exhaustive])
        for name, value in values.items()
    ]
