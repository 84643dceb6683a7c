"""The runtime: which generation a call belongs to, what is kept for it, and which part runs."""

from omni_cache.runtime.executor import CompiledPart, Executor, GuardedParts
from omni_cache.runtime.generation import (
    Generation,
    ModelState,
    branch,
    generation,
    in_generation,
)
from omni_cache.runtime.states import Call, bind, bound_call, expected_state, states_of_module
from omni_cache.runtime.summary import Summary, TrajectorySummary, summarise
from omni_cache.runtime.trajectory import StepRecord, Trajectory

__all__ = [
    "Call",
    "CompiledPart",
    "Executor",
    "Generation",
    "GuardedParts",
    "ModelState",
    "StepRecord",
    "Summary",
    "Trajectory",
    "TrajectorySummary",
    "bind",
    "bound_call",
    "branch",
    "expected_state",
    "generation",
    "in_generation",
    "states_of_module",
    "summarise",
]
