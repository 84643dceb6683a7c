"""The ``torch.compile`` backend: a Dynamo graph goes in, an executor of its guarded form out."""

from __future__ import annotations

import hashlib
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import lookup_backend
from torch._dynamo.exc import ShortenTraceback
from torch.fx import GraphModule

from omni_cache.options import CompileOptions
from omni_cache.passes import (
    Analysis,
    BlockLoop,
    NoBlockLoopError,
    Part,
    RegionError,
    UnknownNameError,
    analyse,
    find_block_loop,
    is_static_input,
    split,
    timestep_name,
)
from omni_cache.runtime import Call, CompiledPart, Executor, GuardedParts, bound_call
from omni_cache.strategies import BoundStrategy

logger = logging.getLogger(__name__)


NO_GRADIENTS = (
    "gradients are enabled, and a reused residual has none; call the model under torch.no_grad() "
    "or torch.inference_mode()"
)


class UncachedWarning(UserWarning):
    """A model runs without a cache; the message says why."""


def omni_cache_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a denoising transformer with a guarded residual-reuse region.

    Use it as ``torch.compile(model, backend=omni_cache_backend, options={"cache": "teacache"})`` or
    by its registered name ``backend="omni_cache"``.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs, as Dynamo passes them.
        mode: mode of the inner compiler.
        options: the flags, see the README.

    Returns:
        A callable over the graph's flat inputs. A graph that cannot be cached is compiled as a
        whole, with one :class:`UncachedWarning` that says why.

    Raises:
        ValueError: a flag is unknown or has a value that is not allowed, or names a module that
            the graph does not run.
        NotImplementedError: a flag's value is planned and not built yet.
        RegionError: the graph cannot be cached and ``strict`` is set. A piece between graph breaks
            that holds no block loop is no error: another one may hold it, and nothing here tells
            that none does. Under ``enable`` that is told when a call ends.
    """
    try:
        flags = CompileOptions.parse(options, mode)
    except (ValueError, NotImplementedError) as error:
        raise unwrapped(error) from None
    if flags.strategy is None:
        return compile_part(gm, example_inputs, flags)
    frame = TracedFrame.current(gm)
    try:
        return _compile_guarded(gm, example_inputs, flags, frame)
    except RegionError as error:
        call = bound_call()
        message = f"{frame.model_class or 'a model'} runs uncached: {error}"
        if call is not None and call.in_pieces:
            # Another piece may have the block loop, which is known when they all have run.
            return _refused(compile_part(gm, example_inputs, flags), error)
        if frame.is_piece and isinstance(error, NoBlockLoopError):
            logger.info("a piece of %s", message)
        elif isinstance(error, UnknownNameError) and not frame.is_piece:
            raise unwrapped(ValueError(str(error))) from None
        elif flags.strict:
            raise unwrapped(error) from None
        else:
            warnings.warn(message, UncachedWarning, stacklevel=2)
        return compile_part(gm, example_inputs, flags)


def _refused(compiled: Callable[..., Any], error: RegionError) -> Callable[..., Any]:
    """A piece that runs uncached, and says so to the call that it runs for."""
    error = error.with_traceback(None)
    error.node = None  # the graph is not needed any more

    def run(*args: Any) -> Any:
        call = bound_call()
        if call is not None:
            call.refusals.append(error)
        return compiled(*args)

    return run


def refusal_in_pieces(call: Call) -> RegionError | ValueError | None:
    """Why a call that ran in pieces is not cached, or not all of its blocks; None where it is."""
    elsewhere = [each for each in call.refusals if isinstance(each, _ELSEWHERE)]
    for each in call.refusals:
        if each not in elsewhere:
            return RegionError(str(each))
    if call.is_cached:
        return None
    unknown = [each for each in elsewhere if isinstance(each, UnknownNameError)]
    if unknown:
        return ValueError(str(max(unknown, key=lambda each: len(each.known))))
    if len(elsewhere) == 1:
        return RegionError(str(elsewhere[0]))
    return RegionError(
        "a graph break keeps the block loop out of every graph; omni_cache.explain(model, ...) "
        "names its line, and what to change"
    )


_ELSEWHERE = (NoBlockLoopError, UnknownNameError)
"""What is wrong with a piece where another piece has the block loop."""


def _compile_guarded(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    flags: CompileOptions,
    frame: TracedFrame,
) -> Executor:
    if torch.is_grad_enabled():
        raise RegionError(NO_GRADIENTS)
    try:
        strategy, analysis = analyse_for_strategy(
            gm, flags, frame.model_class, frame.parameters, frame.model if frame.is_piece else None
        )
    except ValueError as error:
        raise unwrapped(error) from None
    guarded = split(gm, analysis)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    examples = dict(zip((node.name for node in placeholders), example_inputs, strict=True))
    return Executor(
        GuardedParts(
            prologue=_compile_named(guarded.prologue, examples, flags),
            body=_compile_named(guarded.body, examples, flags),
            epilogue=_compile_named(guarded.epilogue, examples, flags),
            reuse=_compile_named(guarded.reuse, examples, flags),
            residuals=guarded.residuals,
            signal=guarded.signal,
        ),
        strategy,
        inputs=list(examples),
        static=[is_static_input(node) for node in placeholders],
        copy_residuals=flags.inner_reuses_memory,
        kind=(flags, _digest(gm)),
        timestep=_timestep(analysis, frame),
        placed_by_call=frame.is_resumed,
    )


def unwrapped(error: Exception) -> Exception:
    """An error of the same class and message that reaches the caller of a compiled model as it is.

    Dynamo turns what a backend raises into its own ``BackendCompilerFailed``, a RuntimeError,
    unless it is of the class of errors whose tracebacks it shortens.
    """
    kind = type(error)
    passing = type(kind.__name__, (ShortenTraceback, kind), {"__module__": kind.__module__})
    seen: Exception = passing(str(error), first_useful_frame=None)
    return seen


def _timestep(analysis: Analysis, frame: TracedFrame) -> str | float | None:
    """What tells the runtime where a call lies: the name of an input, or a constant.

    Behind a graph break nothing does, because models name other things timestep on their way.
    """
    if frame.is_resumed:
        return None
    return frame.timestep if analysis.timestep is None else analysis.timestep.name


def analyse_for_strategy(
    gm: GraphModule,
    flags: CompileOptions,
    model_class: str | None,
    parameters: tuple[str, ...],
    whole: torch.nn.Module | None = None,
) -> tuple[BoundStrategy, Analysis]:
    """Bind the strategy to a model's class, and analyse a graph of the model for it.

    Args:
        gm: the graph.
        flags: with a strategy.
        model_class: name of the model's class, None where it is unknown.
        parameters: names of the parameters of the model's ``forward``, in order.
        whole: the model, where the graph is only a piece of it.

    Raises:
        RegionError: the graph has no region that can be skipped.
        ValueError: the strategy lacks numbers for this class.
    """
    assert flags.strategy is not None
    # A graph without blocks needs no tables, so that none are looked up or missed for it.
    loop = find_block_loop(gm.graph, flags.region)
    if whole is not None and flags.region is None:
        _check_piece(loop, whole)
    strategy = flags.strategy.bind(model_class)
    signal = None if strategy.signal is None else (flags.signal or strategy.signal)
    return strategy, analyse(gm.graph, region=flags.region, signal=signal, parameters=parameters)


def _check_piece(loop: BlockLoop, whole: torch.nn.Module) -> None:
    """Refuse a piece of a model that holds half of its loop, or none but a list beside it."""
    if _is_beside_the_loop(loop, whole):
        raise NoBlockLoopError(
            f"{loop.lists[0].path} is no block loop but a small list beside it, which runs in "
            "another graph"
        )
    main = max(loop.lists, key=lambda each: each.arithmetic)
    first = min(main.blocks, key=lambda block: block.index)
    if first.index > 0:
        raise RegionError(
            f"the graph begins inside the block loop, at {main.path}.{first.index}: a graph break "
            "cuts the loop in two; explain() says where, and what to change is there",
            first.nodes[0],
        )


def _is_beside_the_loop(loop: BlockLoop, whole: torch.nn.Module) -> bool:
    """Whether a model has a list of far more weights than the blocks of one of its pieces."""
    read = {each for node in loop.nodes for each in node.all_input_nodes if is_static_input(each)}
    values = [each.meta.get("example_value") for each in read]
    weights = sum(each.numel() for each in values if isinstance(each, torch.Tensor))
    lists = (each for each in whole.modules() if isinstance(each, torch.nn.ModuleList))
    return 2 * weights < max((_weights(each) for each in lists), default=0)


def _weights(module: torch.nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def _digest(gm: GraphModule) -> str:
    """Equal for two graphs that compute the same, such as two threads make when both come first."""
    graphs = (each for each in gm.modules() if isinstance(each, GraphModule))
    return hashlib.sha256("\n".join(each.code for each in graphs).encode()).hexdigest()


def _compile_named(part: Part, examples: Mapping[str, Any], flags: CompileOptions) -> CompiledPart:
    """Compile a part with the whole graph's own inputs where it has them, fake values elsewhere."""
    inputs = [
        examples.get(name, traced)
        for name, traced in zip(part.inputs, part.example_inputs, strict=True)
    ]
    return CompiledPart(compile_part(part.module, inputs, flags), part.inputs, part.outputs)


