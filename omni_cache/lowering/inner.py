"""One graph compiled with the inner compiler. Knows nothing of regions or caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from omni_cache.options import CompileOptions


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
