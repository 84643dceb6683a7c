"""The block loop: which lists of repeated modules make up the transformer, as the graph has them.

    embed -> [blocks.0 -> blocks.1 -> ... -> blocks.N] -> norm -> project

Dynamo unrolls a loop over a ``ModuleList``; every node still carries the path of the module it was
traced in, so a list is a group of nodes whose paths agree up to a number. The main list is
the one with the most arithmetic; a neighbouring list joins it when the whole residual stream runs
from the one into the other and its blocks do a like share of the work.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .cost import arithmetic, is_fused_attention
from .names import ModulePath, full_name, module_class, module_path, op_name
from .order import Dependencies, Modes, computation, dependencies, memory_root, modes, written_nodes
from .region import NoBlockLoopError, UnknownNameError, close_region
from .streams import trace_origins
from .values import is_static_input

LIKE_SHARE = 1 / 8
"""A block of a neighbouring list does at least this share of a main block's arithmetic."""


@dataclass(frozen=True)
class Block:
    """One element of a block list.

    ``structure`` is equal for two blocks exactly when one could run in place of the other, given
    its operands: the same operations with the same constants, wired in the same way and run in the
    same modes, on operands of the same shapes, strides, dtypes and devices, the same of which are
    weights.
    """

    index: int
    class_name: str
    nodes: tuple[Node, ...]
    arithmetic: int
    modes: Mapping[Node, Modes] = field(repr=False)

    @cached_property
    def structure(self) -> str:
        """The digest that blocks of one structure share."""
        return structure_of(self.nodes, self.modes)


@dataclass(frozen=True)
class BlockList:
    """A ``ModuleList`` of the model, with those of its elements that the graph runs."""

    path: str
    blocks: tuple[Block, ...]
    has_attention: bool

    @property
    def arithmetic(self) -> int:
        """Floating-point operations of all blocks together."""
        return sum(block.arithmetic for block in self.blocks)

    @property
    def nodes(self) -> list[Node]:
        """The nodes of all blocks, in graph order."""
        return [node for block in self.blocks for node in block.nodes]


@dataclass(frozen=True)
class BlockLoop:
    """The lists that make up the block loop, in the order they run in."""

    lists: tuple[BlockList, ...]

    @property
    def arithmetic(self) -> int:
        """Floating-point operations of all lists together."""
        return sum(each.arithmetic for each in self.lists)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all lists."""
        return [block for each in self.lists for block in each.blocks]

    @property
    def nodes(self) -> list[Node]:
        """The nodes of all blocks."""
        return [node for each in self.lists for node in each.nodes]

    @property
    def in_order(self) -> list[Block]:
        """The blocks of all lists in the order that they run in; lists may take turns."""
        if not self.lists:
            return []
        place = {node: index for index, node in enumerate(self.nodes[0].graph.nodes)}
        return sorted(self.blocks, key=lambda block: place[block.nodes[0]])


def find_block_lists(graph: Graph, skip: int = 0) -> list[BlockList]:
    """All lists of repeated modules in a graph, in the order they start in.

    Where lists lie in lists, a node counts for the outermost one of which several elements with
    attention run. A model that lies in a list, as one of several experts, is therefore no block.

    Args:
        graph: a Dynamo graph.
        skip: how many of such lists to descend into, where there are more.
    """
    fixed = _depends_on_nothing_but_weights(graph)
    attention: set[tuple[ModulePath, str]] = set()
    for node in computation(graph):
        if _mixes_activations(node, fixed):
            path = module_path(node)
            attention.update((path[:at], path[at]) for at in _levels(path))
    elements = Counter(path for path, _ in attention)

    def level(path: ModulePath) -> int | None:
        levels = _levels(path)
        several = [at for at in levels if elements[path[:at]] > 1]
        if several:
            return several[min(skip, len(several) - 1)]
        return levels[0] if levels else None

    return _lists(graph, level, fixed)


def _lists(
    graph: Graph, level: Callable[[ModulePath], int | None], fixed: Collection[Node]
) -> list[BlockList]:
    """The lists of a graph, where ``level`` says at which step of a path its list ends."""
    held = modes(graph)
    members: dict[ModulePath, dict[int, list[Node]]] = {}
    class_names: dict[tuple[ModulePath, int], str] = {}
    attention: set[ModulePath] = set()
    for node in computation(graph):
        path = module_path(node)
        at = level(path)
        if at is None:
            continue
        name, index = path[:at], int(path[at])
        members.setdefault(name, {}).setdefault(index, []).append(node)
        if (name, index) not in class_names:
            class_names[name, index] = module_class(node, path[: at + 1])
        if _mixes_activations(node, fixed):
            attention.add(name)
    return [
        BlockList(
            ".".join(name),
            tuple(
                Block(index, class_names[name, index], tuple(inside), _work(inside), held)
                for index, inside in blocks.items()
            ),
            name in attention,
        )
        for name, blocks in members.items()
    ]


def _work(nodes: Iterable[Node]) -> int:
    return sum(map(arithmetic, nodes))


def _levels(path: ModulePath) -> list[int]:
    """Where a module's path goes from a list to one of its elements, outermost first."""
    return [at for at, step in enumerate(path) if step.isdigit()]


