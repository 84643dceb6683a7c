"""Draws every prompt with every setting of a kind, in a process of its own, and times it.

Knows processes and clocks; pictures are judged by whoever asked for them.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from omni_cache.compare.kinds import Kind
from omni_cache.compare.peers import switch_on
from omni_cache.pipelines.folder import Folder, Picture
from omni_cache.strategies.calibrations import Calibration


@dataclass(frozen=True)
class Task:
    """What all kinds have in common.

    Attributes:
        pipeline: what draws.
        prompts: prompt i starts from the noise of ``seed + i``.
        num_inference_steps: steps of an uncached generation.
        inner: the compiler of the model.
        seed: of the noise.
        calibration: magnitude ratios, for peers that take some.
    """

    pipeline: Folder
    prompts: Sequence[str]
    num_inference_steps: int
    inner: str = "inductor"
    seed: int = 0
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Drawn:
    """One picture of one setting, by their numbers; ``started``: seconds until it could begin."""

    setting: int
    prompt: int
    picture: Picture
    seconds: float
    computed: float
    started: float


class KindFailed(RuntimeError):  # noqa: N818  # it is one kind that failed, and no error of ours
    """A kind could not be measured; the others go on without it."""


def draw_all(task: Task, kind: Kind) -> Iterator[Drawn]:
    """Draw in this process, setting by setting."""
    began = time.perf_counter()
    pipe: Any = None
    for number, setting in enumerate(kind.settings):
        # What a peer has left in a pipeline is not for the next setting.
        if pipe is None or kind.family in ("diffusers", "cache-dit"):
            pipe = task.pipeline.load()
        steps = setting.flags.get("steps", task.num_inference_steps)
        count = switch_on(
            kind.family, kind.name, setting.flags, pipe, steps, task.inner, task.calibration
        )
        for _ in range(2):  # compiles, and touches what stays
            task.pipeline.draw(pipe, task.prompts[0], task.seed, steps)
        count()
        started = time.perf_counter() - began
        for index, prompt in enumerate(task.prompts):
            picture, seconds = task.pipeline.draw(pipe, prompt, task.seed + index, steps)
            yield Drawn(number, index, picture, seconds, count(), started)
        began = time.perf_counter()


def in_its_own_process(task: Task, kind: Kind, log: Path) -> Iterator[Drawn]:
    """The same in a new process, whose words go to a log.

    Raises:
        KindFailed: the process ended early; the message says why.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(task, kind, log, sender))
    process.start()
    sender.close()  # so that its end shows here
    try:
        while True:
            try:
                received = receiver.recv()
            except EOFError:
                process.join()
                raise KindFailed(f"its process ended with {process.exitcode}; see {log}") from None
            if isinstance(received, str):
                raise KindFailed(received)
            if received is None:
                return
            yield received
    finally:
        receiver.close()
        process.join(5)
        if process.is_alive():
            process.terminate()
            process.join()


def _work(task: Task, kind: Kind, log: Path, sender: Connection) -> None:
    with log.open("w") as words:
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
        try:
            for drawn in draw_all(task, kind):
                sender.send(drawn)
            sender.send(None)
        except Exception as error:
            traceback.print_exc()
            sender.send(f"{type(error).__name__}: {error}"[:500])
