"""SeaCache on one module, under the names of ``vllm_omni.diffusion.cache.seacache.hook``.

It makes a strategy of its configuration and attaches it, and says the place and the sigma of each
call as its callbacks tell them; deciding, keeping and reusing are the runtime's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

from torch import Tensor, nn

from omni_cache.backends.attach import (
    attach,
    begin,
    detach,
    guidance_of,
    trajectories_of,
)
from omni_cache.backends.hooks import HookRegistry, ModelHook
from omni_cache.backends.seacache.config import SeaCacheConfig
from omni_cache.backends.seacache.state import SeaCacheState
from omni_cache.capture.extractor import Extractor
from omni_cache.pipelines.enable import around_calls, own_module
from omni_cache.runtime.calls import Call
from omni_cache.runtime.contexts import Generation, branch, named_generation

Number = float | Tensor | None
Callback = Callable[[], Number]

# By hook, so that contexts of two models may lie within each other.
_names: ContextVar[Mapping[SeaCacheRootHook, str]] = ContextVar("sea_cache_contexts")


class SeaCacheRootHook(ModelHook):
    """SeaCache on a module.

    Args:
        config: what it is configured with.
        current_step_callback: tells the step of a call, from 0.
        current_sigma_callback: tells the noise in its latents, from 0 to 1. Better a float: a
            tensor on a device is read at every call.
        num_inference_steps_callback: tells the number of steps.
        extractor_fn: takes calls apart. Without one, that of the module or its class, if there is
            one, and otherwise the graph tells.
        flags: further ones for ``omni_cache.enable``, such as ``inner``.

    Attributes:
        full_count: how many calls were computed since the last refresh.
        skip_count: how many were reused.
    """

    _HOOK_NAME: ClassVar[str] = "sea_cache"

    def __init__(
        self,
        config: SeaCacheConfig,
        *,
        current_step_callback: Callback | None = None,
        current_sigma_callback: Callback | None = None,
        num_inference_steps_callback: Callback | None = None,
        extractor_fn: Extractor | None = None,
        **flags: Any,
    ) -> None:
        self.config = config
        self.current_step_callback = current_step_callback
        self.current_sigma_callback = current_sigma_callback
        self.num_inference_steps_callback = num_inference_steps_callback
        self.extractor_fn = extractor_fn
        self.full_count = self.skip_count = 0
        self._flags = flags
        self._generation = Generation()
        self._has_warned = False

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Attach to a module."""
        attach(module, self.config.strategy(), self._flags, self.extractor_fn)
        around_calls(own_module(module), self._around)
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Begin a request of a number of steps that nobody knows yet."""
        self.refresh(module)
        return module

    def remove_hook(self, module: nn.Module) -> None:
        """Leave the module as it was before."""
        detach(module)

    def refresh(self, module: nn.Module, num_inference_steps: int | None = None) -> None:
        """Begin a request: forget what is kept and count from 0.

        Args:
            module: the one that it is attached to.
            num_inference_steps: of the request; 0 or None where they are not known.
        """
        begin(module, num_inference_steps)
        self._begin(num_inference_steps or None)
        self.full_count = self.skip_count = 0

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Name the guidance branch of the calls within. Contexts nest; the innermost counts."""
        token = _names.set({**_names.get({}), self: name})
        try:
            yield
        finally:
            _names.reset(token)

    def states(self, module: nn.Module) -> dict[str, SeaCacheState]:
        """What is known of each context of the latest generation of a module."""
        return {each.branch: SeaCacheState.of(each) for each in trajectories_of(module)}

    @contextmanager
    def _around(self, call: Call) -> Iterator[None]:
        name, guidance = _names.get({}).get(self), guidance_of(call.module)
        assert guidance is not None  # it is attached
        with guidance(call) if name is None else self._named(name):
            yield
        if call.place is None:
            return
        course, trajectories = call.place.course, list(call.place.run.trajectories.values())
        computed = [each.steps[-1].computed for each in trajectories if each.branch == course.name]
        self.full_count += any(computed)
        self.skip_count += len(computed) > 0 and not any(computed)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """The context of a call whose branch is named, with what the callbacks say of it."""
        step, sigma, total = map(
            _told,
            (
                self.current_step_callback,
                self.current_sigma_callback,
                self.num_inference_steps_callback,
            ),
        )
        if not _fits(step, sigma, total):
            if not self._has_warned:
                self._has_warned = True
                given = f"step={step!r}, sigma={sigma!r}, num_inference_steps={total!r}"
                message = f"SeaCache computes calls whose metadata is wrong: {given}"
                warnings.warn(message, stacklevel=2)
            step, sigma, total = None, math.nan, None
        if total is not None and total != self._generation.num_inference_steps:
            self._begin(int(total))
        token = named_generation.set(named_generation.get() or self._generation)
        try:
            with branch(name, None if step is None else int(step), sigma):
                yield
        finally:
            named_generation.reset(token)

    def _begin(self, num_inference_steps: int | None) -> None:
        self._generation.release()
        self._generation = Generation(num_inference_steps)


def _told(callback: Callback | None) -> float | None:
    """What a callback tells; NaN for what is no number."""
    told = None if callback is None else callback()
    try:
        return None if told is None else float(told)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _fits(step: float | None, sigma: float | None, total: float | None) -> bool:
    """Whether what is told of a call may be true."""
    beyond = math.inf if total is None else total
    return (
        (total is None or (total >= 1 and total < math.inf))
        and (step is None or 0 <= step < beyond)
        and (sigma is None or 0 <= sigma <= 1)
    )


def apply_sea_cache_hook(
    module: nn.Module,
    config: SeaCacheConfig,
    *,
    current_step_callback: Callback | None = None,
    current_sigma_callback: Callback | None = None,
    num_inference_steps_callback: Callback | None = None,
    extractor_fn: Extractor | None = None,
    **flags: Any,
) -> SeaCacheRootHook:
    """Have calls of a module follow SeaCache from now on, with nothing kept from before.

    The module is compiled in place. Arguments are those of `SeaCacheRootHook`.

    Returns:
        The hook, whose ``cache_context`` names guidance branches. A callback counts for calls
        within such a context; what it does not tell (None), and what lies outside, is found as for
        any other model: the branch and the step by the inputs, the sigma by the timestep.

    Raises:
        ValueError: a flag is unknown or has a value that is not allowed.
        RuntimeError: another hook of the module takes the place of its forward.
    """
    hook = SeaCacheRootHook(
        config,
        current_step_callback=current_step_callback,
        current_sigma_callback=current_sigma_callback,
        num_inference_steps_callback=num_inference_steps_callback,
        extractor_fn=extractor_fn,
        **flags,
    )
    HookRegistry.get_or_create(own_module(module)).register_hook(hook._HOOK_NAME, hook)
    return hook
