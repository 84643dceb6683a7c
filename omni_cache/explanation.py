"""explain: what the pass finds in a model, or why there is nothing to find."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import FrameSummary
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from omni_cache.backend import analyse_for_guard
from omni_cache.capture.extractor import CacheContext, extract, find_extractor
from omni_cache.capture.frame import TracedFrame
from omni_cache.dynamo import (
    NoGraphError,
    break_of,
    compiled,
    forget_compiled,
    place_of,
    traced_frame,
)
from omni_cache.lowering.deciding import within_text
from omni_cache.options import CompileOptions
from omni_cache.passes import (
    Analysis,
    GuardedGraph,
    NoBlockLoopError,
    RegionError,
    calls_of,
    guarded_text,
    roll,
    split,
)
from omni_cache.passes.values import describe_value
from omni_cache.pipelines import enabled_flags
from omni_cache.runtime.calls import Call, bind
from omni_cache.runtime.model_state import ModelState
from omni_cache.strategies.base import DEFAULT_STEPS


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: the text of its guarded form, or the reason why there is none.

    ``has_blocks`` says whether a part of the block loop is in it, ``held_bytes`` how many bytes a
    trajectory will hold, ``hoisted_parameters`` which parameters and buffers nothing reads at every
    step.
    """

    text: str
    analysis: Analysis | None
    reason: str | None
    has_blocks: bool = True
    held_bytes: int = 0
    hoisted_parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphBreak:
    """Where Dynamo cannot go on. ``str()`` is one line.

    Attributes:
        reason: what it cannot follow.
        place: ``file:line`` in the user's code, innermost.
        source: that line.
        reached_from: ``file:line`` in the model's own ``forward``, where that is another one.
        advice: what Dynamo advises, or an empty string.
        in_block: whether it lies in an element of a ModuleList, or in what that calls.
    """

    reason: str
    place: str
    source: str = ""
    reached_from: str = ""
    advice: str = ""
    in_block: bool = False

    def __str__(self) -> str:
        return f"{self.reason}, at {self.place}. {self.advice}".strip()


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found. ``str()`` is the report that it prints.

    Attributes:
        model_class: the model's class.
        graphs: one report for each graph that Dynamo captured, in order; for a model with a
            registered extractor one report of what that says.
        breaks: the graph breaks, if Dynamo cannot capture the model as one graph; the first is the
            one that it meets first.
        extractor: the name of the registered extractor that takes the model apart; None for a
            model without one.
    """

    model_class: str
    graphs: tuple[GraphReport, ...]
    breaks: tuple[GraphBreak, ...]
    extractor: str | None = None

    @property
    def cached(self) -> bool:
        """Whether some graph has a region."""
        return any(each.reason is None for each in self.graphs)

    @property
    def hoisted_parameters(self) -> tuple[str, ...]:
        """Names of the parameters and buffers that only what is hoisted reads."""
        kept = [set(each.hoisted_parameters) for each in self.graphs]
        return tuple(sorted(set().union(*kept)))

    @property
    def reason(self) -> str:
        """Why the model is not cached, in one sentence that says what to do; empty if it is."""
        if self.cached:
            return ""
        with_blocks = [each for each in self.graphs if each.has_blocks]
        if not self.breaks:
            return str(self.graphs[0].reason) if self.graphs else "the model runs no graph at all"
        if len(with_blocks) == 1 and "graph break" not in str(with_blocks[0].reason):
            return str(with_blocks[0].reason)
        among = next((each for each in self.breaks if each.in_block), None)
        met = among or self.breaks[0]
        effect = (
            "cuts the block loop, so that no graph holds it"
            if among
            else "keeps the block loop out of every graph"
        )
        return (
            f"a graph break at {met.place} {effect} ({met.reason}); change that line so that it "
            "takes no number and no decision from a tensor, or say what the blocks are with "
            "omni_cache.register_extractor"
        )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        count = len(self.graphs)
        if not self.cached:
            yield f"{self.model_class} runs uncached: {self.reason}."
        elif self.extractor is not None:
            yield f"{self.model_class} is cached under enable, by the extractor {self.extractor}."
            yield "torch.compile alone takes no notice of it."
        elif count == 1:
            yield f"{self.model_class} is cached: its block loop lies in one graph."
        else:
            numbers = [n for n, each in enumerate(self.graphs, 1) if each.reason is None]
            listed = " and ".join(map(str, numbers))
            yield f"{self.model_class} is cached: its block loop lies in graph {listed} of {count}."
            yield "The other graphs run on every step. Behind a break no input tells the timestep:"
            yield "enable takes it from the call; with torch.compile alone, name the place of a"
            yield "call with omni_cache.generation and omni_cache.branch."
        for number, each in enumerate(self.graphs, 1):
            heading = f"graph {number} of {count}: " if count > 1 else ""
            if each.reason is None:
                yield ""
                yield from [heading.rstrip(": ")] if heading else []
                yield each.text
            elif each.has_blocks and each.reason != self.reason:
                yield f"{heading}not cached: {each.reason}"
        for met in self.breaks:
            yield f"graph break: {met.reason}"
            yield f"  at {met.place}: {met.source}" if met.source else f"  at {met.place}"
            yield from [f"  reached from {met.reached_from}"] if met.reached_from else []
            yield from [f"  Dynamo advises: {met.advice}"] if met.advice else []


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Trace a model with example inputs, and report what the pass finds.

    The report says first whether the model is cached, and if not, why and what to change. Then it
    names block loop, region inputs and outputs, residual pairs, signal and the memory that a
    trajectory will hold. It is printed and returned. Nothing is compiled, and the model stays as it
    is; only what ``torch.compile`` had made of a model with graph breaks is made anew at its next
    call. Of a model with a registered extractor it reports what that extracts.

    Args:
        model: the module; a pipeline's ``transformer``, say.
        args: example inputs of its ``forward``.
        kwargs: likewise. ``cache_options`` is taken for a dict of compile-time flags; without it,
            those that the model is enabled with count, and the defaults for one that is not.

    Raises:
        TypeError: ``model`` is not a module.
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
    name = type(module).__name__
    extractor = find_extractor(module)
    if extractor is not None and flags.guard is not None:
        with torch.no_grad():
            context = extract(extractor, module, *args, **kwargs)
        named = f"{extractor.__module__}.{getattr(extractor, '__qualname__', extractor)}"
        return Explanation(name, (GraphReport(_context_text(context), None, None),), (), named)
    args, kwargs = _by_name(module, args, kwargs)
    blocks = _block_code(module)
    reports: list[GraphReport] = []
    breaks: list[GraphBreak] = []
    traced: set[CodeType] = set()

    def report(gm: GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        frame = traced_frame()
        assert frame is not None  # Dynamo calls
        traced.add(frame.code)
        try:
            if flags.guard is None:
                raise RegionError("cache='none'")
            is_behind = bool(breaks)
            piece = TracedFrame(
                name, module, frame.values, is_piece=is_behind, is_resumed=is_behind
            )
            owner, analysis = analyse_for_guard(gm, flags, piece)
            if flags.strategy is not None:
                policy = flags.strategy.policy(owner)  # refuses a class that it has no numbers for
                if policy.signal is not None and policy.signal.looks_back:
                    analysis = replace(analysis, signals=1 + policy.depth)
            if breaks and reports:  # behind a break anything may be called a timestep
                analysis = replace(analysis, timestep=None)
            guard = flags.guard
            guarded = split(gm, analysis, guard.depth, flags.history_dtype, inputs=guard.inputs)
            named = None if flags.strategy is None else flags.strategy.num_inference_steps
            keeps = guard.skips, named or DEFAULT_STEPS
            text = guarded_text(guarded, *keeps)
            if flags.blocks == "rolled":
                text = f"{text.rstrip()}\n{_rolled_text(guarded)}"
            if guard.within is not None:
                text = f"{text.rstrip()}\n{within_text(guard.within)}"
            held = sum(guarded.held_bytes(*keeps).values())
            free = _hoisted_parameters(module, gm, analysis, example_inputs)
            reports.append(
                GraphReport(text, analysis, None, held_bytes=held, hoisted_parameters=free)
            )
        except NoBlockLoopError as error:
            reports.append(GraphReport("", None, str(error), has_blocks=False))
        except (RegionError, ValueError) as error:
            reports.append(GraphReport("", None, str(error)))
        ended = break_of(gm)
        if ended is not None and ended.user_stack:
            breaks.append(_graph_break(str(ended.reason), ended.user_stack, blocks))
        return gm.forward

    def forward() -> Any:
        return module.forward(*args, **kwargs)

    # Within a call of its own, what an enabled module runs is the model.
    call = Call(module, ModelState(), kwargs)
    try:
        with torch.no_grad(), bind(call):
            try:
                compiled(forward, report, fullgraph=True, dynamic=False)()
            except NoGraphError as error:
                breaks.append(_graph_break(str(error), place_of(error), blocks))
                reports.clear()
                compiled(forward, report, dynamic=False)()
    finally:
        # Dynamo keeps what it compiled with the code, and compiles one code only so many times.
        for code in (forward.__code__, *traced):
            forget_compiled(code)
    by_place = {each.place: each for each in reversed(breaks)}
    return Explanation(name, tuple(reports), tuple(reversed(by_place.values())))


def _by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """A call's arguments by keyword, so that its graphs name their inputs as the model does."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [
        each.name
        for each, _ in zip(parameters, args, strict=False)
        if each.kind == each.POSITIONAL_OR_KEYWORD and each.name not in kwargs
    ]
    if len(names) < len(args):
        return args, kwargs
    return (), {**dict(zip(names, args, strict=True)), **kwargs}


