"""The ``torch.compile`` backend: a Dynamo graph goes in, an executor of its guarded form out."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from omni_cache.capture.frame import TracedFrame
from omni_cache.capture.pieces import check_piece, refused
from omni_cache.errors import NO_GRADIENTS, UncachedWarning, unwrapped
from omni_cache.lowering.inner import compile_part
from omni_cache.options import CompileOptions
from omni_cache.passes import (
    Analysis,
    NoBlockLoopError,
    Part,
    RegionError,
    UnknownNameError,
    analyse,
    find_block_loop,
    is_static_input,
    split,
)
from omni_cache.runtime import CompiledPart, Executor, GuardedParts, bound_call
from omni_cache.strategies import BoundStrategy

logger = logging.getLogger(__name__)


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
            return refused(compile_part(gm, example_inputs, flags), error)
        if frame.is_piece and isinstance(error, NoBlockLoopError):
            logger.info("a piece of %s", message)
        elif isinstance(error, UnknownNameError) and not frame.is_piece:
            raise unwrapped(ValueError(str(error))) from None
        elif flags.strict:
            raise unwrapped(error) from None
        else:
            warnings.warn(message, UncachedWarning, stacklevel=2)
        return compile_part(gm, example_inputs, flags)


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
        check_piece(loop, whole)
    strategy = flags.strategy.bind(model_class)
    signal = None if strategy.signal is None else (flags.signal or strategy.signal)
    return strategy, analyse(gm.graph, region=flags.region, signal=signal, parameters=parameters)


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
