"""The ``torch.compile`` backend: a Dynamo graph goes in, an executor of its guarded form out."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from omni_cache.options import CompileOptions
from omni_cache.passes import (
    NoBlockLoopError,
    Part,
    RegionError,
    analyse,
    find_block_loop,
    is_static_input,
    split,
)
from omni_cache.runtime import CompiledParts, Executor

logger = logging.getLogger(__name__)


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
        ValueError: a flag is unknown or has a value that is not allowed.
        NotImplementedError: a flag's value is planned and not built yet.
        RegionError: the graph cannot be cached and ``strict`` is set.
    """
    flags = CompileOptions.parse(options, mode)
    if flags.strategy is None:
        return compile_part(gm, example_inputs, flags)
    model, is_piece = traced_frame(gm)
    model_class = None if model is None else type(model).__name__
    try:
        return _compile_guarded(gm, example_inputs, flags, model)
    except RegionError as error:
        if flags.strict:
            raise
        message = f"{model_class or 'a model'} runs uncached: {error}"
        if is_piece and isinstance(error, NoBlockLoopError):
            # A model that breaks into several graphs has its block loop in another one.
            logger.info("a piece of %s", message)
        else:
            warnings.warn(message, UncachedWarning, stacklevel=2)
        return compile_part(gm, example_inputs, flags)


def _compile_guarded(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    flags: CompileOptions,
    model: torch.nn.Module | None,
) -> Executor:
    assert flags.strategy is not None
    if torch.is_grad_enabled():
        raise RegionError(
            "gradients are enabled, and a reused residual has none; call the model under "
            "torch.no_grad() or torch.inference_mode()"
        )
    # A graph without blocks needs no tables, so that none are looked up or missed for it.
    find_block_loop(gm.graph, flags.region)
    strategy = flags.strategy.bind(None if model is None else type(model).__name__)
    signal = None if strategy.signal is None else (flags.signal or strategy.signal)
    parameters = () if model is None else tuple(inspect.signature(model.forward).parameters)
    analysis = analyse(gm.graph, region=flags.region, signal=signal, parameters=parameters)
    guarded = split(gm, analysis)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    examples = dict(zip((node.name for node in placeholders), example_inputs, strict=True))
    return Executor(
        guarded,
        CompiledParts(
            *(
                _compile_named(part, examples, flags)
                for part in (guarded.prologue, guarded.body, guarded.epilogue, guarded.reuse)
            )
        ),
        strategy,
        inputs=list(examples),
        static=[is_static_input(node) for node in placeholders],
        copy_residuals=flags.inner_reuses_memory,
    )


def _compile_named(
    part: Part, examples: Mapping[str, Any], flags: CompileOptions
) -> Callable[..., Any]:
    """Compile a part with the whole graph's own inputs where it has them, fake values elsewhere."""
    inputs = [
        examples.get(name, traced)
        for name, traced in zip(part.inputs, part.example_inputs, strict=True)
    ]
    return compile_part(part.module, inputs, flags)


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


def traced_frame(gm: GraphModule) -> tuple[torch.nn.Module | None, bool]:
    """What Dynamo is compiling now.

    Returns:
        The module that is called (None for a function without one), and whether the graph is only a
        piece of it, between graph breaks.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    ended = getattr(gm, "compile_subgraph_reason", None)
    is_piece = bool(ended is not None and ended.graph_break)
    try:
        frame = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:  # called by hand, not by Dynamo
        return None, is_piece
    modules = (each for each in frame.f_locals.values() if isinstance(each, torch.nn.Module))
    resumed = frame.f_code.co_name.startswith("torch_dynamo_resume_in")
    return next(modules, None), is_piece or resumed
