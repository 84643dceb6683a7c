"""What of a tuning is kept while it runs, so that one that was interrupted goes on.

It is a plan's file, whose points have been refined and not yet judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
