"""One configuration for all cache backends, under the names of ``vllm_omni.diffusion.data``.

Each backend reads the fields that are its own and checks them; nothing is checked here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any


@dataclass
class DiffusionCacheConfig:
    """The flags of all backends. Keys that none of them knows read back as attributes.

    Attributes:
        rel_l1_thresh, coefficients: TeaCache.
        sea_threshold, sea_residual_order, sea_max_consecutive_cached, sea_power_exp: SeaCache.
        mag_threshold, mag_max_skip_steps, mag_retention_ratio, mag_ratios, mag_calibrate: MagCache.
        Fn_compute_blocks, Bn_compute_blocks, max_warmup_steps, max_cached_steps,
            residual_diff_threshold, max_continuous_cached_steps, enable_taylorseer,
            taylorseer_order, scm_steps_mask_policy, scm_steps_policy, force_refresh_step_hint,
            force_refresh_step_policy: cache-dit.
        num_inference_steps: of the requests, where a backend wants to know it when it is enabled.
        step_cache_dit_enabled, velocity_sim_thresholds, velocity_skip_countdowns,
            step_cache_dit_min_history, step_cache_dit_max_history: StepCache.
    """

    rel_l1_thresh: float | None = None
    coefficients: list[float] | None = None

    sea_threshold: float = 0.25
    sea_residual_order: int = 1
    sea_max_consecutive_cached: int = 2
    sea_power_exp: float = 3.0

    mag_threshold: float = 0.24
    mag_max_skip_steps: int = 5
    mag_retention_ratio: float = 0.1
    mag_ratios: Any = None
    mag_calibrate: bool = False

    Fn_compute_blocks: int = 1
    Bn_compute_blocks: int = 0
    max_warmup_steps: int = 4
    max_cached_steps: int = -1
    residual_diff_threshold: float = 0.24
    max_continuous_cached_steps: int = 3
    enable_taylorseer: bool = False
    taylorseer_order: int = 1
    scm_steps_mask_policy: str | None = None
    scm_steps_policy: str = "dynamic"
    num_inference_steps: int | None = None
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"

    step_cache_dit_enabled: bool = True
    velocity_sim_thresholds: list[float] = field(default_factory=lambda: [0.95, 0.93])
    velocity_skip_countdowns: list[int] = field(default_factory=lambda: [4, 2])
    step_cache_dit_min_history: int = 2
    step_cache_dit_max_history: int = 2

    _extra_params: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, stacklevel: int = 1) -> DiffusionCacheConfig:
        """A configuration of a dictionary's keys; those that are no field are kept as well.

        Warns of a key that is nearly a field's name, since it takes no effect.

        Args:
            data: the dictionary.
            stacklevel: whom a warning points at: the caller, 2 for the caller's caller.

        Raises:
            TypeError: ``data`` is no dictionary.
        """
        if not isinstance(data, dict):
            raise TypeError(f"data is a {type(data).__name__}; it must be a dict")
        names = [each.name for each in fields(cls) if not each.name.startswith("_")]
        known = {key: value for key, value in data.items() if key in names}
        unknown = {key: value for key, value in data.items() if key not in names}
        for key in unknown:
            for meant in get_close_matches(str(key), names, n=1, cutoff=0.85):
                message = f"{key!r} is no field of {cls.__name__} and takes no effect"
                warnings.warn(f"{message}; did you mean {meant!r}?", stacklevel=stacklevel + 1)
        return cls(**known, _extra_params=unknown)

    def __getattr__(self, name: str) -> Any:
        # Not for private names: copy and pickle ask for some before the fields are there.
        if not name.startswith("_") and name in self._extra_params:
            return self._extra_params[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
