"""The ``torch.compile`` backend: a Dynamo graph goes in, an executor of its guarded form out."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from omni_cache.capture.frame import TracedFrame
from omni_cache.capture.pieces import block_by_block, check_piece, is_news, refused
from omni_cache.capture.ranks import groups_of_body
from omni_cache.dynamo import is_bucket, last_graph, only_returns, traced_frame
from omni_cache.errors import NO_GRADIENTS, UncachedWarning, unwrapped
from omni_cache.lowering.deciding import DecidingProgram, compile_deciding
from omni_cache.lowering.dispatch import compile_program
from omni_cache.lowering.inner import compile_part
from omni_cache.options import CompileOptions
from omni_cache.passes import (
    Analysis,
    NoBlockLoopError,
    RegionError,
    UnknownNameError,
    analyse,
    check_writes,
    find_block_loop,
    is_static_input,
    take_out,
)
from omni_cache.passes.names import op_name
from omni_cache.passes.values import is_shape, tensor_of
from omni_cache.runtime.calls import bound_call, unbound
from omni_cache.runtime.decision import Guarded
from omni_cache.runtime.executor import Executor
from omni_cache.runtime.placement import Placement, without_cache

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
        RegionError: the graph cannot be cached and ``strict`` is set. A piece between graph breaks
            that holds no block loop is no error: another one may hold it, and nothing here tells
            that none does, unless it is a single block. Under ``enable`` that is told when a call
            ends.
    """
    try:
        flags = CompileOptions.parse(options, mode)
    except ValueError as error:
        raise unwrapped(error) from None
    if flags.guard is None:
        return without_cache(compile_part(gm, example_inputs, flags))
    # What is compiled on its own, with a strategy, is no part of a call of an enabled model.
    with nullcontext() if flags.strategy is None else unbound():
        return _compile(gm, example_inputs, flags)


def _compile(
    gm: GraphModule, example_inputs: Sequence[Any], flags: CompileOptions
) -> Callable[..., Any]:
    frame = TracedFrame.current(gm)
    try:
        executor = _compile_guarded(gm, example_inputs, flags, frame)
    except RegionError as error:
        call = bound_call.get()
        if isinstance(error, UnknownNameError) and not frame.is_piece:
            raise unwrapped(ValueError(str(error))) from None
        if call is not None and (call.in_pieces or not flags.strict):
            # Another piece may have the block loop, which is known when they all have run.
            return refused(compile_part(gm, example_inputs, flags), error)
        if call is None and isinstance(error, NoBlockLoopError) and frame.is_block:
            return block_by_block(compile_part(gm, example_inputs, flags), flags.strict)
        message = f"{frame.name} runs uncached: {error}"
        if frame.is_piece and isinstance(error, NoBlockLoopError):
            logger.info("a piece of %s", message)
        elif flags.strict:
            raise unwrapped(error) from None
        elif is_news(frame.model, message):
            warnings.warn(message, UncachedWarning, stacklevel=3)
        return compile_part(gm, example_inputs, flags)
    traced = traced_frame()
    limit = last_graph(traced) if traced is not None and bound_call.get() is None else None
    if limit is not None:
        message = f"{frame.name} will run uncached where it needs another graph: {limit}"
        warnings.warn(message, UncachedWarning, stacklevel=3)
    return executor


def _compile_guarded(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    flags: CompileOptions,
    frame: TracedFrame,
) -> Executor:
    if torch.is_grad_enabled():
        raise RegionError(NO_GRADIENTS)
    assert flags.guard is not None
    if is_bucket(gm):
        raise RegionError(_CUT_AT_BUCKETS)
    if (flags.guard.whole or flags.guard.skips) and frame.is_piece:
        raise RegionError(_NOT_WHOLE)
    try:
        owner, analysis = analyse_for_guard(gm, flags, frame)
    except ValueError as error:
        raise unwrapped(error) from None
    groups = groups_of_body(analysis.region.body, flags.process_group)
    program = (
        compile_program(gm, analysis, example_inputs, flags)
        if flags.guard.within is None
        else _compile_deciding(gm, analysis, example_inputs, flags, owner, groups)
    )
    timestep = None if frame.is_resumed else analysis.timestep
    skipped = analysis.region.body if analysis.whole else analysis.loop.nodes
    placeholders = gm.graph.find_nodes(op="placeholder")
    changing = [
        slot
        for slot, node in enumerate(placeholders)
        if not is_static_input(node) and node is not timestep
    ]
    region = (*(each.path for each in analysis.loop.lists), repr(flags.strategy))
    placement = Placement(
        Guarded(
            region=region,
            computation=_computation(skipped),
            depth=flags.guard.depth,
            device=flags.history_device,
            groups=groups,
            # Ranks have batches of their own, and one number of numbers to add up.
            per_sample=program.per_sample and not groups,
            inputs=flags.guard.inputs,
            skips=flags.guard.skips,
            only_returns=only_returns(),
            hoists=program.has_constants,
            modulates=program.has_modulations,
            gate=program.gate,
        ),
        owner,
        flags.guard,
        flags.signal,
        flags.strategy,
        identity=program.identity,
        inputs=[slot for slot in changing if isinstance(example_inputs[slot], torch.Tensor)],
        timestep=None if timestep is None else program.slots[timestep.name],
        # Behind a graph break nothing tells it: models name other things timestep on their way.
        constant=None if frame.is_resumed else frame.timestep,
        by_call=frame.is_resumed,
        constants=program.constant_inputs,
        modulations=program.modulation_inputs,
        numbers=[slot for slot in changing if not isinstance(example_inputs[slot], torch.Tensor)],
        uncounted=[region],
    )
    return Executor(program, placement)


