"""The dispatch executor: the host decides which compiled part of a guarded model runs.

place -> skip -> prologue -> decide -> compute: body -> epilogue          keeps the residuals
-> reuse:   partners + forecast -> epilogue
-> commit
"""

from __future__ import annotations

from typing import Any

from omni_cache.lowering.program import Program
from omni_cache.runtime.placement import Placement
from omni_cache.runtime.trajectory import Layout


class Executor:
    """A guarded model, compiled. It holds no state, so threads and models may share it.

    Args:
        program: the parts, compiled.
        placement: says where a call lies.
    """

    def __init__(self, program: Program, placement: Placement) -> None:
        self._program = program
        self._placement = placement

    def __call__(self, *args: Any) -> Any:
        """Run one forward on the model's flat inputs; returns its flat outputs."""
        program = self._program
        step = self._placement.place(args)
        skipped = step.skip()
        if skipped is not None:
            step.commit(skipped)
            return skipped
        values = program.begin(args)
        computation = self._placement.guarded.computation, program.has_residual(values)
        layout = Layout.of(program.shaped(values), computation)
        if step.decide(program.signal(values), layout):
            result = program.reuse(values, *step.operands())
            step.commit(result)
        else:
            entered = program.entered(values)
            result, made, finite = step.recalled() or program.compute(values)
            step.commit(result, made, finite, entered)
        return result
