"""Every private name of PyTorch that the package leans on outside of passes, kernels and repeats.

Each stands here once, under a name that says what it is for, and has a test that fails when PyTorch
changes it (``tests/test_dynamo.py``). Knows nothing of caches.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from traceback import FrameSummary
from types import CodeType, FrameType
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _FrameAction
from torch._C._dynamo.guards import GlobalStateGuard
from torch._dynamo import list_backends, lookup_backend
from torch._dynamo.exc import (
    FailOnRecompileLimitHit,
    ShortenTraceback,
    Unsupported,
    UserError,
)
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

Unwrapped = ShortenTraceback
"""Base of the errors of a backend that reach the caller of a compiled function as they are."""

NoGraphError = (Unsupported, UserError, GuardOnDataDependentSymNode)
"""Raised when a function that is asked for as one graph breaks, before any of the call has run."""

LimitError = FailOnRecompileLimitHit
"""Raised when Dynamo's recompile limit is reached, before anything of the call has run."""

GRAPHS = 8
"""So many times ``torch._dynamo.config.recompile_limit`` graphs are made of one code object."""

__all__ = [
    "GRAPHS",
    "Frame",
    "LimitError",
    "NoGraphError",
    "Surroundings",
    "Unwrapped",
    "break_of",
    "callers",
    "captures_conditionals",
    "compile_ahead",
    "compiled",
    "find_vectors",
    "forget_compiled",
    "inductor_modes",
    "inductor_options",
    "inductor_setting",
    "is_bucket",
    "kernels_together",
    "last_graph",
    "leave_uncompiled",
    "list_backends",
    "lookup_backend",
    "only_returns",
    "place_of",
    "prepare_for_part",
    "run_inductor",
    "traced_frame",
    "write_package",
]


# --- capturing ------------------------------------------------------------------------------------


