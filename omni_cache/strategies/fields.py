"""Reads and writes files of one JSON object; errors name the field. Knows nothing of meanings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from omni_cache.strategies.base import is_count, is_number, require

T = TypeVar("T")


def read_file(path: str | Path, form: str, read: Callable[[Fields], T]) -> T:
    """Read a file that `write_file` has written.

    Args:
        path: of the file.
        form: the format, with its version, that the file has to name.
        read: makes something of the fields.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is broken; the message names the file and the field.
    """
    text = Path(path).read_text("utf-8", errors="replace")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is cut off or no JSON: {error}") from None
    try:
        fields = Fields(content, what=f"a JSON object with the format {form!r}")
        require(fields["format"] == form, "format", fields["format"], repr(form))
        return read(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_file(path: str | Path, form: str, content: Mapping[str, Any]) -> None:
    """Write fields that JSON has, no NaN among them, below the name of their format."""
    text = json.dumps({"format": form, **content}, indent=1, allow_nan=False)
    Path(path).write_text(text + "\n", "utf-8")


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

    def each(self) -> list[tuple[str, Fields]]:
        """Its own fields, all of them objects; at least one."""
        require(len(self.content) > 0, self.name, self.content, "an object with entries")
        return [(key, self.object(key)) for key in self.content]

    def objects(self, key: str) -> list[Fields]:
        """A field that is a list of at least one object."""
        given, name = self[key], self.name_of(key)
        fits = isinstance(given, list) and len(given) > 0
        require(fits, name, given, "a list of at least one object")
        return [Fields(each, f"{name}[{place}]") for place, each in enumerate(given)]

    def text(self, key: str) -> str:
        """A field that is a string with something in it."""
        given = self[key]
        fits = isinstance(given, str) and given != ""
        require(fits, self.name_of(key), given, "a non-empty string")
        return str(given)

    def texts(self, key: str) -> tuple[str, ...]:
        """A field that is a list of at least one string."""
        given = self[key]
        fits = isinstance(given, list) and len(given) > 0
        fits = fits and all(isinstance(each, str) for each in given)
        require(fits, self.name_of(key), given, "a list of at least one string")
        return tuple(given)

    def count(self, key: str, least: int = 1) -> int:
        """A field that is an integer of at least 1, or of another least."""
        given = self[key]
        require(is_count(given, least), self.name_of(key), given, f"an integer >= {least}")
        return int(given)

    def number(self, key: str) -> float:
        """A field that is a finite number."""
        given = self[key]
        require(is_number(given), self.name_of(key), given, "a finite number")
        return float(given)

    def positive(self, key: str) -> float:
        """A field that is a finite number above 0."""
        given = self.number(key)
        require(given > 0, self.name_of(key), given, "a number > 0")
        return given

    def numbers(self, key: str) -> tuple[float, ...]:
        """A field that is a list of at least one finite number."""
        given = self[key]
        fits = isinstance(given, list) and len(given) > 0 and all(map(is_number, given))
        require(fits, self.name_of(key), given, "a list of at least one finite number")
        return tuple(map(float, given))

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        """A field that may be null, and is otherwise read by one of the methods."""
        return None if self[key] is None else read(key)