def compile_part(
    gm: GraphModule, example_inputs: Sequence[Any], flags: CompileOptions
) -> Callable[..., Any]:
    """Compile a graph with the inner compiler.

    Args:
        gm: the graph.
        example_inputs: real or fake values of its inputs.
        flags: say which compiler, with which mode and options.
    """
    tracing = torch._guards.TracingContext.try_get()
    if tracing is not None:
        # AOTAutograd leaves the metadata of the graph before here, and would take it for this
        # one's.
        tracing.fw_metadata = None
    extra = {
        key: value
        for key, value in (("mode", flags.mode), ("options", flags.inner_options))
        if value is not None
    }
    if flags.inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = {**list_mode_options(flags.mode or "default"), **(flags.inner_options or {})}
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
        return compiled  # type: ignore[no-any-return]
    inner = flags.inner if callable(flags.inner) else lookup_backend(flags.inner)
    return inner(gm, list(example_inputs), **extra)


@dataclass(frozen=True)
class TracedFrame:
    """What Dynamo is compiling now.

    Attributes:
        model: the module that is called, as far as it is known, None for a function without one.
        model_class: its class; behind a break, that of the module whose code goes on.
        parameters: names of the parameters of the module's ``forward``, in order.
        is_piece: whether the graph is only a piece of it, between graph breaks.
        is_resumed: whether it is a piece behind a graph break.
        timestep: the timestep, where it is a Python number: the first graph is specialised on it,
            so that it is no input.
    """

    model: torch.nn.Module | None = None
    model_class: str | None = None
    parameters: tuple[str, ...] = ()
    is_piece: bool = False
    is_resumed: bool = False
    timestep: float | None = None

    @classmethod
    def current(cls, gm: GraphModule) -> TracedFrame:
        """The frame that a graph was traced in."""
        from torch._dynamo.symbolic_convert import InstructionTranslator

        ended = getattr(gm, "compile_subgraph_reason", None)
        is_piece = bool(ended is not None and ended.graph_break)
        try:
            frame = InstructionTranslator.current_tx().output.root_tx
        except AttributeError:  # called by hand, not by Dynamo
            return cls(is_piece=is_piece)
        is_resumed = frame.f_code.co_name.startswith("torch_dynamo_resume_in")
        is_piece = is_piece or is_resumed
        given = dict(frame.f_locals)
        model = next((each for each in given.values() if isinstance(each, torch.nn.Module)), None)
        if model is None:
            return cls(is_piece=is_piece, is_resumed=is_resumed)
        call = bound_call()
        if call is not None and call.module is not model:
            # A module of the model that was called, traced on its own behind a break.
            is_piece = is_resumed = True
        parameters = tuple(inspect.signature(model.forward).parameters)
        positional = zip(parameters, given.get("args", ()), strict=False)
        given = {**dict(positional), **given.get("kwargs", {}), **given}
        name = timestep_name(name for name, value in given.items() if value is not None)
        time = given.get(name) if name is not None else None
        return cls(
            model=model if call is None else call.module,
            model_class=type(model).__name__,
            parameters=parameters,
            is_piece=is_piece,
            is_resumed=is_resumed,
            timestep=float(time) if isinstance(time, float | int) else None,
        )
