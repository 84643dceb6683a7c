"""Constants: what a graph makes of inputs that stay, and whether it serves another call.

They are a function of the weights and these inputs alone, so that equal inputs are all that counts.
An input is known by the object that it is, not written into since, or by its contents. What is not
known to be the same is not the same. It knows nothing of graphs, places or branches.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_cache.runtime.inference import Inputs, Seen, version


class Constants(NamedTuple):
    """The constants of one call.

    Attributes:
        results: what was made. The model reads them and hands none of them out.
        made_by: what made them.
        given: the inputs that they were made of, as that call brought them: numbers, or tensors as
            they were seen.
        inference_mode: whether it was on; what is made in it cannot be used everywhere outside.
    """

    results: tuple[Tensor, ...]
    made_by: object
    given: tuple[Any, ...]
    inference_mode: bool

    @classmethod
    def of(
        cls, results: Sequence[Tensor], made_by: object, given: Sequence[Any], inputs: Inputs
    ) -> Constants:
        """What a call has made.

        Args:
            results: what it made.
            made_by: tells apart who makes other results of the same inputs.
            given: the inputs that it made them of.
            inputs: all inputs of the call, whose contents may be known.
        """
        seen = [
            Seen(weakref.ref(each), version(each), inputs.content_of(each), changes=False)
            if isinstance(each, Tensor)
            else each
            for each in given
        ]
        return cls(tuple(results), made_by, tuple(seen), torch.is_inference_mode_enabled())

    def serve(
        self, made_by: object, given: Sequence[Any], inputs: Inputs, trusted: Sequence[Tensor] = ()
    ) -> bool:
        """Whether they are what a call would make.

        Args:
            made_by: who would make them.
            given: the inputs of that call.
            inputs: all of them, fingerprinted where the place of the call has asked for it.
            trusted: those whose contents count as the same as long as nobody has read them.
        """
        return (
            self.made_by is made_by
            and self.inference_mode == torch.is_inference_mode_enabled()
            and all(
                _is_same(before, now, inputs, trusted)
                for before, now in zip(self.given, given, strict=True)
            )
        )


def _is_same(before: Any, now: Any, inputs: Inputs, trusted: Sequence[Tensor]) -> bool:
    """Whether an input is known to be as it was."""
    if not isinstance(now, Tensor):
        return bool(before == now)
    if before.is_again(now):
        return True
    content = inputs.content_of(now)
    if content is None or before.content is None or before.content.differs(content):
        return False
    is_read = content.numbers is not None and before.content.numbers is not None
    return is_read or any(each is now for each in trusted)
