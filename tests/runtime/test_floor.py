"""What a call runs besides the model's own operations: nothing, beyond what a strategy names.

With inner="eager" each part runs the operations of its graph, so that those of a call can be told
from those of its parts one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from following import Followed, actions
from plans_by_hand import plan
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from toy_transformer import CHANNELS, MAGCACHE, TOKENS, Loop, ToyTransformer, compiled, gaussian

import omni_cache
from omni_cache.runtime.history import History

pytestmark = pytest.mark.usefixtures("no_grad")

PARTS = ("body", "prologue", "epilogue", "reuse")
"""In the order in which they are compiled."""

EVERY_THIRD = {**MAGCACHE, "threshold": 1e9, "max_skip_steps": 2, "retention_ratio": 0.0}
"""Computes the first step, and one of three from there on; knows the schedule without a read."""


class InPlainSight:
    """An inner compiler that leaves graphs as they are, and names the part that runs."""

    def __init__(self) -> None:
        self._compiled = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        name = PARTS[self._compiled % len(PARTS)]
        self._compiled += 1

        def run(*args: Any) -> Any:
            with record_function(name):
                return gm.forward(*args)

        return run


class Ran(NamedTuple):
    """One call: its parts in order, and the operations that ran outside of them."""

    parts: tuple[str, ...]
    others: tuple[str, ...]


def ran(call: Callable[[], Any]) -> Ran:
    """What a call runs."""
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        call()
    events = sorted(measured.events(), key=lambda each: each.time_range.start)
    parts = tuple(each.name for each in events if each.name in PARTS)
    operations = [each for each in events if each.name.startswith("aten::")]
    return Ran(parts, tuple(each.name for each in operations if not _is_within_part(each)))


def _is_within_part(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name in PARTS or _is_within_part(parent))


def steps(cached: Callable[..., Any], count: int) -> list[Ran]:
    """What each step of a loop runs."""
    prompt, found = gaussian("cond", 1, 5, CHANNELS), []
    with omni_cache.generation(count), omni_cache.branch("cond"):
        for step, time in enumerate(Loop(steps=count).timesteps):
            inputs = gaussian(step, 1, TOKENS, CHANNELS), torch.tensor([time]), prompt
            found.append(ran(partial(cached, *inputs)))
    return found


def made(forecast: str, order: int) -> dict[str, Any]:
    return {**EVERY_THIRD, "forecast": forecast, "forecast_order": order}


LOOK = ("aten::item", "aten::_local_scalar_dense")
"""At a timestep that is on the host, as here, for the record. It is no operation on a device."""
FLAG = (*LOOK, "aten::is_nonzero", *LOOK)
"""And at the flag that says whether a residual is finite."""
KEEPS = {
    "hold": EVERY_THIRD,
    "newton 1": made("newton", 1),
    "newton 2": made("newton", 2),
    "taylor 1": made("taylor", 1),
    "taylor 2": made("taylor", 2),
    "what enters": {"cache": Followed(actions=actions("cccrcrcr"), row=(1.5, -0.5, 0), input=0.5)},
    "a plan": {"cache": plan("ccrcrcrr")},
    "around the middle": {
        "cache": "dbcache",
        "fn_compute_blocks": 1,
        "bn_compute_blocks": 1,
        "steps_computation_mask": [1, 1, 1, 0, 0, 1, 0, 0],
        "steps_computation_policy": "static",
    },
}


def cached_by(
    kind: str, flags: dict[str, Any], blocks: int = 2
) -> tuple[ToyTransformer, Callable[..., Any]]:
    model, flags = ToyTransformer(blocks=blocks), {**flags, "inner": InPlainSight()}
    if kind == "compiled":
        return model, compiled(model, **flags)
    return model, omni_cache.enable(model, **flags)


@pytest.mark.parametrize("kind", ["enabled", "compiled"])
@pytest.mark.parametrize("name", KEEPS)
def test_beside_its_parts_a_call_runs_nothing(name: str, kind: str) -> None:
    """Once a branch knows which inputs stay, and weights have been on the device before."""
    model, cached = cached_by(kind, KEEPS[name], blocks=3 if name == "around the middle" else 2)
    steps(cached, 8)
    found = steps(cached, 8)
    (trajectory,) = omni_cache.summary(model).trajectories
    assert trajectory.reused_steps > 1
    behind = ("epilogue",) if name == "around the middle" else ()
    for step, each in list(zip(trajectory.steps, found, strict=True))[3:]:
        if step.computed:
            assert each == (("prologue", "body", "epilogue"), FLAG), step
        else:
            assert each == (("prologue", "reuse", *behind), LOOK), step


def test_what_is_kept_elsewhere_is_copied_once() -> None:
    model, cached = cached_by("compiled", {**EVERY_THIRD, "history_device": "cpu:0"})
    steps(cached, 8)
    found = steps(cached, 8)
    (trajectory,) = omni_cache.summary(model).trajectories
    copied = ("aten::empty_like", "aten::empty_strided", "aten::copy_")
    for step, each in list(zip(trajectory.steps, found, strict=True))[3:]:
        assert each.others == ((*LOOK, *copied, *FLAG[2:]) if step.computed else LOOK)


@pytest.mark.parametrize("kind", ["enabled", "compiled"])
def test_a_skipped_step_runs_the_sum_of_earlier_results(kind: str) -> None:
    strategy = Followed(actions=actions("ccccsscs"), skipped=(1.5, -0.5), row=(1.5, -0.5))
    _, cached = cached_by(kind, {"cache": strategy})
    steps(cached, 8)
    found = steps(cached, 8)
    for place, each in enumerate(found):
        if strategy.actions[place] == "skip":
            assert each.parts == ()
            sums = [name for name in each.others if name in ("aten::mul", "aten::add_")]
            assert sums == ["aten::mul", "aten::mul", "aten::add_"]
            moved = {"aten::clone", "aten::empty_like", "aten::linear"}
            assert not moved.intersection(each.others)


def test_the_pretence_sees_a_stray_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = History.operands

    def copying(*args: Any) -> list[Tensor]:
        return [each.clone() for each in operands(*args)]

    monkeypatch.setattr(History, "operands", copying)
    _, cached = cached_by("compiled", EVERY_THIRD)
    steps(cached, 8)
    assert any("aten::clone" in each.others for each in steps(cached, 8))
