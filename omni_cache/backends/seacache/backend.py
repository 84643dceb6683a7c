"""SeaCache on a pipeline, which tells the step and the sigma of each call."""

from __future__ import annotations

import weakref
from typing import Any

from omni_cache.backends.attach import (
    extra_flags,
    first_transformer,
    hook_of,
    remove_hook,
    warn_of_others,
)
from omni_cache.backends.base import CacheBackend
from omni_cache.backends.seacache.config import SeaCacheConfig
from omni_cache.backends.seacache.hook import Callback, SeaCacheRootHook, apply_sea_cache_hook


class SeaCacheBackend(CacheBackend):
    """SeaCache for a pipeline's transformer; ``config`` is a `DiffusionCacheConfig`.

    Its keys that are no fields may be flags of ``omni_cache.enable``, such as ``inner``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._hook: SeaCacheRootHook | None = None
        self._transformer: weakref.ref[Any] | None = None

    def enable(self, pipeline: Any) -> None:
        """Cache a pipeline's transformer.

        Its attributes ``current_step_index``, ``current_sigma`` and ``num_timesteps`` tell of each
        call, and ``pipeline._cache_context_factory(name)`` opens the context of a branch.

        Raises:
            ValueError: a value is not allowed.
        """
        config = SeaCacheConfig.from_diffusion_cache_config(self.config)
        own = first_transformer(pipeline)
        warn_of_others(pipeline)
        remove_hook(own, SeaCacheRootHook)
        self._hook = apply_sea_cache_hook(
            own,
            config,
            current_step_callback=_attribute(pipeline, "current_step_index"),
            current_sigma_callback=_attribute(pipeline, "current_sigma"),
            num_inference_steps_callback=_attribute(pipeline, "num_timesteps"),
            **extra_flags(self.config),
        )
        pipeline._cache_context_factory = self._hook.cache_context
        self._transformer = weakref.ref(own)
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None:
        """Begin a request; another transformer than before is cached anew.

        Raises:
            RuntimeError: somebody has taken the hook, or the cache, off.
        """
        own = first_transformer(pipeline)
        if self._transformer is None or self._transformer() is not own:
            self.enable(pipeline)
        hook = hook_of(own, SeaCacheRootHook)
        if hook is None or hook is not self._hook:
            raise RuntimeError("the transformer has lost its SeaCache hook; enable it again")
        self._hook.refresh(own, num_inference_steps)

    def disable(self, pipeline: Any) -> None:
        """Leave the pipeline as it was; one that is not cached is left alone."""
        remove_hook(first_transformer(pipeline), SeaCacheRootHook)
        vars(pipeline).pop("_cache_context_factory", None)
        self._hook = self._transformer = None
        self.enabled = False


def _attribute(pipeline: Any, name: str) -> Callback:
    """Tells an attribute of a pipeline, None while it has none."""
    owner = weakref.ref(pipeline)
    return lambda: getattr(owner(), name, None)
