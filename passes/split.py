"""The split: a graph with a region becomes callable parts and the guard between them.

    constants, modulations: inputs -> what was hoisted, for all of these to read
    prologue: inputs               -> signal, region inputs, whatever else the epilogue reads
    body:     region inputs        -> outputs, residuals (= outputs - partners), finite
    epilogue: outputs, ...         -> the graph's outputs                       (after the body)
    reuse:    partners, history, w -> outputs = partners + sum of w[:, i] * history[i]
                                   -> the graph's outputs

The subtraction is the last node of the body and the weighted sum the first of ``reuse``, which is
the epilogue a second time, so that a compiler fuses both with their neighbours. Where the epilogue
has blocks in it, ``reuse`` ends with the outputs and the epilogue follows it too, so that no block
is compiled twice. The history is the residuals of the last computed steps; every forecast is a row
of weights over it, and to hold the last residual is the row (1,). With ``inputs``, each sum has two
terms more: what enters at this call, and what entered at the newest computed step. Residuals of 8
bits leave the body with scales behind them, which the sum multiplies by.

Where partners fit their outputs only if numbers that the prologue computes are below 0 (``-n`` of
``x[:, :-n]``), a part without residuals serves calls in which they are not.

A residual is cached with its non-finite elements replaced by zero, and the body says in ``finite``
whether all were finite: no NaN can be reused, even by a gate that reads nothing back from the
device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from .analysis import Analysis
from .build import Builder, Part, Partner, numbers_of_data, symbols_of, unused, value_of
from .hoist import Cut
from .order import Modes, is_written, memory_root, modes, written_nodes
from .region import Region, RegionError
from .storage import FLOAT8, can_store, of_partners, restored, scaled, unscaled
from .values import is_distributed, is_shape, is_static_input, nbytes, same_shape
from .views import leaves

FINITE = "omni_cache_finite"
"""The name of the body's last output: a bool tensor, whether every residual was finite."""


SIGNAL = "omni_cache_signal"
"""The name of a signal that the prologue makes for the gate alone."""

WEIGHTS = "omni_cache_weights"
"""The name of reuse's row of weights: (1 or B, depth), newest entry first.

It is float32, or float64 where a residual has double precision. With ``inputs`` there are two
columns more, for the partner of this call and for that of the newest computed step.
"""


class Entered(NamedTuple):
    """A partner that a computed step leaves to reused ones, which weigh it.

    Attributes:
        name: of the partner, an input of the graph or an output of the prologue.
        kept: what it is called as an input of ``reuse``.
        copies: whether it is copied: others may write into it, or it is a part of more memory.
        dtype: what it is kept in; None for its own.
    """

    name: str
    kept: str
    copies: bool
    dtype: torch.dtype | None

    def of(self, partner: torch.Tensor) -> torch.Tensor:
        """The partner as it is kept; a dtype that cannot hold it leaves 0."""
        if self.dtype not in (None, partner.dtype):
            return partner.to(self.dtype).nan_to_num(0.0, 0.0, 0.0)
        return partner.clone() if self.copies else partner


