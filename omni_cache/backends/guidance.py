"""Which guidance branch a call is for, as pipelines of vLLM-Omni say it.

They open no context. A tag names the branch where they set one; else the inputs that stay tell, as
everywhere in this package; and where a call brings no timestep to go by, their order does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from omni_cache.runtime.calls import Call
from omni_cache.runtime.contexts import Generation, branch, named_branch, named_generation

POSITIVE, NEGATIVE = "positive", "negative"


class Guidance:
    """Names the branches of one module's calls.

    Attributes:
        calls: how many have ended well since the request began.
    """

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, num_inference_steps: int | None) -> None:
        """Begin a request of so many steps, None where nobody knows."""
        self.calls = 0
        self._step = 0
        self._called: frozenset[str] = frozenset()
        self._generation = Generation(num_inference_steps)

    @contextmanager
    def __call__(self, call: Call) -> Iterator[None]:
        """The context of a call."""
        name = _tag(call.module)
        if named_branch.get() is not None:  # the caller's own words come first
            yield
        elif call.timestep is not None or call.loop is not None:
            with _named(name):
                yield
        else:
            generation = named_generation.get() or self._generation
            token = named_generation.set(generation)
            try:
                with self._counted(name or self._by_order(call.module)):
                    yield
            finally:
                named_generation.reset(token)
        self.calls += 1

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """A branch that is called for again is at the next step."""
        is_again = name in self._called
        step = self._step + is_again
        with branch(name, step):
            yield
        self._step, self._called = step, (frozenset() if is_again else self._called) | {name}

    def _by_order(self, module: nn.Module) -> str:
        if not getattr(module, "do_true_cfg", False):
            return POSITIVE
        rank = _rank_in_guidance()
        is_second = self.calls % 2 == 1 if rank is None else rank > 0
        return NEGATIVE if is_second else POSITIVE


@contextmanager
def _named(name: str | None) -> Iterator[None]:
    if name is None:
        yield
    else:
        with branch(name):
            yield


def _tag(module: Any) -> str | None:
    """The branch that a pipeline has tagged a call with; a tag on the module serves one call."""
    number = getattr(module, "_teacache_branch_id", None)
    if number is not None:
        module._teacache_branch_id = None
        return f"branch_{number}"
    name = getattr(module, "cfg_branch", None)
    if name is None:
        name = getattr(_forward_context(), "cfg_branch_id", None)
    return None if name is None else str(name)


def _rank_in_guidance() -> int | None:
    """Which part of guidance this rank has in vLLM-Omni, where ranks share it; None where not."""
    theirs: Any = sys.modules.get("vllm_omni.diffusion.distributed.parallel_state")
    if theirs is None:
        return None
    try:
        shared = theirs.get_classifier_free_guidance_world_size() > 1
        return int(theirs.get_classifier_free_guidance_rank()) if shared else None
    except AssertionError:  # it has set up no groups
        return None


def _forward_context() -> Any:
    """What vLLM-Omni's runner says of the running forward, where it runs us."""
    theirs = sys.modules.get("vllm_omni.diffusion.forward_context")
    available = getattr(theirs, "is_forward_context_available", None)
    return theirs.get_forward_context() if theirs and available and available() else None
