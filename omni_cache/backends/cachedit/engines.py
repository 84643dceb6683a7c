"""The two engines: what puts DBCache on a transformer, begins a request, and takes it off.

Neither knows a pipeline or a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from logging import getLogger
from typing import Any, ClassVar, Protocol

from torch import nn

from omni_cache.backends.attach import attach, begin, detach
from omni_cache.backends.cachedit.config import CacheDiTAdapterConfig, CacheDiTConfig
from omni_cache.backends.hooks import ModelHook
from omni_cache.pipelines import is_enabled, summary
from omni_cache.strategies.base import one_of

_log = getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Target:
    """A transformer to cache.

    Attributes:
        transformer: the module.
        config: for this one.
        blocks: what says which its blocks are; None for what its class declares.
    """

    transformer: nn.Module
    config: CacheDiTConfig
    blocks: CacheDiTAdapterConfig | None = None

    @cached_property
    def declared(self) -> CacheDiTAdapterConfig | None:
        """What says which its blocks are; None where the engine has to know.

        Raises:
            AttributeError: the transformer has no such blocks.
        """
        found = self.blocks or getattr(self.transformer, "_cache_dit_adapter_config", None)
        if found is not None:
            found.check(self.transformer)
        return found


class Engine(Protocol):
    """What runs DBCache."""

    def install(self, target: Target) -> None:
        """Put the cache on a transformer.

        Raises:
            AttributeError: the transformer lacks blocks that are declared.
            ValueError: a field is not allowed, or the transformer cannot be cached.
        """

    def refresh(self, target: Target, num_inference_steps: int | None, verbose: bool) -> None:
        """Begin a request of so many steps, None where nobody knows."""

    def remove(self, transformer: Any) -> None:
        """Take the cache off."""

    def summary(self, transformer: Any, details: bool) -> bool:
        """Log what the latest request computed; False where the transformer is not cached."""


def make_engine(name: str, flags: Mapping[str, Any]) -> Engine:
    """The engine of a name.

    Raises:
        ValueError: there is no such engine, or it takes no flags.
    """
    one_of("engine", name, ("graph", "library"))
    if name == "graph":
        return GraphEngine(flags)
    if flags:
        raise ValueError(
            f"{', '.join(flags)} is not allowed with engine='library', which compiles nothing"
        )
    return LibraryEngine()


class CacheDiTHook(ModelHook):
    """An engine's cache on a transformer, so that no other backend takes it over unnoticed.

    Args:
        engine: puts it on and takes it off.
        target: what the engine is told.
    """

    _HOOK_NAME: ClassVar[str] = "cache_dit"

    def __init__(self, engine: Engine, target: Target) -> None:
        self._engine, self._target = engine, target

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Put the cache on."""
        self._engine.install(self._target)
        return module

    def remove_hook(self, module: nn.Module) -> None:
        """Take the cache off."""
        self._engine.remove(self._target.transformer)


@dataclass(frozen=True)
class GraphEngine:
    """Our own DBCache, in the compiled graph.

    It finds the blocks and tells the guidance branches apart by itself.

    Attributes:
        flags: further ones of ``omni_cache.enable``, such as ``inner``.
    """

    flags: Mapping[str, Any] = field(default_factory=dict)

    def install(self, target: Target) -> None:
        """As `Engine`."""
        self.refresh(target, None)

    def refresh(
        self, target: Target, num_inference_steps: int | None, verbose: bool = False
    ) -> None:
        """As `Engine`. Nothing is compiled anew, whatever the number of steps."""
        flags = dict(self.flags)
        if target.declared is not None:
            flags.setdefault("region", tuple(target.declared.block_forward_patterns))
        attach(target.transformer, target.config.to_strategy(num_inference_steps), flags)
        begin(target.transformer, num_inference_steps)

    def remove(self, transformer: Any) -> None:
        """As `Engine`."""
        detach(transformer)

    def summary(self, transformer: Any, details: bool) -> bool:
        """As `Engine`."""
        if not isinstance(transformer, nn.Module) or not is_enabled(transformer):
            return False
        found = summary(transformer)
        total = found.computed_steps + found.reused_steps
        short = f"{found.computed_steps} of {total} steps computed"
        _log.info("%s: %s", type(transformer).__name__, found if details else short)
        return True


class LibraryEngine:
    """The library cache-dit, by its own functions."""

    def install(self, target: Target) -> None:
        """As `Engine`."""
        import cache_dit

        config, declared = target.config, target.declared
        target.config.to_strategy()  # cache-dit checks no field
        adapter = _adapter(target)
        own = None if declared is None else declared.cached_adapter_cls
        put_on = cache_dit.enable_cache if own is None else own.apply
        put_on(
            target.transformer if adapter is None else adapter,
            cache_config=_in_calls(config, adapter).to_db_cache_config(),
            calibrator_config=config.to_calibrator_config(),
        )

    def refresh(self, target: Target, num_inference_steps: int | None, verbose: bool) -> None:
        """As `Engine`."""
        import cache_dit

        mask = target.config.mask(num_inference_steps)
        has_masks = target.config.scm_steps_mask_policy is not None
        if num_inference_steps is None or (has_masks and mask is None):
            # What cache-dit is given it merges into what it has, and None says nothing there: the
            # number of steps or the mask of the request before would stay.
            self.remove(target.transformer)
            self.install(target)
        if num_inference_steps is None:
            return
        changed = cache_dit.DBCacheConfig().reset(
            num_inference_steps=num_inference_steps,
            steps_computation_mask=None if mask is None else list(mask),
            steps_computation_policy=target.config.scm_steps_policy,
        )
        cache_dit.refresh_context(target.transformer, cache_config=changed, verbose=verbose)

    def remove(self, transformer: Any) -> None:
        """As `Engine`."""
        import cache_dit

        cache_dit.disable_cache(transformer)
        # It leaves the method of the class behind, bound to its own module.
        attributes, of_class = vars(transformer), getattr(type(transformer), "forward", None)
        if of_class is not None and getattr(attributes.get("forward"), "__func__", 0) is of_class:
            del attributes["forward"]

    def summary(self, transformer: Any, details: bool) -> bool:
        """As `Engine`."""
        import cache_dit

        if not cache_dit.BlockAdapter.is_cached(transformer):
            return False
        cache_dit.summary(transformer, details=details)
        return True


def _adapter(target: Target) -> Any:
    """cache-dit's description of a transformer; None where it knows none."""
    import cache_dit

    declared = target.declared
    if declared is None:
        return cache_dit.get_adapter(target.transformer)
    return cache_dit.BlockAdapter(
        transformer=target.transformer,
        blocks=[getattr(target.transformer, name) for name in declared.block_forward_patterns],
        forward_pattern=list(declared.block_forward_patterns.values()),
        has_separate_cfg=declared.has_separate_cfg,
        check_forward_pattern=declared.check_forward_pattern,
    )


def _in_calls(config: CacheDiTConfig, adapter: Any) -> CacheDiTConfig:
    """The configuration with a hint that counts calls, as cache-dit's does, and not steps."""
    hint = config.force_refresh_step_hint
    if hint is None or not getattr(adapter, "has_separate_cfg", False):
        return config
    return replace(config, force_refresh_step_hint=2 * hint)
