"""The blocks of an enabled model, watched for calls of theirs that no call of the model makes.

Compiled code never comes here: Dynamo traces the blocks within a call of the model. Knows nothing
of what is cached.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from omni_cache.capture.frame import largest_list
from omni_cache.dynamo import leave_uncompiled
from omni_cache.runtime.calls import bound_call


def watch_blocks(model: nn.Module, tell: Callable[[], None]) -> list[WatchedBlock]:
    """Have calls told that pass a model by: the elements of its largest list, called on their own.

    Args:
        model: whose list it is.
        tell: a method to call before each of them; it is referred to weakly, as its owner may own
            what this returns.
    """
    watched = []
    for block in largest_list(model) or ():
        before = vars(block).get("_compiled_call_impl")
        if not isinstance(before, WatchedBlock):  # of a model around or inside this one
            watched.append(WatchedBlock(block, before, tell))
            vars(block)["_compiled_call_impl"] = watched[-1]
    return watched


def unwatch_blocks(watched: Sequence[WatchedBlock]) -> None:
    """Give blocks back what ran them before."""
    for each in watched:
        block = each.block()
        # What others have put in place of it since is theirs.
        if block is not None and vars(block).get("_compiled_call_impl") is each:
            del vars(block)["_compiled_call_impl"]
            if each.before is not None:
                vars(block)["_compiled_call_impl"] = each.before


class WatchedBlock:
    """What a block runs when it is called. PyTorch leaves it out of copies.

    Args:
        block: the block; it is referred to weakly, as it owns this.
        before: what it ran when it was called, None for what its class runs.
        tell: called before a call that no enabled model makes.
    """

    def __init__(self, block: nn.Module, before: Any, tell: Callable[[], None]) -> None:
        self.block = weakref.ref(block)
        self.before = before
        self._tell = weakref.WeakMethod(tell)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, and tell if nobody has called the model."""
        if not self._is_within_call():
            tell = self._tell()
            if tell is not None:
                tell()
        block = self.block()
        assert block is not None  # somebody calls it
        run = block._call_impl if self.before is None else self.before
        return run(*args, **kwargs)

    # The same on every call of what Dynamo traces, as it is for the forward of a model.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _is_within_call(self) -> bool:
        # With gradients nothing is cached, and a backward pass runs blocks again.
        return bound_call.get() is not None or torch.is_grad_enabled()


# Dynamo would compile this frame for all blocks alike, and give up one for all.
leave_uncompiled(WatchedBlock.__call__.__code__)
