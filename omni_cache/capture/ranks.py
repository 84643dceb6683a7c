"""Which ranks compute one call together: what the block loop, or a module, says of process groups.

    body: all_gather(k, 2, group_name), linear(DTensor on a mesh) -> groups -> those to agree over

Only what a reused step leaves out counts: ranks that share nothing within the blocks may reuse as
each likes. It knows graphs and modules, nothing of gates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from omni_cache.passes import RegionError

GROUP_ARGUMENTS = ("group_name", "group", "process_group")
"""Names under which operators take a process group, or the name of one."""


def groups_of_body(body: Iterable[Node], given: Any = None) -> tuple[Any, ...]:
    """The process groups to agree over, one after the other; none where no rank waits for another.

    Args:
        body: the nodes that a reused step leaves out.
        given: the group that the caller names.

    Raises:
        RegionError: the body communicates over groups that nothing tells how to put together, or
            over one that PyTorch does not know.
    """
    if given is not None:
        return (given,)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    found = _Found()
    for node in _with_inner(body):
        found.add_value(node.meta.get("example_value"))
        for each in node.all_input_nodes:
            found.add_value(each.meta.get("example_value"))
        for name in _group_arguments(node):
            found.add_named(name, node)
    return found.in_turn()


def groups_of_module(module: nn.Module, given: Any = None) -> tuple[Any, ...]:
    """The same for a module whose blocks no graph holds, from its weights and what shards them.

    Raises:
        RegionError: as `groups_of_body`.
    """
    if given is not None:
        return (given,)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    found = _Found()
    for weight in module.parameters():
        found.add_value(weight)
    for each in module.modules():
        # Of FullyShardedDataParallel. Weights that `fully_shard` has sharded are DTensors.
        found.add_group(getattr(each, "process_group", None))
    return found.in_turn()


class _Found:
    """Process groups of more than one rank, by their names, and the meshes that they may lie in."""

    def __init__(self) -> None:
        self._groups: dict[str, torch.distributed.ProcessGroup] = {}
        self._meshes: list[Any] = []

    def add_value(self, value: Any) -> None:
        """Take in the mesh of a DTensor, and know of a mesh that is passed around."""
        if isinstance(value, torch.Tensor):
            mesh = _unwrapped(getattr(value, "device_mesh", None))
            if mesh is not None:
                for group in mesh.get_all_groups():
                    self.add_group(group)
        else:
            mesh = _unwrapped(value)
        if hasattr(mesh, "_get_root_mesh"):
            self._meshes.append(mesh._get_root_mesh())

    def add_named(self, given: Any, node: Node) -> None:
        """Take in the group that an operator is given, or the name of it."""
        if isinstance(given, str):
            try:
                given = torch._C._distributed_c10d._resolve_process_group(given)  # type: ignore[arg-type]
            except (RuntimeError, ValueError):
                given = None
        given = _unwrapped(given)
        if not isinstance(given, torch.distributed.ProcessGroup):
            raise RegionError(
                "the blocks communicate over ranks that PyTorch has no process group for; name "
                "one with process_group=...",
                node,
            )
        self.add_group(given)

    def add_group(self, group: Any) -> None:
        """Take in a group."""
        if isinstance(group, torch.distributed.ProcessGroup) and group.size() > 1:
            self._groups[group.group_name] = group

    def in_turn(self) -> tuple[Any, ...]:
        """Groups over which a sum, taken over one after the other, is one over all ranks."""
        ranks = {
            name: set(torch.distributed.get_process_group_ranks(group))
            for name, group in self._groups.items()
        }
        # A group within another has its sum already; of two with the same ranks, one will do.
        names = list(ranks)
        widest = [
            name
            for place, name in enumerate(names)
            if not any(
                ranks[name] < ranks[other] or (ranks[name] == ranks[other] and before < place)
                for before, other in enumerate(names)
            )
        ]
        if len(widest) <= 1:
            return tuple(self._groups[name] for name in widest)
        for mesh in self._meshes:
            dimensions = [group.group_name for group in mesh.get_all_groups()]
            if set(dimensions).issuperset(widest):
                return tuple(self._groups[name] for name in dimensions if name in widest)
        sizes = " and ".join(str(sorted(ranks[name])) for name in widest)
        raise RegionError(
            f"the blocks communicate over several process groups, of ranks {sizes}, and nothing "
            "tells which ranks compute a call together; name their group with process_group=..."
        )


def _unwrapped(value: Any) -> Any:
    """What Dynamo has wrapped, because it is neither a tensor nor a number."""
    return getattr(value, "real_obj", value)


def _with_inner(nodes: Iterable[Node]) -> Iterator[Node]:
    """Nodes, and those of the graphs that they run."""
    for node in nodes:
        yield node
        for each in node.all_input_nodes:
            if each.op == "get_attr":
                inner = _attribute(each)
                if isinstance(inner, GraphModule):
                    yield from _with_inner(inner.graph.nodes)


def _attribute(node: Node) -> Any:
    value: Any = node.graph.owning_module
    for step in str(node.target).split("."):
        value = getattr(value, step, None)
    return value


def _group_arguments(node: Node) -> Sequence[Any]:
    """What an operator is given as a process group."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])  # type: ignore[no-untyped-call]
    if not isinstance(target, torch._ops.OpOverload):
        return []
    names = [each.name for each in target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return [given[name] for name in GROUP_ARGUMENTS if name in given]
