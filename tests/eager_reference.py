"""What forced reuse must compute, worked out on the eager model with forward hooks alone.

    entry --> block --> block --> ... --> block --> exit      residual = exit - entry
    entry --> (every block hands its input on) ---> entry + residual --> rest of the model

A block loop that is reused adds an earlier call's residual to this call's entry. Here every block
is made to hand its input on, so the model's own code carries the entry past the loop and does
whatever it does between block lists, such as joining the text to the image; the last block adds
the residual. No graph is involved and nothing of omni-cache is imported, so that a mistake there
cannot hide here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers_models import ModelCase, sample
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Streams = dict[str, Tensor]
_Replace = Callable[[bool, Streams, Streams], Streams]
"""Chooses the output streams of a block from: is it the last, its input streams, its outputs."""


@dataclass(frozen=True)
class BlockLoopValues:
    """The streams where the block loop begins and where it ends, in the last block's layout.

    A stream that the last block drops (the text in SD3) appears in neither.
    """

    entry: Streams
    exit: Streams

    @property
    def residual(self) -> Streams:
        """What the block loop added to each stream."""
        return {name: value - self.entry[name] for name, value in self.exit.items()}


@contextmanager
def _replaced_outputs(
    model: nn.Module, case: ModelCase, replace: _Replace, skip_added: bool
) -> Iterator[None]:
    """Let `replace` choose the output streams of every block.

    With `skip_added`, what modules between the blocks add to the streams is zero.
    """
    blocks = [
        (block, names)
        for list_name, names in case.streams.items()
        for block in model.get_submodule(list_name).children()
    ]

    def hook_for(names: tuple[str, ...], is_last: bool) -> Callable[..., Any]:
        def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            bound = inspect.signature(block.forward).bind(*args, **kwargs).arguments
            returned = output if isinstance(output, tuple) else (output,)
            outputs = {
                name: value
                for name, value in zip(names, returned, strict=True)
                if value is not None
            }
            chosen = replace(is_last, {name: bound[name] for name in outputs}, outputs)
            values = tuple(chosen.get(name) for name in names)
            return values if isinstance(output, tuple) else values[0]

        return hook

    handles = [
        block.register_forward_hook(hook_for(names, block is blocks[-1][0]), with_kwargs=True)
        for block, names in blocks
    ]
    if skip_added:
        handles += [
            module.register_forward_hook(lambda _, args, output: tree_map(torch.zeros_like, output))
            for list_name in case.added
            for module in model.get_submodule(list_name).children()
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def block_loop_values(
    model: nn.Module, case: ModelCase, inputs: Mapping[str, Any]
) -> BlockLoopValues:
    """The values of the streams at both ends of the block loop of `model(**inputs)`."""
    ends: dict[str, Streams] = {}

    def record_exit(is_last: bool, inputs: Streams, outputs: Streams) -> Streams:
        if is_last:
            ends["exit"] = outputs
        return outputs

    def record_entry(is_last: bool, inputs: Streams, outputs: Streams) -> Streams:
        if is_last:
            ends["entry"] = inputs
        return inputs

    for replace, skip_added in ((record_exit, False), (record_entry, True)):
        with _replaced_outputs(model, case, replace, skip_added):
            model(**inputs)
    return BlockLoopValues(entry=ends["entry"], exit=ends["exit"])


def capture_residual(model: nn.Module, case: ModelCase, inputs: Mapping[str, Any]) -> Streams:
    """What the block loop adds to each stream in `model(**inputs)`."""
    return block_loop_values(model, case, inputs).residual


@torch.no_grad()
def forced_reuse(
    model: nn.Module, case: ModelCase, inputs: Mapping[str, Any], residual: Streams
) -> Tensor:
    """The prediction of `model(**inputs)` when the block loop only adds `residual` to its entry."""

    def reuse(is_last: bool, inputs: Streams, outputs: Streams) -> Streams:
        if not is_last:
            return inputs
        return {name: value + residual[name] for name, value in inputs.items()}

    with _replaced_outputs(model, case, reuse, skip_added=True):
        return sample(model(**inputs))
