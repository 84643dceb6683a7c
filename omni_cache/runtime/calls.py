"""The call of an enabled module that the graphs of this context run for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from omni_cache.passes import RegionError, timestep_name
from omni_cache.runtime.model_state import ModelState
from omni_cache.runtime.place import Loop, Place


class Ran(NamedTuple):
    """A region as one call runs it.

    Modules of one class that Dynamo captures by themselves share a graph, and so a region; and a
    model may call such a module twice.

    Attributes:
        region: the region.
        weight: identity of a weight, which tells these modules apart; None where there is one.
        time: how often the call has run it before.
    """

    region: Any
    weight: int | None = None
    time: int = 0


class Served(NamedTuple):
    """A guarded graph that may skip calls, as a call has run it.

    Attributes:
        placement: says where calls of the graph lie.
        args: its flat inputs.
        result: its flat outputs.
    """

    placement: Any
    args: Sequence[Any]
    result: Sequence[Any]


@dataclass
class Call:
    """A call of an enabled module, which may run several graphs.

    Attributes:
        module: the module.
        state: its state.
        arguments: what its ``forward`` is called with, by name.
        loop: the announced loop that it belongs to, None where there is none.
        place: where it lies, once one of its graphs has found out.
        agree: has the last word on whether the call computes, given whether it would; None where
            nobody else has to be asked.
        commits: what is to be done when the call has ended well.
        in_pieces: whether Dynamo was asked for the pieces between graph breaks.
        refusals: why those of the pieces that have run uncached are not cached.
        is_cached: whether a guarded graph has run.
        ran: the regions that have run, in order.
        served: the guarded graphs that may skip calls, likewise.
    """

    module: nn.Module
    state: ModelState
    arguments: Mapping[str, Any]
    loop: Loop | None = None
    place: Place | None = None
    agree: Callable[[bool], bool] | None = None
    commits: list[Callable[[], None]] = field(default_factory=list)
    in_pieces: bool = False
    refusals: list[RegionError] = field(default_factory=list)
    is_cached: bool = False
    ran: list[Ran] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)

    @property
    def timestep(self) -> Any:
        """The timestep: a tensor, a number, or None where no argument is one."""
        name = timestep_name(self.arguments)
        return None if name is None else self.arguments[name]

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors other than the timestep."""
        time = self.timestep
        leaves = tree_leaves(list(self.arguments.values()))
        return [each for each in leaves if isinstance(each, Tensor) and each is not time]

    def run(self, region: Any, weight: int | None) -> Ran:
        """Note that a region runs."""
        before = [each for each in self.ran if each.region == region and each.weight == weight]
        ran = Ran(region, weight, len(before))
        self.ran.append(ran)
        return ran


bound_call: ContextVar[Call | None] = ContextVar("omni_cache_call", default=None)
"""The call that the current context is bound to."""


class bind:  # noqa: N801  # a context that is named like a function, without a generator's cost
    """Say which call the graphs in this context run for; what they did counts once it ends well."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __enter__(self) -> None:
        self._token = bound_call.set(self._call)

    def __exit__(self, kind: object, *raised: object) -> None:
        bound_call.reset(self._token)
        # Taken out, because what commits refers to the call.
        commits, self._call.commits = self._call.commits, []
        if kind is None:
            for commit in commits:
                commit()


@contextmanager
def unbound() -> Iterator[None]:
    """Have nothing in this context run for a call that is around it."""
    token = bound_call.set(None)
    try:
        yield
    finally:
        bound_call.reset(token)