def _context_text(context: CacheContext) -> str:
    """What an extractor says of a call."""
    lines = ["what enters the blocks, and what is compared between steps:"]
    for field in ("hidden_states", "encoder_hidden_states", "modulated_input", "temb"):
        value = getattr(context, field)
        if value is not None:
            lines.append(f"  {field}: {describe_value(value)}")
    return "\n".join(lines)


def _hoisted_parameters(
    module: nn.Module, gm: GraphModule, analysis: Analysis, example_inputs: Sequence[Any]
) -> tuple[str, ...]:
    """Names of the weights that only what is hoisted reads."""
    if analysis.hoisted is None:
        return ()
    names = {id(each): name for name, each in module.named_parameters(remove_duplicate=False)}
    names |= {id(each): name for name, each in module.named_buffers(remove_duplicate=False)}
    placeholders = gm.graph.find_nodes(op="placeholder")
    given = dict(zip(placeholders, example_inputs, strict=True))
    free = [each for cut in analysis.hoisted.taken for each in cut.weights]
    return tuple(names[id(given[each])] for each in free if id(given.get(each)) in names)


def _rolled_text(guarded: GuardedGraph) -> str:
    """How many of the region's blocks are compiled once for several."""
    called = calls_of(roll(guarded.body))
    region = set(guarded.analysis.region.body)
    blocks = sum(not region.isdisjoint(each.nodes) for each in guarded.analysis.loop.blocks)
    if not called:
        return f"rolled: none of {blocks} blocks, each is compiled on its own"
    kinds = len(set(called))
    return f"rolled: {len(called)} of {blocks} blocks are calls of {kinds}, compiled once"


