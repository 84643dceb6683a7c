"""How each kind is switched on, and how the steps that it computed are counted.

Knows the peers' interfaces; each peer runs in a process in which nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from torch import nn

from omni_cache.compare.kinds import Family, Flags
from omni_cache.pipelines import enable, summary
from omni_cache.pipelines.loop import TRANSFORMERS
from omni_cache.strategies.calibrations import Calibration

Count = Callable[[], float]
"""How many steps were computed by the generation since the last count."""


def switch_on(
    family: Family,
    name: str,
    flags: Flags,
    pipe: Any,
    steps: int,
    inner: str,
    calibration: Calibration | None = None,
) -> Count:
    """Switch a kind of caching on, and compile.

    Args:
        family: whose it is.
        name: of the kind.
        flags: of the setting, as the family spells them.
        pipe: a pipeline; one that a peer has had must not be used again.
        steps: of a generation.
        inner: the compiler of the model.
        calibration: magnitude ratios of the pipeline, for peers that take some.
    """
    if family == "omni-cache":
        enable(pipe, inner=inner, **flags)
        return lambda: fmean(
            sum(step.computed for step in each.steps) for each in summary(pipe).trajectories
        )
    count = (
        _cache_dit(name, flags, pipe, steps)
        if family == "cache-dit"
        else _diffusers(name, flags, pipe, steps, calibration)
        if family == "diffusers"
        else lambda: float(flags.get("steps", steps))
    )
    # The hooks of diffusers keep the blocks that they are on from being compiled.
    if inner != "eager" and family != "diffusers":
        for model in (getattr(pipe, each, None) for each in TRANSFORMERS):
            if model is not None:
                model.compile(backend=inner)
    return count


def _cache_dit(name: str, flags: Flags, pipe: Any, steps: int) -> Count:
    import cache_dit

    own = dict(flags)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=own.pop("fn_compute_blocks"), Bn_compute_blocks=0, **own
    )
    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    forecast = taylor if "TaylorSeer" in name else None
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=forecast)
    return lambda: float(steps - len(cache_dit.summary(pipe, logging=False)[0].cached_steps))


def _diffusers(
    name: str, flags: Flags, pipe: Any, steps: int, calibration: Calibration | None
) -> Count:
    from diffusers import hooks

    own, model = dict(flags), pipe.transformer
    if name == "MagCache":
        assert calibration is not None
        (transformer, *_) = calibration.transformers.values()
        (branch, *_) = transformer.branches.values()
        own |= {"mag_ratios": list(branch.numbers), "num_inference_steps": steps}
    if name == "TaylorSeer":
        # Its own default rounds what it extrapolates from to bfloat16.
        own |= {"taylor_factors_dtype": next(model.parameters()).dtype}
    configs = {
        "FirstBlockCache": hooks.FirstBlockCacheConfig,
        "MagCache": hooks.MagCacheConfig,
        "TaylorSeer": hooks.TaylorSeerCacheConfig,
    }
    model.enable_cache(configs[name](**own))
    share = _count_by_attention(model)
    return lambda: steps * share()


def _count_by_attention(model: nn.Module) -> Count:
    """By a layer of the last block's attention, which runs in computed steps only.

    The hooks replace the ``forward`` of blocks and attentions, and leave layers within them alone.

    Returns:
        What counts the share of the model's calls in which the layer ran.
    """
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) > 1]
    layer = next(
        each
        for name, each in lists[-1][-1].named_modules()
        if "attn" in name and isinstance(each, nn.Linear)
    )
    ran = {"layer": 0, "model": 0}

    def count_up(what: str) -> Callable[..., None]:
        return lambda *_: ran.update({what: ran[what] + 1})

    layer.register_forward_pre_hook(count_up("layer"))
    model.register_forward_pre_hook(count_up("model"))

    def count() -> float:
        # Both once for each guidance branch.
        share = ran["layer"] / max(ran["model"], 1)
        ran.update(layer=0, model=0)
        return share

    return count
