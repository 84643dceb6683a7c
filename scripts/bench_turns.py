"""Kinds of bench_gpu that wait in processes of their own and run in turn; reports that go on.

Knows processes and files, and nothing of what is compared.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import bench_gpu
import torch
from bench_gpu import Setting

import omni_cache
from omni_cache.compare.report import processor

Report = dict[str, Any]


# Reports that are written measurement by measurement.


def environment() -> dict[str, str]:
    """What the figures depend on."""
    script, *arguments = sys.argv
    packages = ("omni-cache", "torch", "diffusers", "cache-dit")
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", f"scripts/{Path(script).name}", *arguments]),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **{each: version(each) for each in packages if find_spec(each.replace("-", "_"))},
    }


def begun(path: Path, settings: dict[str, Any]) -> Report:
    """The report that an interrupted run of the same command has left, or a new one.

    Args:
        path: of the report's JSON.
        settings: what the report is of; it becomes part of the report.
    """
    settings = json.loads(json.dumps(settings))
    report: Report = {"environment": environment(), **settings, "measured": [], "is_done": False}
    if path.exists():
        found: Report = json.loads(path.read_text(encoding="utf-8"))
        same = ("command", "machine", "python", "omni-cache", "torch")
        is_same = all(
            [
                *(found["environment"].get(key) == report["environment"][key] for key in same),
                *(found.get(key) == value for key, value in settings.items()),
            ]
        )
        if is_same and not found["is_done"]:
            return found
    return report


def write(report: Report, path: Path, markdown: str) -> None:
    """As data, and beside it for people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")


def signature(report: Report) -> list[str]:
    """The last lines of a report as Markdown: date, machine, versions and command."""
    about = dict(report["environment"])
    command, first = about.pop("command"), (about.pop("date"), about.pop("machine"))
    rest = (f"{name} {number}" for name, number in about.items())
    unfinished = [] if report["is_done"] else ["", "**Interrupted:** the same command goes on."]
    return [f"{', '.join((*first, *rest))}.", *unfinished, "", f"    {command}", ""]


# Processes that take turns.


class Want(NamedTuple):
    """A kind of `bench_gpu.KINDS`, and how many steps its generations have."""

    kind: str
    setting: Setting
    steps: int = bench_gpu.STEPS


KEEPS_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_MAX_": "0"}
"""The C library keeps freed memory, as the allocators that PyTorch advises for processors do.

Where it gives some back and fetches it again, which is chance, a step of 30 ms took up to 3 longer.
"""


class Turns(AbstractContextManager["Turns"]):
    """Kinds that have compiled, each in a process of its own; all wait while one runs.

    Which compiles first leaves what others may take from Inductor's cache, so that compilation is
    not to be compared here.

    Attributes:
        failed: why those that could not run did not.
    """

    def __init__(self, wanted: Mapping[str, Want]) -> None:
        self.failed: dict[str, str] = {}
        self._waiting: dict[str, tuple[BaseProcess, Connection]] = {}
        self._folder = TemporaryDirectory()
        context = get_context("spawn")
        with patch.dict(os.environ, KEEPS_MEMORY):  # for those that begin here
            for name, want in wanted.items():
                ours, theirs = context.Pipe()
                process = context.Process(target=take_turns, args=(theirs, want, self._folder.name))
                process.start()  # all import at once, which takes longer than to compile
                theirs.close()
                self._waiting[name] = process, ours
        for name in wanted:
            self._ask(name)

    def _ask(self, name: str) -> Any:
        process, pipe = self._waiting[name]
        try:
            pipe.send(True)
            received = pipe.recv()
        except (EOFError, OSError):
            process.join()
            received = f"its process ended with {process.exitcode}"
        if isinstance(received, str):
            self.failed[name] = received
            del self._waiting[name]
        return received

    def round(self) -> dict[str, dict[str, Any]]:
        """One generation of each, in turn: what `bench_gpu.medians` finds, and more.

        ``own_ms`` is the loop's own time in a step, and ``held_mib`` what ours holds.
        """
        found = {}
        for name in [*self._waiting]:
            received = self._ask(name)
            if name not in self.failed:
                found[name] = received
        return found

    def __exit__(self, *_: object) -> None:
        for process, pipe in self._waiting.values():
            with suppress(OSError):  # it has ended
                pipe.send(False)
            process.join()
        self._folder.cleanup()


def take_turns(pipe: Connection, want: Want, folder: str) -> None:
    """Compile when asked for the first time, and run a generation whenever asked again."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = folder
    try:
        with torch.no_grad():
            if not pipe.recv():
                return
            runner, _ = bench_gpu.prepared(want.kind, want.setting, want.steps)
            bench_gpu.timed(runner, want.steps)  # touches what stays
            pipe.send(True)
            while pipe.recv():
                found = bench_gpu.medians([bench_gpu.timed(runner, want.steps)])
                found["own_ms"] = bench_gpu.own_time(runner, want.steps)
                if bench_gpu.KINDS[want.kind].is_ours:
                    found["held_mib"] = omni_cache.summary(runner.model).memory_bytes / 2**20
                pipe.send(found)
    except EOFError:  # nobody asks any more
        return
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        pipe.send(f"{type(error).__name__}: {lines[0] if lines else ''}")


Rounds = Sequence[Mapping[str, Mapping[str, Any]]]
"""What rounds have found, by kind."""


def paired(rounds: Rounds, what: str, name: str, other: str) -> list[float]:
    """What one kind took over what another one took in the same round."""
    return [each[name][what] / each[other][what] for each in rounds if {name, other} <= {*each}]


def unavoidable(
    cached: Mapping[str, Any], plain: Mapping[str, Any], share: float, reused: int
) -> float:
    """The milliseconds of a cached generation in which the cache itself would take no time.

    Sums stand against sums: steps of another computation on the same machine scatter as ours do,
    and a median leaves out the slow ones.

    Args:
        cached: of a round.
        plain: of the same round.
        share: computed steps of the cached generation over steps of the plain one.
        reused: the steps of the cached one in which only some compiled parts run, and the loop's
            own work is done.
    """
    rest: float = cached["reused_parts_ms"] + cached["own_ms"]
    whole: float = plain["generation_ms"]
    return share * whole + reused * rest


def middle(rounds: Rounds, name: str, what: str) -> float | None:
    """The median over the rounds, None where there is none."""
    found = [each[name][what] for each in rounds if name in each and each[name][what] is not None]
    return statistics.median(found) if found else None
