"""explain: what the pass finds in a model, or why there is nothing to find."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule

from omni_cache.backend import analyse_for_strategy
from omni_cache.capture import UNCAPTURED, in_pieces
from omni_cache.options import CompileOptions
from omni_cache.passes import Analysis, RegionError, guarded_text, split
from omni_cache.pipelines import enabled_flags


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: the text of its guarded form, or the reason why there is none."""

    text: str
    analysis: Analysis | None
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found. ``str()`` is the report that it prints.

    Attributes:
        graphs: one report for each graph that Dynamo captured, in order.
        breaks: the first graph break, if Dynamo cannot capture the model as one graph: why, the
            file and line, and what to change.
    """

    graphs: tuple[GraphReport, ...]
    breaks: tuple[str, ...]

    @property
    def cached(self) -> bool:
        """Whether some graph has a region."""
        return any(each.reason is None for each in self.graphs)

    def __str__(self) -> str:
        lines = []
        for number, graph in enumerate(self.graphs):
            lines.append(f"graph {number + 1} of {len(self.graphs)}")
            lines.append(graph.text if graph.reason is None else f"  not cached: {graph.reason}")
        lines += [f"graph break: {each}" for each in self.breaks]
        return "\n".join(lines)


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Trace a model with example inputs, and report what the pass finds.

    The report names block loop, region inputs and outputs, residual pairs, signal and the memory
    that a trajectory will hold, or the reason why there is no region and where in the source it
    lies. It is printed and returned. Nothing is compiled, and the model stays as it is; only what
    ``torch.compile`` had made of a model with graph breaks is made anew at its next call.

    Args:
        model: the module; a pipeline's ``transformer``, say.
        args: example inputs of its ``forward``.
        kwargs: likewise. ``cache_options`` is taken for a dict of compile-time flags; without it,
            those that the model is enabled with count, and the defaults for one that is not.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a flag is unknown or has a value that is not allowed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={type(model).__name__} is not allowed; model must be a torch.nn.Module, such "
            "as a pipeline's transformer"
        )
    flags = CompileOptions.parse(kwargs.pop("cache_options", enabled_flags(model)))
    explanation = examine(model, args, kwargs, flags)
    print(explanation)
    return explanation


def examine(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], flags: CompileOptions
) -> Explanation:
    """What :func:`explain` reports, without printing it."""
    module = getattr(model, "_orig_mod", model)
    parameters = tuple(inspect.signature(module.forward).parameters)
    reports: list[GraphReport] = []
    breaks: list[str] = []
    traced: set[CodeType] = set()

    def report(gm: GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        traced.add(InstructionTranslator.current_tx().output.root_tx.f_code)
        try:
            if flags.strategy is None:
                raise RegionError("cache='none'")
            whole = module if breaks else None
            name = type(module).__name__
            _, analysis = analyse_for_strategy(gm, flags, name, parameters, whole)
            reports.append(GraphReport(guarded_text(split(gm, analysis)), analysis, None))
        except (RegionError, ValueError) as error:
            reports.append(GraphReport("", None, str(error)))
        return gm.forward

    def forward() -> Any:
        return module.forward(*args, **kwargs)

    try:
        with torch.no_grad():
            try:
                torch.compile(forward, backend=report, fullgraph=True, dynamic=False)()
            except UNCAPTURED as error:
                breaks.append(_break_text(error))
                reports.clear()
                with in_pieces():
                    torch.compile(forward, backend=report, dynamic=False)()
    finally:
        # Dynamo keeps what it compiled with the code, and compiles one code only so many times.
        for code in (forward.__code__, *traced):
            torch._dynamo.eval_frame.remove_from_cache(code)
    return Explanation(tuple(reports), tuple(breaks))


def _break_text(error: Exception) -> str:
    """Why Dynamo could not go on, where in the user's code, and what it advises."""
    lines = [line.strip() for line in str(error).splitlines()]
    advice = [line.removeprefix("Hint: ") for line in lines if line.startswith("Hint: ")]
    # Of a size that depends on data, Dynamo says what it needs between advice and internals.
    reason = lines[0].removeprefix("Consider annotating your code using torch._check*(). ")
    reason = re.sub(r"\s*\((?:unhinted|Size-like symbols):.*$", "", reason)
    own = Path(torch.__file__).parent
    stack = getattr(error, "real_stack", None) or ()
    users = [each for each in stack if own not in Path(each.filename).parents] or stack
    place = f", at {users[-1].filename}:{users[-1].lineno}" if users else ""
    return " ".join([f"{reason.rstrip('.')}{place}.", *advice[:1]])
