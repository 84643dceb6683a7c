"""explain says what the pass finds or why it finds nothing, and changes nothing."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers_models import CASES
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.fx import GraphModule

import omni_cache
from omni_cache import explain
from omni_cache.strategies import STRATEGIES

OWN = {"coefficients": (1.0, 0.0)}
"""Flags with which no table is looked up."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = F.layer_norm(x, (8,)) * (1 + self.modulation(time)[:, None])
        return x + self.out(F.scaled_dot_product_attention(y, y, y))


class Tiny(nn.Module):
    """Two blocks of attention over (B, S, 8) latents."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = self.embed(timestep[:, None])
        for block in self.blocks:
            x = block(x, time)
        return x.tanh()


class Deeper(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))


class Breaking(Tiny):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x * 2
        if x.sum() > 1e9:  # Dynamo cannot follow this
            x = -x
        return super().forward(x, timestep)


def break_line() -> int:
    lines, first = inspect.getsourcelines(Breaking.forward)
    return first + next(i for i, line in enumerate(lines) if "cannot follow" in line)


class Attentionless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def inputs(tokens: int = 6, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(1, tokens, 8, generator=generator), torch.tensor([1.0 - step / 10])


# --- what it reports -----------------------------------------------------------------------------


def test_flux_is_explained_in_words_and_in_figures(capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["flux"]
    model = case.build()
    found = explain(model, **case.inputs())
    text = str(found)
    assert capsys.readouterr().out == text + "\n"
    assert found.cached
    assert found.breaks == ()
    (graph,) = found.graphs
    assert graph.reason is None
    assert graph.analysis is not None
    assert [each.path for each in graph.analysis.loop.lists] == list(case.block_lists)
    for word in ("transformer_blocks", "FluxTransformerBlock", "residual", "modulated input"):
        assert word in text
    # What it says a trajectory will hold is what one holds.
    foreseen = graph.analysis.residual_bytes() + graph.analysis.signal_bytes()
    omni_cache.enable(model, inner="eager")
    with torch.no_grad():
        model(**case.inputs())
    (trajectory,) = omni_cache.summary(model).trajectories
    assert trajectory.memory_bytes == foreseen


def test_how_many_blocks_are_compiled_once_for_several_is_said() -> None:
    case = CASES["ltx_video"]
    text = str(explain(case.build(), **case.inputs()))
    assert "rolled: 2 of 3 blocks are calls of 1, compiled once" in text
    text = str(explain(case.build(), **case.inputs(), cache_options={"blocks": "unrolled"}))
    assert "rolled" not in text


@pytest.mark.parametrize("cache", STRATEGIES)
def test_every_strategy_is_explained(cache: str) -> None:
    flags = {"teacache": {"coefficients": (1.0, 0.0)}, "magcache": {"mag_ratios": (1.0,)}}
    spans = {"dbcache": {"fn_compute_blocks": 2, "bn_compute_blocks": 2}}
    options = {"cache": cache, **flags.get(cache, {}), **spans.get(cache, {})}
    found = explain(Deeper(), *inputs(), cache_options=options)
    assert found.cached, found.reason
    text = str(found)
    if cache in ("dbcache", "first_block_cache"):
        # Compared is what the first blocks add, which no operation of the model makes.
        assert re.search(r"signal = \w+ - \w+", text)
        assert "if gate(signal)" in text
    assert ("# reuse:" in text) == (cache == "dbcache")  # elsewhere the epilogue is a part of it


def test_inputs_have_the_names_that_the_model_gives_them() -> None:
    class Loose(Tiny):
        def forward(self, x: Tensor, *others: Tensor) -> Tensor:
            return super().forward(x, *others)

    x, timestep = inputs()
    by_position = str(explain(Tiny(), x, timestep, cache_options=OWN))
    assert by_position == str(explain(Tiny(), x=x, timestep=timestep, cache_options=OWN))
    assert "    x: f32[1, 6, 8],\n" in by_position
    assert "timestep: timestep" in by_position
    assert explain(Loose(), *inputs(), cache_options=OWN).cached
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        explain(Tiny(), *inputs(), x=inputs()[0], cache_options=OWN)


def test_wan_is_explained_with_the_published_signal_or_the_one_asked_for() -> None:
    case = CASES["wan"]
    model = case.build()

    def signal_of(**options: Any) -> tuple[str, tuple[int, ...]]:
        (graph,) = explain(model, **case.inputs(), cache_options=options).graphs
        assert graph.analysis is not None
        assert graph.analysis.signal is not None
        signal = graph.analysis.signal
        assert signal.kind in graph.text
        return signal.kind, tuple(signal.node.meta["example_value"].shape)

    assert signal_of(variant="Wan2.1-T2V-1.3B") == ("module output", (1, 48))
    assert signal_of(**OWN) == ("modulated input", (1, 72, 48))
    assert signal_of(**OWN, signal="timestep_embedding")[0] == "timestep embedding"


def test_a_strategy_without_a_signal_is_explained_without_one() -> None:
    options = {"cache": "magcache", "mag_ratios": [1.0]}
    (graph,) = explain(Tiny(), *inputs(), cache_options=options).graphs
    assert graph.analysis is not None
    assert graph.analysis.signal is None


def test_a_model_without_attention_is_told_what_was_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = explain(Attentionless(), inputs()[0])
    assert not found.cached
    (graph,) = found.graphs
    assert graph.analysis is None
    assert "attention" in str(graph.reason)
    assert "layers" in str(graph.reason)  # the list that there is
    assert f"Attentionless runs uncached: {graph.reason}" in capsys.readouterr().out


def test_a_graph_break_names_its_file_and_line() -> None:
    found = explain(Breaking(), *inputs(), cache_options=OWN)
    (met,) = found.breaks
    assert met.place == f"{__file__}:{break_line()}"
    assert met.source.startswith("if x.sum() > 1e9")
    assert "branch" in met.reason
    assert not met.in_block
    assert all(part in str(found) for part in (met.reason, met.place, met.source))
    # The pieces are explained one by one; the second has the blocks.
    assert [graph.reason is None for graph in found.graphs] == [False, True]
    assert [graph.has_blocks for graph in found.graphs] == [False, True]
    assert found.cached
    assert str(found).startswith("Breaking is cached: its block loop lies in graph 2 of 2.")
    # What tells its place behind a break is the call, none of its inputs.
    assert "timestep: none" in found.graphs[1].text


def test_a_loop_in_pieces_names_the_line_that_keeps_it_from_being_captured() -> None:
    class Halting(Tiny):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            time = self.embed(timestep[:, None])
            for block in self.blocks:
                torch._dynamo.graph_break()  # between two blocks
                x = block(x, time)
            return x

    found = explain(Halting(), *inputs(), cache_options=OWN)
    lines, first = inspect.getsourcelines(Halting.forward)
    line = first + next(i for i, each in enumerate(lines) if "between two blocks" in each)
    assert not found.cached
    assert f"{__file__}:{line} keeps the block loop out of every graph" in found.reason


def test_a_loop_of_which_nothing_but_the_outcome_can_be_kept_is_refused() -> None:
    class Replacing(Tiny):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            time = self.embed(timestep[:, None])
            for block in self.blocks:
                x = block(x, time).tanh()
            return x + 1

    found = explain(Replacing(), *inputs(), cache_options=OWN)
    assert not found.cached
    assert "no output of the block loop is an input plus what the blocks add to it" in found.reason


def test_a_branch_on_a_number_read_from_a_tensor_names_its_line_too() -> None:
    class ReadingBack(Tiny):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            scale = 2 if float(x.sum()) > 1e9 else 1
            return super().forward(x * scale, timestep)

    (met,) = explain(ReadingBack(), *inputs(), cache_options=OWN).breaks
    assert met.place == f"{__file__}:{inspect.getsourcelines(ReadingBack.forward)[1] + 1}"


class Judging(Block):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = super().forward(x, time)
        return y if y.sum() < 1e9 else x  # nor this


def test_a_break_that_cuts_the_loop_is_the_reason_with_its_line_and_what_to_do() -> None:
    class Cut(Breaking):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Judging() for _ in range(3))

    found = explain(Cut(), *inputs(), cache_options=OWN)
    assert not found.cached
    # The break before the loop comes first, and is not to blame.
    assert [each.in_block for each in found.breaks] == [False, True]
    lines, first = inspect.getsourcelines(Judging.forward)
    assert f"{__file__}:{first + len(lines) - 1} cuts the block loop" in found.reason
    assert "change that line" in found.reason
    assert "register_extractor" in found.reason
    assert str(found).startswith(f"Cut runs uncached: {found.reason}")


def test_a_model_with_an_extractor_is_explained_by_it() -> None:
    def extract(module: Any, x: Tensor, timestep: Tensor) -> omni_cache.CacheContext:
        return omni_cache.CacheContext(x, x, None, timestep, lambda: (x,), lambda y: y)

    omni_cache.register_extractor(Tiny, extract)
    try:
        found = explain(Tiny(), *inputs())
        assert found.cached
        assert found.extractor == f"{extract.__module__}.{extract.__qualname__}"
        first = f"Tiny is cached under enable, by the extractor {found.extractor}."
        assert str(found).startswith(first)
        assert "hidden_states: f32[1, 6, 8]" in str(found)
        assert explain(Tiny(), *inputs(), cache_options={"cache": "none"}).reason == "cache='none'"
    finally:
        omni_cache.register_extractor(Tiny, None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache": "none"}, "cache='none'"),
        ({"cache": "magcache"}, "no magnitude ratios are published for Tiny"),
        ({**OWN, "signal": "blocks.7.norm"}, "signal='blocks.7.norm'"),
        ({**OWN, "region": ["stacks"]}, "stacks"),
    ],
)
def test_flags_that_leave_the_model_uncached_are_the_reason(
    options: dict[str, Any], reason: str
) -> None:
    (graph,) = explain(Tiny(), *inputs(), cache_options=options).graphs
    assert reason in str(graph.reason)


def test_sizes_are_those_of_the_inputs_whatever_was_explained_before() -> None:
    for tokens in (6, 9):
        (graph,) = explain(Tiny(), *inputs(tokens), cache_options=OWN).graphs
        assert f"f32[1, {tokens}, 8]" in graph.text
        assert graph.analysis is not None
        assert graph.analysis.residual_bytes() == tokens * 8 * 4


@torch.no_grad()
@pytest.mark.parametrize(
    ("flags", "depth", "row"),
    [
        ({}, 1, 8 * 4),
        ({"forecast": "newton", "forecast_order": 2}, 3, 8 * 4),
        ({"forecast": "taylor", "history_dtype": "bfloat16"}, 2, 8 * 2),
        ({"forecast": "taylor", "history_dtype": "float8_e4m3fn"}, 2, 8 * 1 + 4),
    ],
)
def test_the_bytes_that_a_history_takes_are_foreseen(
    flags: dict[str, Any], depth: int, row: int
) -> None:
    model = Tiny()
    omni_cache.enable(model, **OWN, **flags, rel_l1_thresh=0.0, inner="eager")
    (graph,) = explain(model, *inputs()).graphs
    for step in range(4):
        model(*inputs(step=step))

    (trajectory,) = omni_cache.summary(model).trajectories
    residual, signal = 6 * row * depth, 6 * 8 * 4
    assert trajectory.memory_bytes == residual + signal == graph.held_bytes
    assert f"a trajectory holds {residual + signal} bytes: residual {residual} bytes" in graph.text


def test_an_enabled_model_is_explained_with_its_own_flags() -> None:
    model = Tiny()
    omni_cache.enable(model, cache="magcache", mag_ratios=[1.0], inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (graph,) = explain(model, *inputs()).graphs
    assert graph.analysis is not None
    assert graph.analysis.signal is None  # TeaCache, the default, would have one


def test_its_module_may_be_imported_first() -> None:
    code = (
        "from omni_cache.explanation import Explanation; import omni_cache; "
        "assert omni_cache.Explanation is Explanation; "
        "assert omni_cache.explain.__name__ == 'explain'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what it refuses -----------------------------------------------------------------------------


def test_a_pipeline_is_refused_with_a_hint() -> None:
    with pytest.raises(TypeError, match=r"model=FluxPipeline is not allowed.*pipeline's transf"):
        explain(diffusers.FluxPipeline.__new__(diffusers.FluxPipeline))


def test_a_wrong_flag_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'rel_l1_thresh'"):
        explain(Tiny(), *inputs(), cache_options={"rel_l1_tresh": 1})


def test_a_model_that_cannot_run_raises_what_it_raises() -> None:
    with pytest.raises(TypeError, match="timestep"):
        explain(Tiny(), inputs()[0], cache_options=OWN)


# --- what it leaves behind -----------------------------------------------------------------------


def compiled_forms(function: Callable[..., Any]) -> int:
    return len(_debug_get_cache_entry_list(function.__code__))


@pytest.mark.parametrize("model_class", [Tiny, Breaking])
def test_nothing_is_left_behind_however_often_it_is_called(model_class: type[Tiny]) -> None:
    model = model_class()
    before, weights = dict(vars(model)), {k: v.clone() for k, v in model.state_dict().items()}
    graphs = [len(explain(model, *inputs(), cache_options=OWN).graphs) for _ in range(10)]
    assert len(set(graphs)) == 1  # Dynamo gives a function up after eight compilations
    assert compiled_forms(model_class.forward) == compiled_forms(Tiny.forward) == 0
    assert vars(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert omni_cache.summary(model).trajectories == ()


def test_it_may_be_called_with_gradients_enabled() -> None:
    with torch.enable_grad():
        assert explain(Tiny(), *inputs(), cache_options=OWN).cached


def test_a_compiled_model_is_explained_and_stays_compiled() -> None:
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = torch.compile(Tiny(), backend="omni_cache", options={"inner": keep, **OWN})
    with torch.no_grad():
        model(*inputs(step=0))
        compiled = len(graphs)
        assert explain(model, *inputs(), cache_options=OWN).cached
        model(*inputs(step=1))
    assert len(graphs) == compiled
    assert [len(each.steps) for each in omni_cache.summary(model).trajectories] == [2]
