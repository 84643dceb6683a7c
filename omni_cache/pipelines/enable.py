"""enable, disable, refresh and summary, for a diffusers pipeline or a bare module.

Enabling compiles each denoising transformer in place, so that it keeps its type and attributes, and
listens to what the pipeline says of its loop: new timesteps in its scheduler are a new generation
of so many steps, ``transformer.cache_context`` names the branch. All that it adds are two
attributes of the transformer, which ``disable`` takes away and which no copy of it inherits.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from omni_cache.backend import omni_cache_backend
from omni_cache.capture.extractor import ExtractedModel, Extractor, find_extractor
from omni_cache.capture.function import CapturedFunction, with_own_code
from omni_cache.capture.pieces import refusal_in_pieces
from omni_cache.errors import UncachedWarning
from omni_cache.options import FLAGS, NO_CACHE, CompileOptions
from omni_cache.runtime import (
    Call,
    Generation,
    ModelState,
    Summary,
    bind,
    branch,
    expected_state,
    in_generation,
    states_of_module,
    summarise,
)
from omni_cache.strategies import Strategy

TRANSFORMERS = ("transformer", "transformer_2")
"""Names under which pipelines keep their denoising transformers."""

COMPILE_FLAGS = ("dynamic", "fullgraph")
"""Flags of ``enable`` that go to ``torch.compile``."""


def enable(target: Any, cache: Any = "teacache", **flags: Any) -> Any:
    """Switch caching on.

    Enabling again with other flags replaces the cache; with the same flags it changes nothing.
    Thresholds and step counts reach the gates at run time, so other ones compile nothing anew.

    Args:
        target: a diffusers pipeline, or a module.
        cache: a strategy's name, a strategy's config object, or ``"none"`` to compile only.
        flags: the compile-time flags, see the README. ``dynamic`` and ``fullgraph`` go to
            ``torch.compile``.

    Returns:
        ``target``.

    Raises:
        TypeError: ``target`` is no module and has no transformer.
        ValueError: a flag is unknown or has a value that is not allowed, or asks of a model with a
            registered extractor what only a graph has.
    """
    compile_flags: dict[str, Any] = {key: flags.pop(key) for key in COMPILE_FLAGS if key in flags}
    strategy = CompileOptions.parse({"cache": cache, **flags}, beside=COMPILE_FLAGS).strategy
    # Dynamo compares options; a config object has plain numbers where a flag may be a tensor.
    options = {key: value for key, value in flags.items() if key in FLAGS}
    options["cache"] = NO_CACHE if strategy is None else strategy.for_compilation()
    models = _models(target)
    calls = [_enable_module(module, options, compile_flags) for module in models.values()]
    for call in calls:
        call.configure(strategy)
    if not isinstance(target, nn.Module):
        loop = _PipelineLoop(target, models.values())
        for call in calls:
            call.follow(loop)
    return target


def disable(target: Any) -> Any:
    """Switch caching off: the pipeline or module is as it was before ``enable``.

    Returns:
        ``target``. One that is not enabled is left as it is.

    Raises:
        TypeError: ``target`` is no module and has no transformer.
    """
    for module in _models(target).values():
        _disable_module(module)
    return target


def is_enabled(target: Any) -> bool:
    """Whether ``enable`` has been called on a pipeline or module, and not yet ``disable``."""
    return any(_cached_call(module) is not None for module in _models(target).values())


def enabled_flags(module: nn.Module) -> dict[str, Any] | None:
    """The flags that a module is enabled with; None where it is not."""
    call = _cached_call(getattr(module, "_orig_mod", module))
    if call is None:
        return None
    flags = {key: value for key, value in call.flags.items() if key in FLAGS}
    return flags if call.state.config is None else {**flags, "cache": call.state.config}


def refresh(target: Any, num_inference_steps: int | None = None) -> Any:
    """Forget everything that is cached, and expect a new generation.

    Args:
        target: an enabled pipeline or module, or one that was compiled with the backend.
        num_inference_steps: the number of steps of the coming generation, where it is known.

    Raises:
        TypeError: ``target`` is no module and has no transformer.
        ValueError: ``num_inference_steps`` is no integer >= 1.
    """
    models = _models(target)
    coming = Generation(num_inference_steps, experts=len(models) > 1)
    states = [state for _, state in _states(target)]
    if not states and num_inference_steps is not None:
        states = [expected_state(module) for module in models.values()]
    for state in states:
        state.forget()
        if num_inference_steps is not None:
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
        call = _cached_call(module)
        own = [call.state] if call is not None else states_of_module(module)
        states += [(name, state) for state in own]
    return states


class _PipelineLoop:
    """The denoising loop of a pipeline, as far as its scheduler tells.

    Every scheduler makes a new tensor of timesteps when a loop begins, so looking at it is enough:
    a scheduler may be replaced, copied or saved at any time, and needs no disabling.
    """

    def __init__(self, pipeline: Any, models: Iterable[nn.Module]) -> None:
        self.pipeline = weakref.ref(pipeline)
        self._models = [weakref.ref(module) for module in models]
        self._heard = self._timesteps()

    def listen(self) -> None:
        """Announce a generation to the pipeline's models if the scheduler has begun one."""
        timesteps = self._timesteps()
        if timesteps is None or timesteps is self._heard:
            return
        self._heard = timesteps
        # An image-to-image loop begins in the middle of the scheduler's steps.
        first = getattr(self._scheduler(), "begin_index", None) or 0
        coming = Generation(max(1, len(timesteps) - first), experts=len(self._models) > 1)
        for model in self._models:
            module = model()
            call = None if module is None else _cached_call(module)
            if call is not None:
                call.state.announce(coming)

    def steps_made(self) -> int | None:
        """How far the scheduler has come; None where it does not count."""
        # It counts from its first step on, some from the first scaling of the latents.
        counted: int | None = getattr(self._scheduler(), "step_index", None)
        return counted or None

    def _scheduler(self) -> Any:
        return getattr(self.pipeline(), "scheduler", None)

    def _timesteps(self) -> Any:
        scheduler = self._scheduler()
        # A scheduler is made with the timesteps of its training, and has no number of steps then.
        if getattr(scheduler, "num_inference_steps", None) is None:
            return None
        return getattr(scheduler, "timesteps", None)


