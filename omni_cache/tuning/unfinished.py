"""What of a tuning is kept while it runs, so that one that was interrupted goes on.

It is a plan's file, whose points have been refined and not yet judged, and beside it an .npz file
of what the calibration samples return uncached. Both are removed when the tuning ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from omni_cache.strategies.plans import Content
from omni_cache.tuning.results import Result

_CLOSE = 1e-3
"""How far apart two runs of one sample may lie, in units of its range: more than by rounding."""


@dataclass(frozen=True)
class Kept:
    """A tuning as far as it has come.

    Attributes:
        content: with the points that have been refined.
        references: of each calibration sample, what it returns uncached.
    """

    content: Content
    references: list[Result]


@dataclass(frozen=True)
class Unfinished:
    """A file, or none."""

    path: Path | None

    @property
    def _results(self) -> Path:
        assert self.path is not None  # a file was named
        return self.path.with_name(self.path.name + ".npz")

    def read(self) -> Kept | None:
        """What was kept; None where nothing was.

        Raises:
            ValueError: a file is broken.
        """
        if self.path is None or not (self.path.exists() and self._results.exists()):
            return None
        content = Content.load_unfinished(self.path)
        try:
            with np.load(self._results) as found:
                arrays: list[list[np.ndarray]] = [[] for _ in range(content.made.samples)]
                for name in found.files:
                    arrays[int(name.split(".")[0])].append(found[name])
                return Kept(content, list(map(Result.of, arrays)))
        except (BadZipFile, KeyError, IndexError, TypeError, ValueError, EOFError) as error:
            raise ValueError(f"{self._results} is broken: {error}; delete it") from None

    def check(self, kept: Kept, begun: Content, first: Result) -> None:
        """Whether what was kept is of the tuning that begins.

        Args:
            kept: what was read.
            begun: what this tuning knows after one sample.
            first: what that returned.

        Raises:
            ValueError: it is of another one; the message says what differs.
        """
        found = kept.content
        differing = [
            name
            for name, one, other in (
                ("effort", found.made.effort, begun.made.effort),
                ("samples", found.made.samples, begun.made.samples),
                ("judged", found.made.judged, begun.made.judged),
                ("targets", found.made.targets, begun.made.targets),
                ("signature", found.signature, begun.signature),
            )
            if one != other
        ]
        before = kept.references[0]
        if not differing and not np.abs(first.difference(before)).max() < _CLOSE * before.peak:
            differing = ["generate, prompts or seed"]  # or other weights
        if differing:
            raise ValueError(
                f"resume={str(self.path)!r} is of a tuning with another {' and '.join(differing)}; "
                "delete it, or name another file"
            )

    def begin(self, references: list[Result]) -> None:
        """Write what the calibration samples return, which stays as it is from now on."""
        if self.path is None:
            return
        arrays: dict[str, Any] = {
            f"{sample}.{place}": array
            for sample, result in enumerate(references)
            for place, array in enumerate(result.arrays)
        }

        def write_results(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, **arrays)

        _replaced(self._results, write_results)

    def keep(self, content: Content) -> None:
        """Write the plans that there are, the whole file or nothing of it."""
        if self.path is not None:
            _replaced(self.path, content.save)

    def remove(self) -> None:
        """The tuning has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self._results.unlink(missing_ok=True)


def _replaced(path: Path, write: Callable[[Path], None]) -> None:
    written = path.with_name(path.name + ".new")
    write(written)
    written.replace(path)
