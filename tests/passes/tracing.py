"""One compilation of a module: the captured graph, what the pass makes of it, a run of each.

Dynamo takes away where a graph's inputs came from when compilation ends, so all that reads them
happens within.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omni_cache.passes import (
    WEIGHTS,
    GuardedGraph,
    Part,
    RegionError,
    analyse,
    graph_text,
    guarded_text,
    split,
    take_out,
)
from torch import Tensor
from torch.fx import GraphModule


@dataclass
class Trace:
    """A captured graph, its guarded form, both texts, and the inputs that it was captured for."""

    gm: GraphModule
    guarded: GuardedGraph
    before: str
    after: str
    inputs: Mapping[str, Any]

    def whole(self) -> list[Tensor]:
        """The outputs of the graph as it was captured."""
        return list(self.gm(*self.inputs.values()))

    def values(self) -> dict[str, Any]:
        """All that is known after a computed step, by name."""
        guarded = self.guarded
        parts = (guarded.constants, guarded.modulations, guarded.prologue, guarded.body)
        values = dict(self.inputs)
        for part in parts:
            if part is not None:
                values.update(zip(part.outputs, run(part, values), strict=True))
        return values

    def computed(self) -> list[Tensor]:
        """The outputs by way of prologue, body and epilogue."""
        return run(self.guarded.epilogue, self.values())

    def reused(self, values: Mapping[str, Any], weights: Tensor | None = None) -> list[Tensor]:
        """The outputs by way of the history in ``values``, which is held if no weights are given.

        ``weights`` are (1 or B, depth).
        """
        return run(
            self.guarded.reuse, {**values, WEIGHTS: self.hold() if weights is None else weights}
        )

    def hold(self) -> Tensor:
        """The row of weights that takes the newest residuals as they are."""
        part = self.guarded.reuse
        examples = dict(zip(part.inputs, part.example_inputs, strict=True))
        weights = torch.zeros(1, len(self.guarded.history), dtype=examples[WEIGHTS].dtype)
        weights[:, 0] = 1
        return weights


def run(part: Part, values: Mapping[str, Any]) -> list[Any]:
    """The outputs of a part whose inputs are found by name."""
    return list(part.module(*(values[name] for name in part.inputs)))


def trace(
    model: Callable[..., Any],
    *args: Any,
    region: list[str] | None = None,
    signal: str | None = "auto",
    parameters: tuple[str, ...] = (),
    dynamic: bool | None = None,
    depth: int = 1,
    history_dtype: torch.dtype | None = None,
    per_sample: bool = False,
    first: int = 0,
    whole: bool = False,
    hoist: bool | str = False,
    **kwargs: Any,
) -> Trace:
    """Capture ``model(*args, **kwargs)`` as one graph, and analyse and split it.

    Raises:
        RegionError: the pass refuses the graph.
    """
    traces: list[Trace] = []
    errors: list[RegionError] = []

    def backend(gm: GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        try:
            before = graph_text(gm.graph)
            analysis = analyse(
                gm.graph,
                region=region,
                signal=signal,
                parameters=parameters,
                first=first,
                whole=whole,
            )
            if hoist:
                analysis = take_out(analysis, parameters, hoist == "modulations")
            guarded = split(gm, analysis, depth, history_dtype, per_sample)
            traces.append(Trace(gm, guarded, before, guarded_text(guarded), {}))
        except RegionError as error:
            # Dynamo would wrap it.
            errors.append(error)

        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]

        def run_and_remember(*inputs: Any) -> Any:
            if traces:
                traces[-1].inputs = dict(zip(names, inputs, strict=True))
            return gm(*inputs)

        return run_and_remember

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    if errors:
        raise errors[0]
    (captured,) = traces
    return captured
