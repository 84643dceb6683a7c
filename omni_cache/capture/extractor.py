"""The second front end, for models whose block loop no graph holds: an extractor says what it is.

    arguments -> extractor -> CacheContext -> gate -> compute: run_transformer_blocks -> postprocess
                                                   -> reuse:   states + residuals     -> postprocess

It feeds the executor, gates and trajectories that graphs feed. The interface is that of vLLM-Omni's
TeaCache (``vllm_omni.diffusion.cache.teacache``), so that an extractor written for it serves here.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from omni_cache.capture.function import with_own_code
from omni_cache.capture.ranks import groups_of_module
from omni_cache.dynamo import compiled
from omni_cache.errors import NO_GRADIENTS, UncachedWarning
from omni_cache.lowering.inner import compile_part
from omni_cache.lowering.program import CompiledPart, GuardedParts, Program
from omni_cache.options import CompileOptions
from omni_cache.passes import FINITE, Entered, RegionError
from omni_cache.passes.storage import FLOAT8, of_partners, restore, scaled, unscaled
from omni_cache.runtime.calls import bound_call
from omni_cache.runtime.contexts import branch
from omni_cache.runtime.decision import Guarded
from omni_cache.runtime.executor import Executor
from omni_cache.runtime.placement import Placement


@dataclass
class CacheContext:
    """A model's call, taken apart around its blocks.

    Attributes:
        modulated_input: the signal, what the first block's attention reads: (B, ...).
        hidden_states: what enters the blocks: (B, S, D).
        encoder_hidden_states: the second stream that enters them, None where there is one stream.
        temb: the timestep embedding; an extractor may leave it out (None) where the blocks take
            none.
        run_transformer_blocks: runs them on what enters, and returns the streams that leave them
            as a tuple ``(hidden_states,)`` or ``(hidden_states, encoder_hidden_states)``, in the
            shapes in which they entered. It may write into these streams, unless one of them is
            ``modulated_input`` too.
        postprocess: from the first stream that leaves the blocks to what the model returns.
        extra_states: what else an extractor wants to carry. These keys are read:
            "run_flux2_full_transformer_with_single", a function from both streams to both streams,
            takes the place of ``run_transformer_blocks``, and the residual of the first one alone
            is kept; "synchronize_cache_decision", a function from whether this rank computes to
            whether all do, has the last word; "teacache_branch" names the guidance branch.
    """

    modulated_input: Tensor
    hidden_states: Tensor
    encoder_hidden_states: Tensor | None
    temb: Tensor | None
    run_transformer_blocks: Callable[[], tuple[Tensor, ...]]
    postprocess: Callable[[Tensor], Any]
    extra_states: dict[str, Any] | None = None

    def validate(self) -> None:
        """Check the fields: the types of all first.

        Raises:
            TypeError: a field is not of its type. ``temb`` has to be a tensor.
            RuntimeError: a callable does not take the arguments that it will be called with.
            ValueError: batch sizes or devices disagree, or the hidden states are no floating-point
                tensor with a batch.
        """
        _check(self)


def _check(context: CacheContext, may_lack: Sequence[str] = ("encoder_hidden_states",)) -> None:
    """Check a context, in which some tensors may be None."""
    for name in ("modulated_input", "hidden_states", "encoder_hidden_states", "temb"):
        given = getattr(context, name)
        if not isinstance(given, Tensor) and not (name in may_lack and given is None):
            allowed = "a Tensor or None" if name in may_lack else "a Tensor"
            raise TypeError(_refusal(name, type(given).__name__, allowed))
    callables = {"run_transformer_blocks": (), "postprocess": (None,)}
    for name in callables:
        given = getattr(context, name)
        if not callable(given):
            raise TypeError(_refusal(name, type(given).__name__, "callable"))
    extra: Any = context.extra_states
    if not isinstance(extra, dict | None):
        raise TypeError(_refusal("extra_states", type(extra).__name__, "a dict or None"))
    for name, arguments in callables.items():
        given = getattr(context, name)
        if not _takes(given, arguments):
            count = "no argument" if not arguments else "one argument, the hidden states"
            signature = str(inspect.signature(given))
            raise RuntimeError(_refusal(name, signature, f"callable with {count}"))
    states = context.hidden_states
    if states.dim() < 1 or not states.is_floating_point():
        given = f"{states.dtype} of shape {tuple(states.shape)}"
        raise ValueError(
            _refusal("hidden_states", given, "a floating-point tensor of shape (B, ..., D)")
        )
    if context.modulated_input.shape[:1] != states.shape[:1]:
        given = f"of shape {tuple(context.modulated_input.shape)}"
        allowed = f"of the batch size of hidden_states, {states.shape[0]}"
        raise ValueError(_refusal("modulated_input", given, allowed))
    for name in ("modulated_input", "encoder_hidden_states", "temb"):
        given = getattr(context, name)
        if given is not None and given.device != states.device:
            allowed = f"on the device of hidden_states, {states.device}"
            raise ValueError(_refusal(name, f"on {given.device}", allowed))


Extractor = Callable[..., CacheContext]

EXTRACTORS: dict[str, Extractor] = {}
"""The extractors of model classes, by the name of the class."""

_of_modules: weakref.WeakKeyDictionary[nn.Module, Extractor] = weakref.WeakKeyDictionary()


def register_extractor(
    model_class: str | type[nn.Module] | nn.Module, extractor: Extractor | None
) -> None:
    """Say how calls of a model class are taken apart, for models whose blocks no graph holds.

    It counts for models that are enabled from then on, in place of what a graph would tell.

    Args:
        model_class: the class, or its name; subclasses of it are meant too. A module means that
            one alone, and comes before its class.
        extractor: called as ``extractor(module, *args, **kwargs)`` with the arguments of the
            module's ``forward``; None takes back what was registered.

    Raises:
        TypeError: ``model_class`` is neither a module, a class nor a name, or ``extractor`` is not
            callable.
    """
    if extractor is not None and not callable(extractor):
        raise TypeError(_refusal("extractor", repr(extractor), "callable or None"))
    registry: Any = _of_modules if isinstance(model_class, nn.Module) else EXTRACTORS
    key = model_class if isinstance(model_class, nn.Module) else _name(model_class)
    if extractor is None:
        registry.pop(key, None)
    else:
        registry[key] = extractor


def _name(model_class: Any) -> str:
    name = model_class if isinstance(model_class, str) else getattr(model_class, "__name__", None)
    if name is None:
        raise TypeError(_refusal("model_class", repr(model_class), "a class or its name"))
    return str(name)


def own_extractor(module: nn.Module) -> Extractor | None:
    """The extractor that is registered for a module alone."""
    return _of_modules.get(module)


def find_extractor(module: nn.Module) -> Extractor | None:
    """The extractor that is registered for a module, its class or the nearest of its bases."""
    own = own_extractor(module)
    names = (each.__name__ for each in type(module).__mro__)
    return own or next((EXTRACTORS[name] for name in names if name in EXTRACTORS), None)


def extract(extractor: Extractor, module: nn.Module, *args: Any, **kwargs: Any) -> CacheContext:
    """A call's context, checked.

    Raises:
        TypeError: the extractor returns something else, or see :meth:`CacheContext.validate`,
            which wants a ``temb`` as well.
        ValueError: see there.
        RuntimeError: see there.
    """
    context = extractor(module, *args, **kwargs)
    # By name, so that vLLM-Omni's own class serves.
    if CacheContext.__name__ not in (each.__name__ for each in type(context).__mro__):
        raise TypeError(
            f"the extractor of {type(module).__name__} returned a {type(context).__name__}; it "
            "must return an omni_cache.CacheContext"
        )
    _check(context, ("encoder_hidden_states", "temb"))
    return context


class ExtractedModel:
    """Calls of one model as its extractor takes them apart, under a guard.

    Args:
        extractor: of the model's class.
        model_class: the class.
        flags: with a strategy.
        compile_flags: flags of ``torch.compile``, for the blocks.

    Raises:
        ValueError: a flag asks for what only a graph has.
    """

    def __init__(
        self,
        extractor: Extractor,
        model_class: type[nn.Module],
        flags: CompileOptions,
        **compile_flags: Any,
    ) -> None:
        assert flags.guard is not None  # without a cache there is nothing to take apart
        if flags.region is not None:
            raise ValueError(_refusal("region", repr(list(flags.region)), _ONLY_GRAPHS))
        if flags.guard is not None and flags.guard.within is not None:
            raise ValueError(_refusal("lowering", "'cond'", _NO_GRAPH))
        if flags.hoist:
            raise ValueError(_refusal("hoist", repr(flags.hoist), _NO_GRAPH))
        self._extractor = extractor
        self._model_class = model_class.__name__
        if flags.guard.whole or flags.guard.skips:
            given = "one that skips the whole model"
            raise ValueError(_refusal("cache", given, _RUNS_IN_PARTS))
        source = flags.guard.source_of(self._model_class)
        signal = None if source is None else flags.signal or source
        if signal not in (*_SIGNALS, None):
            known = f"{' or '.join(map(repr, _SIGNALS))} for a model with an extractor"
            raise ValueError(_refusal("signal", repr(signal), known))
        self._signal = None if signal is None else _SIGNALS[signal]
        self._flags, self._guard = flags, flags.guard
        self._run_blocks = _compiled_blocks(model_class, flags, compile_flags)
        # One for calls with one stream, one for those with two.
        self._executors: dict[Sequence[str], Executor] = {}
        self._has_warned = False

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the module; returns what its ``forward`` would."""
        try:
            if torch.is_grad_enabled():
                raise RegionError(NO_GRADIENTS)
            context = extract(self._extractor, module, *args, **kwargs)
            if self._signal == _LATENTS:
                _check_latents(context.extra_states or {})
            if not self._executors:
                groups = groups_of_module(module, self._flags.process_group)
                for streams in (_STREAMS[:1], _STREAMS):
                    self._executors[streams] = self._executor(streams, groups)
        except RegionError as error:
            if self._flags.strict:
                raise
            if not self._has_warned:
                self._has_warned = True
                message = f"{type(module).__name__} runs uncached: {error}"
                warnings.warn(message, UncachedWarning, stacklevel=2)
            return module.forward(*args, **kwargs)
        states, call = context.extra_states or {}, bound_call.get()
        if call is not None:
            call.agree = states.get("synchronize_cache_decision")
        name = states.get("teacache_branch")
        run_both = states.get("run_flux2_full_transformer_with_single")
        if run_both is not None:
            _run_first_stream_by(context, run_both)
        has_one = context.encoder_hidden_states is None
        executor = self._executors[_STREAMS[:1] if has_one else _STREAMS]
        with nullcontext() if name is None else branch(str(name)):
            return executor(context)[-1]

    def _executor(self, streams: Sequence[str], groups: Sequence[Any]) -> Executor:
        made = [f"{stream}_made" for stream in streams]
        history_dtype = self._flags.history_dtype
        has_scales = history_dtype is FLOAT8
        kinds = ("residual", "dtype", "scale") if has_scales else ("residual", "dtype")
        residuals = [f"{stream}_{kind}" for kind in kinds for stream in streams]
        inputs = [*streams, *([] if self._signal is None else [self._signal])]
        inputs = list(dict.fromkeys(inputs))

        def prologue(context: CacheContext) -> list[Any]:
            return [_read(context, name) for name in inputs]

        def body(context: CacheContext, *entered: Tensor) -> list[Tensor]:
            before = [each.clone() for each in entered]  # blocks may write into them
            left = _checked(self._run_blocks(context.run_transformer_blocks), entered)
            changes = [
                (new - old.to(new.dtype)).to(unscaled(history_dtype or new.dtype))
                for new, old in zip(left, before, strict=True)
            ]
            finite = torch.stack([each.isfinite().all() for each in changes]).all()
            changes = [each.nan_to_num(0.0, 0.0, 0.0) for each in changes]
            # What a reused step gives its streams, whose residuals may be of another dtype.
            dtypes = [each.new_empty(0) for each in left]
            scales: list[Tensor] = []
            if has_scales:
                changes, scales = map(list, zip(*map(scaled, changes), strict=True))
            return [*left, *changes, *dtypes, *scales, finite]

        def epilogue(context: CacheContext, *left: Tensor) -> list[Any]:
            # An extractor may have postprocess read the streams off the context.
            for name, state in zip(streams, left, strict=True):
                setattr(context, name, state)
            result = context.postprocess(left[0])
            return [*tree_leaves(result), result]

        depth, weighs_too = self._guard.depth, self._guard.inputs
        before = [f"{stream}_before" for stream in streams] if weighs_too else []
        history = [[f"{name}_{age}" for name in residuals] for age in range(depth)]

        def reuse(context: CacheContext, *values: Tensor) -> list[Any]:
            entered, kept, row = values[: len(streams)], values[len(streams) : -1], values[-1]
            kept, earlier = kept[: depth * len(residuals)], kept[depth * len(residuals) :]
            sets = [
                restore(kept[age:][: len(residuals)]) for age in range(0, len(kept), len(residuals))
            ]
            left = []
            for place, old in enumerate(entered):
                dtype = kept[len(streams) + place].dtype
                # Of as many dimensions as the stream, so that sums are of float32 at least.
                weights = row.reshape(-1, *[1] * (old.dim() - 1), row.shape[-1]).unbind(-1)
                changes = [each[place] for each in sets]
                if weighs_too:
                    changes += [old.to(dtype), earlier[place].to(dtype)]
                terms = (w * each for w, each in zip(weights, changes, strict=True))
                left.append((old.to(dtype) + reduce(torch.add, terms)).to(dtype))
            return epilogue(context, *left)

        parts = GuardedParts(
            CompiledPart(prologue, ["context"], inputs),
            CompiledPart(body, ["context", *streams], [*made, *residuals, FINITE]),
            CompiledPart(epilogue, ["context", *made]),
            CompiledPart(
                reuse,
                [
                    "context",
                    *streams,
                    *(name for names in history for name in names),
                    *before,
                    "weights",
                ],
            ),
            residuals,
            history,
            "weights",
            self._signal,
            entered=[
                Entered(stream, name, True, of_partners(history_dtype))
                for stream, name in zip(streams, before, strict=False)
            ],
        )
        # The blocks may write into what they are given.
        program = Program(parts, ["context"], [False], copies_signal=True)
        device, per_sample = self._flags.history_device, not groups
        guarded = Guarded("blocks", self._extractor, depth, device, groups, per_sample, weighs_too)
        compiled_for = self._guard, self._flags.signal
        placement = Placement(
            guarded, self._model_class, *compiled_for, None, None, inputs=(), by_call=True
        )
        return Executor(program, placement)


