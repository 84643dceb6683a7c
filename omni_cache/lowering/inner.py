"""One graph compiled with the inner compiler. Knows nothing of regions or caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from omni_cache.dynamo import lookup_backend, prepare_for_part, run_inductor
from omni_cache.options import CompileOptions
from omni_cache.passes import is_static_input


def compile_part(
    gm: GraphModule, example_inputs: Sequence[Any], flags: CompileOptions
) -> Callable[..., Any]:
    """Compile a graph with the inner compiler.

    Args:
        gm: the graph.
        example_inputs: real or fake values of its inputs.
        flags: say which compiler, with which mode and options.
    """
    prepare_for_part()
    extra = {
        key: value
        for key, value in (("mode", flags.mode), ("options", flags.inner_options))
        if value is not None
    }
    if flags.inner == "inductor":
        placeholders = gm.graph.find_nodes(op="placeholder")
        static = {i for i, node in enumerate(placeholders) if is_static_input(node)}
        return run_inductor(gm, example_inputs, flags.inductor_patches, static)
    inner = flags.inner if callable(flags.inner) else lookup_backend(flags.inner)
    compiled: Callable[..., Any] = inner(gm, list(example_inputs), **extra)
    return compiled