@dataclass(frozen=True)
class GuardedGraph:
    """A graph split at its region.

    Attributes:
        analysis: what it was split by.
        inputs: the graph's inputs by name, each with the metadata of its node.
        results: how many outputs the graph has.
        constants: what was hoisted because nothing changes it; None where nothing was.
        modulations: what was hoisted because the timestep alone changes it, likewise.
        prologue: the part before the region.
        body: the region.
        epilogue: the part after it.
        reuse: the epilogue on forecasts instead of the body's outputs. If ``merges``, only what
            makes the body's outputs of forecasts, under their names; the epilogue follows.
        supposed: names of the prologue's outputs that must be numbers below 0. In a call in which
            one is not, what :func:`without_residuals` gives comes after the prologue.
        residuals: names of the outputs of ``body`` that a computed step leaves to reused ones.
        history: for each entry that ``reuse`` knows, newest first, the names of the residuals in
            it, in the order of ``residuals``. Those of the newest entry are ``residuals``. What
            ``reuse`` never reads (an older entry of an integer) is missing from its inputs.
        scales: by the name of a residual of 8 bits that of its scale; they are the last of
            ``residuals``.
        entered: the partners that ``reuse`` weighs, none without ``inputs``.
        history_dtype: what floating residuals are kept in; None for their own dtype.
        signal: name of the prologue's output that the gate compares, None if nothing is compared.
    """

    analysis: Analysis
    inputs: Mapping[str, Mapping[str, Any]]
    results: int
    constants: Part | None
    modulations: Part | None
    prologue: Part
    body: Part
    epilogue: Part
    reuse: Part
    merges: bool
    supposed: tuple[str, ...]
    residuals: tuple[str, ...]
    history: tuple[tuple[str, ...], ...]
    scales: Mapping[str, str]
    entered: tuple[Entered, ...]
    history_dtype: torch.dtype | None
    signal: str | None

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of ``reuse``'s row of weights."""
        row = dict(zip(self.reuse.inputs, self.reuse.example_inputs, strict=True)).get(WEIGHTS)
        return row.dtype if isinstance(row, torch.Tensor) else torch.float32

    def held_bytes(self, keeps_results: bool = False, timesteps: int = 1) -> dict[str, int]:
        """Bytes that a trajectory holds, by what it holds.

        Args:
            keeps_results: whether it holds what the graph returns, too.
            timesteps: for how many it holds modulations, where they are hoisted.
        """
        analysis, depth = self.analysis, len(self.history)
        held = {
            "residual": analysis.residual_bytes(depth, self.history_dtype),
            "signal": analysis.signal_bytes(),
        }
        if self.entered:
            examples = dict(zip(self.reuse.inputs, self.reuse.example_inputs, strict=True))
            kept = (examples[each.kept] for each in self.entered)
            held["input"] = sum(nbytes(each) for each in kept if isinstance(each, torch.Tensor))
        if keeps_results:
            held["result"] = analysis.result_bytes(depth)
        if analysis.hoisted is not None:
            held["constants"] = analysis.hoisted.constants.held_bytes
        if self.modulations is not None and analysis.hoisted is not None:
            held["modulations"] = timesteps * analysis.hoisted.modulations.held_bytes
        return held


