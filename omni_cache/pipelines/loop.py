"""The denoising loop of a pipeline, as far as its scheduler tells.

The pipeline is the nearest caller that owns the transformer and a scheduler, so that copies of it,
other threads and schedulers that are replaced between runs are each heard for themselves. A
scheduler is looked at and not patched: it makes a new tensor of timesteps when a loop begins, and
most count their steps.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from omni_cache.kernels import number_dtype
from omni_cache.runtime.contexts import Generation
from omni_cache.runtime.reading import Reading, read

TRANSFORMERS = ("transformer", "transformer_2")
"""Names under which pipelines keep their denoising transformers."""


class PipelineLoop:
    """One pipeline's denoising loops, one after the other.

    Attributes:
        generation: the loop that is running.
        timesteps: all of its timesteps.
        counts: whether its scheduler tells the step of a call without the call's timestep.
    """

    def __init__(self) -> None:
        self.generation = Generation()
        self._timesteps: Any = None
        self._reached = 0

    def listen(self, scheduler: Any) -> bool:
        """Hear whether the scheduler has begun a loop; False where it has not begun one yet."""
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or not _is_set(scheduler):
            return False
        if timesteps is not self._timesteps:
            self._timesteps = timesteps
            numbers = torch.as_tensor(timesteps).flatten()
            self.timesteps = Reading(numbers.to(number_dtype(numbers.device)))
            # Some pipelines hand their transformer a share of the training's timesteps.
            config = getattr(scheduler, "config", None)
            self._scale = float(getattr(config, "num_train_timesteps", None) or 1000)
            self._begin()
        self._counted = _counted(scheduler)
        return True

    @property
    def counts(self) -> bool:
        """Whether the scheduler counts its own steps."""
        return self._counted is not None

    def locate(self, value: float | None, branch: str | None) -> tuple[Generation, int | None]:
        """The generation and the step of a call, from its timestep (None where that is unread)."""
        last = self.generation.lasts.get(branch) if branch is not None else None
        index = self._index(value, None if last is None else last.index)
        if index is not None and index < self._reached:
            self._begin()  # once more through the same timesteps, such as for the next chunk
        self._reached = index or 0
        return self.generation, index

    def _begin(self) -> None:
        self.generation.release()
        self.generation = Generation(max(1, len(self._timesteps)))
        self._reached = 0

    def _index(self, value: float | None, after: int | None) -> int | None:
        counted = self._counted
        if value is None:
            return counted
        read([self.timesteps])  # unless it has come with the call's own
        values, scale = self.timesteps.numbers or (), self._scale
        known = counted is not None and counted < len(values)
        if known and _is_close(values[counted or 0], value, scale):
            return counted
        places = [index for index, each in enumerate(values) if _is_close(each, value, scale)]
        if not places:
            return counted
        # A timestep that comes twice is one step or two: the branch's last call tells.
        later = bisect_right(places, -1 if after is None else after)
        return places[later] if later < len(places) else places[-1 if after in places else 0]


def _is_close(timestep: float, value: float, scale: float) -> bool:
    tolerance = 1e-3 * max(abs(timestep), 1.0)
    return abs(timestep - value) <= tolerance or abs(timestep - value * scale) <= tolerance


def _counted(scheduler: Any) -> int | None:
    """The step that a scheduler is at; None where it does not count."""
    index = getattr(scheduler, "step_index", -1)
    if index is None:
        # It counts from its first step on, some from the first scaling of the latents.
        return getattr(scheduler, "begin_index", None) or 0
    return None if index < 0 else int(index)


def _is_set(scheduler: Any) -> bool:
    """Whether timesteps were set: a scheduler is made with those of its training."""
    if getattr(scheduler, "num_inference_steps", None) is not None:
        return True
    config = getattr(scheduler, "config", None)
    return len(scheduler.timesteps) != getattr(config, "num_train_timesteps", None)


_loops: dict[int, PipelineLoop] = {}
_lock = threading.Lock()


def running_loop(
    module: nn.Module, frame: FrameType | None, default: Any = None
) -> PipelineLoop | None:
    """The loop of the pipeline that calls a module; None where no loop has begun.

    Args:
        module: a denoising transformer.
        frame: its caller.
        default: a pipeline to take where none calls.
    """
    pipeline = next(_owners(module, frame), default)
    if pipeline is None:
        return None
    loop = _loop_of(pipeline)
    return loop if loop.listen(pipeline.scheduler) else None


def _owners(module: nn.Module, frame: FrameType | None) -> Iterator[Any]:
    """The callers' first arguments that own a module and a scheduler, the nearest first."""
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and not code.co_filename.startswith(_TORCH):
            owner = frame.f_locals.get(code.co_varnames[0])
            parts = getattr(owner, "__dict__", {})
            if "scheduler" in parts and any(_is(parts.get(name), module) for name in TRANSFORMERS):
                yield owner
        frame = frame.f_back


_TORCH = torch.__path__[0]


def _is(component: Any, module: nn.Module) -> bool:
    return component is module or getattr(component, "_orig_mod", None) is module


def _loop_of(pipeline: Any) -> PipelineLoop:
    key = id(pipeline)
    with _lock:
        if key not in _loops:
            _loops[key] = PipelineLoop()
            weakref.finalize(pipeline, _loops.pop, key, None)
        return _loops[key]
