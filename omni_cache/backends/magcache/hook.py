"""MagCache on one module, under the names of ``vllm_omni.diffusion.cache.magcache.hook``.

It makes a strategy of its configuration and attaches it; deciding, keeping and reusing are the
runtime's. A calibration watches what the runtime shows of computed steps.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from omni_cache.backends.attach import attach, begin, detach, guidance_of
from omni_cache.backends.hooks import HookRegistry, ModelHook, StateManager
from omni_cache.backends.magcache.config import MagCacheConfig
from omni_cache.backends.magcache.state import MagCacheState
from omni_cache.backends.magcache.strategy import (
    MagCacheStrategy,
    MagCacheStrategyRegistry,
    calibration_metrics,
)
from omni_cache.pipelines.enable import around_calls, own_module
from omni_cache.runtime.calls import Call
from omni_cache.runtime.contexts import Observed, current_observer, observing

logger = logging.getLogger(__name__)


class MagCacheHeadHook(ModelHook):
    """MagCache on a module.

    Args:
        state_manager: of `MagCacheState`, one for each branch by its name.
        config: what it is configured with.
        strategy: what is known of the model's class; without one, only what all have in common.
        flags: further ones for ``omni_cache.enable``, such as ``inner``.
    """

    _HOOK_NAME: ClassVar[str] = "mag_cache_head"

    def __init__(
        self,
        state_manager: StateManager,
        config: MagCacheConfig,
        strategy: MagCacheStrategy | None = None,
        **flags: Any,
    ) -> None:
        self.state_manager, self.config, self.strategy = state_manager, config, strategy
        self._flags = flags
        self._states: dict[str, MagCacheState] = {}
        self._before: dict[str, Tensor] = {}

    @property
    def calibrated_ratios(self) -> Mapping[str, list[float]]:
        """What a calibration has measured: for each guidance branch a ratio for each step."""
        return {branch: [*state.norm_ratios] for branch, state in self._states.items()}

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Attach to a module."""
        attach(module, self.config.strategy(), self._flags)
        around_calls(own_module(module), self._around)
        self.reset_state(module)
        return module

    def configure(self, module: nn.Module, config: MagCacheConfig) -> None:
        """Follow another configuration from now on, such as one for a request of other steps.

        What the module is compiled for stays.
        """
        self.config = config
        self.initialize_hook(module)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Begin a request of as many steps as the configuration says."""
        begin(module, self.config.num_inference_steps)
        self.state_manager.reset()
        self._states, self._before = {}, {}
        return module

    def remove_hook(self, module: nn.Module) -> None:
        """Leave the module as it was before."""
        detach(module)

    @contextmanager
    def _around(self, call: Call) -> Iterator[None]:
        guidance = guidance_of(call.module)
        assert guidance is not None  # it is attached
        with guidance(call), self._watching():
            yield
        if call.place is None:
            return
        run, branch = call.place.run, call.place.course.name
        for trajectory in list(run.trajectories.values()):
            if trajectory.branch == branch:
                self._state_of(branch).follow(trajectory, self.config.num_inference_steps)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Measure computed steps, beside what others watch."""
        outer = current_observer.get()

        def observer(step: Observed) -> None:
            if outer is not None:
                outer(step)
            self._measure(step)

        with observing(observer) if self.config.mag_calibrate else nullcontext():
            yield

    def _measure(self, step: Observed) -> None:
        if not step.residuals:
            return
        state, residual = self._state_of(step.branch), max(step.residuals, key=Tensor.numel)
        if step.at.index == 0:
            state.reset()
            self._before.pop(step.branch, None)
        before = self._before.get(step.branch)
        self._before[step.branch] = residual.clone()  # it is the call's own
        metrics = (
            self.strategy.compute_calibration_metrics if self.strategy else calibration_metrics
        )
        state.measured(metrics(residual, before))
        if step.at.index == self.config.num_inference_steps - 1:
            del self._before[step.branch]
            logger.info("MagCache: mag_ratios of %r are %s", step.branch, state.norm_ratios)

    def _state_of(self, branch: str) -> MagCacheState:
        self.state_manager.set_context(branch)
        state: MagCacheState = self.state_manager.get_state()
        self._states[branch] = state
        return state


MagCacheBlockHook = MagCacheHeadHook
"""The same: one hook stands for all blocks, of which none carries one of its own."""

_ARITHMETIC = (
    "register_block_metadata",
    "compute_residual",
    "apply_residual",
    "apply_residual_tuple",
)


def apply_mag_cache_hook(
    module: nn.Module,
    config: MagCacheConfig,
    strategy: MagCacheStrategy | None = None,
    **flags: Any,
) -> None:
    """Have calls of a module follow MagCache from now on, with nothing kept from before.

    The module is compiled in place, and the hook is ``module._hook_registry.get_hook(
    "mag_cache_head")``. Applied again, it takes the place of the one before.

    Args:
        module: a denoising transformer. One without a ModuleList is left alone, with a warning.
        config: what it is configured with.
        strategy: what is known of the model's class; by default that of
            ``config.transformer_type``, if there is one.
        flags: further ones for ``omni_cache.enable``, such as ``inner``.

    Raises:
        ValueError: a flag is unknown or has a value that is not allowed.
        RuntimeError: another hook of the module takes the place of its forward.
    """
    own = own_module(module)
    if not any(isinstance(each, nn.ModuleList) for each in own.modules()):
        message = f"{type(own).__name__} has no ModuleList of blocks, and runs without MagCache"
        warnings.warn(message, stacklevel=2)
        return
    strategy = strategy or MagCacheStrategyRegistry.get_if_exists(config.transformer_type)
    changed = [
        name
        for name in _ARITHMETIC
        if strategy and getattr(type(strategy), name) is not getattr(MagCacheStrategy, name)
    ]
    if changed:
        warnings.warn(
            f"{type(strategy).__name__}.{changed[0]} is not asked: what the blocks add, and where, "
            "is found in the graph of the model",
            stacklevel=2,
        )
    registry = HookRegistry.get_or_create(own)
    registry.remove_hook(MagCacheHeadHook._HOOK_NAME)
    hook = MagCacheHeadHook(StateManager(MagCacheState), config, strategy, **flags)
    registry.register_hook(MagCacheHeadHook._HOOK_NAME, hook)
