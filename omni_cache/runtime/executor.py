"""The executor: what runs of a guarded model in a call, and in which order.

place -> skip -> constants, modulations -> prologue -> decide
-> compute: body -> epilogue                keeps the residuals
-> reuse:   partners + forecast -> epilogue
-> commit

place -> what is found -> all of it, where the graph decides -> what it has decided -> commit
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from omni_cache.lowering.deciding import DecidingProgram
from omni_cache.lowering.program import Program
from omni_cache.runtime.calls import Served
from omni_cache.runtime.decision import Step
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
        result = self._run(args)
        placement = self._placement
        call = placement.call if placement.guarded.skips else None
        if call is not None:
            call.served.append(Served(placement, args, result))
        return result

    def _run(self, args: Sequence[Any]) -> Any:
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
        hoisted = (*constants, *self._modulations(program, step, args, constants))
        values = program.begin(args, hoisted)
        computation = self._placement.guarded.computation, program.has_residual(values)
        layout = Layout.of(program.shaped(values), computation)
        signal = program.signal(values)
        reuse = step.decide(signal, layout)
        if step.is_refuted:
            # What was held is another call's, as the host has only now heard.
            constants = program.constants(args)
            hoisted = (*constants, *program.modulations(args, constants))
            values = program.begin(args, hoisted)
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

    @staticmethod
    def _modulations(
        program: Program, step: Step, args: Sequence[Any], constants: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Those of this call: a row of a table, or computed for it alone."""
        if not program.has_modulations:
            return ()
        row = step.row()
        if row is not None:
            return row
        made = program.modulations(args, constants)
        timesteps = step.listed(made)
        if timesteps is not None:
            step.tabulate(made, program.rows(args, constants, timesteps))
        return made
