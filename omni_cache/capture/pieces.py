"""A model in pieces between graph breaks: which piece has the block loop, and why none has."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from omni_cache.capture.frame import largest_list, outermost_module, weights_of
from omni_cache.errors import UncachedWarning
from omni_cache.passes import (
    BlockLoop,
    NoBlockLoopError,
    RegionError,
    UnknownNameError,
    is_static_input,
)
from omni_cache.runtime.calls import Call, bound_call
from omni_cache.runtime.model_state import states_of_module


def refused(compiled: Callable[..., Any], error: RegionError) -> Callable[..., Any]:
    """Make a piece that runs uncached and reports its reason to the call that it runs for."""
    error = error.with_traceback(None)
    error.node = None  # the graph is not needed any more

    def run(*args: Any) -> Any:
        call = bound_call.get()
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
    if any(map(_is_sharded, largest_list(call.module) or ())):
        return RegionError(
            "FSDP (fully_shard) gathers the weights of each block outside of graphs, so that no "
            "graph has the block loop; say what the blocks are with omni_cache.register_extractor"
        )
    return RegionError(
        "a graph break keeps the block loop out of every graph; omni_cache.explain(model, ...) "
        "names its line, and what to change"
    )


def _is_sharded(block: nn.Module) -> bool:
    """Whether the weights of a block are shared between ranks, and gathered for each call."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(block, (FSDPModule, FullyShardedDataParallel))


_ELSEWHERE = (NoBlockLoopError, UnknownNameError)
"""What is wrong with a piece where another piece has the block loop."""


def check_piece(loop: BlockLoop, whole: nn.Module) -> None:
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


def block_by_block(compiled: Callable[..., Any], strict: bool) -> Callable[..., Any]:
    """Run one block that Dynamo compiled alone; warn once per model that its loop is uncached.

    Nothing binds a call here, and several models may share what is compiled, so that the model is
    looked for among the callers.
    """

    def run(*args: Any) -> Any:
        model = outermost_module()
        if model is not None and (is_news(model, _BLOCK_BY_BLOCK) or strict):
            for state in states_of_module(model):
                state.forget()  # or summary would show a generation before
            if strict:
                raise RegionError(_BLOCK_BY_BLOCK)
            message = f"{type(model).__name__} runs uncached: {_BLOCK_BY_BLOCK}"
            warnings.warn(message, UncachedWarning, stacklevel=2)
        return compiled(*args)

    return run


def is_news(model: nn.Module | None, message: str) -> bool:
    """Whether this is the first warning of its text for a model; asking counts as warning.

    One call may have many graphs of which the same is true. Without a model, each is the first.
    """
    if model is None:
        return True
    told = _told.setdefault(model, set())
    is_new = message not in told
    told.add(message)
    return is_new


_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""What has been warned of for models that are not enabled."""

_BLOCK_BY_BLOCK = (
    "Dynamo compiles its blocks one by one, because it has given up the code around them at a "
    "graph break, met in this model or in another one of the same code (one with hooks, say). "
    "omni_cache.enable compiles code of its own for the model; omni_cache.explain names a break"
)


def _is_beside_the_loop(loop: BlockLoop, whole: nn.Module) -> bool:
    """Whether a model has a list of far more weights than the blocks of one of its pieces."""
    read = {each for node in loop.nodes for each in node.all_input_nodes if is_static_input(each)}
    values = [each.meta.get("example_value") for each in read]
    weights = sum(each.numel() for each in values if isinstance(each, torch.Tensor))
    lists = (each for each in whole.modules() if isinstance(each, nn.ModuleList))
    return 2 * weights < max((weights_of(each) for each in lists), default=0)
