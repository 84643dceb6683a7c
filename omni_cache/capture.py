"""How Dynamo is asked for a model's graphs: for one of the whole, or for the pieces between breaks.

One graph is asked for first, because Dynamo then follows sizes and numbers that depend on data
(``x[mask]``, ``n.item()``) where it would break otherwise.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported, UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

UNCAPTURED = (Unsupported, UserError, GuardOnDataDependentSymNode, FailOnRecompileLimitHit)
"""What Dynamo raises when it is asked for one graph and has none; nothing of the call has run."""


def in_pieces() -> AbstractContextManager[None]:
    """Where a model with graph breaks is compiled and called.

    Tensors whose size depends on data do not break it further. Where such a break lies in a loop,
    Dynamo captures nothing of the function around it, which is often the one with the blocks.
    """
    capturing: AbstractContextManager[None] = torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True
    )
    return capturing


class CapturedFunction:
    """A function compiled as one graph, or in pieces from the first call on that has breaks.

    Args:
        function: what to compile.
        fullgraph: True to raise at a break, False to ask for pieces from the start.
        flags: of ``torch.compile``.
    """

    def __init__(
        self, function: Callable[..., Any], fullgraph: bool | None = None, **flags: Any
    ) -> None:
        self._whole: Callable[..., Any] | None = None
        if fullgraph is not False:
            self._whole = torch.compile(function, fullgraph=True, **flags)
        self._pieces: Callable[..., Any] | None = None
        if not fullgraph:
            self._pieces = torch.compile(function, **flags)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; as one graph, or from now on in pieces."""
        if self._whole is not None:
            try:
                return self._whole(*args, **kwargs)
            except UNCAPTURED:
                if self._pieces is None:
                    raise
                self._whole = None
            # The attempt leaves cycles that hold the call's tensors. Who keeps which inputs tells
            # one generation from another.
            gc.collect()
        assert self._pieces is not None  # there is the one or the other
        with in_pieces():
            return self._pieces(*args, **kwargs)
