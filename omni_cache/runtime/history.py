"""The history: what the last computed steps left, newest first. Knows its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_cache.runtime.reading import on_host
from omni_cache.strategies import Time


@dataclass
class Kept:
    """The residuals of one computed step.

    Attributes:
        at: when they were made.
        residuals: tensors, in the order of the program's residuals.
        finite: bool tensor, whether all of them were finite when they were made.
        is_finite: the same on the host; None until somebody has read it.
        signal: of that step, for what looks back at it.
    """

    at: Time
    residuals: tuple[Tensor, ...]
    finite: Tensor
    is_finite: bool | None = None
    signal: Tensor | None = None

    def __post_init__(self) -> None:
        if on_host(self.finite):
            self.is_finite = bool(self.finite)


class History:
    """A ring of the last ``depth`` computed steps.

    Args:
        depth: how many there are at most.
        device: where they are kept; None where they are made. Copies to the host are asynchronous:
            the device's own order of work has them done before they are used.
    """

    def __init__(self, depth: int, device: torch.device | None = None) -> None:
        self.depth = depth
        self.device = self.home = device
        self.kept: list[Kept] = []

    def push(
        self, at: Time, residuals: Sequence[Tensor], finite: Tensor, signal: Tensor | None = None
    ) -> None:
        """Take over the residuals of a computed step, by reference unless they move.

        A step without residuals ends the history.
        """
        if not residuals:
            self.kept = []
            return
        self.home = residuals[0].device
        moved = tuple(_moved(each, self.device or self.home) for each in residuals)
        self.kept = [Kept(at, moved, finite, signal=signal), *self.kept][: self.depth]

    @property
    def usable(self) -> list[Kept]:
        """The newest ones, up to the first that is known not to have been finite."""
        broken = next((i for i, each in enumerate(self.kept) if each.is_finite is False), None)
        return self.kept[:broken]

    def operands(self, kept: Sequence[Kept], count: int) -> list[Tensor]:
        """``count`` sets of residuals where they were made; the newest stands in for missing ones.

        The weight of what stands in is 0.
        """
        sets = [self.at_home(each) for each in kept]
        sets += [sets[0]] * (count - len(sets))
        return [each for residuals in sets for each in residuals]

    def at_home(self, kept: Kept) -> tuple[Tensor, ...]:
        """The residuals of an entry where they were made."""
        assert self.home is not None  # something was kept
        return tuple(_moved(each, self.home) for each in kept.residuals)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        signals = [each.signal for each in self.kept if each.signal is not None]
        return [*signals, *(tensor for each in self.kept for tensor in each.residuals)]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    if device.type != "cpu":
        return tensor.to(device, non_blocking=True)
    pinned = torch.empty_like(tensor, device=device, pin_memory=tensor.is_cuda)
    return pinned.copy_(tensor, non_blocking=True)
