"""Pipelines that need a word of their own: which of their modules are cached, and for which steps.

An enabler describes, and an engine installs. Only pipelines with two experts, or whose transformer
has another name, need one: the engine "graph" finds blocks by itself, keeps what a model does
between its blocks, and knows a guidance branch by its inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from omni_cache.backends.attach import named_transformers_of, no_transformer
from omni_cache.backends.cachedit.config import CacheDiTConfig
from omni_cache.backends.cachedit.engines import Target

Refresh = Callable[..., None]
"""``refresh(pipeline, num_inference_steps, verbose=True)``."""


@dataclass(frozen=True)
class Recipe:
    """What of a pipeline to cache.

    Attributes:
        targets: the transformers.
        split: how many steps of a request each of them has; None where each has all.
    """

    targets: tuple[Target, ...]
    split: Callable[[Any, int], Sequence[int]] | None = None

    def steps(self, pipeline: Any, num_inference_steps: int | None) -> Sequence[int | None]:
        """The steps of each target; None where nobody knows."""
        if num_inference_steps is None or self.split is None:
            return [num_inference_steps] * len(self.targets)
        return [each or None for each in self.split(pipeline, num_inference_steps)]


@dataclass(frozen=True)
class CacheDiTEnableResult:
    """What an enabler has left that has put cache-dit on by itself.

    Attributes:
        refresh: begins a request: ``refresh(pipeline, num_inference_steps, verbose)``.
        targets: the transformers that it is to be taken off again.
    """

    refresh: Refresh
    targets: tuple[Any, ...]


Enabler = Callable[[Any, Any], "Recipe | CacheDiTEnableResult | Refresh"]
"""Called with a pipeline and a ``DiffusionCacheConfig``."""


def recipe_of_modules(pipeline: Any, cache_config: Any, name: str | None = None) -> Recipe:
    """All denoising transformers of a pipeline, with all steps each.

    Args:
        pipeline: the pipeline.
        cache_config: a ``DiffusionCacheConfig``.
        name: of the only one, where it has a name that tells nobody; None for those that the
            pipeline names in ``_dit_modules``, else the usual ones.

    Raises:
        ValueError: the pipeline has none.
    """
    found = named_transformers_of(pipeline) if name is None else [getattr(pipeline, name)]
    if not found:
        raise no_transformer(pipeline)
    config = CacheDiTConfig.from_diffusion_config(cache_config)
    return Recipe(tuple(Target(each, config) for each in found))


def enable_cache_for_wan22(pipeline: Any, cache_config: Any) -> Recipe:
    """Wan 2.2: an expert for high noise, and one for low noise, if there are two.

    Each counts its own steps. The one for low noise comes late, where little changes: two steps of
    warm-up do for it, and it reuses 20 at most.
    """
    if getattr(pipeline, "transformer_2", None) is None:
        return recipe_of_modules(pipeline, cache_config, "transformer")
    config = CacheDiTConfig.from_diffusion_config(cache_config)
    low = replace(config, max_warmup_steps=2, max_cached_steps=20)
    experts = Target(pipeline.transformer, config), Target(pipeline.transformer_2, low)
    return Recipe(experts, steps_of_experts)


def steps_of_experts(pipeline: Any, num_inference_steps: int) -> tuple[int, int]:
    """How many steps lie at ``boundary_ratio`` of the noise or above, and how many below.

    Without a ratio, all lie above.
    """
    ratio = pipeline.boundary_ratio
    if ratio is None:
        return num_inference_steps, 0
    scheduler = copy.deepcopy(pipeline.scheduler)  # the pipeline's own may be in use
    scheduler.set_timesteps(num_inference_steps)
    boundary = ratio * scheduler.config.num_train_timesteps
    high = sum(float(each) >= boundary for each in scheduler.timesteps)
    return high, num_inference_steps - high


class _OfTheGraph:
    """An adapter that a transformer's class may name, and that only the engine "graph" serves."""

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> None:
        """What the engine "library" calls.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{cls.__name__} is not allowed with engine='library', as it works on blocks of "
            "vLLM-Omni's own model; engine='graph' needs no adapter"
        )


class BagelCachedAdapter(_OfTheGraph):
    """Bagel's, as ``cached_adapter_cls`` of a `CacheDiTAdapterConfig`."""


class SensenovaCachedAdapter(_OfTheGraph):
    """SenseNova's, as ``cached_adapter_cls`` of a `CacheDiTAdapterConfig`."""


CUSTOM_DIT_ENABLERS: dict[str, Enabler] = {
    "Wan22Pipeline": enable_cache_for_wan22,
    "Wan22I2VPipeline": enable_cache_for_wan22,
    "Wan22TI2VPipeline": enable_cache_for_wan22,
    "Wan22VACEPipeline": enable_cache_for_wan22,
    "MammothModa2DiTPipeline": partial(recipe_of_modules, name="gen_transformer"),
}
"""Enablers by the name of the pipeline's class; others may be added."""
