"""The published tables, packaged as JSON beside this file, with the source of every entry."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class TeaCacheTable:
    """A published rescaling polynomial.

    ``signal`` is the flag's value that selects its signal, ``rel_l1_thresh`` the threshold that is
    published with it, None where the source has none for this class alone.
    """

    transformer_class: str
    variant: str
    coefficients: tuple[float, ...]
    signal: str
    source: str
    rel_l1_thresh: float | None = None


@dataclass(frozen=True)
class MagCacheTable:
    """Published magnitude ratios, one tuple of ``num_steps`` entries for each guidance branch."""

    transformer_class: str
    variant: str
    ratios: Mapping[str, tuple[float, ...]]
    source: str


def teacache_table(model_class: str | None, variant: str | None = None) -> TeaCacheTable | None:
    """The polynomial of a model class; None where none is published.

    Args:
        model_class: name of the transformer's class.
        variant: which one, where a class has several; by default the first, and a warning says so
            when the choice matters.

    Raises:
        ValueError: the class has no such variant; the message lists those it has.
    """
    entry = _choose("teacache_coefficients", ("coefficients", "signal"), model_class, variant)
    if entry is None:
        return None
    return TeaCacheTable(
        entry["transformer_class"],
        entry["variant"],
        tuple(entry["coefficients"]),
        entry["signal"],
        entry["source"],
        entry.get("rel_l1_thresh"),
    )


def teacache_classes() -> list[str]:
    """The names of the model classes that have a published polynomial."""
    entries = load_table("teacache_coefficients")
    return list(dict.fromkeys(each["transformer_class"] for each in entries))


def magcache_table(model_class: str | None, variant: str | None = None) -> MagCacheTable | None:
    """The magnitude ratios of a model class; None where none are published.

    Arguments and errors are those of :func:`teacache_table`.
    """
    entry = _choose("magcache_ratios", ("cond", "uncond", "ref"), model_class, variant)
    if entry is None:
        return None
    branches = ("cond", "uncond", "ref")
    ratios: dict[str, tuple[float, ...]] = {
        name: tuple(entry[name]) for name in branches if name in entry
    }
    return MagCacheTable(entry["transformer_class"], entry["variant"], ratios, entry["source"])


def teacache_signal(model_class: str | None, variant: str | None = None) -> str:
    """The signal of the polynomial of a model class; "auto" where none is published.

    Says nothing of a choice, which whoever takes the polynomial is told.

    Raises:
        ValueError: as :func:`teacache_table`.
    """
    entries = _published("teacache_coefficients", model_class, variant)
    signal: str = entries[0]["signal"] if entries else "auto"
    return signal


@cache
def load_table(name: str) -> tuple[dict[str, Any], ...]:
    """All entries of a packaged table, as they stand in its JSON file."""
    text = (resources.files(__package__) / "tables" / f"{name}.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["tables"])


def _published(
    table: str, model_class: str | None, variant: str | None
) -> Sequence[dict[str, Any]]:
    """The entries of a class, the first of which is used; only one where a variant is named."""
    entries = [each for each in load_table(table) if each["transformer_class"] == model_class]
    if variant is None:
        return entries
    named = [each for each in entries if each["variant"] == variant]
    if not named:
        known = ", ".join(repr(each["variant"]) for each in entries) or "none"
        raise ValueError(
            f"variant={variant!r} is not published for {model_class}; published are: {known}"
        )
    return named


def _choose(
    table: str, content: tuple[str, ...], model_class: str | None, variant: str | None
) -> dict[str, Any] | None:
    entries = _published(table, model_class, variant)
    if not entries:
        return None
    first = entries[0]
    if any(each.get(key) != first.get(key) for each in entries for key in content):
        variants = ", ".join(repr(each["variant"]) for each in entries)
        warnings.warn(
            f"several tables are published for {model_class}; {first['variant']!r} is used. Choose "
            f"with variant=..., one of: {variants}",
            stacklevel=3,
        )
    return first
