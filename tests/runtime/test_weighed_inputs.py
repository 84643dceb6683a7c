"""A reused step may weigh what enters: partner + sum w r + u (partner - the last one)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers_models import CASES, sample
from eager_reference import block_loop_values, forced_reuse
from following import Followed, actions
from test_explain import Tiny
from test_extraction import NumpyToy, extract_toy
from torch import Tensor
from toy_transformer import CHANNELS, TOKENS, WIDTH, Loop, ToyTransformer, compiled, gaussian, same

import omni_cache
from omni_cache.runtime.contexts import Observed, observing
from omni_cache.runtime.model_state import states_of_module

pytestmark = pytest.mark.usefixtures("no_grad")

ROW, U = (1.7, -0.6), 0.3
PLAN = "ccrrcr"
FLAGS: dict[str, Any] = {"cache": Followed(actions=actions(PLAN), row=ROW, input=U)}


def calls(batch: int = 1, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    prompt = gaussian("prompt", batch, 5, CHANNELS).to(dtype)
    return [
        {
            "hidden_states": gaussian(f"latents {step}", batch, TOKENS, CHANNELS).to(dtype),
            "timestep": torch.tensor([900.0 - 50 * step]),
            "prompt": prompt,
        }
        for step in range(len(PLAN))
    ]


def by_hand(model: Any, given: list[dict[str, Any]], history: torch.dtype | None) -> list[Tensor]:
    """The same steps on the eager model: residuals and inputs are kept in ``history``."""
    made, kept, last = [], [], torch.tensor(0.0)
    for action, call in zip(PLAN, given, strict=True):
        entering = model.embed(call["hidden_states"])
        precise = torch.promote_types(entering.dtype, torch.float32)
        if action == "c":
            left: list[Tensor] = []
            handle = model.blocks[-1].register_forward_hook(
                lambda block, args, output, left=left: left.append(output)
            )
            made.append(model(**call))
            handle.remove()
            kept.insert(0, (left[0] - entering).to(history or entering.dtype))
            last, ago = entering.to(history or entering.dtype), 0
            continue
        ago += 1
        moved = U * ago * entering.to(precise) - U * ago * last.to(precise)
        change = sum(w * each.to(precise) for w, each in zip(ROW, kept, strict=False))
        made.append(model.project((entering + (change + moved)).to(entering.dtype)))
    return made


def run(model: Any, given: list[dict[str, Any]]) -> list[Tensor]:
    with omni_cache.generation(len(given) + 1), omni_cache.branch("cond"):
        return [model(**each) for each in given]


@pytest.mark.parametrize(
    ("dtype", "history"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_reused_step_is_the_formula(
    dtype: torch.dtype, history: torch.dtype | None, batch: int
) -> None:
    model = ToyTransformer().to(dtype)
    model.embed_time.float()
    model.embed_time.register_forward_hook(lambda module, args, output: output.to(dtype))
    given = calls(batch, dtype)
    expected = by_hand(model, given, history)
    found = run(compiled(model, **FLAGS, history_dtype=history, strict=True), given)
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_the_weight_of_the_input_counts() -> None:
    without = {"cache": Followed(actions=actions(PLAN), row=ROW)}
    found, others = (run(compiled(ToyTransformer(), **each), calls()) for each in (FLAGS, without))
    moved = [(a - b).abs().max() > 0.01 for a, b in zip(found, others, strict=True)]
    assert moved == [step == "r" for step in PLAN]


def test_flux_reuses_by_the_formula() -> None:
    """Two streams that enter, one of them composed, and what is reused is what the hooks say."""
    case = CASES["flux"]
    model, eager = case.build(), case.build()
    omni_cache.enable(model, inner="eager", strict=True, **FLAGS)
    moving = {"hidden_states", case.timestep_argument}
    fixed = case.inputs()
    given = [
        {name: each if name in moving else fixed[name] for name, each in case.inputs(step).items()}
        for step in range(0, 4 * len(PLAN), 4)
    ]
    with omni_cache.generation(), omni_cache.branch("cond"):
        found = [sample(model(**each)) for each in given]
    kept: list[Any] = []
    last, ago = None, 0
    for action, call, output in zip(PLAN, given, found, strict=True):
        values = block_loop_values(eager, case, call)
        if action == "c":
            assert torch.equal(output, sample(eager(**call)))
            kept.insert(0, values.residual)
            last, ago = values.entry, 0
            continue
        ago += 1
        assert last is not None
        forecast = {
            name: sum(w * each[name] for w, each in zip(ROW, kept, strict=False))
            + U * ago * (values.entry[name] - last[name])
            for name in last
        }
        expected = forced_reuse(eager, case, call, forecast)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    omni_cache.disable(model)


@pytest.mark.parametrize("flags", [{}, {"history_device": "cpu"}, {"history_dtype": "float16"}])
def test_each_branch_weighs_its_own_input(flags: dict[str, Any]) -> None:
    strategy = Followed(actions=actions("ccrrcrrc"), row=ROW, input=U)
    both = Loop(("cond", "uncond"), explicit=True).run(
        compiled(ToyTransformer(), cache=strategy, **flags)
    )
    assert all(each.isfinite().all() for each in both)
    assert not same(both[::2], both[1::2])
    # The latents of a loop come of both, so that each branch is run again by what it was given.
    for name, expected in (("cond", both[::2]), ("uncond", both[1::2])):
        alone = compiled(ToyTransformer(), cache=strategy, **flags)
        prompt, x, made = gaussian(name, 1, 5, CHANNELS), gaussian(0, 1, TOKENS, CHANNELS), []
        with omni_cache.generation(8), omni_cache.branch(name):
            for step, time in enumerate(Loop().timesteps):
                made.append(alone(x, torch.tensor([time]), prompt))
                x = x - torch.stack([both[2 * step], both[2 * step + 1]]).mean(0) / 8
        assert same(made, expected)


@pytest.mark.parametrize("whole", [False, True])
def test_nobody_can_write_into_the_input_that_is_kept(whole: bool) -> None:
    """The blocks of this model take the latents as they come, and so does a whole model."""
    plan = "crrcr"

    def run(spoil: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Tiny().requires_grad_(False)
        strategy = Followed(actions=actions(plan), input=U, whole=whole)
        cached = compiled(model, cache=strategy, strict=True)
        made = []
        with omni_cache.generation(6), omni_cache.branch("cond"):
            for step in range(len(plan)):
                x = gaussian(step, 1, 6, 8)
                made.append(cached(x, torch.tensor([1.0 - step / 10])).clone())
                if spoil:
                    x.fill_(torch.nan)
        return made

    assert same(run(True), run(False))
    assert all(each.isfinite().all() for each in run(True))


def test_an_input_that_the_history_cannot_hold_weighs_nothing() -> None:
    """In float16 it would be infinite, and infinity times a weight is not a number."""
    torch.manual_seed(0)
    model = Tiny().requires_grad_(False)
    strategy = Followed(actions=actions("cr"), input=U)
    cached = compiled(model, cache=strategy, history_dtype="float16", strict=True)
    with omni_cache.generation(3), omni_cache.branch("cond"):
        for step in range(2):
            x = gaussian(step, 1, 6, 8)
            x[0, 0, 0] = 1e6
            assert cached(x, torch.tensor([1.0 - step / 10])).isfinite().all()


def test_an_observer_sees_what_is_kept() -> None:
    seen: list[Observed] = []
    model = ToyTransformer()
    given = calls()
    with observing(seen.append):
        run(compiled(model, **FLAGS), given)
    assert [each.action[0] for each in seen] == list(PLAN)
    for each, call in zip(seen, given, strict=True):
        assert [len(each.residuals), len(each.entered)] == [each.computed] * 2
        for entered in each.entered:
            assert torch.equal(entered, model.embed(call["hidden_states"]))


def test_a_forecast_that_weighs_no_input_goes_with_such_a_graph() -> None:
    model = ToyTransformer()
    plain = Followed(actions=actions(PLAN), row=ROW)
    expected = run(compiled(ToyTransformer(), cache=plain), calls())
    cached = compiled(model, **FLAGS)
    run(cached, calls())
    with omni_cache.generation(cache=plain), omni_cache.branch("cond"):
        for call, one in zip(calls(), expected, strict=True):
            torch.testing.assert_close(cached(**call), one)


def test_a_graph_without_inputs_refuses_a_forecast_that_weighs_them() -> None:
    cached = compiled(ToyTransformer(), cache=Followed(actions=actions(PLAN), row=ROW))
    with (
        omni_cache.generation(**FLAGS),
        omni_cache.branch("cond"),
        pytest.raises(ValueError, match="needs reused steps that weigh what enters the blocks"),
    ):
        cached(**calls()[0])


@pytest.mark.parametrize(
    ("flags", "row", "partner"),
    [
        ({}, 4 * WIDTH, 4 * WIDTH),
        ({"history_dtype": "bfloat16"}, 2 * WIDTH, 2 * WIDTH),
        ({"history_dtype": "float8_e4m3fn"}, WIDTH + 4, 2 * WIDTH),
    ],
    ids=["as they are", "bfloat16", "float8"],
)
def test_explain_foresees_what_is_held(flags: dict[str, Any], row: int, partner: int) -> None:
    model, strategy = ToyTransformer(), FLAGS["cache"]
    given = calls()
    options = {"cache": strategy, **flags}
    (graph,) = omni_cache.explain(model, **given[0], cache_options=options).graphs
    run(compiled(model, cache=strategy, **flags), given)
    residual, entered = 2 * TOKENS * row, TOKENS * partner
    assert omni_cache.summary(model).memory_bytes == residual + entered
    assert f"residual {residual} bytes, signal 0 bytes, input {entered} bytes" in graph.text
    assert "weights[:, 2] * " in graph.text
    assert "weights[:, 3] * input_before" in graph.text


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_an_input_lives_as_long_as_its_step_is_the_newest() -> None:
    model = ToyTransformer()
    cached = compiled(model, **FLAGS)
    seen: list[weakref.ref[Tensor]] = []
    alive = []
    with omni_cache.generation(), omni_cache.branch("cond"):
        for call in calls():
            cached(**call)
            (state,) = states_of_module(model)
            assert state.latest is not None
            (trajectory,) = state.latest.trajectories.values()
            seen += [weakref.ref(each) for kept in trajectory.history.kept for each in kept.entered]
            alive.append(len({id(each()) for each in seen if each() is not None}))
    assert alive == [1] * len(PLAN)
    assert all(each() is None for each in seen)


@pytest.mark.parametrize("history", [None, "bfloat16", "float8_e4m3fn"])
def test_an_extractor_s_model_weighs_as_its_graph_would(history: str | None) -> None:
    """Also where the blocks write into the stream that they are given."""

    def extract_writing(module: Any, *args: Any, **kwargs: Any) -> Any:
        context = extract_toy(module, *args, **kwargs)
        run_blocks, states = context.run_transformer_blocks, context.hidden_states

        def writing() -> tuple[Tensor]:
            (left,) = run_blocks()
            states.copy_(left)
            return (states,)

        context.run_transformer_blocks = writing
        return context

    flags = {**FLAGS, "history_dtype": history}
    expected = run(compiled(ToyTransformer(), **flags), calls(2))
    omni_cache.register_extractor(NumpyToy, extract_writing)
    try:
        model = omni_cache.enable(NumpyToy(), inner="eager", **flags)
        found = run(model, calls(2))
    finally:
        omni_cache.register_extractor(NumpyToy, None)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_inductor_compiles_it_with_rolled_blocks() -> None:
    model, given = ToyTransformer(blocks=3), calls(2)
    expected = by_hand(model, given, None)
    cached = compiled(model, **FLAGS, inner="inductor", blocks="rolled", strict=True)
    for one, other in zip(run(cached, given), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
