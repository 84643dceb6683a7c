"""Where Dynamo asks, at each call of a block, whether a copy will do."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from omni_cache.repeats.copying import copy_of
from omni_cache.repeats.state import has_no_effect, is_key
from omni_cache.repeats.traced import Before, TracedCall

logger = logging.getLogger(__name__)


@contextmanager
def traced_once(model: nn.Module | None) -> Iterator[None]:
    """Have Dynamo trace the blocks of a model once for all that are alike.

    Args:
        model: whose blocks, the elements of its lists, are meant; None for no blocks at all.
    """
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)] if model else []
    blocks = {id(block): block for each in lists if len(each) > 1 for block in each}
    token = _tracing.set(_Tracing(blocks) if blocks and _dynamo_asks() else None)
    try:
        yield
    finally:
        _tracing.reset(token)


@functools.cache
def _dynamo_asks() -> bool:
    """Have Dynamo ask `_tracing` at each call of a module; False where this PyTorch is another.

    For good, since of two threads that each put the method back one could put back the other's.
    """
    try:
        from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable as Module
    except ImportError:
        logger.info("torch %s traces every block", torch.__version__)
        return False
    call: Any = Module.call_function

    @functools.wraps(call)
    def call_once(self: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tracing = _tracing.get()
        trace = functools.partial(call, self, tx, args, kwargs)
        if tracing is None or tracing.blocks.get(id(self.value)) is not self.value:
            return trace()
        return tracing.call(trace, self, tx, [*args, *kwargs.values()], tuple(kwargs))

    Module.call_function = call_once  # type: ignore[method-assign]
    return True


@dataclass
class _Tracing:
    """What has been traced of the blocks that may repeat."""

    blocks: Mapping[int, nn.Module]
    output: Any = None
    traced: list[TracedCall] = field(default_factory=list)
    is_within_block: bool = False

    def call(
        self, trace: Callable[[], Any], block: Any, tx: Any, args: list[Any], names: tuple[str, ...]
    ) -> Any:
        """What a call that is being traced returns: by a copy where one will do."""
        is_nested = self.is_within_block or tx.output.current_tracer.parent is not None
        if is_nested or block.source is None or is_key(block.source):
            return trace()
        if not has_no_effect(tx):
            return trace()
        if self.output is not tx.output:  # Dynamo has begun anew
            self.output, self.traced = tx.output, []
        for each in self.traced:
            result = copy_of(each, block, tx, args, names)
            if result is not None:
                return result
        self.is_within_block = True
        before = Before(tx, args)
        try:
            result = trace()
        finally:
            self.is_within_block = False
        traced = before.traced(block, names, result)
        if traced is not None:
            self.traced.append(traced)
        return result


_tracing: ContextVar[_Tracing | None] = ContextVar("blocks_being_traced", default=None)