def _check_latents(states: Mapping[str, Any]) -> None:
    """Refuse a call that gives no latents to compare, or none with noise."""
    given = states.get(_LATENTS)
    latents = given if isinstance(given, list) else []
    if not latents or not all(isinstance(each, Tensor) and each.dim() == 5 for each in latents):
        raise RegionError(f"the extractor gives no list of 5-D tensors as {_LATENTS!r}")
    if any(each.shape != latents[-1].shape for each in latents):
        raise RegionError(f"the tensors of {_LATENTS!r} have several shapes")
    mask = states.get("sea_cache_noisy_frame_mask")
    if isinstance(mask, Tensor) and not mask.any():
        raise RegionError("no frame of the latents is noisy")


def _read(context: CacheContext, name: str) -> Tensor:
    """What enters the blocks or is compared; several latents as one batch."""
    if name == _LATENTS:
        return torch.cat((context.extra_states or {})[name])
    found: Tensor = getattr(context, name)
    return found


def _run_first_stream_by(context: CacheContext, run_both: Callable[..., Any]) -> None:
    """Have a context's blocks run by a function of both streams, of which the first one counts."""
    encoder = context.encoder_hidden_states

    def run_transformer_blocks() -> tuple[Tensor, ...]:
        hidden: Tensor = run_both(context.hidden_states, encoder)[0]
        return (hidden,)

    context.run_transformer_blocks, context.encoder_hidden_states = run_transformer_blocks, None


