r"""What a graph need not compute at every step: nodes to take out of it.

    weights, prompt, mask, ids -> [ constants ] -------> keys, values, tables ----\
    weights, timestep, constants -> [ modulations ] ---> shifts, scales, gates ---->  the rest
    latents ----------------------------------------------------------------------/

Constants depend on nothing that moves from step to step, modulations on the timestep besides. What
the rest reads of either is held, and nothing is held that the rest can make as well: views, casts,
copies and expansions stay with their readers, and what is made of weights alone (one that is stored
in fewer bits, say) is as large as they are. Left where they are: what writes in place, draws
random numbers, runs under vmap, has sizes that depend on data, or talks to other ranks; so is what
is handed out, because whoever gets it may write into it.

Which inputs really stay, only the calls show. Nothing here depends on a guess about it but what is
taken out. Linear in the size of the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch.fx import Graph, Node

from .cost import arithmetic
from .names import CAST_OPS, ELEMENTWISE_OPS, VIEW_OPS, op_name
from .order import (
    Dependencies,
    computation,
    draws,
    memory_root,
    modes,
    shares_memory_with,
    vmap_spans,
    written_nodes,
)
from .region import Region
from .values import (
    is_distributed,
    is_shape,
    is_size,
    is_static_input,
    is_tuple,
    nbytes,
    numel,
    size_hint,
    tensor_of,
)

WORTHWHILE = 1024
"""What no contraction makes is held from so many elements on; fewer are made in no time."""


@dataclass(frozen=True)
class Cut:
    """A part that is taken out of a graph. All tuples are in graph order.

    Attributes:
        nodes: what it computes. Cheap ones among them may stay in the rest too.
        results: what the rest reads of it, which is held.
        freed: the nodes that the rest has no more use of.
    """

    nodes: tuple[Node, ...]
    results: tuple[Node, ...]
    freed: tuple[Node, ...]

    @property
    def arithmetic(self) -> int:
        """Floating-point operations that the rest is spared."""
        return sum(map(arithmetic, self.freed))

    @property
    def held_bytes(self) -> int:
        """Bytes of the results."""
        return sum(nbytes(value) for value in map(tensor_of, self.results) if value is not None)

    @property
    def weights(self) -> list[Node]:
        """The parameters and buffers that nothing else reads."""
        freed = set(self.freed)
        read = dict.fromkeys(each for node in self.freed for each in node.all_input_nodes)
        return [each for each in read if is_static_input(each) and freed.issuperset(each.users)]

    @property
    def weight_elements(self) -> int:
        """Number of their elements."""
        return _count(self.weights)

    @property
    def weight_bytes(self) -> int:
        """Bytes of them."""
        return sum(nbytes(value) for value in map(tensor_of, self.weights) if value is not None)


@dataclass(frozen=True)
class Hoisted:
    """What is taken out of a graph.

    Attributes:
        constants: what depends on nothing that moves.
        modulations: what depends on the timestep besides. It is found in any case.
        takes_modulations: whether it is taken out too.
    """

    constants: Cut
    modulations: Cut
    takes_modulations: bool

    @property
    def taken(self) -> tuple[Cut, ...]:
        """What is taken out, one after the other."""
        return (self.constants, self.modulations) if self.takes_modulations else (self.constants,)

    def rest_of(self, region: Region) -> Region:
        """A region without what is taken out."""
        gone = {node for cut in self.taken for node in cut.freed}
        prologue, body, epilogue = (
            tuple(node for node in nodes if node not in gone)
            for nodes in (region.prologue, region.body, region.epilogue)
        )
        inside = set(body)
        crossing = dict.fromkeys(
            each
            for node in body
            for each in node.all_input_nodes
            if each not in inside and not is_static_input(each)
        )
        return replace(
            region, prologue=prologue, body=body, epilogue=epilogue, inputs=tuple(crossing)
        )


NOTHING = Cut((), (), ())


def find_hoisted(
    graph: Graph,
    before: Dependencies,
    moving: Collection[Node],
    timestep: Node | None,
    needed: Collection[Node],
    pinned: Collection[Node],
    modulations: bool = False,
) -> Hoisted:
    """Find what can be taken out of a graph.

    Args:
        graph: a Dynamo graph.
        before: its dependencies.
        moving: the graph inputs that differ from step to step, the timestep among them.
        timestep: the one that modulations may depend on, None where there is none.
        needed: values that the rest has to know besides what it reads.
        pinned: those that the rest has to compute itself.
        modulations: whether what depends on the timestep is taken out too.
    """
    search = _Search(graph, before, needed, pinned)
    constants = search.take(moving)
    time = None if timestep is None else timestep.meta.get("example_value")
    if not isinstance(time, torch.Tensor) or time.dim() > 1:  # one for each token
        return Hoisted(constants, NOTHING, modulations)
    others = [node for node in moving if node is not timestep]
    values = [value for value in map(tensor_of, others) if value is not None]
    batches = [size_hint(value.shape[0]) for value in values if value.dim() > 1]
    found = search.take(others, max([numel(time), *batches]))
    return Hoisted(constants, found, modulations)


def parameter_elements(graph: Graph) -> int:
    """Number of elements of the parameters and buffers that a graph reads."""
    return _count(node for node in graph.nodes if is_static_input(node))


_Frontiers: TypeAlias = Mapping[Node, frozenset[Node]]


class _Search:
    """Takes one part after the other out of a graph.

    Args:
        graph: the graph.
        before: its dependencies.
        needed: values that the rest has to know.
        pinned: those that the rest has to compute.
    """

    def __init__(
        self,
        graph: Graph,
        before: Dependencies,
        needed: Collection[Node],
        pinned: Collection[Node],
    ) -> None:
        self._graph, self._before = graph, before
        self._needed, self._pinned = {*needed, *pinned}, set(pinned)
        self._working = set(computation(graph))
        spans = {node for span in vmap_spans(graph) for node in span}
        held_modes = modes(graph)
        self._movable = {
            node
            for node in self._working
            if node not in spans and not held_modes[node].nestings and _is_movable(node)
        }
        (end,) = graph.find_nodes(op="output")
        handed_out = [
            *end.all_input_nodes,
            *(w for node in graph.nodes for w in written_nodes(node)),
        ]
        self._others = set(map(memory_root, handed_out))
        # What was taken out before, what it left, and what the rest can make of that.
        self._taken: set[Node] = set()
        self._held: set[Node] = set()
        self._known: set[Node] = set()

    def take(self, moving: Collection[Node], rows: int | None = None) -> Cut:
        """Take out what depends on none of the graph inputs ``moving``.

        Args:
            rows: how many vectors a contraction may be of, None for any number.
        """
        fixed = self._fixed(moving, rows)
        rest = [node for node in self._graph.nodes if node not in fixed]
        read = [each for node in rest for each in node.all_input_nodes]
        wanted = dict.fromkeys(each for each in (*read, *self._needed) if each in fixed)
        results = self._least(wanted, *self._frontiers(fixed))
        held = self._held | results
        # Everything is computed that the results need, and nothing by the rest that only they do.
        nodes = self._ancestors(results, fixed - self._held, self._before)
        stays = self._ancestors(
            [node for node in wanted if node not in held],
            fixed - held,
            {node: node.all_input_nodes for node in fixed},
        )
        freed = (fixed & self._working) - stays - self._taken
        self._taken |= freed
        self._held, self._known = held, fixed
        return Cut(*map(self._in_order, (nodes, results, freed)))

    def _in_order(self, nodes: Collection[Node]) -> tuple[Node, ...]:
        return tuple(node for node in self._graph.nodes if node in nodes)

    def _fixed(self, moving: Collection[Node], rows: int | None) -> set[Node]:
        """The values that depend on no input that moves."""
        fixed: set[Node] = set()
        for node in self._graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                if node not in moving:
                    fixed.add(node)
                continue
            is_small = rows is None or node in self._taken or _rows(node) <= rows
            if is_small and node in self._movable and fixed.issuperset(self._before[node]):
                fixed.add(node)
        return fixed

    def _frontiers(self, fixed: Collection[Node]) -> tuple[_Frontiers, _Frontiers]:
        """For every fixed value what has to be held for the rest to have it.

        Besides, for each that is held itself and made by light work, what could be held instead.
        """
        frontiers: dict[Node, frozenset[Node]] = {}
        instead: dict[Node, frozenset[Node]] = {}
        of_weights: set[Node] = set()
        for node in self._graph.nodes:
            if node not in fixed:
                continue
            if node.op in ("placeholder", "get_attr") or node in self._known:
                frontiers[node] = frozenset()
                if is_static_input(node):
                    of_weights.add(node)
                continue
            inputs = node.all_input_nodes
            below = frozenset(each for one in inputs for each in frontiers[one])
            sources = [each for each in inputs if tensor_of(each) is not None or is_tuple(each)]
            if sources and of_weights.issuperset(sources):
                of_weights.add(node)
            frontiers[node] = frozenset([node])
            if not self._may_be_held(node) or node in of_weights or _is_view(node):
                frontiers[node] = below
            elif _is_copy(node):
                if sum(map(_bytes, below)) < _bytes(node):
                    frontiers[node] = below
            elif not arithmetic(node):
                if not below and _elements(node) < WORTHWHILE:
                    frontiers[node] = below
                elif below and op_name(node) in _LIGHT:
                    instead[node] = frozenset(
                        deeper for each in below for deeper in instead.get(each, (each,))
                    )
        return frontiers, instead

    def _least(
        self, wanted: Iterable[Node], frontiers: _Frontiers, instead: _Frontiers
    ) -> set[Node]:
        """What is held for the rest to have what it wants.

        What several are made of by light work is held in their place if it is smaller.
        """
        results = {each for node in wanted for each in frontiers[node]}
        for node in reversed(self._graph.nodes):
            if node not in results or node not in instead:
                continue
            below = instead[node]
            group = [each for each in results if instead.get(each) == below]
            if sum(map(_bytes, below - results)) < sum(map(_bytes, group)):
                results.difference_update(group)
                results |= below
        return results

    def _may_be_held(self, node: Node) -> bool:
        """Whether a value may outlive the call: a tensor that nobody else gets hold of."""
        return (
            node in self._working
            and node not in self._pinned
            and tensor_of(node) is not None
            and memory_root(node) not in self._others
        )

    def _ancestors(
        self, nodes: Iterable[Node], among: Collection[Node], before: Dependencies
    ) -> set[Node]:
        """Nodes with all that they need of a set, as far as it computes anything."""
        found: set[Node] = set()
        frontier = list(nodes)
        while frontier:
            each = frontier.pop()
            if each in among and each in self._working and each not in found:
                found.add(each)
                frontier += before[each]
        return found


def _rows(node: Node) -> int:
    """How many vectors a contraction makes; 0 of another node."""
    value = tensor_of(node)
    if value is None or not arithmetic(node):
        return 0
    return numel(value) // max(1, size_hint(value.shape[-1])) if value.dim() else 1


def _is_movable(node: Node) -> bool:
    """Whether a node may run at another time than the nodes around it."""
    value = node.meta.get("example_value")
    values = value if isinstance(value, (tuple, list)) else [value]
    is_value = tensor_of(node) is not None or is_tuple(node) or is_size(node) or is_shape(node)
    return (
        is_value
        and not draws(node)
        and not written_nodes(node)
        and not isinstance(node.target, torch._ops.HigherOrderOperator)
        and not _communicates(node)
        and not any(map(is_distributed, (node, *node.all_input_nodes)))
        and not any(map(_depends_on_data, values))
    )


def _depends_on_data(value: object) -> bool:
    """Whether a value is a size that is only known when the graph runs, or is laid out by one."""
    sizes: Sequence[object] = [value]
    if isinstance(value, torch.Tensor):
        sizes = [*value.shape, *value.stride(), value.storage_offset()]
    numbers = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(isinstance(size, numbers) and size.node.hint is None for size in sizes)


def _communicates(node: Node) -> bool:
    """Whether an operator takes part in what other ranks do."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace.strip("_").startswith(
        "c10d"
    )


