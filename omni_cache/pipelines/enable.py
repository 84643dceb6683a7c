"""enable, disable, refresh and summary, for a diffusers pipeline or a bare module.

Enabling compiles each denoising transformer in place, so that it keeps its type and attributes, and
listens to what the pipeline says of its loop: ``scheduler.set_timesteps`` starts a generation with
its number of steps, ``transformer.cache_context`` names the branch. Both are instance attributes
laid over the class's own, and are taken away again by ``disable``.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from omni_cache.backend import omni_cache_backend
from omni_cache.options import FLAGS, NO_CACHE, CompileOptions
from omni_cache.runtime import (
    Generation,
    ModelState,
    Summary,
    bind,
    branch,
    states_of_module,
    summarise,
)

TRANSFORMERS = ("transformer", "transformer_2")
"""Names under which pipelines keep their denoising transformers."""


class _Enabled:
    """One model with its cache on, and how to take it off again."""

    def __init__(self, module: nn.Module, flags: dict[str, Any]) -> None:
        self.flags = flags
        self.state = ModelState()
        self.compiled_before = {
            name: value for name, value in vars(module).items() if name == "_compiled_call_impl"
        }
        self.has_context = hasattr(module, "cache_context")


_numbers = itertools.count()
_entries: weakref.WeakValueDictionary[Any, FunctionType] = weakref.WeakValueDictionary()
_enabled: weakref.WeakKeyDictionary[nn.Module, _Enabled] = weakref.WeakKeyDictionary()


def enable(target: Any, cache: Any = "teacache", **flags: Any) -> Any:
    """Switch caching on.

    Enabling again with other flags replaces the cache; with the same flags it changes nothing.

    Args:
        target: a diffusers pipeline, or a module.
        cache: a strategy's name, a strategy's config object, or ``"none"`` to compile only.
        flags: the compile-time flags, see the README. ``dynamic`` and ``fullgraph`` go to
            ``torch.compile``.

    Returns:
        ``target``.

    Raises:
        TypeError: ``target`` is no module and has no transformer.
        ValueError: a flag is unknown or has a value that is not allowed.
    """
    compile_flags: dict[str, Any] = {
        key: flags.pop(key) for key in ("dynamic", "fullgraph") if key in flags
    }
    strategy = CompileOptions.parse({"cache": cache, **flags}).strategy
    # Dynamo compares options; a config object has plain numbers where a flag may be a tensor.
    options = {key: value for key, value in flags.items() if key in FLAGS}
    options["cache"] = strategy or NO_CACHE
    models = _models(target)
    for module in models.values():
        _enable_module(module, options, compile_flags)
    if not isinstance(target, nn.Module):
        _listen_to_scheduler(target, list(models.values()))
    return target


def disable(target: Any) -> Any:
    """Switch caching off: the pipeline or module is as it was before ``enable``.

    Returns:
        ``target``. One that is not enabled is left as it is.

    Raises:
        TypeError: ``target`` is no module and has no transformer.
    """
    for module in _models(target).values():
        enabled = _enabled.pop(module, None)
        if enabled is None:
            continue
        enabled.state.forget()
        vars(module).pop("_compiled_call_impl", None)
        vars(module).update(enabled.compiled_before)
        vars(module).pop("cache_context", None)
    scheduler = getattr(target, "scheduler", None)
    if not isinstance(target, nn.Module) and scheduler is not None:
        vars(scheduler).pop("set_timesteps", None)
    return target


def is_enabled(target: Any) -> bool:
    """Whether ``enable`` has been called on a pipeline or module, and not yet ``disable``."""
    return any(module in _enabled for module in _models(target).values())


def refresh(target: Any, num_inference_steps: int | None = None) -> Any:
    """Forget everything that is cached, and expect a new generation.

    Args:
        target: an enabled pipeline or module, or one that was compiled with the backend.
        num_inference_steps: the number of steps of the coming generation, where it is known.

    Raises:
        TypeError: ``target`` is no module and has no transformer.
        ValueError: ``num_inference_steps`` is no integer >= 1.
    """
    if num_inference_steps is not None and (
        not isinstance(num_inference_steps, int) or num_inference_steps < 1
    ):
        raise ValueError(
            f"num_inference_steps={num_inference_steps!r} is not allowed; num_inference_steps must "
            "be an integer >= 1 or None"
        )
    states = [state for _, state in _states(target)]
    for state in states:
        state.forget()
    if num_inference_steps is not None:
        coming = Generation(num_inference_steps, experts=len(states) > 1)
        for state in states:
            state.announce(coming)
    return target


def summary(target: Any) -> Summary:
    """What the latest generation computed and reused, and why.

    Args:
        target: an enabled pipeline or module, or a module compiled with the backend.

    Raises:
        TypeError: ``target`` is no module and has no transformer.
    """
    return summarise(_states(target))


def _models(target: Any) -> dict[str, nn.Module]:
    """The modules to cache, by their names in the pipeline."""
    if isinstance(target, nn.Module):
        return {"": getattr(target, "_orig_mod", target)}
    found = {name: getattr(target, name, None) for name in TRANSFORMERS}
    models = {
        name: getattr(each, "_orig_mod", each)
        for name, each in found.items()
        if isinstance(each, nn.Module)
    }
    if not models:
        raise TypeError(
            f"target={type(target).__name__} is not allowed; target must be a torch.nn.Module or a "
            f"pipeline with a component named {' or '.join(TRANSFORMERS)}"
        )
    return models


def _states(target: Any) -> list[tuple[str, ModelState]]:
    states: list[tuple[str, ModelState]] = []
    for name, module in _models(target).items():
        enabled = _enabled.get(module)
        own = [enabled.state] if enabled is not None else states_of_module(module)
        states += [(name, state) for state in own]
    return states


def _enable_module(
    module: nn.Module, options: dict[str, Any], compile_flags: dict[str, Any]
) -> None:
    flags = {**options, **compile_flags}
    current = _enabled.get(module)
    if current is not None:
        if current.flags == flags:
            return
        disable(module)
    enabled = _enabled[module] = _Enabled(module, flags)
    compiled = torch.compile(
        _entry(type(module), flags), backend=omni_cache_backend, options=options, **compile_flags
    )
    state = enabled.state
    owner = weakref.ref(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        with bind(state):
            return compiled(owner(), *args, **kwargs)

    module._compiled_call_impl = call
    if enabled.has_context:
        # Over the class's method, for this instance alone. The reference back must be weak: a
        # module that owns a closure over itself would be freed by the cycle collector only.
        vars(module)["cache_context"] = _named_context(weakref.ref(module))


def _entry(module_class: type[nn.Module], flags: dict[str, Any]) -> Callable[..., Any]:
    """The function to compile for a class and its flags, with a code object of its own.

    Dynamo compiles one code object only so many times, whatever the backend, and would leave the
    models enabled after that uncompiled. Models of one class with equal flags share one.
    """
    key = (module_class, repr(sorted(flags.items(), key=lambda item: item[0])))
    entry = _entries.get(key)
    if entry is None:
        code = _call.__code__.replace(co_name=f"call_{module_class.__name__}_{next(_numbers)}")
        entry = _entries[key] = FunctionType(code, globals())
    return entry


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def _named_context(module: weakref.ref[nn.Module]) -> Callable[..., Any]:
    @contextmanager
    def cache_context(name: str, **place: Any) -> Iterator[None]:
        owner = module()
        assert owner is not None  # somebody is calling its method
        original: Any = getattr(type(owner), "cache_context")  # noqa: B009
        with original(owner, name, **place), branch(name, place.get("step_index")):
            yield

    return cache_context


def _listen_to_scheduler(pipeline: Any, models: list[nn.Module]) -> None:
    """Make ``scheduler.set_timesteps`` announce a generation to the pipeline's models."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "set_timesteps"):
        return
    references = [weakref.ref(module) for module in models]
    own_scheduler = weakref.ref(scheduler)

    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        owner = own_scheduler()
        assert owner is not None  # somebody is calling its method
        result = type(owner).set_timesteps(owner, *args, **kwargs)
        coming = Generation(len(owner.timesteps), experts=len(references) > 1)
        for reference in references:
            module = reference()
            enabled = _enabled.get(module) if module is not None else None
            if enabled is not None:
                enabled.state.announce(coming)
        return result

    # Pipelines look at the signature to learn whether the scheduler takes sigmas of their own.
    set_timesteps.__signature__ = inspect.signature(scheduler.set_timesteps)  # type: ignore[attr-defined]
    vars(scheduler)["set_timesteps"] = set_timesteps