def compiled(
    function: Callable[..., Any],
    backend: Callable[[GraphModule, list[Any]], Any],
    fullgraph: bool = False,
    dynamic: bool | None = None,
    at_limit: Callable[[str], None] | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[..., Any]:
    """A function compiled as ``torch.compile`` does, under settings of our own.

    They hold while Dynamo traces, and cost nothing when what is compiled runs:

    - integer attributes of modules may change without a graph for each of their values
      (``dynamic=True`` excepted, which would make a size of every one of them);
    - tensors whose size depends on data do not break a graph that may have breaks: where such a
      break lies in a loop, Dynamo captures nothing of the function around it, which is often the
      one with the blocks;
    - DistributedDataParallel does not split the graph where there are no gradients to send;
    - one code object may have `GRAPHS` times as many graphs as elsewhere.

    Args:
        function: what to compile.
        backend: called with each graph and its example inputs. Functions that are one and the same
            share what was compiled with equal backends.
        fullgraph: whether to raise `NoGraphError` at a graph break, and `LimitError` for one graph
            too many.
        dynamic: as in ``torch.compile``.
        at_limit: called when Dynamo makes no more graphs of a function, with one sentence that says
            so and why it needed another one.
        around: makes what is entered around each trace.
    """
    context: Any = torch._dynamo.optimize(backend, nopython=fullgraph, dynamic=dynamic)
    convert = getattr(context, "callback", None)
    if convert is None:  # TORCHDYNAMO_DISABLE=1
        return function

    @functools.wraps(convert, assigned=())  # Dynamo finds the backend by an attribute
    def convert_under_settings(frame: Any, *rest: Any) -> Any:
        try:
            with _settings(fullgraph, dynamic), around():
                result = convert(frame, *rest)
        except LimitError as error:
            if at_limit is not None:
                at_limit(_limit_reason(frame, error))
            raise
        if at_limit is not None and result.frame_exec_strategy.cur_action == _FrameAction.RUN_ONLY:
            at_limit(_limit_reason(frame))
        return result

    context.callback = convert_under_settings
    frames: Callable[..., Any] = context(function)
    return frames


def _settings(fullgraph: bool, dynamic: bool | None) -> AbstractContextManager[None]:
    config = torch._dynamo.config
    settings: dict[str, Any] = {"recompile_limit": GRAPHS * config.recompile_limit}
    if not fullgraph:
        settings["capture_dynamic_output_shape_ops"] = True
    if not dynamic:
        settings["allow_unspec_int_on_nn_module"] = True
    if not torch.is_grad_enabled():
        settings["optimize_ddp"] = False
    patched: AbstractContextManager[None] = config.patch(**settings)
    return patched


def _limit_reason(frame: Any, error: BaseException | None = None) -> str:
    """Which limit is met, what the last call asks for that no graph serves, and what to set."""
    flag = "recompile_limit"
    if error is not None and f"accumulated_{flag}" in str(error.__cause__):
        flag = f"accumulated_{flag}"
    made = len(_graphs_of(frame.f_code))
    return (
        f"Dynamo has made {made} graphs of {frame.f_code.co_name} and makes no more"
        f"{_newest_graph(frame.f_code, frame.f_locals)}, and this call differs. Keep that from "
        f"changing from call to call, or raise torch._dynamo.config.{flag} (now "
        f"{getattr(torch._dynamo.config, flag)}; an enabled model may have {GRAPHS} times as many "
        "graphs)"
    )


def _newest_graph(code: CodeType, values: Mapping[str, Any]) -> str:
    """A clause that says what the newest graph was made for that a call does not meet."""
    checked = (each.guard_manager.check_verbose(values) for each in _graphs_of(code))
    unmet = [each.verbose_code_parts[0] for each in checked if not each.result]
    # Behind the guard stands the line that it comes from.
    return f"; the newest was made for {unmet[0].partition('#')[0].strip()}" if unmet else ""


def _graphs_of(code: CodeType) -> list[Any]:
    """What is compiled of a code object, the newest first."""
    entries: list[Any] = torch._dynamo.eval_frame._debug_get_cache_entry_list(code)
    return entries


def leave_uncompiled(code: CodeType) -> None:
    """Let Dynamo run frames of this code as they are, and look at what they call."""
    torch._dynamo.eval_frame.skip_code(code)


def forget_compiled(code: CodeType) -> None:
    """Take back what was compiled of a code object, and that it was left as it is."""
    torch._dynamo.eval_frame.remove_from_cache(code)


def place_of(error: BaseException) -> Sequence[FrameSummary]:
    """The stack of the user's code where tracing met an error; empty where it does not tell."""
    return getattr(error, "real_stack", None) or ()


# --- beside what is compiled ----------------------------------------------------------------------


class Surroundings:
    """What Dynamo takes into account of a process and a thread before it runs a graph.

    Modes of gradients and autocast, default dtype, threads and the like are as they were when this
    was made; no other mode is on, and nobody has asked Dynamo to step back.
    """

    def __init__(self) -> None:
        self._state = GlobalStateGuard()

    def are_back(self) -> bool:
        """Whether a graph that ran then may run now."""
        return (
            self._state.check()
            and torch._dynamo.eval_frame._stance.stance == "default"
            and not torch._C._len_torch_function_stack()
            and not torch._C._len_torch_dispatch_stack()
            and torch._C._functorch.peek_interpreter_stack() is None
        )


# --- within a backend -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """The frame that Dynamo is tracing when it calls a backend.

    Attributes:
        code: its code; behind a graph break code that Dynamo made for the rest of a function.
        values: its local variables, by name.
        global_values: its global variables, by name.
        is_resumed: whether it goes on behind a graph break.
    """

    code: CodeType
    values: Mapping[str, Any]
    global_values: Mapping[str, Any]
    is_resumed: bool


def traced_frame() -> Frame | None:
    """The frame that is being traced; None where a backend is called by hand."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        frame = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return None
    code = frame.f_code
    is_resumed = code.co_name.startswith("torch_dynamo_resume_in")
    return Frame(code, dict(frame.f_locals), frame.f_globals, is_resumed)


def break_of(gm: GraphModule) -> Any | None:
    """The graph break that a graph ends at, with ``reason`` and ``user_stack``; None for none."""
    ended = getattr(gm, "compile_subgraph_reason", None)
    return ended if ended is not None and ended.graph_break else None


def last_graph(frame: Frame) -> str | None:
    """That the graph being made is the last one of its code, and what to set; None if it is not.

    For functions that were not made by :func:`compiled`, of which nobody else tells.
    """
    limit = torch._dynamo.config.recompile_limit
    if len(_graphs_of(frame.code)) + 1 != limit:
        return None
    return (
        f"this is the last of {limit} graphs that Dynamo makes of it"
        f"{_newest_graph(frame.code, frame.values)}, and this call differs. Keep that from "
        "changing from call to call, or raise torch._dynamo.config.recompile_limit"
    )


def only_returns() -> bool:
    """Whether the frame that is being traced does nothing but call its graph and return.

    Dynamo does by itself, after each run of the graph, what the frame does to objects that were
    there before, such as to count in an attribute. False where nobody traces.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

    try:
        effects = InstructionTranslator.current_tx().output.side_effects
        before = (AttributeMutationExisting, ValueMutationExisting)
        changed = filter(effects.is_modified, effects.id_to_variable.values())
        return not effects.tensor_hooks and not any(
            isinstance(each.mutation_type, before) for each in changed
        )
    except AttributeError:
        return False


def is_bucket(gm: GraphModule) -> bool:
    """Whether a graph is what lies between two cuts that DistributedDataParallel has made.

    Where gradients are sent while others are computed, Dynamo cuts the graph of a call at the
    buckets that they are sent in.
    """
    ended = break_of(gm)
    return ended is not None and str(ended.reason).startswith("DDPOptimizer")


def callers() -> Iterator[FrameType]:
    """The Python frames that run within the innermost compiled function, from within outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _entry_code():
        yield frame
        frame = frame.f_back


@functools.cache
def _entry_code() -> CodeType:
    """The code in which every compiled function runs."""
    return torch._dynamo.optimize("eager")(_limit_reason).__code__


# --- compiling ------------------------------------------------------------------------------------


def prepare_for_part() -> None:
    """Let another graph be compiled within a backend.

    AOTAutograd leaves the metadata of the graph before here, and would take it for this one's.
    """
    tracing = torch._guards.TracingContext.try_get()
    if tracing is not None:
        tracing.fw_metadata = None


@functools.cache
def find_vectors() -> Callable[[], None]:
    """Begin to find out for which vector instructions C++ can be compiled, in other processes.

    Inductor does so before its first kernel for a CPU, which takes seconds if no earlier process
    has: they pass while this one traces.

    Returns:
        What waits until it is known.
    """

    def find() -> None:
        with suppress(Exception):  # Inductor meets it again, and tells
            from torch._inductor.cpu_vec_isa import valid_vec_isa_list

            valid_vec_isa_list()

    thread = Thread(target=find, daemon=True)
    thread.start()
    return thread.join


def run_inductor(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    patches: Mapping[str, Any],
    static: Collection[int] = (),
) -> Callable[..., Any]:
    """Compile a graph with Inductor under patches of its configuration.

    Args:
        gm: the graph.
        example_inputs: real or fake values of its inputs.
        patches: options of Inductor, by name.
        static: the positions of inputs that stay where they are, as weights do. CUDA graphs read
            those in place and copy all others at every replay. Of a graph that Dynamo made,
            AOTAutograd finds them itself; of one that a backend built, it finds none.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    tensors = [each for each in example_inputs if isinstance(each, torch.Tensor)]
    if tensors and all(each.device.type == "cpu" for each in tensors):
        find_vectors()()

    @functools.wraps(compile_fx_inner)
    def compile_inner(
        lowered: GraphModule,
        inputs: Sequence[Any],
        *,
        static_input_idxs: Sequence[int],
        **rest: Any,
    ) -> Any:
        placeholders = lowered.graph.find_nodes(op="placeholder")
        found = (i for i, node in enumerate(placeholders) if _input_of(node) in static)
        positions = sorted({*static_input_idxs, *found})
        return compile_fx_inner(lowered, inputs, static_input_idxs=positions, **rest)

    compile_part: Any = compile_fx(
        gm, list(example_inputs), inner_compile=compile_inner, config_patches=dict(patches)
    )
    return compile_part  # type: ignore[no-any-return]


_later: ContextVar[list[Callable[[], None]]] = ContextVar("waits_for_kernels")


@contextmanager
def kernels_together() -> Iterator[None]:
    """Wait at the end for the C++ kernels of all graphs that Inductor compiles within.

    It hands kernels to other processes and ends each graph by waiting for them; like this, the next
    graph is lowered meanwhile. Nothing that is compiled within may run before the end. Triton's
    kernels are waited for as ever, because Inductor's cache takes them in with their graph. Other
    threads wait as ever too.
    """
    _let_waits_be_put_off()
    later: list[Callable[[], None]] = []
    token = _later.set(later)
    try:
        yield
    finally:
        _later.reset(token)
        for each in later:
            each()


@functools.cache
def _let_waits_be_put_off() -> None:
    """Have Inductor's wait look at `_later`.

    For good, since of two threads that each put the method back one could put back the other's.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CodeCacheFuture, LambdaFuture

    wait = AsyncCompile.wait

    @functools.wraps(wait)
    def wait_later(self: AsyncCompile, scope: dict[str, Any]) -> None:
        later = _later.get(None)
        pending = [each for each in scope.values() if isinstance(each, CodeCacheFuture)]
        cpp = all(isinstance(each, LambdaFuture) and each.future is None for each in pending)
        if later is None or not cpp:
            wait(self, scope)
        else:
            later.append(functools.partial(wait, self, scope))

    AsyncCompile.wait = wait_later  # type: ignore[method-assign]


def compile_ahead(program: ExportedProgram, patches: Mapping[str, Any]) -> list[Any]:
    """Compile an exported program with AOTInductor; returns the files that a package is made of.

    Args:
        program: what is compiled, weights included.
        patches: options of Inductor, by name.
    """
    args, kwargs = program.example_inputs
    options = {**patches, "aot_inductor.package": True}
    module: Any = program.module(check_guards=False)
    files: Any = torch._inductor.aot_compile(module, args, kwargs, options=options)
    return list(files)


def write_package(path: Path, files: Mapping[str, list[Any]], texts: Mapping[str, str]) -> None:
    """Write compiled programs by name, and texts by file name, as one ``.pt2``."""
    from torch.export.pt2_archive._package import package_pt2

    package_pt2(path, aoti_files=dict(files), extra_files=dict(texts))


def captures_conditionals() -> bool:
    """Whether this PyTorch captures ``torch.cond`` in a CUDA graph, as a conditional node."""
    return find_spec("torch._higher_order_ops.cudagraph_conditional_nodes") is not None


def _input_of(placeholder: Node) -> int | None:
    """The position of the input that AOTAutograd made a placeholder of; None for its own ones.

    A tensor subclass, such as a quantized weight, is handed over as the tensors that it holds.
    """
    from torch._functorch._aot_autograd.descriptors import PlainAOTInput, SubclassGetAttrAOTInput

    described = placeholder.meta.get("desc")
    while isinstance(described, SubclassGetAttrAOTInput):
        described = described.base
    return described.idx if isinstance(described, PlainAOTInput) else None


def inductor_options() -> list[str]:
    """The names of Inductor's options."""
    from torch._inductor import list_options

    return list_options()


def inductor_modes() -> dict[str, dict[str, Any]]:
    """The options that each mode of Inductor sets."""
    from torch._inductor import list_mode_options

    return list_mode_options()


def inductor_setting(name: str) -> Any:
    """An option of Inductor as it stands in this process, set there or by the environment."""
    from torch._inductor import config

    return config.get_config_copy()[name]
