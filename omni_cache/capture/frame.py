"""What Dynamo is compiling when it calls the backend: which module, which piece of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from omni_cache.passes import timestep_name
from omni_cache.runtime import bound_call


@dataclass(frozen=True)
class TracedFrame:
    """What Dynamo is compiling now.

    Attributes:
        model: the module that is called, as far as it is known, None for a function without one.
        model_class: its class; behind a break, that of the module whose code goes on.
        parameters: names of the parameters of the module's ``forward``, in order.
        is_piece: whether the graph is only a piece of it, between graph breaks.
        is_resumed: whether it is a piece behind a graph break.
        timestep: the timestep, where it is a Python number: the first graph is specialised on it,
            so that it is no input.
    """

    model: torch.nn.Module | None = None
    model_class: str | None = None
    parameters: tuple[str, ...] = ()
    is_piece: bool = False
    is_resumed: bool = False
    timestep: float | None = None

    @classmethod
    def current(cls, gm: GraphModule) -> TracedFrame:
        """The frame that a graph was traced in."""
        from torch._dynamo.symbolic_convert import InstructionTranslator

        ended = getattr(gm, "compile_subgraph_reason", None)
        is_piece = bool(ended is not None and ended.graph_break)
        try:
            frame = InstructionTranslator.current_tx().output.root_tx
        except AttributeError:  # called by hand, not by Dynamo
            return cls(is_piece=is_piece)
        is_resumed = frame.f_code.co_name.startswith("torch_dynamo_resume_in")
        is_piece = is_piece or is_resumed
        given = dict(frame.f_locals)
        model = next((each for each in given.values() if isinstance(each, torch.nn.Module)), None)
        if model is None:
            return cls(is_piece=is_piece, is_resumed=is_resumed)
        call = bound_call()
        if call is not None and call.module is not model:
            # A module of the model that was called, traced on its own behind a break.
            is_piece = is_resumed = True
        parameters = tuple(inspect.signature(model.forward).parameters)
        positional = zip(parameters, given.get("args", ()), strict=False)
        given = {**dict(positional), **given.get("kwargs", {}), **given}
        name = timestep_name(name for name, value in given.items() if value is not None)
        time = given.get(name) if name is not None else None
        return cls(
            model=model if call is None else call.module,
            model_class=type(model).__name__,
            parameters=parameters,
            is_piece=is_piece,
            is_resumed=is_resumed,
            timestep=float(time) if isinstance(time, float | int) else None,
        )
