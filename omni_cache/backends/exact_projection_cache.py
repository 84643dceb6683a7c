"""Results of small projections, reused where input, weights and settings are bit for bit the same.

    prepare(embedding) -> its digest ; project(name, module, embedding, compute) -> hit, or compute

It knows digests and evidence, no model: which projections are worth it is the model's to say.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from omni_cache.backends.evidence import (
    Evidence,
    evidence_of,
    numerical_settings,
    version_of,
)
from omni_cache.backends.plain import digest
from omni_cache.strategies.base import require


class _Prepared(NamedTuple):
    """What is known of an embedding, in one piece: other threads prepare others."""

    embedding: weakref.ref[Tensor]
    version: int | None
    digest: str


class _Entry(NamedTuple):
    evidence: Evidence
    value: Tensor

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.value.element_size()


class ExactProjectionCache:
    """Projections of a conditioning tensor, kept by what the tensor holds.

    ``compute`` must depend on nothing but the embedding and the module. A hit returns the tensor
    that is stored: read it only. When the bytes are used up, new results are not stored: a loop
    that goes through more entries than fit would evict each one before its turn comes again.

    Nothing is reused while gradients are enabled, while torch compiles, when the module or a child
    of it has forward hooks, when there are global ones, and when a weight has no version counter.

    Attributes:
        max_bytes: that the stored tensors may take; 0 switches the cache off.
        hits: calls of `project` that returned a stored tensor.
        misses: those that computed although their embedding was prepared.
    """

    def __init__(
        self, *, max_bytes: int = 256 * 1024 * 1024, group: dist.ProcessGroup | None = None
    ) -> None:
        """An empty cache.

        Args:
            max_bytes: an int >= 0.
            group: ranks that compute the projections together. They reuse where all of them can.
                Without one, vLLM's tensor-parallel group counts where vLLM has made one.

        Raises:
            ValueError: ``max_bytes`` is not an int >= 0.
        """
        require(type(max_bytes) is int and max_bytes >= 0, "max_bytes", max_bytes, "an int >= 0")
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._group = group
        self._lock = threading.Lock()
        self._entries: dict[tuple[Any, ...], _Entry] = {}
        self._prepared: _Prepared | None = None

    def prepare(self, embedding: Tensor) -> None:
        """Take note of the embedding that the next projections get.

        Its bytes are copied to the host and hashed; it is held weakly. One that was made under
        ``torch.inference_mode`` has no version counter, so `project` hashes it again.
        """
        self._prepared = None
        if self.max_bytes and not _is_off():
            version = version_of(embedding)  # before it is read, should others write to it
            self._prepared = _Prepared(weakref.ref(embedding), version, _digest(embedding))

    def project(
        self, name: str, module: nn.Module, embedding: Tensor, compute: Callable[[], Tensor]
    ) -> Tensor:
        """The stored result, or that of ``compute()``.

        Args:
            name: of the projection, one for each place in the model.
            module: whose parameters and buffers ``compute`` uses.
            embedding: what was prepared: the object itself, not written to since.
            compute: makes the projection, a tensor.
        """
        digested = None if _is_off() else self._digest_of(embedding)
        if digested is None:
            return compute()
        key = (digested, name, numerical_settings(embedding.device.type))
        evidence = evidence_of(module)
        lasts = not (evidence.unversioned or _has_hooks(module))
        ranks = _ranks(self._group)
        with self._lock:
            entry = self._entries.get(key)
        hits = lasts and entry is not None and entry.evidence == evidence
        if ranks > 1:
            hits = _votes(hits, embedding.device, self._group) == ranks
        if hits and entry is not None:
            self.hits += 1
            return entry.value
        self.misses += 1
        value = None
        if lasts and ranks == 1:
            value = self._lookup_precomputed(name, embedding, evidence)
        if value is None:
            value = compute()
        self._store(key, _Entry(evidence, value) if lasts else None)
        return value

    def clear(self) -> None:
        """Drop all results and the prepared embedding; the counters stay."""
        with self._lock:
            self._entries.clear()
        self._prepared = None

    def _lookup_precomputed(
        self, name: str, embedding: Tensor, signature: Evidence
    ) -> Tensor | None:
        """A result from elsewhere, for subclasses to override; None where there is none.

        It is asked for on a miss, without tensor parallelism. A result has to be checked against
        the embedding, the settings and the evidence of the module.
        """
        return None

    def _store(self, key: tuple[Any, ...], entry: _Entry | None) -> None:
        with self._lock:
            self._entries.pop(key, None)  # of other weights
            if entry is None:
                return
            used = sum(each.nbytes for each in self._entries.values())
            if used + entry.nbytes <= self.max_bytes:
                self._entries[key] = entry._replace(value=entry.value.detach().clone())

    def _digest_of(self, embedding: Tensor) -> str | None:
        """That of the prepared embedding; None if it is another one or was written to since."""
        prepared = self._prepared
        if prepared is None or prepared.embedding() is not embedding:
            return None
        version = version_of(embedding)
        is_same = version == prepared.version
        if version is None:
            is_same = _digest(embedding) == prepared.digest
        return prepared.digest if is_same else None


def _digest(embedding: Tensor) -> str:
    kind = repr((embedding.dtype, tuple(embedding.shape)))
    return hashlib.sha256((kind + digest(embedding)).encode()).hexdigest()


def _is_off() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _has_hooks(module: nn.Module) -> bool:
    everywhere = nn_module._global_forward_pre_hooks or nn_module._global_forward_hooks
    return bool(everywhere) or any(
        each._forward_pre_hooks or each._forward_hooks for each in module.modules()
    )


def _ranks(group: dist.ProcessGroup | None) -> int:
    """How many ranks compute a projection together."""
    if group is not None:
        return dist.get_world_size(group)
    vllm: Any = sys.modules.get("vllm.distributed")
    return 1 if vllm is None else int(vllm.get_tensor_model_parallel_world_size())


def _votes(hits: bool, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """How many of them have a hit; each asks once in every call."""
    vote = torch.tensor([int(hits)], dtype=torch.int32, device=device)
    if group is not None:
        dist.all_reduce(vote, group=group)
    else:
        vote = sys.modules["vllm.distributed"].get_tp_group().all_reduce(vote)
    return int(vote.item())
