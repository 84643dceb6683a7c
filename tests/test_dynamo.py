"""What PyTorch has no public name for does what the package takes it to do: one test a name."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.two_tensor import TwoTensor

from omni_cache import dynamo


class Graphs:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.made: list[GraphModule] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.made.append(gm)
        return gm.forward


X = torch.arange(6.0)


# --- compiled -------------------------------------------------------------------------------------


def test_functions_share_what_equal_backends_have_compiled() -> None:
    class Equal(Graphs):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        __hash__ = None  # type: ignore[assignment]

    def double(x: Tensor) -> Tensor:
        return x * 2

    first, second, other = Equal(), Equal(), Graphs()
    for backend in (first, second, other):
        assert torch.equal(dynamo.compiled(double, backend)(X), X * 2)
    assert [len(each.made) for each in (first, second, other)] == [1, 0, 1]


def test_a_break_is_told_where_one_graph_is_asked_for_and_nothing_has_run() -> None:
    ran = []

    def breaking(x: Tensor) -> Tensor:
        ran.append(None)
        torch._dynamo.graph_break()
        return x * 2

    with pytest.raises(dynamo.NoGraphError) as raised:
        dynamo.compiled(breaking, Graphs(), fullgraph=True)(X)
    assert not ran
    assert dynamo.place_of(raised.value)[-1].name == "breaking"


def test_what_is_around_is_entered_for_each_trace_and_for_no_call() -> None:
    happened = []

    @contextmanager
    def around() -> Iterator[None]:
        happened.append("traced")
        yield
        happened.append("compiled")

    double = dynamo.compiled(lambda x: x * 2, Graphs(), True, False, around=around)
    for x in (X, X, X[1:]):
        double(x)
    assert happened == ["traced", "compiled"] * 2


def test_a_number_taken_from_data_is_told_likewise() -> None:
    with pytest.raises(dynamo.NoGraphError, match="data-dependent"):
        dynamo.compiled(lambda x: x * 2 if int(x.sum()) > 3 else x, Graphs(), fullgraph=True)(X)


def test_an_integer_attribute_that_counts_makes_no_graph_for_each_count() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * 2

    model, graphs = Counting(), Graphs()
    call = dynamo.compiled(lambda x: model.forward(x), graphs, fullgraph=True)
    for _ in range(20):
        call(X)
    assert model.calls == 20
    assert len(graphs.made) < 4


def test_under_dynamic_integer_attributes_are_numbers() -> None:
    class Repeating(nn.Module):
        times = 3

        def forward(self, x: Tensor) -> Tensor:
            return x[:, None].expand(-1, self.times)

    model, graphs = Repeating(), Graphs()
    dynamo.compiled(lambda x: model.forward(x), graphs, dynamic=True)(X)
    (expand,) = (node for node in graphs.made[0].graph.nodes if node.target == "expand")
    assert expand.args[1:] == (-1, 3)


def test_sizes_that_depend_on_data_do_not_break_what_may_break() -> None:
    def selecting(x: Tensor) -> Tensor:
        return x[x > 2].sum() * 2

    graphs = Graphs()
    dynamo.compiled(selecting, graphs)(X)
    assert len(graphs.made) == 1


def test_settings_hold_while_dynamo_traces_and_no_longer() -> None:
    names = ("recompile_limit", "allow_unspec_int_on_nn_module", "optimize_ddp")
    config = torch._dynamo.config

    def read() -> list[Any]:
        return [getattr(config, name) for name in names]

    seen = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        seen.append(read())
        return gm.forward

    before = read()
    with torch.no_grad():
        dynamo.compiled(lambda x: x * 2, backend)(X)
    with torch.enable_grad():
        dynamo.compiled(lambda x: x * 3, backend)(X)
    assert seen == [
        [dynamo.GRAPHS * before[0], True, False],
        [dynamo.GRAPHS * before[0], True, True],
    ]
    assert read() == before


@pytest.mark.parametrize("fullgraph", [True, False])
def test_beyond_the_last_graph_the_limit_and_what_changed_are_told(fullgraph: bool) -> None:
    class Named(nn.Module):
        name = ""

        def forward(self, x: Tensor) -> Tensor:
            return x * len(self.name)

    model, graphs, told = Named(), Graphs(), []

    def call(x: Tensor) -> Tensor:
        return model.forward(x)

    run = dynamo.compiled(call, graphs, fullgraph, at_limit=told.append)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(dynamo.GRAPHS):
            model.name += "a"
            run(X)
        assert not told
        model.name += "a"
        if fullgraph:
            with pytest.raises(dynamo.LimitError):
                run(X)
        else:
            run(X)
    assert len(graphs.made) == dynamo.GRAPHS
    (reason,) = told
    assert f"Dynamo has made {dynamo.GRAPHS} graphs of call and makes no more" in reason
    assert f"name == '{'a' * dynamo.GRAPHS}'" in reason
    assert "torch._dynamo.config.recompile_limit (now 1" in reason


def test_the_limit_over_all_is_told_by_its_name() -> None:
    told: list[str] = []
    run = dynamo.compiled(lambda x: x * len(x), Graphs(), True, False, told.append)
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        run(torch.ones(2))
        run(torch.ones(3))
        with pytest.raises(dynamo.LimitError):
            run(torch.ones(4))
    assert "torch._dynamo.config.accumulated_recompile_limit (now 2" in told[0]


def test_where_dynamo_is_switched_off_a_function_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    graphs = Graphs()
    assert torch.equal(dynamo.compiled(lambda x: x * 2, graphs)(X), X * 2)
    assert not graphs.made


def test_a_compiled_function_is_freed_with_its_last_reference() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    graphs = Graphs()
    run = dynamo.compiled(double, graphs, at_limit=[].append)
    gone = weakref.ref(run)
    gc.disable()
    try:
        del run
        assert gone() is None
    finally:
        gc.enable()


# --- code -----------------------------------------------------------------------------------------


def test_code_that_is_left_uncompiled_runs_as_it_is_and_what_it_calls_is_compiled() -> None:
    def inner(x: Tensor) -> Tensor:
        return x * 2

    def outer(x: Tensor) -> Tensor:
        return inner(x + 1)

    graphs = Graphs()
    dynamo.leave_uncompiled(outer.__code__)
    assert torch.equal(dynamo.compiled(outer, graphs)(X), (X + 1) * 2)
    assert [node.op for node in graphs.made[0].graph.nodes].count("call_function") == 1


def test_what_was_compiled_can_be_taken_back() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    graphs = Graphs()
    run = dynamo.compiled(double, graphs)
    for _ in range(2):
        run(X)
    assert len(graphs.made) == 1
    dynamo.forget_compiled(double.__code__)
    run(X)
    assert len(graphs.made) == 2


# --- within a backend -----------------------------------------------------------------------------


def test_the_frame_is_that_of_the_function_and_behind_a_break_of_its_rest() -> None:
    frames: list[Any] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        frames.append((dynamo.traced_frame(), dynamo.break_of(gm)))
        return gm.forward

    def breaking(x: Tensor) -> Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    assert dynamo.traced_frame() is None
    dynamo.compiled(breaking, backend)(X)
    (first, ended), (rest, last) = frames
    assert (first.code.co_name, first.is_resumed) == ("breaking", False)
    assert first.values["x"] is X
    assert first.global_values["X"] is X
    assert rest.is_resumed
    assert "graph_break" in str(ended.reason)
    assert ended.user_stack[-1].name == "breaking"
    assert last is None


class Noted:
    calls = 0


_seen = 0


@pytest.mark.parametrize("kind", ["returns", "makes", "attribute", "list", "cell", "global"])
def test_whether_a_frame_only_returns_is_known_within_the_backend(kind: str) -> None:
    noted, names, cell, found = Noted(), ["a"], 0, []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append(dynamo.only_returns())
        return gm.forward

    def function(x: Tensor) -> Any:
        nonlocal cell
        global _seen
        if kind == "makes":
            made = Noted()
            made.calls = 3
            return {"x": x * 2, "made": [made.calls]}
        if kind == "attribute":
            noted.calls = 3
        if kind == "list":
            names[0] = "b"
        if kind == "cell":
            cell = 3
        if kind == "global":
            _seen = 3
        return x * 2

    dynamo.compiled(function, backend, fullgraph=True)(X)
    assert found == [kind in ("returns", "makes")]
    assert not dynamo.only_returns()  # nobody traces


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "eager": lambda: torch.compiler.set_stance("force_eager"),
    "device": lambda: torch.device("cpu"),
    "fake": torch._subclasses.FakeTensorMode,
    "dtype": lambda: _default_dtype(torch.float64),
    "threads": lambda: _threads(torch.get_num_threads() + 1),
}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_other_surroundings_are_told_from_those_before(name: str) -> None:
    before = dynamo.Surroundings()
    assert before.are_back()
    with SURROUNDINGS[name]():
        assert not before.are_back()
    assert before.are_back()


def test_within_a_transform_of_functions_surroundings_are_others() -> None:
    before, found = dynamo.Surroundings(), []

    def function(x: Tensor) -> Tensor:
        found.append(before.are_back())
        return x

    torch.vmap(function)(X)
    assert found == [False]


def test_an_error_of_a_backend_reaches_the_caller_as_it_is() -> None:
    class OwnError(dynamo.Unwrapped):
        pass

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        raise OwnError("own", first_useful_frame=None)

    with pytest.raises(OwnError, match="own"):
        dynamo.compiled(lambda x: x * 2, backend)(X)


def test_callers_end_where_a_compiled_function_is_entered() -> None:
    names: list[list[str]] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            names.append([frame.f_code.co_name for frame in dynamo.callers()])
            return gm.forward(*args)

        return run

    def inner(x: Tensor) -> Tensor:
        return x * 2

    def outer(x: Tensor) -> Tensor:
        return inner(x)

    dynamo.leave_uncompiled(outer.__code__)
    torch.compile(outer, backend=backend)(X)
    assert names[0][-1] == "outer"
    assert "inner" in names[0]


@pytest.mark.parametrize(("layers", "is_cut"), [(1, False), (4, True)])
def test_a_graph_between_two_buckets_is_known(tmp_path: Any, layers: int, is_cut: bool) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(600, 600) for _ in range(layers))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    found: list[bool] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append(dynamo.is_bucket(gm))
        return gm.forward

    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(Layers(), bucket_cap_mb=2)
        parallel.module.compile(backend=backend)
        with torch.no_grad():
            parallel(torch.ones(1, 600))
    finally:
        dist.destroy_process_group()
    assert (len(found) > 1) == is_cut
    assert found == [is_cut] * len(found)


# --- compiling ------------------------------------------------------------------------------------


def test_two_parts_can_be_compiled_within_one_backend() -> None:
    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        for _ in range(2):
            dynamo.prepare_for_part()
            assert torch._guards.TracingContext.get().fw_metadata is None
            part = dynamo.lookup_backend("aot_eager")(gm, example_inputs)
        return part

    with torch.no_grad():
        assert torch.equal(dynamo.compiled(lambda x: (x * 2).relu(), backend)(X), X * 2)
    dynamo.prepare_for_part()  # where nothing is traced there is nothing to do


@pytest.mark.slow
def test_inductor_compiles_a_graph_under_patches() -> None:
    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return dynamo.run_inductor(gm, example_inputs, {"max_autotune": False})

    with torch.no_grad():
        assert torch.equal(dynamo.compiled(lambda x: x * 2 + 1, backend)(X), X * 2 + 1)


def test_kernels_of_graphs_are_waited_for_when_all_are_lowered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    wait = AsyncCompile._wait_futures

    def waited(self: AsyncCompile, scope: dict[str, Any]) -> None:
        events.append("waited")
        wait(self, scope)

    monkeypatch.setattr(AsyncCompile, "_wait_futures", waited)

    def lower(constant: float) -> Callable[..., Any]:
        gm = torch.fx.symbolic_trace(lambda x: (x * 2 + constant,))
        lowered = dynamo.run_inductor(gm, [X], {})
        events.append("lowered")
        return lowered

    with torch.no_grad(), config.patch(compile_threads=2):
        with dynamo.kernels_together():
            both = [lower(constant) for constant in (2.5, 3.5)]
        made = [run(X)[0] for run in both]
    assert torch.equal(made[1] - made[0], torch.ones(6))
    assert events == ["lowered", "lowered", "waited", "waited"]


@pytest.mark.parametrize("is_subclass", [False, True])
def test_inductor_is_told_which_inputs_are_static(
    monkeypatch: pytest.MonkeyPatch, is_subclass: bool
) -> None:
    """They are found though AOTAutograd leaves out an input, or takes one apart."""
    lowered_to: list[tuple[list[bool], list[int]]] = []

    def lower(
        lowered: GraphModule, inputs: list[Any], *, static_input_idxs: list[int], **rest: Any
    ) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            lowered_to.append(([bool((each == 1).all()) for each in args], static_input_idxs))
            return lowered(*args)

        return make_boxed_func(run)

    def forward(x: Tensor, y: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor]:
        x.add_(1)
        return (x * weight + y + z,)

    x, y, ones = torch.zeros(6), torch.zeros(6), torch.ones(6)
    inputs = [x, y, TwoTensor(ones, ones.clone()), y] if is_subclass else [x, x, ones, y]
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", lower)
    with torch.no_grad():
        run = dynamo.run_inductor(torch.fx.symbolic_trace(forward), inputs, {}, static={2})
        run(*inputs)
    ((are_ones, static),) = lowered_to
    assert static == [i for i, is_one in enumerate(are_ones) if is_one]
    assert len(static) == 1 + is_subclass


def test_inductors_modes_and_options_are_known() -> None:
    assert "triton.cudagraphs" in dynamo.inductor_options()
    modes = dynamo.inductor_modes()
    assert modes["default"] == {}
    assert modes["reduce-overhead"]["triton.cudagraphs"] is True
    assert dynamo.inductor_setting("triton.cudagraphs") is False
    import torch._inductor.config

    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert dynamo.inductor_setting("triton.cudagraphs") is True


def test_backends_are_known_by_name() -> None:
    assert "inductor" in dynamo.list_backends(exclude_tags=())
    assert dynamo.lookup_backend("eager")


@pytest.mark.slow
def test_a_program_is_compiled_ahead_and_packed_with_a_text(tmp_path: Path) -> None:
    from torch.export.pt2_archive._package import load_pt2

    module, x = nn.Linear(6, 2).requires_grad_(False), torch.ones(1, 6)
    files = {
        "one": dynamo.compile_ahead(torch.export.export(module, (x,)), {"max_autotune": False})
    }
    dynamo.write_package(tmp_path / "one.pt2", files, {"words.json": "{}"})
    contents = load_pt2(tmp_path / "one.pt2")
    assert contents.extra_files == {"words.json": "{}"}
    (found,) = contents.aoti_runners["one"].loader.boxed_run([x])
    assert torch.allclose(found, module(x))


def test_whether_cuda_graphs_take_conditional_nodes_is_known() -> None:
    from torch._inductor import cudagraph_trees

    known = hasattr(cudagraph_trees, "ControlFlowOpWarmupDispatchMode")
    assert dynamo.captures_conditionals() is known


def test_vector_instructions_are_found_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, end = [], threading.Event()

    def find() -> list[str]:
        begun.append(threading.current_thread())
        end.wait(10)
        return []

    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", find)
    dynamo.find_vectors.cache_clear()
    try:
        wait = dynamo.find_vectors()
        assert dynamo.find_vectors() is wait
        end.set()
        wait()
        [thread] = begun
        assert thread is not threading.current_thread()
        assert not thread.is_alive()
    finally:
        dynamo.find_vectors.cache_clear()


def test_inductor_takes_the_vector_instructions_that_were_found() -> None:
    from torch._inductor.cpu_vec_isa import pick_vec_isa, valid_vec_isa_list

    dynamo.find_vectors()()
    before = valid_vec_isa_list.cache_info().misses
    assert before
    pick_vec_isa()
    assert valid_vec_isa_list.cache_info().misses == before
