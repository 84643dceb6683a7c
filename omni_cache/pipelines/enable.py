"""enable, disable, refresh and summary, for a diffusers pipeline or a bare module.

Enabling compiles each denoising transformer in place, so that it keeps its type and attributes, and
looks at the pipeline's scheduler: new timesteps, or a step that goes back, begin a new generation
of so many steps; ``transformer.cache_context`` names the branch. All that it adds are three
attributes of the transformer and one of each block, which ``disable`` takes away and which no copy
inherits: what runs in place of its ``__call__``, of its ``forward``, of its ``cache_context``, and
of a block's ``__call__``.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from omni_cache.backend import omni_cache_backend
from omni_cache.capture.extractor import ExtractedModel, Extractor, find_extractor
from omni_cache.capture.function import CapturedFunction, tracing, with_own_code
from omni_cache.capture.pieces import refusal_in_pieces
from omni_cache.dynamo import leave_uncompiled
from omni_cache.errors import UncachedWarning
from omni_cache.options import FLAGS, CompileOptions
from omni_cache.passes import RegionError
from omni_cache.pipelines.blocks import WatchedBlock, unwatch_blocks, watch_blocks
from omni_cache.pipelines.identity import owner_of
from omni_cache.pipelines.loop import TRANSFORMERS, PipelineLoop, running_loop
from omni_cache.runtime.calls import Call, bind, bound_call
from omni_cache.runtime.contexts import Generation, branch
from omni_cache.runtime.model_state import ModelState, expected_state, states_of_module
from omni_cache.runtime.records import Summary, summarise
from omni_cache.runtime.skipping import SkippedCalls
from omni_cache.strategies import NO_CACHE, Owner, Strategy

COMPILE_FLAGS = ("dynamic", "fullgraph")
"""Flags of ``enable`` that go to ``torch.compile``."""


def enable(target: Any, cache: Any = "teacache", **flags: Any) -> Any:
    """Switch caching on.

    Enabling again with other flags replaces the cache; with the same flags it changes nothing.
    Thresholds and step counts reach the gates at run time, so other ones compile nothing anew.

    Args:
        target: a diffusers pipeline, or a module.
        cache: a strategy's name, a strategy object such as ``TeaCache(...)``, or ``"none"`` to
            compile only.
        flags: the compile-time flags, see the README. ``dynamic`` and ``fullgraph`` go to
            ``torch.compile``.

    Returns:
        ``target``.

    Raises:
        TypeError: ``target`` is not a module and has no transformer.
        ValueError: a flag is unknown or has a value that is not allowed, or asks of a model with a
            registered extractor what only a graph has, or the calibration is another model's. All
            transformers of a pipeline are then as they were before.
    """
    compile_flags: dict[str, Any] = {key: flags.pop(key) for key in COMPILE_FLAGS if key in flags}
    parsed = CompileOptions.parse({"cache": cache, **flags}, beside=COMPILE_FLAGS)
    strategy = parsed.strategy
    # Of a strategy only the guard is compiled, so that other thresholds compile nothing anew.
    options = {key: value for key, value in flags.items() if key in FLAGS}
    options["cache"] = NO_CACHE if strategy is None else parsed.guard
    models = models_of(target)
    weakref.ref(target)
    # All of them or none: what may fail comes before the first one is touched.
    scheduler = getattr(target, "scheduler", None)
    owners = {name: owner_of(name, each, scheduler) for name, each in models.items()}
    strategies = {
        name: None if strategy is None else strategy.for_transformer(owner)
        for name, owner in owners.items()
    }
    if parsed.guard is not None and parsed.guard.within is not None:
        # What decides in a graph is the strategy of this transformer.
        guards = {name: each.guard_within() for name, each in strategies.items() if each}
    else:
        guards = {}
    calls = {
        name: _call_for(
            each, {**options, "cache": guards.get(name, options["cache"])}, compile_flags
        )
        for name, each in models.items()
    }
    for name, call in calls.items():
        _install(call, models[name])
        call.configure(strategies[name], owners[name])
    if not isinstance(target, nn.Module):
        for call in calls.values():
            call.belongs_to(target)
    return target


def disable(target: Any) -> Any:
    """Switch caching off: the pipeline or module is as it was before ``enable``.

    Returns:
        ``target``. One that is not enabled is left as it is.

    Raises:
        TypeError: ``target`` is not a module and has no transformer.
    """
    for module in models_of(target).values():
        _disable_module(module)
    return target


@contextmanager
def as_it_was(target: Any) -> Iterator[None]:
    """Leave a pipeline or module at the end as it is now, enabled or not.

    What was compiled for it is still there then.
    """
    before = [(module, _enabled.get(module)) for module in models_of(target).values()]
    states = [
        None if call is None else (call.state.strategy, call.state.owner) for _, call in before
    ]
    try:
        yield
    finally:
        for (module, call), state in zip(before, states, strict=True):
            _disable_module(module)
            if call is not None and state is not None:
                _install(call, module)
                call.configure(*state)


def is_enabled(target: Any) -> bool:
    """Whether ``enable`` has been called on a pipeline or module, and not yet ``disable``."""
    return any(module in _enabled for module in models_of(target).values())


def around_calls(
    module: nn.Module, context: Callable[[Call], AbstractContextManager[None]]
) -> None:
    """Enter a context around every call of an enabled module, such as one that names its branch.

    Args:
        module: enabled; the context goes when other flags are enabled or it is disabled.
        context: makes it for a call.
    """
    _enabled[module].context = context


def enabled_flags(module: nn.Module) -> dict[str, Any] | None:
    """The flags that a module is enabled with; None where it is not."""
    call = _enabled.get(own_module(module))
    if call is None:
        return None
    flags = {key: value for key, value in call.flags.items() if key in FLAGS}
    return flags if call.state.strategy is None else {**flags, "cache": call.state.strategy}


def refresh(target: Any, num_inference_steps: int | None = None) -> Any:
    """Forget everything that is cached, and expect a new generation.

    Args:
        target: an enabled pipeline or module, or one that was compiled with the backend.
        num_inference_steps: the number of steps of the coming generation, where it is known.

    Raises:
        TypeError: ``target`` is not a module and has no transformer.
        ValueError: ``num_inference_steps`` is not an integer >= 1.
    """
    models = models_of(target)
    Generation(num_inference_steps)  # raises if it is not a number of steps
    states = [state for _, state in states_of(target)]
    if not states and num_inference_steps is not None:
        states = [expected_state(module) for module in models.values()]
    for state in states:
        state.forget()
        if num_inference_steps is not None:
            state.expected_steps = num_inference_steps
    return target


def summary(target: Any) -> Summary:
    """What the latest generation computed and reused, and why.

    Args:
        target: an enabled pipeline or module, or a module compiled with the backend.

    Raises:
        TypeError: ``target`` is not a module and has no transformer.
    """
    return summarise(states_of(target))


def own_module(module: Any) -> Any:
    """The module itself, where it is one that ``torch.compile`` has wrapped."""
    return getattr(module, "_orig_mod", module)


def models_of(target: Any) -> dict[str, nn.Module]:
    """The modules to cache, by their names in the pipeline."""
    if isinstance(target, nn.Module):
        return {"": own_module(target)}
    found = {name: getattr(target, name, None) for name in TRANSFORMERS}
    models = {name: own_module(each) for name, each in found.items() if isinstance(each, nn.Module)}
    if not models:
        raise TypeError(
            f"target={type(target).__name__} is not allowed; target must be a torch.nn.Module or a "
            f"pipeline with a component named {' or '.join(TRANSFORMERS)}"
        )
    return models


def states_of(target: Any) -> list[tuple[str, ModelState]]:
    """What the runtime knows of each transformer, by its name in the pipeline ("" for a module)."""
    states: list[tuple[str, ModelState]] = []
    for name, module in models_of(target).items():
        call = _enabled.get(module)
        own = [call.state] if call is not None else states_of_module(module)
        states += [(name, state) for state in own]
    return states


class _CachedCall:
    """What an enabled module runs when it is called. Copies of the module leave it out."""

    def __init__(
        self, module: nn.Module, options: dict[str, Any], compile_flags: dict[str, Any]
    ) -> None:
        self.flags = {**options, **compile_flags}
        self.extractor = find_extractor(module)
        self.state = ModelState()
        current = _enabled.get(module)
        self.pipelines: list[weakref.ref[Any]] = [] if current is None else current.pipelines
        # What the module had before it was enabled, unless somebody has set it since.
        before, forward = (vars(module).get(name) for name in ("_compiled_call_impl", "forward"))
        if isinstance(before, _CachedCall):
            before = before.before
        if isinstance(forward, _CachedForward):
            forward = forward.before
        self.before: Any = before
        # By weak reference: a module that owned itself would be freed by the cycle collector only.
        self._module = weakref.ref(module)
        self.forward = _CachedForward(module, forward, self.flags)
        parameters = inspect.signature(module.forward).parameters.values()
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._parameters = [each.name for each in parameters if each.kind in by_place]
        self._run = _runner(_call, module, self.extractor, options, compile_flags)
        self._run_forward = (
            self._run
            if isinstance(self._run, ExtractedModel)
            else _runner(_call_forward, module, None, options, compile_flags)
        )
        self._has_warned = False
        self.skipped = SkippedCalls()
        self.blocks: list[WatchedBlock] = []
        self.context: Callable[[Call], AbstractContextManager[None]] = lambda call: nullcontext()

    def is_for(
        self, module: nn.Module, options: dict[str, Any], compile_flags: dict[str, Any]
    ) -> bool:
        """Whether one made now for these flags would run the same."""
        same_flags = self.flags == {**options, **compile_flags}
        return same_flags and self.extractor is find_extractor(module)

    def belongs_to(self, pipeline: Any) -> None:
        """Take the pipeline's loops into account."""
        others = (each for each in self.pipelines if each() not in (None, pipeline))
        self.pipelines = [*others, weakref.ref(pipeline)]

    def configure(self, strategy: Strategy | None, owner: Owner | None) -> None:
        """Let calls follow another strategy, from the next generation on."""
        self.state.owner = owner
        if self.state.strategy != strategy:
            self.state.forget()
            self.state.strategy = strategy

    # For a compiled function that calls the module: it has nothing to trace here.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        assert module is not None  # somebody calls it
        return self._cached(self._run, module, module, args, kwargs)

    def call_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's ``forward`` runs, where that is called past its ``__call__``."""
        module = self._module()
        assert module is not None  # somebody calls its method
        first = module if isinstance(self._run_forward, ExtractedModel) else self.forward
        return self._cached(self._run_forward, module, first, args, kwargs)

    def _cached(
        self,
        run: Callable[..., Any],
        module: nn.Module,
        first: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        arguments = dict(zip(self._parameters, args, strict=False))
        for place, each in enumerate(args[len(self._parameters) :]):
            arguments[f"*{place}"] = each
        arguments.update(kwargs)
        call = Call(module, self.state, arguments, self._loop(module))
        with self.context(call), bind(call):
            result = self.skipped.skip(call)
            if result is None:
                result = run(first, *args, **kwargs)
                self.skipped.learn(call, result)
        if call.refusals or call.in_pieces:
            self._say_what_is_uncached(call)
        return result

    def _loop(self, module: nn.Module) -> PipelineLoop | None:
        """The loop that calls: that of the caller, else of the only pipeline that there is."""
        if not self.pipelines:
            return None
        alive = [pipeline for each in self.pipelines if (pipeline := each()) is not None]
        # The frames up to the third are of this class.
        return running_loop(module, sys._getframe(3), alive[0] if len(alive) == 1 else None)

    def _say_what_is_uncached(self, call: Call) -> None:
        """Warn, once, or raise if no piece of the model is cached or some of its blocks are not."""
        refusal = refusal_in_pieces(call)
        if refusal is not None:
            self._refuse("a part of " if call.is_cached else "", refusal)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def say_that_it_is_passed_by(self) -> None:
        """The same for blocks that somebody runs past the module's call and its ``forward``."""
        self._refuse("", RegionError(_PASSED_BY))

    def _refuse(self, part: str, refusal: RegionError | ValueError) -> None:
        if self.flags.get("strict") or isinstance(refusal, ValueError):
            raise refusal
        if not self._has_warned:
            self._has_warned = True
            name = f"{part}{type(self._module()).__name__}"
            warnings.warn(f"{name} runs uncached: {refusal}", UncachedWarning, stacklevel=2)


_PASSED_BY = (
    "its blocks are called one by one, by a sampler that runs them itself or through a method that "
    "was taken from the model before omni_cache.enable; call the model, or its forward as it is now"
)


class _CachedForward:
    """``forward`` of an enabled module, for samplers that call it past ``__call__``.

    A class-conditional model's ``forward_with_cfg`` calls ``self.forward``, and some samplers are
    handed ``model.forward``. What runs within a cached call of the module is the class's own.
    """

    def __init__(self, module: nn.Module, before: Any, flags: dict[str, Any]) -> None:
        self.before = before
        self._module = weakref.ref(module)
        self._function = with_own_code(type(module).forward, type(module), flags)
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_within_call():
            return self.original(*args, **kwargs)
        return self._cached(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _cached(self, *args: Any, **kwargs: Any) -> Any:
        return _enabled[self._owner()].call_forward(*args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run what ``forward`` was before: the instance's, or the class's in code of its own."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return self._function(self._module(), *args, **kwargs)

    # The same on every call of what Dynamo traces: all of a cached call is within it.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _is_within_call(self) -> bool:
        module, call = self._owner(), bound_call.get()
        return module not in _enabled or (call is not None and call.module is module)

    def _owner(self) -> nn.Module:
        module = self._module()
        assert module is not None  # somebody calls its method, or copies it
        return module

    # A copy of the module is not enabled: it gets the method that the module had before.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.before is not None:
            return copy.deepcopy(self.before, memo)
        module = self._owner()
        return _forward_of_class(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.before is not None:
            return copy.copy, (self.before,)
        return _forward_of_class, (self._owner(),)


def _forward_of_class(module: nn.Module) -> Any:
    return type(module).forward.__get__(module)


# Dynamo would compile these frames for all modules alike, and give up one for all.
for _method in (_CachedForward.__call__, _CachedForward.original):
    leave_uncompiled(_method.__code__)


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


_enabled: weakref.WeakKeyDictionary[nn.Module, _CachedCall] = weakref.WeakKeyDictionary()
"""Modules that are enabled. What is set on them may be overwritten, by ``Module.compile`` say."""


def _call_for(
    module: nn.Module, options: dict[str, Any], compile_flags: dict[str, Any]
) -> _CachedCall:
    """What runs calls of a module with these flags: what runs them now, or something new."""
    current = _enabled.get(module)
    if current is not None and current.is_for(module, options, compile_flags):
        return current
    return _CachedCall(module, options, compile_flags)


def _install(call: _CachedCall, module: nn.Module) -> None:
    if _enabled.get(module) is call:
        return
    _disable_module(module)
    _enabled[module] = call
    attributes = vars(module)
    attributes["_compiled_call_impl"] = call
    # Over the class's methods, for this instance alone.
    attributes["forward"] = call.forward
    call.blocks = watch_blocks(module, call.say_that_it_is_passed_by)
    if hasattr(module, "cache_context"):
        attributes["cache_context"] = _NamedContext(module)


def _disable_module(module: nn.Module) -> None:
    call = _enabled.pop(module, None)
    if call is None:
        return
    call.state.forget()
    unwatch_blocks(call.blocks)
    attributes = vars(module)
    # What others have put in place of it since is theirs.
    for name, ours, before in (
        ("_compiled_call_impl", call, call.before),
        ("forward", call.forward, call.forward.before),
    ):
        if attributes.get(name) is ours:
            del attributes[name]
            if before is not None:
                attributes[name] = before
    if isinstance(attributes.get("cache_context"), _NamedContext):
        del attributes["cache_context"]


def _runner(
    entry: Callable[..., Any],
    module: nn.Module,
    extractor: Extractor | None,
    options: dict[str, Any],
    compile_flags: dict[str, Any],
) -> Callable[..., Any]:
    """What calls a module under a guard, given what the entry takes and the call's arguments."""
    if extractor is not None and options["cache"] != NO_CACHE:
        flags = CompileOptions.parse(options)
        return ExtractedModel(extractor, type(module), flags, **compile_flags)
    # Models of one class with equal flags share what is compiled.
    own = with_own_code(entry, type(module), {**options, **compile_flags})
    around = partial(tracing, CompileOptions.parse(options))
    return CapturedFunction(own, _Backend(options), **compile_flags, around=around)


@dataclass(frozen=True)
class _Backend:
    """The backend with its flags; equal ones share what is compiled."""

    options: dict[str, Any]

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return omni_cache_backend(gm, example_inputs, options=self.options)


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def _call_forward(forward: _CachedForward, *args: Any, **kwargs: Any) -> Any:
    return forward.original(*args, **kwargs)
