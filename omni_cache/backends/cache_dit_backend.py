"""The backend cache-dit under the name of its module in older releases of vLLM-Omni.

One function serves all models here, as blocks and patterns are found or declared.
"""

from functools import partial
from operator import attrgetter
from typing import Any

from omni_cache.backends.cachedit import CUSTOM_DIT_ENABLERS, CacheDiTBackend, cache_summary
from omni_cache.backends.cachedit.backend import enable_cache_for_dit
from omni_cache.backends.cachedit.model_specific import enable_cache_for_wan22

__all__ = [
    "CUSTOM_DIT_ENABLERS",
    "CacheDiTBackend",
    "cache_summary",
    "enable_cache_for_bagel",
    "enable_cache_for_dit",
    "enable_cache_for_ernie_image",
    "enable_cache_for_flux",
    "enable_cache_for_flux2",
    "enable_cache_for_flux2_klein",
    "enable_cache_for_glm_image",
    "enable_cache_for_helios",
    "enable_cache_for_hunyuan_image3",
    "enable_cache_for_hunyuan_video_15",
    "enable_cache_for_longcat_image",
    "enable_cache_for_ltx2",
    "enable_cache_for_sd3",
    "enable_cache_for_stable_audio_open",
    "enable_cache_for_wan22",
    "may_enable_cache_dit",
]

enable_cache_for_ernie_image = enable_cache_for_dit
enable_cache_for_flux = enable_cache_for_dit
enable_cache_for_flux2 = enable_cache_for_dit
enable_cache_for_flux2_klein = enable_cache_for_dit
enable_cache_for_glm_image = enable_cache_for_dit
enable_cache_for_helios = enable_cache_for_dit
enable_cache_for_hunyuan_image3 = enable_cache_for_dit
enable_cache_for_hunyuan_video_15 = enable_cache_for_dit
enable_cache_for_longcat_image = enable_cache_for_dit
enable_cache_for_ltx2 = enable_cache_for_dit
enable_cache_for_sd3 = enable_cache_for_dit
enable_cache_for_stable_audio_open = enable_cache_for_dit

enable_cache_for_bagel = partial(
    enable_cache_for_dit, get_pipeline_transformer=attrgetter("language_model.model")
)
"""Bagel denoises with its language model."""


def may_enable_cache_dit(pipeline: Any, od_config: Any) -> CacheDiTBackend | None:
    """Put the cache on a pipeline, where a configuration asks for it.

    Args:
        pipeline: the pipeline.
        od_config: has ``cache_backend``, and ``cache_config`` for `CacheDiTBackend`.

    Returns:
        The backend, enabled; None where ``cache_backend`` is neither "cache_dit" nor "cache-dit",
        or where there is no ``cache_config``.

    Raises:
        AttributeError: as :meth:`CacheDiTBackend.enable`.
        ValueError: as :meth:`CacheDiTBackend.enable`.
    """
    if od_config.cache_backend not in ("cache_dit", "cache-dit") or not od_config.cache_config:
        return None
    backend = CacheDiTBackend(od_config.cache_config)
    backend.enable(pipeline)
    return backend
