"""The executor: what runs of a guarded model in a call, and in which order.

place -> skip -> constants -> prologue -> decide
-> compute: body -> epilogue                keeps the residuals
-> reuse:   partners + forecast -> epilogue
-> commit

place -> what is found -> all of it, where the graph decides -> what it has decided -> commit
"""

from __future__ import annotations

from typing import Any

from omni_cache.lowering.deciding import DecidingProgram
from omni_cache.lowering.program import Program
from omni_cache.runtime.placement import Placement
from omni_cache.runtime.trajectory import Layout


class Executor:
    """A guarded model, compiled. It holds no state, so threads and models may share it.

    Args:
        program: what was compiled.
        placement: says where a call lies.
    """

    def __init__(self, program: Program | DecidingProgram, placement: Placement) -> None:
        self._program = program
        self._placement = placement

    def __call__(self, *args: Any) -> Any:
        """Run one forward on the model's flat inputs; returns its flat outputs."""
        program = self._program
        step = self._placement.place(args)
        if isinstance(program, DecidingProgram):
            layout = Layout.of(program.shaped(args), self._placement.guarded.computation)
            decided = program(args, step.standing(layout))
            step.learn(decided)
            step.commit(decided.result, decided.residuals, decided.finite)
            return decided.result
        skipped = step.skip()
        if skipped is not None:
            step.commit(skipped)
            return skipped
        constants = step.held()
        if constants is None:
            constants = program.constants(args)
        values = program.begin(args, constants)
        computation = self._placement.guarded.computation, program.has_residual(values)
        layout = Layout.of(program.shaped(values), computation)
        signal = program.signal(values)
        reuse = step.decide(signal, layout)
        if step.is_refuted:
            # The constants were those of another call, as the host has only now heard.
            constants = program.constants(args)
            values = program.begin(args, constants)
            signal = program.signal(values)
        step.keep(constants, signal)
        if reuse:
            result = program.reuse(values, *step.operands())
            step.commit(result)
        else:
            entered = program.entered(values)
            result, made, finite = step.recalled() or program.compute(values)
            step.commit(result, made, finite, entered)
        return result
