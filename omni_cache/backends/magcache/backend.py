"""MagCache on a pipeline: the ratios of its transformer, for the steps of each request."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from omni_cache.backends.attach import (
    extra_flags,
    first_transformer,
    hook_of,
    remove_hook,
    warn_of_others,
)
from omni_cache.backends.base import CacheBackend
from omni_cache.backends.magcache.config import MagCacheConfig, Ratios, each_row
from omni_cache.backends.magcache.hook import MagCacheHeadHook, apply_mag_cache_hook
from omni_cache.backends.magcache.strategy import MagCacheStrategy, get_strategy
from omni_cache.strategies.base import DEFAULT_STEPS


class MagCacheBackend(CacheBackend):
    """MagCache for a pipeline's transformer; ``config`` is a `DiffusionCacheConfig`.

    Its keys that are no fields may be flags of ``omni_cache.enable``, such as ``inner``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._registered = False
        self._magcache_config: MagCacheConfig | None = None
        self._transformer_id: int | None = None
        self._hook: MagCacheHeadHook | None = None

    @property
    def calibrated_ratios(self) -> Mapping[str, list[float]]:
        """What ``mag_calibrate=True`` has measured since the request began, for ``mag_ratios``.

        For each guidance branch a ratio for each step. Empty before.
        """
        return {} if self._hook is None else self._hook.calibrated_ratios

    def enable(self, pipeline: Any) -> None:
        """Cache a pipeline's transformer.

        Raises:
            ValueError: no ratios are known of its class, or a value is not allowed.
        """
        self._enable(pipeline, self._steps(None))
        warn_of_others(pipeline)

    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None:
        """Begin a request: of so many steps, else of as many as the configuration says, else 28.

        A transformer that is another one, or has lost its hook, is cached anew; of a lost hook a
        warning tells if ``verbose``.
        """
        transformer, steps = first_transformer(pipeline), self._steps(num_inference_steps)
        known, hook = self._magcache_config, hook_of(transformer, MagCacheHeadHook)
        is_same = self._registered and self._transformer_id == id(transformer)
        if is_same and hook is None and self._hook is not None and verbose:
            message = "the transformer has lost its MagCache hook, which is applied again"
            warnings.warn(message, stacklevel=2)
        if not is_same or hook is None or known is None:
            self._enable(pipeline, steps)
        elif known.num_inference_steps == steps:
            hook.reset_state(transformer)
        else:
            self._magcache_config = self._config_of(transformer, steps)
            hook.configure(transformer, self._magcache_config)

    def disable(self, pipeline: Any) -> None:
        """Leave the pipeline's transformer as it was; one that is not cached is left alone."""
        remove_hook(first_transformer(pipeline), MagCacheHeadHook)
        self._registered = self.enabled = False
        self._magcache_config = self._transformer_id = self._hook = None

    def _enable(self, pipeline: Any, steps: int) -> None:
        transformer = first_transformer(pipeline)
        config = self._config_of(transformer, steps)
        apply_mag_cache_hook(transformer, config, **extra_flags(self.config))
        self._magcache_config, self._transformer_id = config, id(transformer)
        self._hook = hook_of(transformer, MagCacheHeadHook)
        self._registered = self.enabled = True

    def _config_of(self, transformer: nn.Module, steps: int) -> MagCacheConfig:
        given, kind = self.config, type(transformer).__name__
        ratios: Ratios | None = given.mag_ratios
        if ratios is None and not given.mag_calibrate:
            ratios = get_strategy(kind).mag_ratios
        config = MagCacheConfig(
            threshold=given.mag_threshold,
            max_skip_steps=given.mag_max_skip_steps,
            retention_ratio=given.mag_retention_ratio,
            num_inference_steps=steps,
            mag_ratios=ratios,
            mag_calibrate=given.mag_calibrate,
            transformer_type=kind,
        )
        if config.mag_ratios is not None:
            config.mag_ratios = each_row(
                config.mag_ratios, lambda row: MagCacheStrategy.nearest_interp(row, steps)
            )
        return config

    def _steps(self, told: int | None) -> int:
        return told or self.config.num_inference_steps or DEFAULT_STEPS
