"""A strategy on one module of a pipeline: put it on, begin a request, take it off.

All backends go through here, and through `omni_cache.enable` from here. Which strategy it is, and
which modules a pipeline has, is theirs to know.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

from torch import nn

from omni_cache.backends.guidance import Guidance
from omni_cache.backends.hooks import HookRegistry, ModelHook
from omni_cache.capture.extractor import Extractor, own_extractor, register_extractor
from omni_cache.errors import UncachedWarning
from omni_cache.options import FLAGS
from omni_cache.pipelines import disable, enable, is_enabled, refresh, states_of
from omni_cache.pipelines.enable import COMPILE_FLAGS, around_calls, own_module
from omni_cache.pipelines.loop import TRANSFORMERS
from omni_cache.runtime.trajectory import Trajectory
from omni_cache.strategies import Strategy

DENOISERS = (*TRANSFORMERS, "denoising_transformer")
"""Names under which pipelines of vLLM-Omni keep their denoising transformers."""

Hook = TypeVar("Hook", bound=ModelHook)

_attached: weakref.WeakKeyDictionary[nn.Module, Guidance] = weakref.WeakKeyDictionary()

_replaced: weakref.WeakKeyDictionary[nn.Module, Extractor | None] = weakref.WeakKeyDictionary()
"""The extractors that modules had before ours took their place."""


def attach(
    module: nn.Module,
    strategy: Strategy,
    flags: Mapping[str, Any] | None = None,
    extractor: Extractor | None = None,
) -> None:
    """Have a module's calls follow a strategy, with nothing kept from before.

    Args:
        module: a denoising transformer, or what ``torch.compile`` made of one.
        strategy: what decides.
        flags: further ones for ``omni_cache.enable``, such as ``inner``.
        extractor: takes calls of the module apart until it is detached, in place of another one;
            None for the one that is registered, if there is one.

    Raises:
        ValueError: as ``omni_cache.enable``.
    """
    own, guidance = own_module(module), Guidance()
    if extractor is not None:
        _replaced.setdefault(own, own_extractor(own))
        register_extractor(own, extractor)
    try:
        enable(module, strategy, **(flags or {}))
    except BaseException:
        _put_extractor_back(own)
        raise
    around_calls(own, guidance)
    _attached[own] = guidance
    refresh(module)


def begin(module: nn.Module, num_inference_steps: int | None) -> None:
    """Begin a request: forget all that is kept. 0 and None steps are an unknown number.

    Raises:
        ValueError: the number is no integer >= 0.
    """
    steps = num_inference_steps or None
    refresh(module, steps)
    guidance = _attached.get(own_module(module))
    if guidance is not None:
        guidance.begin(steps)


def detach(module: nn.Module) -> None:
    """Leave a module as it was before; one that is not attached is left alone."""
    disable(module)
    own = own_module(module)
    _attached.pop(own, None)
    _put_extractor_back(own)


def _put_extractor_back(module: nn.Module) -> None:
    if module in _replaced:
        register_extractor(module, _replaced.pop(module))


def transformers_of(pipeline: Any) -> list[nn.Module]:
    """The denoising transformers of a pipeline: the usual ones, else those that it names itself.

    A pipeline names modules, as dotted paths, in ``_dit_modules``: those that are to be moved and
    sharded, a text tower among them.
    """
    return _outermost(pipeline, DENOISERS) or _outermost(pipeline, _named(pipeline))


def named_transformers_of(pipeline: Any) -> list[nn.Module]:
    """The same, where what a pipeline names itself comes before the usual ones."""
    return _outermost(pipeline, _named(pipeline)) or _outermost(pipeline, DENOISERS)


def _named(pipeline: Any) -> Sequence[str]:
    named = getattr(pipeline, "_dit_modules", None)
    return named if isinstance(named, tuple | list) else ()


def _outermost(pipeline: Any, paths: Sequence[str]) -> list[nn.Module]:
    """The modules at dotted paths, without those that are a part of another one."""
    found = (own_module(reduce(_attribute, path.split("."), pipeline)) for path in paths)
    modules = list(dict.fromkeys(each for each in found if isinstance(each, nn.Module)))
    parts = {part for each in modules for part in each.modules() if part is not each}
    return [each for each in modules if each not in parts]


def _attribute(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def first_transformer(pipeline: Any) -> nn.Module:
    """The first of `transformers_of`, for backends that cache no second one.

    Raises:
        ValueError: there is none.
    """
    found = transformers_of(pipeline)
    if not found:
        raise no_transformer(pipeline)
    return found[0]


def no_transformer(pipeline: Any) -> ValueError:
    """What to raise of a pipeline that has nothing to cache."""
    listed = ", ".join(DENOISERS)
    message = f"{type(pipeline).__name__} has no transformer: none of {listed}"
    return ValueError(f"{message}, and _dit_modules names none")


def warn_of_others(pipeline: Any) -> None:
    """Say that the transformers besides the first one run uncached, where there are any."""
    kinds = [type(each).__name__ for each in transformers_of(pipeline)[1:]]
    if kinds:
        message = f"only the first transformer is cached; {', '.join(kinds)} runs uncached"
        warnings.warn(message, UncachedWarning, stacklevel=3)


def hook_of(module: nn.Module, kind: type[Hook]) -> Hook | None:
    """The hook of a kind that a module's calls follow.

    None where it has none, or where the cache was taken off past the hook.
    """
    registry = getattr(own_module(module), "_hook_registry", None)
    hook = registry.get_hook(kind._HOOK_NAME) if isinstance(registry, HookRegistry) else None
    return hook if isinstance(hook, kind) and is_enabled(module) else None


def remove_hook(module: nn.Module, kind: type[ModelHook]) -> None:
    """Take a hook off a module; one that has none is left alone."""
    registry = getattr(own_module(module), "_hook_registry", None)
    if isinstance(registry, HookRegistry):
        registry.remove_hook(kind._HOOK_NAME)
        registry.leave_if_empty()


def trajectories_of(module: nn.Module) -> list[Trajectory]:
    """What the runtime keeps for each branch of a module's latest generation."""
    runs = [state.latest for _, state in states_of(module)]
    return [each for run in runs if run is not None for each in run.trajectories.values()]


def guidance_of(module: nn.Module) -> Guidance | None:
    """What names the branches of a module; None where it is not attached."""
    return _attached.get(own_module(module))


def extra_flags(config: Any) -> dict[str, Any]:
    """Flags of ``omni_cache.enable`` among the keys of a configuration that are no field of it."""
    keys = getattr(config, "_extra_params", {})
    flags = {*FLAGS, *COMPILE_FLAGS, *Strategy.field_names()} - {"cache"}
    return {name: value for name, value in keys.items() if name in flags}
