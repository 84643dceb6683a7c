"""What a configuration says to cache-dit, and what it says to our own DBCache.

One set of fields serves both engines. Nothing here imports cache-dit until it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from omni_cache.strategies import DBCache
from omni_cache.strategies.base import Row, Time, is_count, require
from omni_cache.strategies.forecasts import Taylor
from omni_cache.strategies.masks import PRESETS, preset
from omni_cache.strategies.schedules import Refresh, Reuse


@dataclass(frozen=True)
class TaylorInDBCache(Taylor):
    """TaylorSeer as cache-dit's DBCache runs it.

    Its state is made at the end of the first step, and again at the end of each step at which
    everything begins anew. Such a step and the two after it have no differences.

    Attributes:
        refresh: says where everything begins anew.
    """

    first: int = 3
    refresh: Refresh = field(kw_only=True)

    def weights(self, kept: Sequence[Time], now: Time) -> Row:
        """As `Taylor`. All that is kept comes after the latest beginning."""
        first = self.refresh.counts_from(now) + self.first
        return Taylor(self.order, first).weights(kept, now)


@dataclass
class CacheDiTAdapterConfig:
    """Which blocks a transformer has, declared on its class as ``_cache_dit_adapter_config``.

    Attributes:
        block_forward_patterns: for each attribute that is a ``ModuleList`` of blocks its
            ``cache_dit.ForwardPattern``. The engine "graph" takes these lists for the block loop,
            and finds out itself what a block takes and returns.
        has_separate_cfg: whether the guidance branches take a forward each. The engine "graph"
            knows a branch by its inputs, and asks for no word of it.
        cached_adapter_cls: a subclass of cache-dit's ``CachedAdapter``; for the engine "library".
        check_forward_pattern: whether cache-dit checks the pattern; for the engine "library".
    """

    block_forward_patterns: dict[str, Any]
    has_separate_cfg: bool = False
    cached_adapter_cls: type[Any] | None = None
    check_forward_pattern: bool = True

    def check(self, transformer: object) -> None:
        """Check that a transformer has the blocks.

        Raises:
            AttributeError: it lacks some.
        """
        missing = [name for name in self.block_forward_patterns if not hasattr(transformer, name)]
        if missing:
            raise AttributeError(
                f"block_forward_patterns={list(self.block_forward_patterns)!r} is not allowed for "
                f"{type(transformer).__name__}, which has no attribute {', '.join(missing)}"
            )


@dataclass(frozen=True)
class CacheDiTConfig:
    """The part of a ``DiffusionCacheConfig`` that is cache-dit's. Steps are those of a branch.

    Attributes:
        Fn_compute_blocks: how many blocks at the beginning always run.
        Bn_compute_blocks: how many blocks at the end always run.
        max_warmup_steps: the first steps, which are computed.
        max_cached_steps: most steps of a request that are reused; negative for any number.
        residual_diff_threshold: relative change of the first blocks' residual below which a step
            is reused.
        max_continuous_cached_steps: most steps in a row that are reused; negative for any number.
        enable_taylorseer: whether a reused step is forecast, and not held.
        taylorseer_order: order of the forecast.
        scm_steps_mask_policy: "slow", "medium", "fast", "ultra" or None: a mask of computed steps.
        scm_steps_policy: "dynamic" decides by the threshold where the mask leaves a step out,
            "static" reuses there.
        force_refresh_step_hint: the step at which everything begins anew.
        force_refresh_step_policy: "once" in a request, or "repeat" for every so many steps.

    Raises:
        ValueError: ``scm_steps_mask_policy`` is none of these.
    """

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
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"

    def __post_init__(self) -> None:
        policy = self.scm_steps_mask_policy
        allowed = f"one of {', '.join(map(repr, PRESETS))} or None"
        require(policy is None or policy in PRESETS, "scm_steps_mask_policy", policy, allowed)

    @classmethod
    def from_diffusion_config(cls, config: Any) -> CacheDiTConfig:
        """The fields of a ``DiffusionCacheConfig`` that are cache-dit's."""
        return cls(**{each.name: getattr(config, each.name) for each in fields(cls)})

    def mask(self, num_inference_steps: int | None) -> tuple[int, ...] | None:
        """A 1 for each step that is computed; None where the threshold decides on all.

        That is so without a policy, for an unknown number of steps, and for fewer than 8 steps
        other than 4 and 6, for which cache-dit has no mask.
        """
        steps, policy = num_inference_steps, self.scm_steps_mask_policy
        if policy is None or not is_count(steps, 4) or steps in (5, 7):
            return None
        return preset(policy, steps)

    def to_strategy(self, num_inference_steps: int | None = None) -> DBCache:
        """Our DBCache of these fields, for a request of so many steps.

        Raises:
            ValueError: a field has a value that is not allowed.
        """
        mask, order = self.mask(num_inference_steps), self.taylorseer_order
        require(is_count(order, 0), "taylorseer_order", order, "an integer >= 0")
        return DBCache(
            fn_compute_blocks=self.Fn_compute_blocks,
            bn_compute_blocks=self.Bn_compute_blocks,
            residual_diff_threshold=self.residual_diff_threshold,
            max_warmup_steps=self.max_warmup_steps,
            max_cached_steps=_limit(self.max_cached_steps),
            max_continuous_cached_steps=_limit(self.max_continuous_cached_steps),
            steps_computation_mask=mask,
            steps_computation_policy="dynamic" if mask is None else self.scm_steps_policy,
            force_refresh_step_hint=self.force_refresh_step_hint,
            force_refresh_step_policy=self.force_refresh_step_policy,
            forecast=self._forecast() if self.enable_taylorseer else "hold",
            num_inference_steps=num_inference_steps,
        )

    def _forecast(self) -> TaylorInDBCache:
        repeats = self.force_refresh_step_policy == "repeat"
        refresh = Refresh(Reuse(), self.force_refresh_step_hint, repeats)
        return TaylorInDBCache(self.taylorseer_order, refresh=refresh)

    def to_db_cache_config(self) -> Any:
        """``cache_dit.DBCacheConfig`` of these fields; a refresh adds the steps and the mask."""
        from cache_dit import DBCacheConfig

        return DBCacheConfig(
            num_inference_steps=None,
            Fn_compute_blocks=self.Fn_compute_blocks,
            Bn_compute_blocks=self.Bn_compute_blocks,
            max_warmup_steps=self.max_warmup_steps,
            max_cached_steps=self.max_cached_steps,
            max_continuous_cached_steps=self.max_continuous_cached_steps,
            residual_diff_threshold=self.residual_diff_threshold,
            force_refresh_step_hint=self.force_refresh_step_hint,
            force_refresh_step_policy=self.force_refresh_step_policy,
        )

    def to_calibrator_config(self) -> Any:
        """``cache_dit.TaylorSeerCalibratorConfig``, None where a reused step is held."""
        from cache_dit import TaylorSeerCalibratorConfig

        if not self.enable_taylorseer:
            return None
        return TaylorSeerCalibratorConfig(taylorseer_order=self.taylorseer_order)


def _limit(most: int) -> int | None:
    return most if most >= 0 else None
