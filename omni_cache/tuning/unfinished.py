"""What of a tuning is kept while it runs, so that one that was interrupted goes on.

It is a plan's file, whose points have been refined and not yet judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni_cache.strategies.plans import Content


@dataclass(frozen=True)
class Unfinished:
    """A file, or none."""

    path: Path | None

    def of(self, content: Content) -> Content | None:
        """What was kept of the tuning that begins with this content; None where nothing was.

        Raises:
            ValueError: the file is broken, or of another tuning; the message says what differs.
        """
        if self.path is None or not self.path.exists():
            return None
        found = Content.load(self.path)
        differing = [
            name
            for name, one, other in (
                ("effort", found.made.effort, content.made.effort),
                ("samples", found.made.samples, content.made.samples),
                ("judged", found.made.judged, content.made.judged),
                ("targets", found.made.targets, content.made.targets),
                ("signature", found.signature, content.signature),
            )
            if one != other
        ]
        if not differing and not _are_close(found, content):
            differing = ["generate, prompts or seed"]  # or other weights
        if differing:
            raise ValueError(
                f"resume={str(self.path)!r} is of a tuning with another {' and '.join(differing)}; "
                "delete it, or name another file"
            )
        return found

    def keep(self, content: Content) -> None:
        """Write what there is, whole or not at all."""
        if self.path is not None:
            written = self.path.with_name(self.path.name + ".new")
            content.save(written)
            written.replace(self.path)

    def remove(self) -> None:
        """The tuning has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _are_close(one: Content, other: Content) -> bool:
    """Whether the inner products of the same samples' loops are the same, but for rounding."""
    if {name: each.keys() for name, each in one.grams.items()} != {
        name: each.keys() for name, each in other.grams.items()
    }:
        return False
    return all(
        np.allclose(gram.residuals, other.grams[name][branch].residuals, 1e-2, equal_nan=True)
        for name, branches in one.grams.items()
        for branch, gram in branches.items()
    )
