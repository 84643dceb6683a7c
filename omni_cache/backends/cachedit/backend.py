"""cache-dit as a backend: enable at load, refresh before each request, disable.

It knows when what happens, and leaves how to an engine and to a recipe.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from omni_cache.backends.attach import extra_flags, named_transformers_of, remove_hook
from omni_cache.backends.base import CacheBackend
from omni_cache.backends.cachedit.config import CacheDiTAdapterConfig, CacheDiTConfig
from omni_cache.backends.cachedit.engines import (
    CacheDiTHook,
    Engine,
    GraphEngine,
    LibraryEngine,
    Target,
    make_engine,
)
from omni_cache.backends.cachedit.model_specific import (
    CUSTOM_DIT_ENABLERS,
    CacheDiTEnableResult,
    Enabler,
    Recipe,
    Refresh,
    recipe_of_modules,
)
from omni_cache.backends.config import DiffusionCacheConfig
from omni_cache.backends.hooks import HookRegistry
from omni_cache.pipelines import is_enabled
from omni_cache.pipelines.enable import own_module

__all__ = [
    "CUSTOM_DIT_ENABLERS",
    "CacheDiTBackend",
    "CacheDiTEnableResult",
    "cache_summary",
    "enable_cache_for_dit",
]


class CacheDiTBackend(CacheBackend):
    """DBCache, with step masks and TaylorSeer, on a pipeline's denoising transformers.

    Args:
        cache_config: a ``DiffusionCacheConfig``, a dict of its fields, or None for its defaults.
            Flags of ``omni_cache.enable`` among the keys of a dict, such as ``inner``, go there.
        engine: "graph" for our own DBCache in the compiled graph, "library" for the installed
            cache-dit. None takes the key "engine" of the configuration, else "graph".

    Raises:
        TypeError: ``cache_config`` is a dict of something else.
        ValueError: there is no such engine, or it takes no flags.
    """

    def __init__(self, cache_config: Any = None, engine: str | None = None) -> None:
        if cache_config is None:
            cache_config = DiffusionCacheConfig()
        elif isinstance(cache_config, dict):
            cache_config = DiffusionCacheConfig.from_dict(cache_config, stacklevel=2)
        if engine is not None:  # for enablers, which see nothing but the configuration
            cache_config = copy.copy(cache_config)
            cache_config.engine = engine
        super().__init__(cache_config)
        self.engine = _engine_of(cache_config, None)
        self._installed = ExitStack()
        self._refresh: Refresh | None = None
        self._find: Callable[[Any], list[Any]] = named_transformers_of
        self._found: list[Any] = []

    def enable(self, pipeline: Any) -> None:
        """Put the cache on all denoising transformers of a pipeline, or on none of them.

        Raises:
            AttributeError: a transformer lacks blocks that its class declares.
            ValueError: the pipeline has no denoising transformer, one cannot be cached, or a field
                of the configuration is not allowed.
        """
        self._installed.close()  # of a pipeline before
        self.enabled, self._refresh = False, None
        enabler = CUSTOM_DIT_ENABLERS.get(type(pipeline).__name__, recipe_of_modules)
        with ExitStack() as stack:
            made = enabler(pipeline, self.config)
            if isinstance(made, Recipe):
                self._refresh = _install(pipeline, made, self.engine, stack)
                targets = tuple(each.transformer for each in made.targets)
                self._find = partial(_described, enabler, self.config)
            else:
                result = made
                if not isinstance(result, CacheDiTEnableResult):
                    result = CacheDiTEnableResult(result, (pipeline.transformer,))
                self._refresh, targets = result.refresh, result.targets
                self._find = named_transformers_of
                for each in targets:
                    stack.callback(_remove, each)
            pipeline._cache_dit_targets = targets
            self._found = self._find(pipeline)
            self._installed = stack.pop_all()
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None:
        """Begin a request: nothing of the one before is seen again. Warns where nothing is enabled.

        A pipeline whose transformers are others than before is enabled anew.

        Args:
            pipeline: the enabled one.
            num_inference_steps: of the request; 0 or None where they are not known.
            verbose: whether cache-dit logs what it does.

        Raises:
            ValueError: ``num_inference_steps`` is no number of steps; or as `enable`.
        """
        if self._refresh is None:
            warnings.warn("cache-dit is not enabled, so there is nothing to refresh", stacklevel=2)
            return
        if self._find(pipeline) != self._found:
            self.enable(pipeline)
        self._refresh(pipeline, num_inference_steps or None, verbose)

    def disable(self, pipeline: Any) -> None:
        """Take the cache off; without one, nothing happens.

        The backend is off afterwards, and all transformers were tried, even if one raises.
        """
        self.enabled, self._refresh, self._found = False, None, []
        vars(pipeline).pop("_cache_dit_targets", None)
        self._installed.close()


def cache_summary(pipeline: Any, details: bool = True) -> None:
    """Log what the latest request has computed, for each transformer that is cached.

    Warns where none is.

    Args:
        pipeline: the pipeline.
        details: whether step by step.
    """
    targets = getattr(pipeline, "_cache_dit_targets", None)
    if targets is None:
        targets = tuple(named_transformers_of(pipeline))
    engines: tuple[Engine, ...] = (GraphEngine(), LibraryEngine())
    found = [any(engine.summary(each, details) for engine in engines) for each in targets]
    if not any(found):
        name = type(pipeline).__name__
        warnings.warn(f"{name} has no transformer that is cached by cache-dit", stacklevel=2)


def enable_cache_for_dit(
    pipeline: Any,
    cache_config: Any,
    block_adapter: Any = None,
    adapter_cls: type[Any] | None = None,
    get_pipeline_transformer: Callable[[Any], Any] | None = None,
    engine: str | None = None,
) -> Refresh:
    """Put the cache on one transformer, in an enabler.

    Args:
        pipeline: the pipeline.
        cache_config: a ``DiffusionCacheConfig``.
        block_adapter: a ``cache_dit.BlockAdapter`` that names the blocks, in place of what the
            transformer's class declares.
        adapter_cls: a subclass of cache-dit's ``CachedAdapter``; for the engine "library".
        get_pipeline_transformer: finds the transformer in the pipeline; None takes its
            ``transformer``.
        engine: "graph" or "library"; None takes the key "engine" of the configuration, else
            "graph".

    Returns:
        ``refresh(pipeline, num_inference_steps, verbose=True)``.

    Raises:
        AttributeError: the transformer lacks blocks that are declared.
        ValueError: the transformer cannot be cached, or a field is not allowed.
    """
    find = get_pipeline_transformer or (lambda of: of.transformer)
    target = Target(find(pipeline), CacheDiTConfig.from_diffusion_config(cache_config))
    blocks = target.declared if block_adapter is None else _declared(block_adapter)
    if adapter_cls is not None and blocks is not None:
        blocks = replace(blocks, cached_adapter_cls=adapter_cls)
    recipe = Recipe((replace(target, blocks=blocks),))
    with ExitStack() as stack:
        begin = _install(pipeline, recipe, _engine_of(cache_config, engine), stack)
        stack.pop_all()
    return begin


def _engine_of(cache_config: Any, name: str | None) -> Engine:
    """The engine of a name, None for that of the configuration."""
    if name is None:
        name = getattr(cache_config, "engine", "graph")
    return make_engine(name, extra_flags(cache_config))


def _described(enabler: Enabler, cache_config: Any, pipeline: Any) -> list[Any]:
    """The transformers that an enabler describes in a pipeline as it is now."""
    made = enabler(pipeline, cache_config)
    return [each.transformer for each in made.targets] if isinstance(made, Recipe) else []


def _take_off(registry: HookRegistry, hook: CacheDiTHook) -> None:
    """Remove a hook, unless another backend has put its own in the place of it."""
    if registry.get_hook(hook._HOOK_NAME) is hook:
        registry.remove_hook(hook._HOOK_NAME)
    registry.leave_if_empty()


def _remove(transformer: Any) -> None:
    """Take off what an enabler has put on, through us or by itself."""
    remove_hook(transformer, CacheDiTHook)
    engine: Engine = GraphEngine() if is_enabled(transformer) else LibraryEngine()
    engine.remove(transformer)


def _install(pipeline: Any, recipe: Recipe, engine: Engine, stack: ExitStack) -> Refresh:
    """Put a recipe's targets in place; the stack takes them away again."""
    for target in recipe.targets:
        hook = CacheDiTHook(engine, target)
        registry = HookRegistry.get_or_create(own_module(target.transformer))
        stack.callback(_take_off, registry, hook)
        try:
            registry.register_hook(hook._HOOK_NAME, hook)
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f"{type(target.transformer).__name__} of {type(pipeline).__name__} cannot be "
                f"cached by cache-dit: {error}"
            ) from error

    def begin(pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None:
        steps = recipe.steps(pipeline, num_inference_steps)
        for target, own in zip(recipe.targets, steps, strict=True):
            engine.refresh(target, own, verbose)

    return begin


def _declared(adapter: Any) -> CacheDiTAdapterConfig:
    """The blocks that a ``cache_dit.BlockAdapter`` of one transformer names."""
    names, patterns = adapter.blocks_name, adapter.forward_pattern
    if isinstance(names, str):
        names, patterns = [names], [patterns]
    blocks = dict(zip(names, patterns, strict=True))
    checks = adapter.check_forward_pattern
    return CacheDiTAdapterConfig(blocks, adapter.has_separate_cfg, check_forward_pattern=checks)
