"""A small transformer, and one whose blocks communicate over ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)

import omni_cache

WIDTH, TOKENS = 16, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def gather(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulation(time)[:, None].chunk(2, -1)
        h = self.norm(x) * (1 + scale) + shift
        q, k, v = (
            each(h).unflatten(-1, (-1, 4)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, self.gather(k), self.gather(v))
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class SequenceParallelBlock(Block):
    """Every rank has a part of the tokens, of whatever length, and sees the others' keys."""

    def __init__(self, lengths: list[int], group: dist.ProcessGroup) -> None:
        super().__init__()
        self.lengths, self.group = lengths, group

    def gather(self, x: Tensor) -> Tensor:
        longest = max(self.lengths)
        padded = F.pad(x, (0, 0, 0, longest - x.shape[2]))
        every = collectives.all_gather_tensor(padded, 2, self.group)
        parts = every.split(longest, 2)
        return torch.cat([part[:, :, :n] for part, n in zip(parts, self.lengths, strict=True)], 2)


class DistributedStreamBlock(Block):
    """The stream itself is a DTensor, split over the tokens; heads are split within."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def split(self) -> DistributedStreamBlock:
        for each, dim in ((self.q, 0), (self.k, 0), (self.v, 0), (self.out, 1)):
            distribute_module(each, self.mesh, partial(_split_linear, dim=dim))
        return self

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = (
            DTensor.from_local(each, self.mesh, [Replicate()])
            for each in self.modulation(time)[:, None].chunk(2, -1)
        )
        h = (self.norm(x) * (1 + scale) + shift).redistribute(placements=[Replicate()])
        q, k, v = (
            each(h).to_local().unflatten(-1, (-1, 4)).transpose(1, 2)
            for each in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = self.out(DTensor.from_local(mixed, self.mesh, [Shard(2)]))
        return x + out.redistribute(placements=[Shard(1)])


def _split_linear(name: str, linear: nn.Linear, mesh: DeviceMesh, dim: int) -> None:
    weight = distribute_tensor(linear.weight, mesh, [Shard(dim)])
    bias = distribute_tensor(linear.bias, mesh, [Replicate() if dim else Shard(0)])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False)


class Model(nn.Module):
    def __init__(self, make_block: type[Block] = Block, *args: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.time = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(make_block(*args) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        h, time = self.inp(x), self.time(timestep.reshape(-1, 1) / 500) + prompt
        h = self.enter(h)
        for block in self.blocks:
            h = block(h, time)
        return self.head(self.leave(h))

    def enter(self, h: Tensor) -> Tensor:
        return h

    def leave(self, h: Tensor) -> Tensor:
        return h


class DistributedStreamModel(Model):
    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(DistributedStreamBlock, mesh)
        self.mesh = mesh
        for block in self.blocks:
            block.split()

    def enter(self, h: Tensor) -> Tensor:
        return DTensor.from_local(h, self.mesh, [Replicate()]).redistribute(placements=[Shard(1)])

    def leave(self, h: Tensor) -> Tensor:
        return h.redistribute(placements=[Replicate()]).to_local()


def take_apart(model: Any, x: Tensor, timestep: Tensor, prompt: Tensor) -> Any:
    """The extractor of a model here."""
    h, time = model.inp(x), model.time(timestep.reshape(-1, 1) / 500) + prompt

    def run_blocks() -> tuple[Tensor]:
        made = h
        for block in model.blocks:
            made = block(made, time)
        return (made,)

    return omni_cache.CacheContext(h + time[:, None], h, None, time, run_blocks, model.head)
