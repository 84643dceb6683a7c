"""The denoising loop of a pipeline, as far as its scheduler tells.

The pipeline is the nearest caller that owns the transformer and a scheduler, so that copies of it,
other threads and schedulers that are replaced between runs are each heard for themselves. A
scheduler is looked at and not patched: it makes a new tensor of timesteps when a loop begins, and
most count their steps.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from omni_cache.kernels import number_dtype
from omni_cache.runtime.contexts import Generation
from omni_cache.runtime.reading import Reading, read
from omni_cache.strategies import Schedule
from omni_cache.strategies.base import is_number

TRANSFORMERS = ("transformer", "transformer_2")
"""Names under which pipelines keep their denoising transformers."""


class PipelineLoop:
    """One pipeline's denoising loops, one after the other.

    Attributes:
        generation: the loop that is running.
        timesteps: all of its timesteps.
        training: the number of timesteps in training.
        guidance: the pipeline's guidance scale, where it has one.
    """

    def __init__(self) -> None:
        self.generation = Generation()
        self.guidance: float | None = None
        self._timesteps: Any = None
        self._reached, self._is_called = 0, False

    def listen(self, scheduler: Any) -> bool:
        """Hear whether the scheduler has begun a loop; False where it has not begun one yet."""
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or not _is_set(scheduler):
            return False
        index = getattr(scheduler, "step_index", -1)
        if timesteps is not self._timesteps and not self._goes_on(timesteps, index):
            self._timesteps = timesteps
            self.timesteps = Reading(_numbers(timesteps))
            config = getattr(scheduler, "config", None)
            sigmas = getattr(scheduler, "sigmas", None)
            listed = timesteps if sigmas is None else sigmas
            self._scheduler, self._sigmas = type(scheduler).__name__, Reading(_numbers(listed))
            self.training = float(getattr(config, "num_train_timesteps", None) or 1000)
            self._scale: float | None = None
            self._begin()
        # It counts from its first step on, some from the first scaling of the latents.
        self._begins = getattr(scheduler, "begin_index", None) or 0 if index is None else None
        self._counted = None if index is None or index < 0 else int(index)
        return True

    def _goes_on(self, timesteps: Any, index: int | None) -> bool:
        """Whether a new list is that of the loop: some schedulers make it whenever it is read."""
        as_many = len(timesteps) == self.generation.num_inference_steps
        return as_many and self._is_called and (index or 0) > 0

    @property
    def schedule(self) -> Schedule:
        """What the pipeline says of the loop; schedulers have their sigmas on the host."""
        read([self._sigmas])
        return Schedule(self._scheduler, self._sigmas.numbers or (), self.guidance)

    @property
    def is_over(self) -> bool:
        """Whether its scheduler has counted to the end."""
        return self._counted is not None and self._counted >= len(self._timesteps)

    def count(self, branch: str | None) -> int | None:
        """The step that the scheduler is at; None where it does not count.

        A scheduler that a pipeline copies for each chunk, to step the copy, never begins to.
        """
        is_called = self._is_called if branch is None else branch in self.generation.lasts
        return self._begins if self._counted is None and not is_called else self._counted

    def locate(self, value: float | None, branch: str | None) -> tuple[Generation, int | None]:
        """The generation and the step of a call, from its timestep (None where that is unread)."""
        index = self._index(value, branch)
        if index is not None and index < self._reached:
            self._begin()  # once more through the same timesteps, such as for the next chunk
        self._reached, self._is_called = index or 0, True
        return self.generation, index

    def _begin(self) -> None:
        self.generation.release()
        self.generation = Generation(max(1, len(self._timesteps)))
        self._reached, self._is_called = 0, False

    def _index(self, value: float | None, branch: str | None) -> int | None:
        counted = self.count(branch)
        if value is None or self._counted is not None:
            return counted
        read([self.timesteps])  # unless it has come with the call's own
        values = self.timesteps.numbers or ()
        expected = values[counted or 0 : (counted or 0) + 1]
        if self._scale is None:
            # Some pipelines hand their transformer a share of the training's timesteps. The first
            # call tells, by the step that it should be: 1.0 is the first share or the last step.
            scales = (1.0, self.training)
            fits = [each for each in scales if _places(expected, value * each, 8e-3)]
            fits += [each for each in scales if _places(values, value * each)]
            self._scale = fits[0] if fits else float("nan")
        if counted is not None:
            # Before its first step a scheduler says where it begins, unless it is not told.
            begins = _places(expected, value * self._scale, 8e-3)
            begun = [] if begins else _places(values, value * self._scale, 1e-4)
            return begun[0] if begun else counted
        places = _places(values, value * self._scale)
        if not places:
            return None
        if branch is None:
            return self._reached if self._is_called and self._reached in places else places[0]
        # A timestep that comes twice is one step or two: the branch's last call tells.
        last = self.generation.lasts.get(branch)
        later = [] if last is None else [place for place in places if place > last.index]
        again = -1 if last is not None and last.index in places else 0
        return later[0] if later else places[again]


def _numbers(given: Any) -> Tensor:
    numbers = torch.as_tensor(given).flatten()
    return numbers.to(number_dtype(numbers.device))


def _places(timesteps: Sequence[float], value: float, tolerance: float = 1e-3) -> list[int]:
    """Where a timestep comes, up to rounding: float16's, or bfloat16's with a tolerance of 8e-3."""
    return [
        place
        for place, each in enumerate(timesteps)
        if abs(each - value) <= tolerance * max(abs(each), 1.0)
    ]


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
    calling = next(_owners(module, frame), None)
    pipeline = default if calling is None else calling
    if pipeline is None:
        return None
    loop = _loop_of(pipeline)
    if not loop.listen(getattr(pipeline, "scheduler", None)):
        return None
    guidance: Any = getattr(pipeline, "guidance_scale", None)
    loop.guidance = guidance if is_number(guidance) else None
    # Who calls after a pipeline's run, from elsewhere, has a loop of its own.
    return None if calling is None and loop.is_over else loop


def _owners(module: nn.Module, frame: FrameType | None) -> Iterator[Any]:
    """The callers' first arguments that own a module and a scheduler, the nearest first."""
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and not code.co_filename.startswith(_TORCH):
            owner = frame.f_locals.get(code.co_varnames[0])
            parts = getattr(owner, "__dict__", {})
            if "scheduler" in parts:
                # Some pipelines are modules, which keep their parts apart.
                parts = {**parts, **(parts.get("_modules") or {})}
                if _has(parts.values(), module):
                    yield owner
        frame = frame.f_back


_TORCH = torch.__path__[0]


def _has(components: Collection[Any], module: nn.Module) -> bool:
    """Whether a module is among components, as it is or compiled, which takes longer to ask."""
    return any(each is module for each in components) or any(
        getattr(each, "_orig_mod", None) is module for each in components
    )


def _loop_of(pipeline: Any) -> PipelineLoop:
    key = id(pipeline)
    with _lock:
        if key not in _loops:
            _loops[key] = PipelineLoop()
            weakref.finalize(pipeline, _loops.pop, key, None)
        return _loops[key]