def find_block_loop(
    graph: Graph,
    names: Sequence[str] | None = None,
    before: Dependencies | None = None,
    skip: int = 0,
) -> BlockLoop:
    """The transformer's block loop.

    Args:
        graph: a Dynamo graph.
        names: paths of the ``ModuleList``s to take, where the choice is the caller's.
        before: the graph's dependencies, where the caller has them.
        skip: how many lists of lists to descend into, as in :func:`find_block_lists`.

    Raises:
        NoBlockLoopError: no list holds attention.
        UnknownNameError: the graph runs no list of that name.
    """
    lists = find_block_lists(graph, skip)
    if names is not None:
        return BlockLoop(tuple(_named_lists(graph, lists, names)))
    candidates = [each for each in lists if each.has_attention and len(each.nodes) > 1]
    if not candidates:
        found = ", ".join(each.path for each in lists) or "none"
        advice = (
            "name the ModuleLists of the block loop with the option region=[...]"
            if lists
            else "keep the blocks in a ModuleList, see with omni_cache.explain whether a graph "
            "break cuts them off, or say what they are with omni_cache.register_extractor"
        )
        raise NoBlockLoopError(
            f"no list of repeated blocks with attention in the graph (lists found: {found}); "
            f"{advice}"
        )
    main = max(candidates, key=lambda each: each.arithmetic)
    at = candidates.index(main)
    before = dependencies(graph) if before is None else before
    order = {node: place for place, node in enumerate(graph.nodes)}

    def joins(one: BlockList, next_one: BlockList) -> bool:
        # Lists that take turns lie in one region in any case.
        take_turns = order[next_one.nodes[0]] < order[one.nodes[-1]]
        return take_turns or _continues(graph, before, one, next_one, main)

    chosen = [main]
    for earlier in reversed(candidates[:at]):
        if not joins(earlier, chosen[0]):
            break
        chosen.insert(0, earlier)
    for later in candidates[at + 1 :]:
        if not joins(chosen[-1], later):
            break
        chosen.append(later)
    return BlockLoop(tuple(chosen))


def candidate_loops(
    graph: Graph, names: Sequence[str] | None, before: Dependencies
) -> Iterator[BlockLoop]:
    """What may be the block loop, the likeliest first.

    Behind the loop itself come its repeated elements, for lists that hold an embedding or a head as
    well, and then the loops within its elements.

    Raises:
        NoBlockLoopError: as :func:`find_block_loop`, before the first loop.
        UnknownNameError: likewise.
    """
    seen: set[tuple[Node, ...]] = set()
    for skip in count():
        loop = find_block_loop(graph, names, before, skip)
        if tuple(loop.nodes) in seen:
            return
        for each in (loop, _repeated(loop, "class_name"), _repeated(loop, "structure")):
            if tuple(each.nodes) not in seen:
                seen.add(tuple(each.nodes))
                yield each


def _repeated(loop: BlockLoop, kind: Literal["class_name", "structure"]) -> BlockLoop:
    """The loop without the elements at the ends of a list that are unlike most of the list."""
    trimmed = []
    for each in loop.lists:
        kinds = [getattr(block, kind) for block in each.blocks]
        (most, _), *_ = Counter(kinds).most_common(1)
        first, last = kinds.index(most), len(kinds) - kinds[::-1].index(most)
        trimmed.append(replace(each, blocks=each.blocks[first:last]))
    return BlockLoop(tuple(trimmed))


def structure_of(
    nodes: Sequence[Node], held: Mapping[Node, Modes], any_layout: frozenset[Node] = frozenset()
) -> str:
    """A digest of a block's operations, constants, operands, wiring and modes; no node's name.

    Shape, strides, dtype and device of what comes in settle those of all that is made of it.

    Args:
        nodes: the block's nodes, in graph order.
        held: the modes of the whole graph.
        any_layout: operands whose strides do not count, but those of what is made of them do.
    """
    ambient = held[nodes[0].graph.output_node()]
    # What a graph holds as an attribute is an operand, whichever name it has there.
    nodes = [node for node in nodes if node.op != "get_attr"]
    inner = set(nodes)
    writes = any(map(written_nodes, nodes))
    numbers: dict[Node, int] = {}
    roots: dict[Node, int] = {}

    def numbered(node: Node) -> Any:
        if node in numbers or node in inner:
            return f"%{numbers.setdefault(node, len(numbers))}"
        numbers[node] = len(numbers)
        # Two operands in one memory are two tensors until somebody writes into one of them.
        alias = f"@{roots.setdefault(memory_root(node), len(roots))}" if writes else ""
        known = _sizes(node.meta["example_value"]) if node in any_layout else _operand(node)
        return f"%{numbers[node]} {known}{alias}"

    digest = hashlib.sha256()
    for node in nodes:
        operands = map_arg((node.args, node.kwargs), numbered)
        around = _described_modes(held[node], ambient)
        if not any_layout.isdisjoint(node.all_input_nodes):
            around += _layout(node.meta["example_value"])
        digest.update(f"{numbered(node)} = {full_name(node)}{operands} {around}\n".encode())
    return digest.hexdigest()[:16]