def _compile_deciding(
    gm: GraphModule,
    analysis: Analysis,
    example_inputs: Sequence[Any],
    flags: CompileOptions,
    owner: str | None,
    groups: Sequence[Any],
) -> DecidingProgram:
    assert flags.guard is not None
    assert flags.guard.within is not None
    if groups:
        raise RegionError(_DECIDES_ALONE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first call asks for the policy again
        policy = flags.guard.within.policy(owner)
    try:
        return compile_deciding(gm, analysis, example_inputs, flags, policy)
    except ValueError as error:
        raise unwrapped(ValueError(f"lowering='cond': {error}{_OR_DISPATCH}")) from None


def analyse_for_guard(
    gm: GraphModule, flags: CompileOptions, frame: TracedFrame
) -> tuple[str | None, Analysis]:
    """Analyse a graph for the signal that its guard wants.

    Args:
        gm: the graph.
        flags: with a guard.
        frame: what it was traced of.

    Returns:
        The name of the class that owns the block loop, None where it is unknown, and the analysis.

    Raises:
        RegionError: the graph has no region that can be skipped.
        ValueError: nothing is published for this class under the variant that was named.
    """
    assert flags.guard is not None
    if flags.guard.skips:
        check_writes(gm.graph)
    # A graph without blocks needs no tables, so that none are looked up or missed for it.
    loop = find_block_loop(gm.graph, flags.region)
    if frame.is_piece and frame.model is not None and flags.region is None:
        check_piece(loop, frame.model)
    owner = frame.owner(loop)
    name = None if owner is None else owner.__name__
    signal = flags.guard.source_of(name)
    parameters = frame.parameters(owner)
    found = analyse(
        gm.graph,
        region=flags.region,
        signal=None if signal is None else (flags.signal or signal),
        parameters=parameters,
        first=flags.guard.first,
        last=flags.guard.last,
        whole=flags.guard.whole,
    )
    # Behind a graph break nothing tells which inputs stay: the piece before makes them.
    if flags.hoist and not frame.is_resumed:
        found = take_out(found, parameters, flags.hoist == "modulations")
    return name, found


_CUT_AT_BUCKETS = (
    "DistributedDataParallel cuts its graph at gradient buckets, which calls without gradients do "
    "not need; set torch._dynamo.config.optimize_ddp = False, or use omni_cache.enable on the "
    "module inside"
)


_OR_DISPATCH = ". With lowering='dispatch' the host decides, which has no such limit"


_DECIDES_ALONE = (
    "ranks compute a call together, and with lowering='cond' each would decide alone; "
    "lowering='dispatch' has them decide alike"
)


_NOT_WHOLE = (
    "this strategy skips the whole model, and a graph holds only a piece of it; omni_cache.explain "
    "names the graph breaks"
)


def _computation(nodes: Iterable[Node]) -> str:
    """Equal for two graphs whose regions compute the same, on whatever sizes.

    Dynamo compiles a model again for another prompt length, and for any; what that leaves fits what
    came before. Another constant, operation or weight is another computation, such as that of a
    model which leaves out other blocks.
    """
    digest = hashlib.sha256()
    for node in nodes:
        if tensor_of(node) is not None and not is_shape(node):
            constants = [
                each for each in tree_leaves((node.args, node.kwargs)) if _is_constant(each)
            ]
            weights = [each.name for each in node.all_input_nodes if is_static_input(each)]
            digest.update(f"{op_name(node)}{constants}{weights}\n".encode())
    return digest.hexdigest()


def _is_constant(value: Any) -> bool:
    return isinstance(value, bool | float | str | torch.dtype)
