"""TeaCache on a pipeline, under the names of ``vllm_omni.diffusion.cache.teacache.backend``.

It knows which module of a pipeline denoises, and by which type its coefficients are found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from omni_cache.backends.attach import (
    extra_flags,
    hook_of,
    no_transformer,
    remove_hook,
    transformers_of,
)
from omni_cache.backends.base import CacheBackend
from omni_cache.backends.teacache.config import TeaCacheConfig
from omni_cache.backends.teacache.hook import (
    TeaCacheHook,
    apply_teacache_hook,
    collecting_hooked,
)
from omni_cache.errors import UncachedWarning
from omni_cache.strategies.tables import teacache_classes


def enable_bagel_teacache(pipeline: Any, config: Any) -> None:
    """Bagel keeps its transformer as ``bagel``; ``transformer`` is set to it."""
    _apply({pipeline.bagel: "Bagel"}, config)
    pipeline.transformer = pipeline.bagel


def enable_flux2_klein_teacache(pipeline: Any, config: Any) -> None:
    """The class of FLUX.2 Klein's transformer is that of FLUX.2, its coefficients are not."""
    _apply({pipeline.transformer: "Flux2Klein"}, config)


def enable_hunyuan_image3_teacache(pipeline: Any, config: Any) -> None:
    """HunyuanImage 3 applies the rule in its own loop, to ``pipeline._tea_cache_config``."""
    pipeline._tea_cache_config = _configured(config, "HunyuanImage3Pipeline")


def enable_minimax_h3_teacache(pipeline: Any, config: Any) -> None:
    """MiniMax H3 denoises with its transformer in two of its partitions.

    Raises:
        ValueError: the pipeline is another partition.
    """
    partition = getattr(pipeline, "partition", None)
    if partition not in _PARTITIONS:
        listed = " or ".join(map(repr, _PARTITIONS))
        raise ValueError(f"partition={partition!r} has no TeaCache; partition must be {listed}")
    _apply({pipeline.transformer: "MiniMaxH3DiTModel"}, config)


def enable_sensenova_u1_teacache(pipeline: Any, config: Any) -> None:
    """SenseNova U1 keeps its transformer as ``denoising_transformer``."""
    _apply({pipeline.denoising_transformer: "SenseNovaU1ForCausalLM"}, config)


_PARTITIONS = ("fl2va", "combined")

CUSTOM_TEACACHE_ENABLERS: dict[str, Callable[[Any, Any], None]] = {
    "BagelPipeline": enable_bagel_teacache,
    "Flux2KleinPipeline": enable_flux2_klein_teacache,
    "HunyuanImage3Pipeline": enable_hunyuan_image3_teacache,
    "MiniMaxH3Pipeline": enable_minimax_h3_teacache,
    "SenseNovaU1Pipeline": enable_sensenova_u1_teacache,
}
"""What enables TeaCache on a pipeline, by the name of its class, called with it and a config."""


class TeaCacheBackend(CacheBackend):
    """TeaCache on the denoising transformers of a pipeline.

    Args:
        config: with ``rel_l1_thresh`` and ``coefficients``, and flags of ``omni_cache.enable``
            among its further keys.
    """

    def enable(self, pipeline: Any) -> None:
        """Cache the pipeline's transformers, all or none; enabling again begins anew.

        Raises:
            ValueError: ``Invalid TeaCache configuration``, such as coefficients that are neither
                given nor published for the transformer's class; or a pipeline without transformer.
        """
        self.enabled = False
        enabler = CUSTOM_TEACACHE_ENABLERS.get(type(pipeline).__name__, _enable)
        before = {*getattr(pipeline, "_tea_cache_modules", ())}
        with collecting_hooked() as hooked:
            try:
                enabler(pipeline, self.config)
            except BaseException:
                _remove_hooks({*before, *hooked})
                raise
        _remove_hooks(before - {*hooked})  # of what was replaced since
        pipeline._tea_cache_modules = hooked
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None:
        """Begin a request of so many steps; 0 and None are an unknown number.

        Warns, if ``verbose``, of transformers that are not cached, such as one that has taken the
        place of another since.
        """
        bare, modules = [], _modules_of(pipeline)
        for module in modules:
            hook = hook_of(module, TeaCacheHook)
            if hook is None:
                bare.append(module)
            else:
                hook.reset_state(module, num_inference_steps)
        if not verbose or getattr(pipeline, "_tea_cache_config", None) is not None:
            return
        name = type(pipeline).__name__
        if len(bare) == len(modules):
            message = f"TeaCache is not enabled on {name}, so there is nothing to refresh"
            warnings.warn(message, UncachedWarning, stacklevel=2)
        elif bare:
            kinds = ", ".join(type(each).__name__ for each in bare)
            message = f"TeaCache is not enabled on {kinds} of {name}; enable the backend again"
            warnings.warn(message, UncachedWarning, stacklevel=2)

    def disable(self, pipeline: Any) -> None:
        """Leave the pipeline's transformers as they were before."""
        _remove_hooks(_modules_of(pipeline))
        vars(pipeline).pop("_tea_cache_modules", None)
        if getattr(pipeline, "_tea_cache_config", None) is not None:
            pipeline._tea_cache_config = None
        self.enabled = False


def _enable(pipeline: Any, config: Any) -> None:
    models = transformers_of(pipeline)
    if not models:
        raise no_transformer(pipeline)
    _apply({each: _type_of(each) for each in models}, config)


def _modules_of(pipeline: Any) -> list[nn.Module]:
    """The denoising transformers, and what an enabler has hooked besides."""
    hooked = getattr(pipeline, "_tea_cache_modules", ())
    return list(dict.fromkeys([*transformers_of(pipeline), *hooked]))


def _remove_hooks(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        remove_hook(module, TeaCacheHook)


def _apply(types: dict[nn.Module, str], config: Any) -> None:
    """Hook modules by their types, once the configurations of all have been made."""
    configs = {module: _configured(config, name) for module, name in types.items()}
    for module, each in configs.items():
        apply_teacache_hook(module, each, **extra_flags(config))


def _configured(config: Any, transformer_type: str) -> TeaCacheConfig:
    try:
        return TeaCacheConfig(config.rel_l1_thresh, config.coefficients, transformer_type)
    except Exception as error:
        said = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(f"Invalid TeaCache configuration: {said}") from error


def _type_of(module: nn.Module) -> str:
    """The nearest class that has coefficients, since some runners make classes of their own."""
    names = [each.__name__ for each in type(module).__mro__]
    known = teacache_classes()
    return next((name for name in names if name in known), names[0])