def _operand(node: Node) -> str:
    """What a block must know of a tensor, a number or a subgraph that comes in from outside."""
    owner = node.graph.owning_module
    if node.op == "get_attr" and owner is not None:
        value = operator.attrgetter(str(node.target))(owner)
        if isinstance(value, GraphModule):
            return f"graph {structure_of(list(value.graph.nodes), modes(value.graph))}"
    kind = "weight" if is_static_input(node) else "value"
    return f"{kind} {_layout(node.meta.get('example_value'))}"


def _layout(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_layout, value))})"
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value}"
    strides = value.stride() if value.layout == torch.strided else value.layout
    return f"{_sizes(value)} {strides}"


def _sizes(value: torch.Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)} {value.device}"


def _described_modes(held: Modes, ambient: Modes) -> str:
    """The modes of a node by what they set, whoever set it."""
    # Before its first mark, a switch is as the graph leaves it when it is done.
    switches = {**ambient.switches, **held.switches}
    marks = (*held.scopes, *held.nestings, *(switches[name] for name in sorted(switches)))
    return "; ".join(map(_described_mark, marks))


def _described_mark(mark: Node) -> str:
    arguments = map_arg((mark.args, mark.kwargs), _described_mark)
    return f"{full_name(mark)}{arguments}"


def _continues(
    graph: Graph, before: Dependencies, first: BlockList, second: BlockList, main: BlockList
) -> bool:
    """Whether all streams that run through ``second`` ran through ``first``, with like work."""
    for each in (first, second):
        share = each.arithmetic / len(each.blocks)
        if share < LIKE_SHARE * main.arithmetic / len(main.blocks):
            return False
    # How many additions lie behind each region input where it enters and leaves the second list.
    entering: dict[Node, int] = {}
    leaving: dict[Node, int] = {}
    inner = set(second.nodes)
    both = close_region(graph, [*first.nodes, *second.nodes], before)
    origins = trace_origins(both)
    for node in second.nodes:
        for given in node.all_input_nodes:
            if given in origins and given not in inner:
                for leaf, count in origins[given].counts.items():
                    entering[leaf] = min(entering.get(leaf, count), count)
        if node in origins:
            for leaf, count in origins[node].counts.items():
                leaving[leaf] = max(leaving.get(leaf, count), count)
    made = {leaf: count - entering[leaf] for leaf, count in leaving.items() if leaf in entering}
    # A tensor that joins a stream for one block does not run through the list. The last block may
    # leave out a stream that nobody reads afterwards.
    blocks, most = len(second.blocks), max(made.values(), default=0)
    running = [
        leaf for leaf, count in made.items() if count > 0 and count * blocks >= most * (blocks - 1)
    ]
    return bool(running) and all(entering[leaf] > 0 for leaf in running)


def _named_lists(graph: Graph, found: Sequence[BlockList], names: Sequence[str]) -> list[BlockList]:
    wanted = {tuple(name.split(".")) for name in names}

    def level(path: ModulePath) -> int | None:
        return next((at for at in _levels(path) if path[:at] in wanted), None)

    lists = _lists(graph, level, _depends_on_nothing_but_weights(graph))
    for name in names:
        if all(each.path != name for each in lists):
            raise UnknownNameError(f"region={list(names)!r}", name, [each.path for each in found])
    return lists


def _depends_on_nothing_but_weights(graph: Graph) -> set[Node]:
    """Nodes whose value is the same on every call: parameters, and what is made of them alone."""
    fixed: set[Node] = set()
    for node in graph.nodes:
        computed = node.op not in ("placeholder", "output") and node.all_input_nodes
        if is_static_input(node) or (computed and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    return fixed


def _mixes_activations(node: Node, fixed: Collection[Node]) -> bool:
    """Whether a node multiplies activations with activations, as only attention does."""
    if is_fused_attention(node):
        return True
    if op_name(node) not in ("matmul", "bmm", "mm", "baddbmm", "einsum"):
        return False
    return sum(each not in fixed for each in node.all_input_nodes) >= 2
