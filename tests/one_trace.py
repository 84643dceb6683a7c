"""One capture of a model for several compilations, because capturing is what takes time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from omni_cache import omni_cache_backend

Backend = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]


class OneTrace:
    """A Dynamo backend that hands each captured graph to several backends.

    `chosen` names the one whose compiled form the next call runs.
    """

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self.backends = backends
        self.chosen = next(iter(backends))

    def __call__(self, graph: GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        compiled = {name: compile(graph, example_inputs) for name, compile in self.backends.items()}

        def run(*args: Any) -> Any:
            return compiled[self.chosen](*args)

        return run


def cached(**options: Any) -> Backend:
    """Our backend with `options` set, its parts run eagerly unless `inner` says otherwise."""
    return partial(omni_cache_backend, options={"inner": "eager", **options})
