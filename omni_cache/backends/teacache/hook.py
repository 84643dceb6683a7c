"""TeaCache on one module, under the names of ``vllm_omni.diffusion.cache.teacache.hook``.

It makes a `TeaCache` strategy of its configuration and attaches it; deciding, keeping and reusing
are the runtime's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from omni_cache.backends.attach import (
    attach,
    begin,
    detach,
    guidance_of,
    trajectories_of,
)
from omni_cache.backends.hooks import HookRegistry, ModelHook
from omni_cache.backends.teacache.config import TeaCacheConfig
from omni_cache.backends.teacache.extractors import EXTRACTOR_REGISTRY
from omni_cache.backends.teacache.state import TeaCacheState
from omni_cache.capture.extractor import CacheContext, Extractor, find_extractor
from omni_cache.pipelines.enable import own_module
from omni_cache.runtime.trajectory import Trajectory
from omni_cache.strategies import TeaCache, Time
from omni_cache.strategies.gates import Accumulate, Accumulated
from omni_cache.strategies.signals import RelativeL1

_hooked: ContextVar[weakref.WeakSet[nn.Module]] = ContextVar("teacache_hooked")


class TeaCacheHook(ModelHook):
    """TeaCache on a module.

    Args:
        config: what it is configured with.
        flags: further ones for ``omni_cache.enable``, such as ``inner``.

    Attributes:
        config: the same.
        rescale_func: the polynomial.
        state_manager: what is kept for each branch, to look at.
        extractor_fn: takes calls apart; None where the graph tells.
    """

    _HOOK_NAME: ClassVar[str] = "teacache"

    def __init__(self, config: TeaCacheConfig, **flags: Any) -> None:
        self.config = config
        self.rescale_func = np.poly1d(np.asarray(config.coefficients, dtype=np.float64))
        self.state_manager = _BranchStates()
        self.extractor_fn: Extractor | None = None
        self._flags = flags

    @property
    def _strategy(self) -> TeaCache:
        threshold = self.config.rel_l1_thresh
        assert threshold is not None  # resolved when the configuration was made
        return TeaCache(rel_l1_thresh=threshold, coefficients=self.config.coefficients)

    @property
    def _forward_cnt(self) -> int:
        module = self.state_manager.module
        guidance = None if module is None else guidance_of(module)
        return 0 if guidance is None else guidance.calls

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Attach to a module, with the extractor of the type or of its class, if there is one."""
        registered = EXTRACTOR_REGISTRY.get(self.config.transformer_type)
        self.extractor_fn = self.extractor_fn or registered or find_extractor(module)
        extractor = None if self.extractor_fn is None else self._extract
        flags = {"signal": self.config.signal, **self._flags}
        attach(module, self._strategy, flags, extractor)
        self.state_manager.show(module)
        self.state_manager.set_context(self._HOOK_NAME)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a module, which is attached if it was not."""
        if self.state_manager.module is not module:
            self.initialize_hook(module)
        return module(*args, **kwargs)

    def reset_state(self, module: nn.Module, num_inference_steps: int | None = None) -> nn.Module:
        """Begin a request of so many steps; 0 and None are an unknown number."""
        begin(module, num_inference_steps)
        return module

    def remove_hook(self, module: nn.Module) -> None:
        """Leave the module as it was before."""
        detach(module)
        self.state_manager.show(None)

    def _extract(self, module: nn.Module, *args: Any, **kwargs: Any) -> CacheContext:
        assert self.extractor_fn is not None  # it is registered for the module otherwise
        return self.extractor_fn(module, *args, **kwargs)

    def _should_compute_full_transformer(self, state: TeaCacheState, modulated_inp: Tensor) -> bool:
        """The rule for one call of a branch; writes into its state what has accumulated."""
        before = state.previous_modulated_input
        if state.cnt == 0 or before is None:
            state.accumulated_rel_l1_distance *= state.cnt > 0
            return True
        signal, at = RelativeL1(), Time(state.cnt)
        distance = signal.distance(signal.measure(modulated_inp, before, ()).tolist())
        (coefficients,) = (self._strategy.own_numbers(None) or {}).values()
        rule = Accumulate(coefficients, self._strategy.rel_l1_thresh)
        verdict = rule.decide(Accumulated(state.accumulated_rel_l1_distance), at, None, distance)
        chosen = verdict.if_reused if verdict.reuse else verdict.if_computed
        state.accumulated_rel_l1_distance = chosen.change
        return not verdict.reuse


class _BranchStates:
    """What the runtime keeps for the branches of one module, as states to look at.

    They are named after the branches: "teacache_positive", or as a tag says.
    """

    def __init__(self) -> None:
        self._module: weakref.ref[nn.Module] | None = None
        self._context: str | None = None

    def show(self, module: nn.Module | None) -> None:
        """Look at a module, None for none."""
        self._module = None if module is None else weakref.ref(module)

    @property
    def module(self) -> nn.Module | None:
        """The one that is looked at."""
        return None if self._module is None else self._module()

    @property
    def _states(self) -> dict[str, TeaCacheState]:
        if self.module is None:
            return {}
        found = trajectories_of(self.module)
        return {f"teacache_{each.branch}": _state(each) for each in found}

    def set_context(self, name: str) -> None:
        """Name the state that is meant from now on."""
        self._context = name

    def get_state(self) -> TeaCacheState:
        """The state that is meant; if there is none of the name, of the branch that began last."""
        states = self._states
        last = next(reversed(states.values()), TeaCacheState())
        return last if self._context is None else states.get(self._context, last)

    def reset(self) -> None:
        """Forget all of them."""
        if self.module is not None:
            begin(self.module, None)


def _state(trajectory: Trajectory) -> TeaCacheState:
    kept = trajectory.history.kept
    made = trajectory.history.at_home(kept[0]) if kept else ()
    residuals = [each for each in made if each.numel()]  # others only tell the dtype of a stream
    hidden, encoder = [*residuals, None, None][:2]
    change = trajectory.state.change
    return TeaCacheState(len(trajectory.steps), change, trajectory.signal, hidden, encoder)


def apply_teacache_hook(module: nn.Module, config: TeaCacheConfig, **flags: Any) -> None:
    """Have calls of a module follow TeaCache from now on, with nothing kept from before.

    The module is compiled in place: its attributes, its type and its place in a pipeline stay.
    ``module._hook_registry.remove_hook("teacache")`` takes it off again.

    Args:
        module: a denoising transformer.
        config: what it is configured with.
        flags: further ones for ``omni_cache.enable``, such as ``inner``.

    Raises:
        ValueError: a flag is unknown or has a value that is not allowed.
        RuntimeError: another hook of the module takes the place of its forward.
    """
    own = own_module(module)
    registry = HookRegistry.get_or_create(own)
    registry.register_hook(TeaCacheHook._HOOK_NAME, TeaCacheHook(config, **flags))
    _hooked.get(weakref.WeakSet()).add(own)


@contextmanager
def collecting_hooked() -> Iterator[weakref.WeakSet[nn.Module]]:
    """The modules that `apply_teacache_hook` hooks within, by whoever calls it."""
    found: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    token = _hooked.set(found)
    try:
        yield found
    finally:
        _hooked.reset(token)
