"""Modulations are computed for a list of timesteps at once, and a call takes the row of its own.

Computed one by one, rows are those of plain calls bit for bit; together they differ by the rounding
of larger matrix products.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_constants import OTHER, PARTS, PROMPT, WHOLE, Counting, Crossing
from test_device_read import pretended_device
from torch import Tensor, nn
from toy_transformer import (
    CHANNELS,
    MAGCACHE,
    NEVER_REUSE,
    STRATEGIES,
    TOKENS,
    WIDTH,
    compiled,
    computed,
    gaussian,
    same,
)

import omni_cache
from omni_cache.runtime import decision, reading

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
MOMENTS = tuple(1000.0 * (1 - step / 6) for step in range(6))


class Told(Counting):
    """Notes which part runs, and when."""

    def __init__(self, parts: Sequence[str] = (*PARTS, "modulations")) -> None:
        super().__init__(parts)

    @property
    def alone(self) -> int:
        """How often modulations were computed for one timestep."""
        return self.ran.count("modulations")


def loop(
    cached: Callable[..., Tensor],
    moments: Sequence[float] = MOMENTS,
    named: Any = None,
    prompts: Sequence[Tensor] = (PROMPT,),
    batch: int = 1,
    listed: Sequence[float] | None = None,
    **inputs: Any,
) -> list[Tensor]:
    """All predictions of a loop."""
    latents = gaussian("latents", batch, TOKENS, CHANNELS)
    predictions = []
    with omni_cache.generation(len(moments), timesteps=listed):
        for moment in moments:
            timestep = torch.tensor([moment]).expand(batch)
            for number, prompt in enumerate(prompts):
                with omni_cache.branch(f"branch {number}"):
                    predictions.append(cached(latents, timestep, prompt, **inputs))
            latents = latents - predictions[-1] / len(moments)
    return predictions


Loop = Callable[[Callable[..., Tensor]], list[Tensor]]


def both(
    drive: Loop, kind: type[Crossing] = Crossing, exact: bool = False, **flags: Any
) -> tuple[nn.Module, Told]:
    """Drive a model without hoisting and with it, and compare schedules and predictions."""
    plain, model, told = kind(), kind(), Told()
    expected = drive(compiled(plain, **flags))
    torch._dynamo.reset()
    predictions = drive(compiled(model, **{**flags, "hoist": "modulations", "inner": told}))
    assert computed(model) == computed(plain)
    if exact:
        assert same(predictions, expected)
    for one, other in zip(predictions, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    return model, told


def counters(model: nn.Module) -> tuple[int, int]:
    """Tables that were made, and calls that no row was for."""
    found = omni_cache.summary(model).counters
    return found.tables, found.unlisted


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("prompts", [(PROMPT,), (PROMPT, OTHER)], ids=["one branch", "two"])
def test_one_pass_serves_a_generation(strategy: str, prompts: Sequence[Tensor]) -> None:
    model, told = both(
        lambda cached: loop(cached, listed=MOMENTS, prompts=prompts), **STRATEGIES[strategy]
    )
    # The branches share a table, since no prompt enters it.
    assert counters(model) == (1, 0)
    assert told.alone == 1


@pytest.mark.parametrize("flags", [{}, {"blocks": "rolled"}, MAGCACHE], ids=["", "rolled", "host"])
def test_rows_that_are_computed_one_by_one_are_exact(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch, "vmap", no_batch)
    model, told = both(lambda cached: loop(cached, listed=MOMENTS), exact=True, **flags)
    assert counters(model) == (1, 0)
    assert told.alone == 1


def no_batch(*_: Any, **__: Any) -> Any:
    """As where an operation knows no batch."""
    raise NotImplementedError


def test_without_a_list_the_first_generation_tells_it() -> None:
    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        return loop(cached) + loop(cached) + loop(cached)

    with pytest.warns(UserWarning, match="nobody said which timesteps will come"):
        model, told = both(drive)
    assert counters(model) == (2, 6)
    assert told.alone == 6 + 1 + 1


@pytest.mark.parametrize("prompts", [(PROMPT,), (PROMPT, OTHER)], ids=["one branch", "two"])
def test_loops_that_nobody_names_go_by_the_one_before(prompts: Sequence[Tensor]) -> None:
    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        predictions = []
        for _ in range(2):
            latents = gaussian("latents", 1, TOKENS, CHANNELS)
            for moment in MOMENTS:
                timestep = torch.tensor([moment])
                predictions += [cached(latents, timestep, prompt) for prompt in prompts]
                latents = latents - predictions[-1] / 6
        return predictions

    with pytest.warns(UserWarning, match="nobody said"):
        model, _ = both(drive)
    assert counters(model) == (1, 6 * len(prompts))


def test_a_timestep_that_is_in_no_list_is_computed_for_itself() -> None:
    others = [*MOMENTS[:3], 499.0, 250.0, *MOMENTS[5:]]
    with pytest.warns(UserWarning, match="none of the 6 that modulations were computed for"):
        model, told = both(lambda cached: loop(cached, others, listed=MOMENTS))
    assert counters(model) == (1, 2)
    assert told.alone == 1 + 2


def test_a_list_that_is_another_loops_serves_nobody() -> None:
    with pytest.warns(UserWarning, match="nobody said"):
        model, told = both(lambda cached: loop(cached, listed=[1.0, 0.5]), exact=True)
    assert counters(model) == (0, 6)
    assert told.alone == 6


def test_a_timestep_that_comes_twice_has_one_row() -> None:
    twice = [each for moment in MOMENTS for each in (moment, moment)][:-1]

    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        latents = gaussian("latents", 1, TOKENS, CHANNELS)
        predictions = []
        with omni_cache.generation(len(twice) + 1, timesteps=twice):
            for step, moment in enumerate(twice):
                with omni_cache.branch("cond", step_index=step):
                    predictions.append(cached(latents, torch.tensor([moment]), PROMPT))
                latents = latents - predictions[-1] / len(twice)
            held.extend(len(each.timesteps) for each in tables(cached._orig_mod))
        return predictions

    held: list[int] = []
    model, _ = both(drive, **NEVER_REUSE)
    assert counters(model) == (1, 0)
    assert held[-1] == len(MOMENTS)


# --- anew where anything may have changed -------------------------------------------------------


def test_another_guidance_makes_all_rows_anew() -> None:
    scales = [torch.tensor([each]) for each in (1.0, 2.0)]

    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        latents = gaussian("latents", 1, TOKENS, CHANNELS)
        predictions = []
        with omni_cache.generation(6, timesteps=MOMENTS), omni_cache.branch("cond"):
            for step, moment in enumerate(MOMENTS):
                guidance = scales[step > 2]
                predictions.append(cached(latents, torch.tensor([moment]), PROMPT, guidance))
                latents = latents - predictions[-1] / 6
        return predictions

    model, told = both(drive, **NEVER_REUSE)
    assert counters(model) == (2, 0)
    assert told.alone == 2


def test_branches_with_other_inputs_have_tables_of_their_own() -> None:
    guidance = torch.tensor([3.5])
    drive: Loop = lambda cached: loop(  # noqa: E731
        cached, listed=MOMENTS, prompts=(PROMPT, OTHER), guidance=guidance
    )
    assert counters(both(drive)[0]) == (2, 0)


@pytest.mark.parametrize("change", ["weights", "refresh"])
def test_weights_that_changed_are_not_missed(change: str) -> None:
    plain, model = Crossing(), Crossing()

    def drive(model: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        first = loop(cached, listed=MOMENTS)
        for block in model.blocks:
            block.modulation.weight.data.mul_(-2)
        if change == "refresh":
            omni_cache.refresh(model)
        return first + loop(cached, listed=MOMENTS)

    expected = drive(plain, compiled(plain))
    torch._dynamo.reset()
    predictions = drive(model, compiled(model, hoist="modulations"))
    for one, other in zip(predictions, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    assert counters(model) == (2, 0)


def test_another_batch_has_a_table_of_its_own() -> None:
    text = PROMPT.expand(2, -1, -1).contiguous()

    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        pair = loop(cached, listed=MOMENTS, prompts=(text,), batch=2)
        return pair + loop(cached, listed=MOMENTS)

    model, _ = both(drive)
    assert counters(model) == (2, 0)


def test_samples_at_different_timesteps_are_computed_for_themselves() -> None:
    text = PROMPT.expand(2, -1, -1).contiguous()
    latents = gaussian("latents", 2, TOKENS, CHANNELS)

    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        with omni_cache.generation(3, timesteps=(9.0, 8.0)), omni_cache.branch("cond"):
            return [
                cached(latents, torch.tensor(moments), text) for moments in ([9.0, 9.0], [8.0, 9.0])
            ]

    with pytest.warns(UserWarning, match="none of the 2"):
        model, _ = both(drive, **NEVER_REUSE)
    assert counters(model) == (1, 1)


# --- whatever is skipped, and in whichever mode --------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {"cache": "dbcache", "fn_compute_blocks": 1, "bn_compute_blocks": 1, "max_warmup_steps": 2},
        {"cache": "taylorseer"},
        {"cache": "magcache", "mag_ratios": (1.0,) * 6, "blocks": "rolled"},
    ],
    ids=["spans", "taylorseer", "rolled"],
)
def test_strategies_forecast_as_they_do_without(flags: dict[str, Any]) -> None:
    model, told = both(lambda cached: loop(cached, listed=MOMENTS), **flags)
    assert counters(model) == (1, 0)
    assert told.alone == 1


def test_a_strategy_that_skips_whole_forwards_skips_them() -> None:
    plain, model, told = Crossing(), Crossing(), Told((*WHOLE, "modulations"))
    expected = loop(compiled(plain, cache="easycache"), listed=MOMENTS)
    torch._dynamo.reset()
    flags = {"cache": "easycache", "hoist": "modulations", "inner": told}
    predictions = loop(compiled(model, **flags), listed=MOMENTS)
    for one, other in zip(predictions, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    assert counters(model) == (1, 0)


def test_a_generation_without_a_cache_takes_rows_too() -> None:
    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        latents = gaussian("latents", 1, TOKENS, CHANNELS)
        with omni_cache.generation(6, cache="none", timesteps=MOMENTS), omni_cache.branch("cond"):
            return [cached(latents, torch.tensor([moment]), PROMPT) for moment in MOMENTS]

    assert counters(both(drive)[0]) == (1, 0)


def test_autocast_and_inference_mode_are_those_of_the_call() -> None:
    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            with torch.autocast("cpu", torch.bfloat16):
                first = loop(cached, listed=MOMENTS)
            return [each.float() for each in first] + loop(cached, listed=MOMENTS)

    plain, model = Crossing(), Crossing()
    expected = drive(compiled(plain))
    torch._dynamo.reset()
    predictions = drive(compiled(model, hoist="modulations"))
    assert counters(model) == (2, 0)
    for step, (one, other) in enumerate(zip(predictions, expected, strict=True)):
        torch.testing.assert_close(
            one, other, **({"rtol": 0.05, "atol": 0.05} if step < 6 else TOLERANCE)
        )


@pytest.mark.parametrize("dynamic", [True, False])
def test_sizes_may_be_symbolic(dynamic: bool) -> None:
    longer = gaussian("longer", 1, 7, CHANNELS)

    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        first = loop(cached, listed=MOMENTS)
        return first + loop(cached, listed=MOMENTS, prompts=(longer,))

    plain, model = Crossing(), Crossing()
    expected = drive(compiled(plain, dynamic=dynamic))
    torch._dynamo.reset()
    predictions = drive(compiled(model, dynamic=dynamic, hoist="modulations"))
    assert counters(model) == (2, 0)
    for one, other in zip(predictions, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.slow
def test_inductor_takes_rows_for_operands() -> None:
    drive: Loop = lambda cached: loop(cached, listed=MOMENTS)  # noqa: E731
    plain, model = Crossing(), Crossing()
    expected = drive(compiled(plain))
    torch._dynamo.reset()
    predictions = drive(compiled(model, hoist="modulations", inner="inductor"))
    assert computed(model) == computed(plain)
    assert counters(model) == (1, 0)
    for one, other in zip(predictions, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


# --- where timesteps lie on a device -------------------------------------------------------------


def copies_end(monkeypatch: pytest.MonkeyPatch, by_the_next_call: bool) -> None:
    """When what comes to the host by itself has come; the CPU knows no events."""

    class Event:
        def __init__(self, device: torch.device) -> None:
            self.record, self.query = (lambda: None), (lambda: by_the_next_call)

    monkeypatch.setattr(torch, "Event", Event)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_device_picks_the_row_and_the_host_reads_once(
    monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    drive: Loop = lambda cached: loop(cached, listed=MOMENTS, prompts=(PROMPT, OTHER))  # noqa: E731
    flags = STRATEGIES[strategy]
    plain, model, told = Crossing(), Crossing(), Told()
    copies_end(monkeypatch, False)
    with pretended_device(monkeypatch) as reads:
        expected = drive(compiled(plain, **flags))
        before = list(reads)
        reads.clear()
        torch._dynamo.reset()
        predictions = drive(compiled(model, **flags, hoist="modulations", inner=told))
    assert computed(model) == computed(plain)
    assert counters(model) == (1, 0)
    assert told.alone == 1
    # Whether the list is the loop's.
    assert reads == [before[0] + 1, *before[1:]]
    for one, other in zip(predictions, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_a_device_never_takes_another_timesteps_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Crossing()
    cached = compiled(model, **NEVER_REUSE, hoist="modulations")
    latents = gaussian("latents", 1, TOKENS, CHANNELS)
    copies_end(monkeypatch, True)
    with (
        pretended_device(monkeypatch),
        omni_cache.generation(9, timesteps=MOMENTS),
        omni_cache.branch("cond"),
    ):
        for moment in MOMENTS[:2]:
            assert cached(latents, torch.tensor([moment]), PROMPT).isfinite().all()
        assert cached(latents, torch.tensor([499.0]), PROMPT).isnan().all()
        with pytest.raises(RuntimeError, match="timestep: an earlier call's is none of the 6"):
            cached(latents, torch.tensor([MOMENTS[4]]), PROMPT)
        assert cached(latents, torch.tensor([MOMENTS[4]]), PROMPT).isfinite().all()


def test_on_a_device_no_list_is_taken_from_an_earlier_generation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, model = Crossing(), Crossing()

    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        return loop(cached) + loop(cached) + loop(cached, listed=[3.0, 2.0])

    with pretended_device(monkeypatch):
        expected = drive(compiled(plain))
        torch._dynamo.reset()
        with pytest.warns(UserWarning, match="nobody said which timesteps"):
            predictions = drive(compiled(model, hoist="modulations"))
    assert same(predictions, expected)
    assert counters(model) == (0, 18)


def test_what_was_guessed_wrong_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches that nobody names, in another order at every step, with guidance that enters."""
    prompts = {1.0: PROMPT, 2.0: OTHER}
    scales = {each: torch.tensor([each]) for each in prompts}

    def drive(cached: Callable[..., Tensor]) -> list[Tensor]:
        latents = gaussian("latents", 1, TOKENS, CHANNELS)
        predictions = []
        with omni_cache.generation(6, timesteps=MOMENTS):
            for step, moment in enumerate(MOMENTS):
                for scale in ([1.0, 2.0], [2.0, 1.0])[step % 2]:
                    prompt, guidance = prompts[scale].clone(), scales[scale].clone()
                    timestep = torch.tensor([moment])
                    predictions.append(cached(latents, timestep, prompt, guidance))
                latents = latents - predictions[-1] / 6
        return predictions

    plain, model = Crossing(), Crossing()
    copies_end(monkeypatch, True)
    with pretended_device(monkeypatch):
        expected = drive(compiled(plain))
        torch._dynamo.reset()
        predictions = drive(compiled(model, hoist="modulations"))
    assert computed(model) == computed(plain)
    for one, other in zip(predictions, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_a_guess_at_an_earlier_generation_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights change between loops that nobody names, whose timesteps are on the host."""

    def drive(model: nn.Module, cached: Callable[..., Tensor]) -> list[Tensor]:
        predictions = []
        for _ in range(3):
            latents = gaussian("latents", 1, TOKENS, CHANNELS)
            for moment in MOMENTS:
                predictions.append(cached(latents, torch.tensor([moment]), PROMPT))
                latents = latents - predictions[-1] / 6
            for block in model.blocks:
                block.modulation.weight.data.mul_(-2)
        return predictions

    plain, model = Crossing(), Crossing()
    copies_end(monkeypatch, True)
    # What is patched within is taken back within.
    with pretended_device(monkeypatch) as reads, monkeypatch.context() as patch:
        patch.setattr(decision, "host_value", Tensor.item)
        patch.setattr(reading, "on_host", lambda each: each.dim() == 1 and len(each) == 6)
        expected = drive(plain, compiled(plain))
        torch._dynamo.reset()
        predictions = drive(model, compiled(model, hoist="modulations"))
        assert reads
    assert computed(model) == computed(plain)
    assert counters(model)[0] == 2
    for one, other in zip(predictions, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


# --- what they take ------------------------------------------------------------------------------


def test_the_bytes_that_explain_foretells_are_held_and_freed() -> None:
    model = Crossing()
    latents = gaussian("latents", 1, TOKENS, CHANNELS)
    flags = {**NEVER_REUSE, "hoist": "modulations", "num_inference_steps": 6}
    call = {"timestep": torch.tensor([1000.0]), "prompt": PROMPT}
    found = omni_cache.explain(model, latents, **call, cache_options=flags)
    (graph,) = found.graphs
    assert "for 6 timesteps" in graph.text
    names = dict(model.named_parameters())
    modulations = [name for name in names if "modulation" in name or "embed_time" in name]
    assert set(modulations) < set(found.hoisted_parameters) < set(names)
    cached = compiled(model, **flags)
    with omni_cache.generation(7, timesteps=MOMENTS):
        for branch in ("cond", "uncond"):
            with omni_cache.branch(branch):
                cached(latents, **call)
        one, other = omni_cache.summary(model).trajectories
        assert one.memory_bytes == pytest.approx(graph.held_bytes, rel=0.01)
        # The table that they share counts once.
        assert one.memory_bytes - other.memory_bytes == 6 * 3 * 2 * WIDTH * 4
        held = [weakref.ref(each) for each in tables(model)[0].held.results]
        assert held
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


def tables(model: nn.Module) -> list[Any]:
    """What the newest run holds."""
    (state,) = omni_cache.runtime.model_state.states_of_module(model)
    assert state.latest is not None
    found = [each.modulations for each in state.latest.trajectories.values()]
    return [each for each in found if each is not None]


@pytest.mark.parametrize("wrong", [("now",), [None], 3.0, "now"])
def test_timesteps_have_to_be_numbers(wrong: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"timesteps=.* is not allowed.*numbers"),
        omni_cache.generation(timesteps=wrong),
    ):
        pass


@pytest.mark.parametrize("enables", [True, False], ids=["enabled", "compiled"])
def test_weights_that_nothing_else_reads_may_leave(enables: bool) -> None:
    model = Crossing()
    latents = gaussian("latents", 1, TOKENS, CHANNELS)
    flags = {**NEVER_REUSE, "hoist": "modulations"}
    call = {"timestep": torch.tensor([1000.0]), "prompt": PROMPT}
    names = omni_cache.explain(model, latents, **call, cache_options=flags).hoisted_parameters
    weights = [each for name, each in model.named_parameters() if name in names]
    cached = compiled(model, **flags)
    if enables:
        cached = omni_cache.enable(model, **flags, inner="eager")
    expected = loop(cached, listed=MOMENTS)
    kept: list[Tensor] = []

    def leaving(latents: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        prediction = cached(latents, timestep, prompt)
        if not kept:
            for each in weights:
                kept.append(each.clone())
                each.untyped_storage().resize_(0)
        return prediction

    assert same(loop(leaving, listed=MOMENTS), expected)
    for each, content in zip(weights, kept, strict=True):
        each.untyped_storage().resize_(content.nbytes)
        each.data.copy_(content)
    assert same(loop(cached, listed=MOMENTS), expected)
    assert omni_cache.summary(model).counters.recompiles == 0