def _block_code(model: nn.Module) -> list[tuple[str, range]]:
    """The files and lines of the ``forward`` of every element of a ModuleList."""
    lists = (each for each in model.modules() if isinstance(each, nn.ModuleList))
    found = []
    for kind in dict.fromkeys(type(element) for each in lists for element in each):
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        if code is not None:
            lines = [line for *_, line in code.co_lines() if line is not None]
            found.append((code.co_filename, range(min(lines), max(lines) + 1)))
    return found


def _graph_break(
    message: str, stack: Sequence[FrameSummary], blocks: Sequence[tuple[str, range]]
) -> GraphBreak:
    """Why Dynamo could not go on, where in the user's code, and what it advises."""
    lines = [line.strip() for line in message.splitlines()]
    advice = [line.removeprefix("Hint: ") for line in lines if line.startswith("Hint: ")]
    # Of a size that depends on data, Dynamo says what it needs between advice and internals.
    reason = lines[0].removeprefix("Consider annotating your code using torch._check*(). ")
    reason = re.sub(r"\s*\((?:unhinted|Size-like symbols):.*$", "", reason).rstrip(".")
    libraries = {Path(torch.__file__).parent, Path(__file__).parent}
    frames = [each for each in stack if libraries.isdisjoint(Path(each.filename).parents)]
    if not frames:
        return GraphBreak(reason, "a place that Dynamo does not tell", advice="".join(advice[:1]))
    inner = frames[-1]
    outer = next((each for each in frames if each.name == "forward"), inner)
    place, reached_from = (f"{each.filename}:{each.lineno}" for each in (inner, outer))
    return GraphBreak(
        reason,
        place,
        source=(inner.line or "").strip(),
        reached_from="" if reached_from == place else reached_from,
        advice="".join(advice[:1]),
        in_block=any(
            each.filename == file and each.lineno in lines
            for each in frames
            for file, lines in blocks
        ),
    )