class _CachedCall:
    """What an enabled module runs when it is called. Copies of the module leave it out."""

    def __init__(
        self, module: nn.Module, options: dict[str, Any], compile_flags: dict[str, Any]
    ) -> None:
        self.flags = {**options, **compile_flags}
        self.extractor = find_extractor(module)
        self.state = ModelState()
        self.before = vars(module).get("_compiled_call_impl")
        self.loops: list[_PipelineLoop] = []
        # By weak reference: a module that owned itself would be freed by the cycle collector only.
        self._module = weakref.ref(module)
        self._parameters = tuple(inspect.signature(module.forward).parameters)
        self._run = _runner(module, self.extractor, options, compile_flags)
        self._has_warned = False

    def is_for(
        self, module: nn.Module, options: dict[str, Any], compile_flags: dict[str, Any]
    ) -> bool:
        """Whether one made now for these flags would run the same."""
        same_flags = self.flags == {**options, **compile_flags}
        return same_flags and self.extractor is find_extractor(module)

    def follow(self, loop: _PipelineLoop) -> None:
        """Listen to a pipeline's loop, in place of what was heard from the pipeline before."""
        pipeline = loop.pipeline()
        others = (each for each in self.loops if each.pipeline() not in (None, pipeline))
        self.loops = [*others, loop]

    def configure(self, strategy: Strategy | None) -> None:
        """Let gates read these values from the next generation on."""
        if self.state.config != strategy:
            self.state.forget()
            self.state.config = strategy

    # For a compiled function that calls the module: it has nothing to trace here.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        alive = [loop for loop in self.loops if loop.pipeline() is not None]
        # In a generation, which of several pipelines calls is for the caller to say.
        if len(alive) == 1 or not in_generation():
            for loop in alive:
                loop.listen()
        self.state.hear(tuple(loop.steps_made() for loop in self.loops))
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        module = self._module()
        assert module is not None  # somebody calls it
        call = Call(module, self.state, arguments)
        with bind(call):
            result = self._run(module, *args, **kwargs)
        if call.in_pieces or call.refusals:
            self._say_what_is_uncached(call)
        return result

    def _say_what_is_uncached(self, call: Call) -> None:
        """Warn, once, or raise if no piece of the model is cached or some of its blocks are not."""
        refusal = refusal_in_pieces(call)
        if refusal is None:
            return
        if self.flags.get("strict") or isinstance(refusal, ValueError):
            raise refusal
        if not self._has_warned:
            self._has_warned = True
            name = f"{'a part of ' if call.is_cached else ''}{type(call.module).__name__}"
            warnings.warn(f"{name} runs uncached: {refusal}", UncachedWarning, stacklevel=2)


class _NamedContext:
    """``cache_context`` of an enabled module: the class's own, which also names the branch."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @contextmanager
    def __call__(self, name: str, **place: Any) -> Iterator[None]:
        module = self._owner()
        original = type(module).cache_context
        with original(module, name, **place), branch(name, place.get("step_index")):
            yield

    def _owner(self) -> Any:
        module = self._module()
        assert module is not None  # somebody calls its method, or copies it
        return module

    # A copy of the module is not enabled: it gets the method of its class.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = self._owner()
        return type(module).cache_context.__get__(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner(), "cache_context")


def _cached_call(module: nn.Module) -> _CachedCall | None:
    call = module._compiled_call_impl
    return call if isinstance(call, _CachedCall) else None


def _enable_module(
    module: nn.Module, options: dict[str, Any], compile_flags: dict[str, Any]
) -> _CachedCall:
    current = _cached_call(module)
    if current is not None and current.is_for(module, options, compile_flags):
        return current
    _disable_module(module)
    call = module._compiled_call_impl = _CachedCall(module, options, compile_flags)
    if current is not None:
        call.loops = current.loops
    if hasattr(module, "cache_context"):
        # Over the class's method, for this instance alone.
        vars(module)["cache_context"] = _NamedContext(module)
    return call


def _disable_module(module: nn.Module) -> None:
    attributes = vars(module)
    call = _cached_call(module)
    if call is not None:
        call.state.forget()
        del attributes["_compiled_call_impl"]
        if call.before is not None:
            attributes["_compiled_call_impl"] = call.before
    if isinstance(attributes.get("cache_context"), _NamedContext):
        del attributes["cache_context"]


def _runner(
    module: nn.Module,
    extractor: Extractor | None,
    options: dict[str, Any],
    compile_flags: dict[str, Any],
) -> Callable[..., Any]:
    """What calls a module under a guard, given the module and its arguments."""
    if extractor is not None and options["cache"] != NO_CACHE:
        flags = CompileOptions.parse(options)
        return ExtractedModel(extractor, type(module), flags, **compile_flags)
    # Models of one class with equal flags share what is compiled.
    entry = with_own_code(_call, type(module), {**options, **compile_flags})
    return CapturedFunction(entry, backend=omni_cache_backend, options=options, **compile_flags)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
