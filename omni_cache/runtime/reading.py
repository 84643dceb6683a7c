"""What the host knows of numbers that lie on a device, and how it comes to know more: one copy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from omni_cache.runtime.counters import current_tally


def on_host(tensor: Tensor) -> bool:
    """Whether a look at a tensor waits for no device."""
    return tensor.is_cpu


class Reading:
    """A vector, as ``tensor``, and its ``numbers`` on the host: None until somebody has read it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.numbers: tuple[float, ...] | None = tuple(tensor.tolist()) if on_host(tensor) else None
        self._copy: tuple[Tensor, torch.Event] | None = None

    def fetch(self) -> None:
        """Have the numbers come to the host by themselves, for `has_come`."""
        if self.numbers is None:
            copied = torch.empty_like(self.tensor, device="cpu", pin_memory=self.tensor.is_cuda)
            copied.copy_(self.tensor, non_blocking=True)
            done = torch.Event(self.tensor.device)
            done.record()
            self._copy = copied, done
            current_tally.get().copied(copied.nbytes)

    @property
    def has_come(self) -> bool:
        """Whether the numbers are on the host by now. It waits for nothing."""
        if self.numbers is None and self._copy is not None:
            copied, done = self._copy
            if done.query():
                self.numbers, self._copy = tuple(copied.tolist()), None
        return self.numbers is not None


def read(readings: Iterable[Reading]) -> None:
    """Bring vectors of one device to the host, those that it does not know, in one copy."""
    unread = [each for each in readings if each.numbers is None]
    if not unread:
        return
    tensors = [each.tensor for each in unread]
    together = tensors[0] if len(unread) == 1 else torch.cat(tensors)
    numbers = together.tolist()
    current_tally.get().copied(together.nbytes, waited=True)
    for each in unread:
        each.numbers = tuple(numbers[: each.tensor.numel()])
        numbers = numbers[each.tensor.numel() :]
