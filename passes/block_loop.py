"""The block loop: which lists of repeated modules make up the transformer, as the graph has them.

    embed -> [blocks.0 -> blocks.1 -> ... -> blocks.N] -> norm -> project

Dynamo unrolls a loop over a ``ModuleList``; every node still carries the path of the module it was
traced in, so a list is a group of nodes whose paths agree up to the first number. The main list is
the one with the most arithmetic; a neighbouring list joins it when the whole residual stream runs
from the one into the other and its blocks do a like share of the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .node import (
    Dependencies,
    arithmetic,
    computation,
    dependencies,
    describe_value,
    is_fused_attention,
    is_static_input,
    module_class,
    module_path,
    op_name,
)
from .region import NoBlockLoopError, UnknownNameError, close_region
from .residual import trace_origins

LIKE_SHARE = 1 / 8
"""A block of a neighbouring list does at least this share of a main block's arithmetic."""


@dataclass(frozen=True)
class Block:
    """One element of a block list.

    ``structure`` is equal for two blocks exactly when they run the same operations with the same
    constants on tensors of the same shapes and dtypes, wired in the same way.
    """

    index: int
    class_name: str
    nodes: tuple[Node, ...]
    arithmetic: int

    @cached_property
    def structure(self) -> str:
        """The digest that blocks of one structure share."""
        return structure_of(self.nodes)


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
    def blocks(self) -> list[Block]:
        """The blocks of all lists."""
        return [block for each in self.lists for block in each.blocks]

    @property
    def nodes(self) -> list[Node]:
        """The nodes of all blocks."""
        return [node for each in self.lists for node in each.nodes]


def find_block_lists(graph: Graph) -> list[BlockList]:
    """All lists of repeated modules in a graph, in the order they start in."""
    fixed = _depends_on_nothing_but_weights(graph)
    members: dict[str, dict[int, list[Node]]] = {}
    class_names: dict[tuple[str, int], str] = {}
    attention: set[str] = set()
    for node in computation(graph):
        path = module_path(node)
        at = next((i for i, step in enumerate(path) if step.isdigit()), None)
        if at is None:
            continue
        name, index = ".".join(path[:at]), int(path[at])
        members.setdefault(name, {}).setdefault(index, []).append(node)
        if (name, index) not in class_names:
            class_names[name, index] = module_class(node, path[: at + 1])
        if _mixes_activations(node, fixed):
            attention.add(name)
    return [
        BlockList(
            name,
            tuple(
                Block(index, class_names[name, index], tuple(nodes), sum(map(arithmetic, nodes)))
                for index, nodes in blocks.items()
            ),
            name in attention,
        )
        for name, blocks in members.items()
    ]


def find_block_loop(
    graph: Graph, names: Sequence[str] | None = None, before: Dependencies | None = None
) -> BlockLoop:
    """The transformer's block loop.

    Args:
        graph: a Dynamo graph.
        names: paths of the ``ModuleList``s to take, where the choice is the caller's.
        before: the graph's dependencies, where the caller has them.

    Raises:
        NoBlockLoopError: no list holds attention.
        UnknownNameError: a given name is no list that the graph runs.
    """
    lists = find_block_lists(graph)
    if names is not None:
        return BlockLoop(tuple(_named_lists(lists, names)))
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
        # Lists that take turns lie in one region anyway.
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


def structure_of(nodes: Sequence[Node]) -> str:
    """A digest of a block's operations, constants, shapes and wiring; names do not enter it.

    The shapes and dtypes of what comes in settle those of all that is made of it.
    """
    numbers: dict[Node, int] = {}

    def numbered(node: Node) -> Any:
        if node not in numbers:
            numbers[node] = len(numbers)
        value = describe_value(node.meta.get("example_value")) if node not in inner else ""
        return f"%{numbers[node]}{value}"

    inner = set(nodes)
    digest = hashlib.sha256()
    for node in nodes:
        operands = map_arg((node.args, node.kwargs), numbered)
        digest.update(f"{numbered(node)} = {op_name(node)}{operands}\n".encode())
    return digest.hexdigest()[:16]


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
    # What joins a stream for one block is none that runs through the list; the last block may leave
    # out one that nobody reads.
    blocks, most = len(second.blocks), max(made.values(), default=0)
    running = [
        leaf for leaf, count in made.items() if count > 0 and count * blocks >= most * (blocks - 1)
    ]
    return bool(running) and all(entering[leaf] > 0 for leaf in running)


def _named_lists(lists: Sequence[BlockList], names: Sequence[str]) -> list[BlockList]:
    by_name = {each.path: each for each in lists}
    for name in names:
        if name not in by_name:
            raise UnknownNameError(f"region={list(names)!r}", name, by_name)
    return [each for each in lists if each.path in names]


def _depends_on_nothing_but_weights(graph: Graph) -> set[Node]:
    """Nodes whose value is the same on every call: parameters, and what is made of them alone."""
    fixed: set[Node] = set()
    for node in graph.nodes:
        computed = node.op not in ("placeholder", "output") and node.all_input_nodes
        if is_static_input(node) or (computed and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    return fixed


def _mixes_activations(node: Node, fixed: set[Node]) -> bool:
    """Whether a node multiplies activations with activations, as only attention does."""
    if is_fused_attention(node):
        return True
    if op_name(node) not in ("matmul", "bmm", "mm", "baddbmm", "einsum"):
        return False
    return sum(each not in fixed for each in node.all_input_nodes) >= 2
