"""The analysis: the steps that find what the split needs, in their order. Changes nothing.

block loop -> region -> residual pairs -> signal -> what the body takes in -> checks
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from .block_loop import BlockLoop, candidate_loops, find_block_loop
from .hoist import Hoisted, find_hoisted
from .names import nodes_in
from .order import Dependencies, computation, dependencies
from .region import (
    Region,
    RegionError,
    check_cuts,
    close_region,
    overwritten_inputs,
    shrink_body,
    take_in,
    take_in_sizes,
    with_ancestors,
)
from .residual import ResidualPair, check_results, pair_outputs, unreached_outputs
from .signal import (
    FIRST_BLOCKS,
    LATENTS,
    Signal,
    find_latents,
    find_signal,
    find_timestep,
    first_residual,
    hidden_states,
    moving_inputs,
)
from .storage import stored_bytes
from .values import nbytes, same_shape, tensor_of
from .views import Leaf, leaves

WORTHWHILE = 1 / 4
"""A loop is taken in place of the likeliest one if it does at least this share of its work."""


@dataclass(frozen=True)
class Analysis:
    """What the pass found in a graph, before anything is rewritten.

    ``overwritten`` are the region inputs that the body writes into, ``last`` says how many blocks
    follow the region, ``whole`` that it is the whole graph, ``signals`` how many are kept.
    ``hoisted`` is what was taken out of ``region``, None where that was not asked for.
    """

    graph: Graph
    loop: BlockLoop
    region: Region
    pairs: tuple[ResidualPair, ...]
    signal: Signal | None
    timestep: Node | None
    overwritten: tuple[Node, ...]
    last: int = 0
    whole: bool = False
    signals: int = 1
    hoisted: Hoisted | None = None

    @property
    def supposed(self) -> tuple[Node, ...]:
        """Nodes of the prologue whose numbers must be below 0, or some partner does not fit."""
        return tuple(dict.fromkeys(node for pair in self.pairs for node in pair.supposed))

    def residual_bytes(self, depth: int = 1, history_dtype: torch.dtype | None = None) -> int:
        """Bytes that a trajectory's residuals take, with their scales.

        Args:
            depth: of how many computed steps they are kept.
            history_dtype: what floating residuals are kept in; None for their own dtype.
        """
        return depth * sum(_bytes(pair.output, history_dtype) for pair in self.pairs)

    def result_bytes(self, depth: int = 1) -> int:
        """Bytes of the results of ``depth`` computed steps, for calls that skip the forward."""
        (end,) = self.graph.find_nodes(op="output")
        return depth * sum(map(_bytes, nodes_in(end.args)))

    def signal_bytes(self) -> int:
        """Bytes of the signals that are kept: the last call's, and those of computed steps."""
        return 0 if self.signal is None else self.signals * _bytes(self.signal.node)


def analyse(
    graph: Graph,
    *,
    region: Sequence[str] | None = None,
    signal: str | None = "auto",
    parameters: Sequence[str] = (),
    first: int = 0,
    last: int = 0,
    whole: bool = False,
) -> Analysis:
    """Find block loop, region, residual pairs and signal. Changes nothing.

    Args:
        graph: a Dynamo graph.
        region: paths of the ``ModuleList``s that make up the block loop, or None to find them.
        signal: ``"auto"``, ``"timestep_embedding"``, ``"latents"``, ``"first_blocks"``, a module's
            path, or None for no signal. ``"first_blocks"`` is what the first blocks that always run
            add to the hidden states; it is the only one where there are such blocks.
        parameters: names of the model's positional parameters, by which to know the timestep where
            the model's ``forward`` is wrapped in one with ``*args``.
        first: how many blocks at the beginning of the loop always run; the region begins after.
        last: how many blocks at its end always run.
        whole: whether the region is the whole graph. Its results are held as values, or, with
            ``"latents"`` for the signal, are updates of these.

    Raises:
        RegionError: nothing in the graph can be skipped; the message says why.
    """
    before = dependencies(graph)
    timestep = find_timestep(graph, parameters)
    if whole:
        return _whole(graph, find_block_loop(graph, region), signal, timestep, before)
    loop, found, pairs = _paired_loop(graph, region, before, first, last)
    chosen = None
    if signal is not None:
        if (signal == FIRST_BLOCKS) != (first > 0):
            raise RegionError(
                f"signal={signal!r} does not go with {first} first blocks that always run; "
                f"signal={FIRST_BLOCKS!r} is what those add, and the only one beside them"
            )
        head = [node for block in loop.in_order[:first] for node in block.nodes]
        chosen = (
            first_residual(graph, head, pairs, before)
            if first
            else find_signal(graph, loop, found, pairs, timestep, signal, before)
        )
        found, pairs = _without(graph, found, pairs, chosen.moved)
    if not pairs:
        raise RegionError(
            "the signal needs the whole block loop; choose one that is known before the blocks "
            "run, with signal=..."
        )
    kept = {leaf for pair in pairs if pair.partner is not None for leaf in leaves(pair.partner)}
    if chosen is not None:
        kept.update((chosen.node, *(leaves(chosen.minus) if chosen.minus is not None else ())))
    found = take_in(graph, found, kept, before)
    check_cuts(found)
    check_results(graph, found, pairs)
    overwritten = overwritten_inputs(found)
    return Analysis(graph, loop, found, pairs, chosen, timestep, overwritten, last)