_LIGHT = ELEMENTWISE_OPS | {"layer_norm", "rms_norm"}
"""Operations that take about as long as it takes to read their result."""


_COPIES = frozenset(
    "clone cat concat stack hstack vstack repeat repeat_interleave tile pad roll flip zeros ones "  # noqa: SIM905
    "full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "arange linspace tensor as_tensor scalar_tensor".split()
)
"""Operations that write down what is known: no arithmetic, but memory of their own."""


def _is_view(node: Node) -> bool:
    """Whether a node makes nothing: sizes, and tensors that lie in the memory of its input."""
    if is_size(node) or is_shape(node):
        return True
    owner = shares_memory_with(node)
    if owner is None:
        return False
    if is_tuple(owner):
        return _is_view(owner)
    if is_tuple(node):
        return True
    mine, other = tensor_of(node), tensor_of(owner)
    return mine is not None and other is not None and _memory(mine) == _memory(other)


def _memory(value: torch.Tensor) -> object:
    return value.untyped_storage()._cdata


def _is_copy(node: Node) -> bool:
    """Whether a node only writes down what is known, in other words or more of them."""
    name = op_name(node)
    return name in _COPIES or name in CAST_OPS or name in VIEW_OPS


def _bytes(node: Node) -> int:
    value = tensor_of(node)
    return 0 if value is None else nbytes(value)


def _elements(node: Node) -> int:
    value = tensor_of(node)
    return 0 if value is None else numel(value)


def _count(nodes: Iterable[Node]) -> int:
    return sum(map(_elements, nodes))
