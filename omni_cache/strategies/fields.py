"""Reads the fields of a JSON object; errors name the field. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_cache.strategies.base import is_count, is_number, require


class Fields:
    """A JSON object.

    Args:
        content: what was read.
        name: its own name in the file, dotted; "" for the whole.
        what: what it has to be.

    Raises:
        ValueError: it is no object; and, from every method, the field is missing or its value is
            not allowed.
    """

    def __init__(self, content: Any, name: str = "", what: str = "a JSON object") -> None:
        require(isinstance(content, Mapping), name or "content", content, what)
        self.name, self.content = name, content

    def name_of(self, key: str) -> str:
        """The dotted name of a field."""
        return f"{self.name}.{key}" if self.name else key

    def __getitem__(self, key: str) -> Any:
        if key not in self.content:
            raise ValueError(f"{self.name_of(key)} is missing")
        return self.content[key]

    def object(self, key: str) -> Fields:
        """A field that is an object."""
        return Fields(self[key], self.name_of(key))

    def objects(self, key: str) -> dict[str, Fields]:
        """A field that is an object of at least one object."""
        outer = self.object(key)
        require(len(outer.content) > 0, outer.name, outer.content, "an object with entries")
        return {each: outer.object(each) for each in outer.content}

    def text(self, key: str) -> str:
        """A field that is a string with something in it."""
        given = self[key]
        fits = isinstance(given, str) and given != ""
        require(fits, self.name_of(key), given, "a non-empty string")
        return str(given)

    def count(self, key: str) -> int:
        """A field that is an integer of at least 1."""
        given = self[key]
        require(is_count(given, 1), self.name_of(key), given, "an integer >= 1")
        return int(given)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A field that is a list of at least one finite number."""
        given = self[key]
        fits = isinstance(given, list) and len(given) > 0 and all(map(is_number, given))
        require(fits, self.name_of(key), given, "a list of at least one finite number")
        return tuple(map(float, given))