def take_out(
    found: Analysis, parameters: Sequence[str] = (), modulations: bool = False
) -> Analysis:
    """The same analysis, its region without what need not be computed at every step.

    Args:
        found: by :func:`analyse`.
        parameters: as there.
        modulations: whether what only the timestep changes is taken out too.
    """
    graph, timestep, signal = found.graph, found.timestep, found.signal
    partners = [pair.partner for pair in found.pairs if pair.partner is not None]
    needed = [leaf for partner in partners for leaf in leaves(partner)]
    pinned = [pair.output for pair in found.pairs]
    if signal is not None:
        pinned.append(signal.node)
        needed += leaves(signal.minus) if signal.minus is not None else ()
    hidden = hidden_states(found.pairs) if partners else None
    moving = moving_inputs(graph, hidden, timestep, parameters)
    before = dependencies(graph)
    hoisted = find_hoisted(graph, before, moving, timestep, needed, pinned, modulations)
    return replace(found, region=hoisted.rest_of(found.region), hoisted=hoisted)


def _whole(
    graph: Graph, loop: BlockLoop, signal: str | None, timestep: Node | None, before: Dependencies
) -> Analysis:
    """The analysis whose region is the whole graph: nothing comes before it, nothing after."""
    if signal not in (None, LATENTS):
        raise RegionError(
            f"signal={signal!r} is made in the model, of which a reused step runs nothing; only "
            f"signal={LATENTS!r} goes with that"
        )
    found = take_in_sizes(graph, close_region(graph, computation(graph), before))
    (end,) = graph.find_nodes(op="output")
    results = [node for node in dict.fromkeys(nodes_in(end.args)) if node in found.outputs]
    outputs = dict.fromkeys([*results, *found.outputs])
    chosen = None if signal is None else Signal(find_latents(graph, timestep), LATENTS, ())
    pairs = tuple(_update_of(None if chosen is None else chosen.node, each) for each in outputs)
    check_cuts(found)
    if chosen is not None:
        check_results(graph, found, pairs)
    overwritten = overwritten_inputs(found)
    return Analysis(graph, loop, found, pairs, chosen, timestep, overwritten, whole=True)


def _update_of(latents: Node | None, output: Node) -> ResidualPair:
    """A result as an update of the latents, where it has their shape; otherwise as a value."""
    entered = None if latents is None else tensor_of(latents)
    value = tensor_of(output)
    if latents is None or entered is None or value is None or not value.is_floating_point():
        return ResidualPair(output, None, 0)
    leaf = Leaf(latents, tuple(entered.shape))
    fits = same_shape(leaf.shape, value.shape)
    return ResidualPair(output, leaf if fits else None, 0)


def _paired_loop(
    graph: Graph, names: Sequence[str] | None, before: Dependencies, first: int, last: int
) -> tuple[BlockLoop, Region, tuple[ResidualPair, ...]]:
    """The first block loop with an output that is a residual update of an input.

    Without such an output, a reused step would repeat an earlier one, whatever its latents are.
    """
    has_outputs = False
    likeliest = None
    for loop in candidate_loops(graph, names, before):
        likeliest = likeliest or loop
        if loop.arithmetic < WORTHWHILE * likeliest.arithmetic:
            continue
        blocks = loop.in_order
        between = blocks[first : len(blocks) - last]
        if not between:
            raise RegionError(
                f"the block loop has {len(blocks)} blocks, so that none is left between the first "
                f"{first} and the last {last}, which always run"
            )
        nodes = [node for block in between for node in block.nodes]
        closed = take_in_sizes(graph, close_region(graph, nodes, before))
        found, pairs = pair_outputs(graph, closed)
        unreached = unreached_outputs(found, pairs)
        if unreached:
            found, pairs = _without(graph, found, pairs, with_ancestors(found, unreached, before))
        if not all(pair.held for pair in pairs):
            return loop, found, pairs
        has_outputs = has_outputs or bool(pairs)
    if has_outputs:
        raise RegionError(
            "no output of the block loop is an input plus what the blocks add to it, so that a "
            "reused step would repeat an earlier one whatever its latents; name the ModuleLists "
            "whose blocks add to their stream with region=[...], or say what the blocks are with "
            "omni_cache.register_extractor"
        )
    raise RegionError(
        "nothing that only the block loop computes is used after it; say what the blocks are "
        "with omni_cache.register_extractor"
    )


def _without(
    graph: Graph, region: Region, pairs: tuple[ResidualPair, ...], nodes: Collection[Node]
) -> tuple[Region, tuple[ResidualPair, ...]]:
    """The region with some nodes of its body, and all that they need, in the prologue."""
    if not nodes:
        return region, pairs
    region = shrink_body(graph, region, nodes)
    # What the prologue computes on every step needs no residual.
    outputs = set(region.outputs)
    return region, tuple(pair for pair in pairs if pair.output in outputs)


def _bytes(node: Node, dtype: torch.dtype | None = None) -> int:
    """Bytes of a node's tensor; kept in ``dtype``, if one is given and the tensor is floating."""
    value = tensor_of(node)
    if value is None:
        return 0
    if dtype is not None and value.dtype.is_floating_point:
        return stored_bytes(value, dtype)
    return nbytes(value)
