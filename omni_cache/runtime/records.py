"""What happened in a generation, as an object and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from omni_cache.runtime.counters import Counters
from omni_cache.runtime.model_state import ModelState
from omni_cache.runtime.trajectory import StepRecord


@dataclass(frozen=True)
class TrajectorySummary:
    """One guidance branch.

    Attributes:
        model: the component's name in its pipeline, empty for a bare module.
        branch: the branch's name.
        steps: one record per call, in order.
        memory_bytes: the most that the trajectory held at a time, in bytes.
    """

    model: str
    branch: str
    steps: tuple[StepRecord, ...]
    memory_bytes: int

    @property
    def computed_steps(self) -> int:
        """How many calls ran the block loop."""
        return sum(step.computed for step in self.steps)

    @property
    def reused_steps(self) -> int:
        """How many calls reused the residual."""
        return sum(step.action == "reused" for step in self.steps)

    @property
    def skipped_steps(self) -> int:
        """How many calls ran nothing of the model."""
        return sum(step.action == "skipped" for step in self.steps)


@dataclass(frozen=True)
class Summary:
    """The latest generation of a model or pipeline. ``str()`` renders it as a table.

    Attributes:
        trajectories: its branches, of each model and region.
        by_model: counts of each model by the component's name, of all its generations.
    """

    trajectories: tuple[TrajectorySummary, ...]
    by_model: Mapping[str, Counters] = field(default_factory=dict)

    @property
    def counters(self) -> Counters:
        """What all models together have compiled, read and copied, in all generations.

        Subtract an earlier summary's to have those of what came between.
        """
        return sum(self.by_model.values(), Counters())

    @property
    def computed_steps(self) -> int:
        """Computed calls over all trajectories."""
        return sum(each.computed_steps for each in self.trajectories)

    @property
    def reused_steps(self) -> int:
        """Reused calls over all trajectories."""
        return sum(each.reused_steps for each in self.trajectories)

    @property
    def skipped_steps(self) -> int:
        """Skipped calls over all trajectories."""
        return sum(each.skipped_steps for each in self.trajectories)

    @property
    def memory_bytes(self) -> int:
        """The most that all trajectories held, in bytes."""
        return sum(each.memory_bytes for each in self.trajectories)

    def __rich__(self) -> Table:
        total = self.computed_steps + self.reused_steps + self.skipped_steps
        title = f"{self.computed_steps} of {total} steps computed"
        table = Table(title=title, caption=_told(self.counters))
        checked = any(step.errors for each in self.trajectories for step in each.steps)
        measured = ("forecast off by", "expected") if checked else ("distance", "accumulated")
        for heading in ("branch", "step", "timestep", "", *measured, "reason"):
            table.add_column(
                heading, justify="left" if heading in ("branch", "reason") else "right"
            )
        for each in self.trajectories:
            name = f"{each.model} {each.branch}".strip()
            held = f"{name}\n{each.memory_bytes / 2**20:.1f} MiB held"
            for row, step in enumerate(each.steps):
                table.add_row(
                    held if row == 0 else "",
                    str(step.index),
                    _number(step.timestep),
                    step.action,
                    *map(_number, step.errors or (step.distance, step.accumulated)),
                    step.reason,
                )
            table.add_section()
        return table

    def __str__(self) -> str:
        if not self.trajectories:
            return "no cached generation yet"
        console = Console(width=100, force_terminal=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def summarise(states: Iterable[tuple[str, ModelState]]) -> Summary:
    """Summarise the latest generation of named model states, also while others run."""
    named = list(states)
    for _, state in named:
        for each in list(state.latest.trajectories.values()) if state.latest is not None else ():
            each.hear(waits=True)
    by_model: dict[str, Counters] = {}
    for name, state in named:
        by_model[name] = by_model.get(name, Counters()) + state.tally.counters
    return Summary(
        tuple(
            TrajectorySummary(name, each.branch, tuple(each.steps), each.memory_bytes)
            for name, state in named
            if state.latest is not None
            for each in list(state.latest.trajectories.values())
        ),
        by_model,
    )


def _told(counters: Counters) -> str | None:
    """What is worth a line: one graph for each region, and no read, is what one expects."""
    told = [
        f"{count} {what}"
        for count, what in (
            (counters.recompiles, "graphs compiled again"),
            (counters.reads, "reads from the device"),
            (counters.unlisted, "calls with modulations of their own"),
        )
        if count
    ]
    if counters.copied_bytes >= 2**20:
        told.append(f"{counters.copied_bytes / 2**20:.1f} MiB copied between devices")
    return f"since enabled: {', '.join(told)}" if told else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