def split(
    gm: GraphModule,
    analysis: Analysis,
    depth: int = 1,
    history_dtype: torch.dtype | None = None,
    per_sample: bool = False,
    inputs: bool = False,
    merges: bool = False,
    matches_strides: bool = True,
) -> GuardedGraph:
    """Cut a graph module into the parts of a guarded graph.

    Args:
        gm: the module that ``analysis`` was made from; it is left as it is.
        analysis: what to cut, from :func:`analyse`.
        depth: how many computed steps a forecast weighs, 1 or more.
        history_dtype: what floating residuals are cast to before they are kept: a dtype of 16 bits
            or more, in which an overflow counts as non-finite, or float8_e4m3fn with a float32
            scale for each row of the last dimension; None keeps them in their own.
        per_sample: whether ``reuse`` is traced for a row of weights for each sample, not for one
            row. It matters to compilers that specialise on sizes.
        inputs: whether ``reuse`` weighs partners too, where an output has one that may change.
        merges: whether ``reuse`` ends with the outputs even where the epilogue has no blocks in it.
        matches_strides: whether outputs that ``reuse`` ends with are laid out as the body's are, as
            compilers of separate parts need it.

    Raises:
        ValueError: ``depth`` or ``history_dtype`` is not allowed.
        RegionError: ``per_sample``, but the residuals have no batch dimension in common.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} is not allowed; depth must be 1 or more")
    if history_dtype is not None and not can_store(history_dtype):
        raise ValueError(
            f"history_dtype={history_dtype} is not allowed; history_dtype must be None, {FLOAT8} "
            "or a floating-point dtype of 16 bits or more"
        )
    region, pairs = analysis.region, analysis.pairs
    result: Node = gm.graph.find_nodes(op="output")[0]
    flat: Any = result.args[0]
    held_modes = modes(gm.graph)
    taken = {node.name for node in gm.graph.nodes}
    partners = {pair.output: Partner(pair, taken) for pair in pairs if pair.partner is not None}
    kept = {*_reads(region.body), *_reads(region.epilogue), *result.all_input_nodes}
    for pair in pairs:
        kept.update(leaves(pair.partner) if pair.partner is not None else ())
    if analysis.signal is not None:
        kept.add(analysis.signal.node)
        kept.update(leaves(analysis.signal.minus) if analysis.signal.minus is not None else ())
    kept.update(analysis.supposed)
    numbers = numbers_of_data(region.prologue)
    if numbers:
        laid_out_by = {symbol for node in kept for symbol in symbols_of(node)}
        kept.update(numbers[symbol] for symbol in numbers.keys() & laid_out_by)

    prologue = Builder(gm, held_modes)
    prologue.copy(region.prologue)
    made = {node.name: prologue.values[node] for node in region.prologue if node in kept}
    for partner in partners.values():
        if partner.composed:
            made[partner.name] = prologue.laid_out(prologue.compose(partner.view))
    signal = None if analysis.signal is None else analysis.signal.node.name
    if analysis.signal is not None and analysis.signal.minus is not None:
        entered = prologue.compose(analysis.signal.minus)
        signal = unused(SIGNAL, taken)
        made[signal] = prologue.call(torch.sub, prologue.values[analysis.signal.node], entered)

    body = _blocks(gm, analysis, held_modes)
    outputs = {pair.output.name: body.values[pair.output] for pair in pairs}
    residuals: dict[str, Node] = {}
    for pair in pairs:
        value = body.values[pair.output]
        if pair.output in partners:
            residual = body.call(torch.sub, value, body.partner(partners[pair.output], made))
            # After the subtraction the output is known to have the partner's shape.
            outputs[pair.output.name] = body.laid_out(value)
            value = residual
        if history_dtype is not None and _dtype(value).is_floating_point:
            value = body.cast(value, unscaled(history_dtype))
        residuals[unused(f"{pair.output.name}_residual", taken)] = value
    finite = None
    for name, value in residuals.items():
        mine = body.call(own_part, value) if is_distributed(value) else value
        fine = body.call(torch.all, body.call(torch.isfinite, mine))
        residuals[name] = body.call(torch.nan_to_num, value, 0.0, 0.0, 0.0)
        finite = fine if finite is None else body.call(torch.logical_and, finite, fine)
    assert finite is not None  # there is at least one pair
    scales: dict[str, str] = {}
    for name, value in list(residuals.items()) if history_dtype is FLOAT8 else ():
        if _dtype(value).is_floating_point:
            scales[name] = unused(f"{name}_scale", taken)
            residuals[name], residuals[scales[name]] = scaled(value, body.call)

    epilogue = Builder(gm, held_modes, numbers)
    for pair in pairs:
        made_anew = outputs[pair.output.name]
        if made_anew is not body.values[pair.output]:
            epilogue.values[pair.output] = epilogue.placeholder(
                pair.output.name, value_of(made_anew)
            )
    epilogue.copy(region.epilogue)

    reuse = Builder(gm, held_modes, numbers)
    overwrites = _overwrites(region)
    returned = {memory_root(each) for each in result.all_input_nodes}
    older = [tuple(unused(f"{name}_{age}", taken) for name in residuals) for age in range(1, depth)]
    history = (tuple(residuals), *older)
    weights = _Weights(reuse, residuals, depth + 2 * inputs, per_sample)
    weighed = _Partners(reuse, made, taken, of_partners(history_dtype))

    def read(name: str) -> list[Node]:
        """All entries of the history of what the body returns under a name."""
        place, like = history[0].index(name), value_of(residuals[name])
        return [reuse.placeholder(entry[place], like) for entry in history]

    for name, pair in zip(list(residuals), pairs, strict=False):  # scales follow
        newest = residuals[name]
        if _is_weighed(newest):
            entries = read(name)
            if name in scales:
                beside = read(scales[name])
                entries = [
                    restored(*each, reuse.call) for each in zip(entries, beside, strict=True)
                ]
            if inputs and pair.output in partners:
                entries += weighed.now_and_before(partners[pair.output])
            forecast = weights.sum(entries)
        else:
            forecast = reuse.placeholder(name, value_of(newest))
        if pair.output in partners:
            forecast = reuse.call(torch.add, reuse.partner(partners[pair.output], made), forecast)
        elif not _is_weighed(newest) and (overwrites or memory_root(pair.output) in returned):
            # Whoever writes into it must not write into what the next reused step takes over.
            forecast = reuse.call(torch.clone, forecast)
        reuse.values[pair.output] = reuse.cast(forecast, _dtype(pair.output))
    merges = merges or analysis.last > 0
    if merges:
        like = {pair.output: outputs[pair.output.name] for pair in pairs}
        merged = {
            each.name: reuse.laid_out_like(reuse.values[each], like[each])
            if matches_strides
            else reuse.values[each]
            for each in like
        }
        merge = reuse.finish(merged)
    else:
        reuse.copy(region.epilogue)
        merge = reuse.finish_with(result)

    cuts = () if analysis.hoisted is None else analysis.hoisted.taken
    constants, modulations, *_ = *(_apart(gm, cut, held_modes) for cut in cuts), None, None
    return GuardedGraph(
        analysis,
        inputs={node.name: dict(node.meta) for node in gm.graph.find_nodes(op="placeholder")},
        results=len(flat),
        constants=constants,
        modulations=modulations,
        prologue=prologue.finish(made),
        body=body.finish({**outputs, **residuals, FINITE: finite}),
        epilogue=epilogue.finish_with(result),
        reuse=merge,
        merges=merges,
        supposed=tuple(number.name for number in analysis.supposed),
        residuals=tuple(residuals),
        history=history,
        scales=scales,
        entered=tuple(weighed.entered.values()),
        history_dtype=history_dtype,
        signal=signal,
    )


def without_residuals(gm: GraphModule, analysis: Analysis) -> Part:
    """Body and epilogue as they are, for calls whose outputs have no partner that fits.

    Use it before :func:`split`, which has symbolic sizes learn what partners tell of them.
    """
    part = _blocks(gm, analysis, modes(gm.graph))
    part.copy(analysis.region.epilogue)
    return part.finish_with(gm.graph.find_nodes(op="output")[0])


def _blocks(gm: GraphModule, analysis: Analysis, held_modes: Mapping[Node, Modes]) -> Builder:
    """A new part that begins with the body, on copies of what it writes into."""
    part = Builder(gm, held_modes, numbers_of_data(analysis.region.prologue))
    for node in analysis.overwritten:
        part.values[node] = part.call(torch.clone, part.read(node))
    part.copy(analysis.region.body)
    return part


def _apart(gm: GraphModule, cut: Cut, held_modes: Mapping[Node, Modes]) -> Part | None:
    """What was hoisted, as a part; None where nothing was."""
    if not cut.results:
        return None
    part = Builder(gm, held_modes)
    part.copy(cut.nodes)
    return part.finish({node.name: part.values[node] for node in cut.results})


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor."""
    part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def on_all_ranks(weight: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
    """A weight, the same on every rank, as a DTensor beside the DTensor that it weighs."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = entry.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(weight, mesh, [Replicate()] * mesh.ndim, run_check=False)


class _Weights:
    """The row of weights of a reuse part, and the sums that it weighs."""

    def __init__(
        self, reuse: Builder, residuals: Mapping[str, Node], count: int, per_sample: bool
    ) -> None:
        self._reuse = reuse
        self._count = count
        self._weighed = [node for node in residuals.values() if _is_weighed(node)]
        self._rows: int | torch.SymInt = 1
        if per_sample:
            self._rows = _batch(self._weighed)
        self._columns: list[Node] = []

    def sum(self, entries: Sequence[Node]) -> Node:
        """``sum_i w[:, i] * entries[i]``, in the dtype that weights and entries promote to."""
        if not self._columns:
            self._columns = self._unpacked()
        total: Node | None = None
        # Of what has no partner, the last ones weigh nothing.
        for column, entry in zip(self._columns, entries, strict=False):
            weight = self._fitting(column, entry.meta["example_value"])
            if is_distributed(entry):
                weight = self._reuse.call(on_all_ranks, weight, entry)
            term = self._reuse.call(torch.mul, weight, entry)
            total = term if total is None else self._reuse.call(torch.add, total, term)
        assert total is not None  # there is an entry at least
        return total

    def _fitting(self, column: Node, entry: torch.Tensor) -> Node:
        """One weight for each sample, with as many dimensions as an entry, on its device."""
        shape = (-1, *[1] * (entry.dim() - 1)) if entry.dim() else ()
        column = self._reuse.call(torch.reshape, column, shape)
        value: torch.Tensor = column.meta["example_value"]
        if value.device == entry.device:
            return column
        return self._reuse.call(torch.ops.aten.to.device, column, entry.device, value.dtype)

    def _unpacked(self) -> list[Node]:
        double = any(_dtype(node) in (torch.float64, torch.complex128) for node in self._weighed)
        dtype = torch.float64 if double else torch.float32
        example: torch.Tensor = self._weighed[0].meta["example_value"]
        if is_distributed(self._weighed[0]):
            example = own_part(example)
        value = example.new_empty((self._rows, self._count), dtype=dtype)
        row = self._reuse.placeholder(WEIGHTS, {"example_value": value})
        return [self._reuse.call(torch.select, row, 1, index) for index in range(self._count)]


class _Partners:
    """The partners that a reuse part weighs, as ``entered`` describes them by their names."""

    def __init__(
        self,
        reuse: Builder,
        made: Mapping[str, Node],
        taken: set[str],
        dtype: torch.dtype | None,
    ) -> None:
        self._reuse, self._made, self._taken, self._dtype = reuse, made, taken, dtype
        self._before: dict[str, Node] = {}
        self.entered: dict[str, Entered] = {}

    def now_and_before(self, partner: Partner) -> list[Node]:
        """The partner of this call, and that of the newest computed step; nothing of a weight."""
        sources = leaves(partner.view)
        if all(map(is_static_input, sources)):
            return []
        name = partner.name or sources[0].name
        if name not in self.entered:
            source = self._made[name] if partner.composed else sources[0]
            value: torch.Tensor = source.meta["example_value"]
            kept = unused(f"{name}_before", self._taken)
            dtype = self._dtype if value.dtype.is_floating_point else None
            entered = Entered(name, kept, True, dtype)
            example = entered.of(value)
            if same_shape(example.stride(), value.stride()):
                entered = entered._replace(copies=any(map(is_written, sources)))
            self.entered[name] = entered
            self._before[name] = self._reuse.placeholder(kept, {"example_value": example})
        before = self._before[name]
        if partner.cast is not None:
            before = self._reuse.cast(before, partner.cast)
        return [self._reuse.partner(partner, self._made), before]


def _batch(residuals: Sequence[Node]) -> int | torch.SymInt:
    """The first size that all residuals share; one with two dimensions may well be of tokens."""
    shapes = [node.meta["example_value"].shape for node in residuals]
    first = shapes[0][:1] if shapes else ()
    shared = all(len(shape) > 2 and same_shape(shape[:1], first) for shape in shapes)
    # Rows for a batch that is split over ranks would have to be split with it.
    shared = shared and not any(map(is_distributed, residuals))
    if not first or not shared:
        raise RegionError(
            "per_sample: the residuals have no batch dimension in common, their shapes are "
            f"{', '.join(str(list(shape)) for shape in shapes)}; decide for the whole batch instead"
        )
    size: int | torch.SymInt = first[0]
    return size


def _is_weighed(residual: Node) -> bool:
    """Whether a residual is of numbers that a sum can weigh; integers and masks are taken over."""
    dtype = _dtype(residual)
    return dtype.is_floating_point or dtype.is_complex


def _dtype(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["example_value"].dtype
    return dtype


def _overwrites(region: Region) -> bool:
    """Whether the epilogue writes in place into what the body made."""
    body = set(region.body)
    return any(
        memory_root(each) in body for node in region.epilogue for each in written_nodes(node)
    )


def _reads(nodes: Sequence[Node]) -> set[Node]:
    """What a set of nodes reads from outside itself, weights left out; for a shape, its tensor."""
    inside = set(nodes)
    read = {each for node in nodes for each in node.all_input_nodes if each not in inside}
    shapes = {each for each in read if is_shape(each)}
    read = read - shapes | {each for shape in shapes for each in shape.all_input_nodes}
    return {each for each in read if not is_static_input(each)}
