"""A rolled part computes the bits of the part; what a compiler does for it grows no more.

Parts of diffusers models are rolled in test_models.py, where these are captured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import made_up_models as made_up
import pytest
import torch
from made_up_models import Model, inputs
from omni_cache.passes import Part, calls_of, roll
from test_split import MADE_UP, made_up_trace
from torch import Tensor, nn
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code
from torch.testing._internal.two_tensor import TwoTensor
from toy_transformer import CHANNELS, TOKENS, ToyTransformer, compiled, gaussian
from tracing import Trace, run, trace


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def same(first: Part, second: Part, values: dict[str, Any]) -> bool:
    """Whether two parts return the same bits, each from copies of its inputs."""
    copies = [
        {name: each.clone() if isinstance(each, Tensor) else each for name, each in values.items()}
        for _ in range(2)
    ]
    outputs = [run(part, copy) for part, copy in zip((first, second), copies, strict=True)]
    return len(outputs[0]) == len(outputs[1]) and all(map(_equal, *outputs))


def _equal(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor):
        return bool(first == second)
    return first.dtype == second.dtype and torch.equal(first, second)


def rolled_parts(traced: Trace) -> dict[str, tuple[Part, Part]]:
    guarded = traced.guarded
    parts = {"prologue": guarded.prologue, "body": guarded.body, "epilogue": guarded.epilogue}
    return {name: (part, roll(part)) for name, part in parts.items()}


def check(traced: Trace) -> dict[str, tuple[Part, Part]]:
    """All parts of a guarded graph compute the same when they are rolled."""
    parts = rolled_parts(traced)
    values = traced.values()
    for name, (part, rolled) in parts.items():
        assert (rolled.inputs, rolled.outputs) == (part.inputs, part.outputs), name
        assert same(part, rolled, values), name
    return parts


# --- what rolls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MADE_UP)
def test_however_streams_run_it_computes_the_same_bits(kind: type[Model]) -> None:
    check(made_up_trace(kind))


def deep(blocks: int, **flags: Any) -> Trace:
    return trace(Model(blocks), **inputs(), **flags)


def test_the_nodes_that_are_left_hardly_grow_with_the_blocks() -> None:
    sizes = []
    for blocks in (3, 5, 7):
        body, rolled = check(deep(blocks))["body"]
        sizes.append(len(rolled.module.graph.nodes))
        assert len(body.module.graph.nodes) > 10 * blocks
        # The first block makes the signal and so lies partly outside.
        assert len(calls_of(rolled)) >= blocks - 1
        assert len(set(calls_of(rolled))) == 1
    weights = len(list(made_up.Block().parameters()))
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] <= 4 * (weights + 3)


def test_the_name_of_a_subgraph_says_what_is_in_it() -> None:
    # Compilers keep what they have made of a subgraph by its name.
    assert set(calls_of(roll(deep(4).guarded.body))) == set(calls_of(roll(deep(6).guarded.body)))
    wider = trace(Model(4), **inputs(batch=3)).guarded.body
    assert set(calls_of(roll(wider))).isdisjoint(calls_of(roll(deep(4).guarded.body)))


class JoinsItsStreams(made_up.Block):
    """The first one is given two tensors, every other one two views of one tensor."""

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        joint = super().forward(torch.cat([text, x], dim=1), time)
        return joint[:, made_up.TEXT :], joint[:, : made_up.TEXT]


class NormsItsStreams(JoinsItsStreams):
    """What it does before it joins them may depend on their layout."""

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x + self.norm2(x), text + self.norm2(text), time)


@pytest.mark.parametrize(("kind", "calls"), [(JoinsItsStreams, 4), (NormsItsStreams, 3)])
def test_a_block_that_only_joins_its_streams_is_called_whatever_their_layout(
    kind: type[nn.Module], calls: int
) -> None:
    class OfSuch(made_up.DualStream):
        block = kind

    _, rolled = check(trace(OfSuch(4), **inputs(), signal=None))["body"]
    assert len(calls_of(rolled)) == calls
    assert len(set(calls_of(rolled))) == 1
    nodes = rolled.module.graph.find_nodes(op="call_function", target=invoke_subgraph)
    operands = [[each.meta["example_value"] for each in node.args[2:]] for node in nodes]
    assert len({tuple(each.stride() for each in given) for given in operands}) == 1


# --- what stays as it is -------------------------------------------------------------------------


class Alike(nn.Module):
    """``x + f(attn(x))`` in every block, with the f of a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = made_up.Attention()

    def f(self, x: Tensor, made: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.f(x, self.attn(x * (1 + time.mean())))


class WritesIntoItsInput(Alike):
    def f(self, x: Tensor, made: Tensor) -> Tensor:
        return x.add_(made)


class WritesIntoItsOwn(Alike):
    def f(self, x: Tensor, made: Tensor) -> Tensor:
        own = torch.empty_like(made)
        own[..., 0::2] = made[..., 1::2]
        own[..., 1::2] = -made[..., 0::2]
        return x + own


class WritesIntoWhatLeaves(Alike):
    def f(self, x: Tensor, made: Tensor) -> Tensor:
        return made.add_(x)


class Draws(Alike):
    def f(self, x: Tensor, made: Tensor) -> Tensor:
        return x + torch.nn.functional.dropout(made, 0.5, training=True)


class UnderAutocast(Alike):
    def f(self, x: Tensor, made: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x + (made @ made.transpose(1, 2) @ made).float()


def of(kind: type[nn.Module]) -> Trace:
    class OfSuch(Model):
        block = kind

    return trace(OfSuch(4), **inputs())


@pytest.mark.parametrize("block", [WritesIntoItsInput, WritesIntoWhatLeaves, Draws])
def test_blocks_that_a_call_cannot_stand_for_stay(block: type[Alike]) -> None:
    body = of(block).guarded.body
    assert roll(body) is body


@pytest.mark.parametrize("block", [WritesIntoItsOwn, UnderAutocast])
def test_blocks_that_write_into_their_own_or_switch_modes_roll(block: type[Alike]) -> None:
    _, rolled = check(of(block))["body"]
    assert len(calls_of(rolled)) >= 3


class OfTwo(Alike):
    """Its weight is a tensor made of two, as quantised weights are."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(made_up.WIDTH, made_up.WIDTH)
        self.weight = nn.Parameter(TwoTensor(weight, weight), requires_grad=False)

    def f(self, x: Tensor, made: Tensor) -> Tensor:
        return x + nn.functional.linear(made, self.weight)


def test_blocks_with_weights_that_are_made_of_tensors_stay() -> None:
    body = of(OfTwo).guarded.body
    assert roll(body) is body


def test_blocks_without_a_like_one_stay() -> None:
    widths = iter((1, 2, 3, 4))

    class Other(Alike):
        def __init__(self) -> None:
            super().__init__()
            self.factor = next(widths)

        def f(self, x: Tensor, made: Tensor) -> Tensor:
            return x + self.factor * made

    body = of(Other).guarded.body
    assert roll(body) is body


def test_without_the_operator_each_block_is_compiled_and_one_log_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = deep(4).guarded.body
    monkeypatch.setattr(sys.modules[roll.__module__], "invoke_subgraph", None)
    with caplog.at_level("INFO"):
        assert roll(body) is body is roll(body)
    assert [each.getMessage() for each in caplog.records if "every block" in each.getMessage()] == [
        f"torch {torch.__version__} compiles every block on its own"
    ]


# --- sizes that change ---------------------------------------------------------------------------


@torch._dynamo.config.patch(specialize_float=True)
def test_a_part_for_any_batch_rolls() -> None:
    traced = trace(Model(4), **inputs(), dynamic=True)
    body, rolled = traced.guarded.body, roll(traced.guarded.body)
    assert len(calls_of(rolled)) >= 3
    assert same(body, rolled, traced.values())


# --- compiled ------------------------------------------------------------------------------------


def test_inductor_compiles_rolled_blocks_once_and_they_compute_the_same() -> None:
    traced = deep(6)
    values = traced.values()
    kernels, outputs = [], []
    for part in rolled_parts(traced)["body"]:
        taken = [values[each] for each in part.inputs]
        with config.patch(force_disable_caches=True):
            compiled, code = run_and_get_code(compile_fx, part.module, taken)
        kernels.append(sum(each.count("async_compile.cpp") for each in code))
        outputs.append(compiled(*taken))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert 0 < kernels[1] < kernels[0]


def test_a_subgraph_names_no_compilation() -> None:
    """Its name is new in each process, and AOTAutograd's cache would look into subgraphs for it."""
    seen: list[tuple[bool, Any]] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs = [each for each in gm.modules() if isinstance(each, torch.fx.GraphModule)]
        seen.extend((each is gm, each.meta) for each in graphs)
        return gm.forward

    cached = compiled(ToyTransformer(blocks=3), inner=inner, blocks="rolled")
    prompt = gaussian("cond", 1, 5, CHANNELS)
    cached(gaussian(0, 1, TOKENS, CHANNELS), torch.tensor([900.0]), prompt)
    assert [meta for is_outer, meta in seen if not is_outer] == [{}]
    assert all(meta for is_outer, meta in seen if is_outer)