_STREAMS = ("hidden_states", "encoder_hidden_states")
_LATENTS = "sea_cache_latents"
_SIGNALS = {"auto": "modulated_input", "timestep_embedding": "temb", "latents": _LATENTS}
_ONLY_GRAPHS = "left out for a model with an extractor, which itself says what is compared"


_NO_GRAPH = "left out for a model with an extractor, which has no graph to take anything out of"


_RUNS_IN_PARTS = "another strategy for a model with an extractor, which runs in parts"


def _run_blocks(blocks: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return blocks()


def _compiled_blocks(
    model_class: type[nn.Module], flags: CompileOptions, compile_flags: Mapping[str, Any]
) -> Callable[..., Any]:
    """What runs blocks, compiled with the inner compiler; in pieces where they break."""
    if flags.inner == "eager":
        return _run_blocks
    run = with_own_code(_run_blocks, model_class, {**vars(flags), **compile_flags})
    fullgraph, dynamic = compile_flags.get("fullgraph"), compile_flags.get("dynamic")
    return compiled(run, _Inner(flags), bool(fullgraph), dynamic)


@dataclass(frozen=True)
class _Inner:
    """The inner compiler as a backend; equal ones share what is compiled."""

    flags: CompileOptions

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return compile_part(gm, example_inputs, self.flags)


def _checked(left: Any, entered: Sequence[Tensor]) -> list[Tensor]:
    """What leaves the blocks: a stream that they do not return stays as it entered."""
    name = "run_transformer_blocks"
    if not isinstance(left, tuple) or not 0 < len(left) <= len(entered):
        given = f"{len(left)} values" if isinstance(left, tuple) else type(left).__name__
        allowed = f"a function that returns a tuple of {len(entered)} or fewer tensors"
        raise TypeError(_refusal(name, f"returning {given}", allowed))
    states = [*left, *entered[len(left) :]]
    for stream, new, old in zip(_STREAMS, states, entered, strict=False):
        if new.shape != old.shape:
            raise ValueError(
                _refusal(
                    name,
                    f"returning {stream} of shape {tuple(new.shape)}",
                    f"a function that returns it in the shape that it had, {tuple(old.shape)}",
                )
            )
    return states


def _takes(function: Callable[..., Any], arguments: Sequence[Any]) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a built-in that does not tell
        return True
    return True


def _refusal(name: str, given: str, allowed: str) -> str:
    return f"{name}={given} is not allowed; {name} must be {allowed}"
