"""DiCache as published: when it computes, and how far it forecasts, from its probe alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_transformer import CHANNELS, TOKENS, ToyTransformer, compiled, gaussian

import omni_cache
from omni_cache.strategies import DiCache, Time
from omni_cache.strategies.base import Around, Made
from omni_cache.strategies.forecasts import Aligned


class ByHand:
    """The rule, in double precision: whether to compute, and with which weights to go on.

    Args:
        flags: of the strategy.
        steps: their number.
    """

    def __init__(self, flags: DiCache, steps: int) -> None:
        self.flags, self.steps = flags, steps
        self.sum, self.last = 0.0, np.zeros(0)
        self.computed: list[np.ndarray[Any, Any]] = []
        self.margin = math.inf

    def decides(self, step: int, probe: Tensor) -> bool:
        """Whether the step is computed."""
        p = probe.double().numpy()
        is_kept = step <= int(self.flags.retention_ratio * self.steps)
        is_last = self.flags.force_last_step and step == self.steps - 1
        if is_kept or is_last or len(self.computed) < 2:
            computes = True
        else:
            self.sum += np.abs(p - self.last).mean() / np.abs(self.last).mean()
            self.margin = min(self.margin, abs(self.sum - self.flags.threshold))
            computes = self.sum >= self.flags.threshold
        self.last = p
        if computes:
            self.sum = 0.0
            self.computed.append(p)
        return bool(computes)

    def gain(self) -> float:
        """The weight of the newest residual; the other one's adds up with it to 1."""
        older, newest = self.computed[-2:]
        gone = np.abs(self.last - older).mean() / np.abs(newest - older).mean()
        return float(np.clip(gone, 1.0, 1.5))


FLAGS = st.builds(
    DiCache,
    threshold=st.sampled_from([0.0, 0.1, 0.3, 1.0, 3.0]),
    retention_ratio=st.sampled_from([0.0, 0.1, 0.35]),
    force_last_step=st.booleans(),
)


@settings(max_examples=250)
@given(
    flags=FLAGS,
    seed=st.integers(0, 2**16),
    steps=st.integers(1, 40),
    speed=st.sampled_from([0.05, 0.2, 1.0]),
)
def test_it_decides_and_weighs_as_published(
    flags: DiCache, seed: int, steps: int, speed: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(steps, 2, 3, 4, generator=generator)
    moves[1:] *= torch.rand(steps - 1, 1, 1, 1, generator=generator) * speed
    probes = moves.cumsum(0)
    hand = ByHand(flags, steps)
    policy = flags.policy(None)
    signal, gate = policy.signal, policy.gate("cond", 0)
    assert signal is not None
    state, made = gate.begin(), list[tuple[Time, Made]]()
    found, expected = [], []
    for step, probe in enumerate(probes):
        computes = hand.decides(step, probe)
        expected.append(None if computes else pytest.approx(hand.gain(), rel=1e-4))
        at, distance, progress = Time(step), None, None
        must = len(made) < 2 or gate.foretell(at, steps) is not None
        if not must:
            kept = [each for _, each in made[:2]]
            around = Around(None, signal.look_back(kept), [each.signal for each in kept])  # type: ignore[misc]
            sums = signal.measure(probe, probes[step - 1], (), around).tolist()
            distance, progress = signal.distance(sums), signal.progress(sums)
        verdict = gate.decide(state, at, steps, distance)
        reuse = verdict.reuse and not must
        state = verdict.if_reused if reuse else verdict.if_computed
        if not reuse:
            made.insert(0, (at, Made(probe, ())))
            found.append(None)
            continue
        now = at._replace(progress=progress)
        newest, older = policy.forecast.weights([time for time, _ in made[:2]], now)
        assert newest + older == pytest.approx(1.0)
        found.append(newest)
    if hand.margin > 1e-5:  # near enough to tell in another precision
        assert found == expected


def as_the_rule_says(
    model: ToyTransformer, flags: DiCache, steps: int
) -> tuple[list[bool], list[float], list[Tensor]]:
    """Which steps a loop over the plain model computes, the gains of others, the predictions."""
    hand = ByHand(flags, steps)
    prompt, latents = gaussian("cond", 1, 5, CHANNELS), gaussian(0, 1, TOKENS, CHANNELS)
    schedule, gains, made = [], [], []
    residuals: list[Tensor] = []
    for step in range(steps):
        entered = model.embed(latents)
        moment = torch.tensor([[1000.0 * (1 - step / steps) / 500]])
        time = model.embed_prompt(prompt).mean(1) + model.embed_time(moment)
        x = entered
        for block in model.blocks[: flags.probe_depth]:
            x = block(x, time, None)
        schedule.append(hand.decides(step, x - entered))
        if schedule[-1]:
            left = x
            for block in model.blocks[flags.probe_depth :]:
                left = block(left, time, None)
            residuals.append(left - x)
        else:
            gains.append(hand.gain())
            left = x + residuals[-2] + gains[-1] * (residuals[-1] - residuals[-2])
        made.append(model.project(left))
        latents = latents - made[-1] / steps
    return schedule, gains, made


@pytest.mark.parametrize(
    ("depth", "threshold", "ratio"), [(1, 0.3, 0.2), (2, 0.4, 0.1), (3, 0.3, 0.0)]
)
@torch.no_grad()
def test_a_model_computes_what_the_rule_says(depth: int, threshold: float, ratio: float) -> None:
    steps = 24
    flags = DiCache(threshold=threshold, probe_depth=depth, retention_ratio=ratio)
    schedule, gains, expected = as_the_rule_says(ToyTransformer(blocks=4), flags, steps)
    assert 5 <= sum(schedule) <= steps - 5
    assert len({round(each, 3) for each in gains}) >= 3  # some lie between the ends
    model = ToyTransformer(blocks=4)
    cached = compiled(model, cache=flags, strict=True)
    prompt, latents, made = gaussian("cond", 1, 5, CHANNELS), gaussian(0, 1, TOKENS, CHANNELS), []
    with omni_cache.generation(steps), omni_cache.branch("cond"):
        for step in range(steps):
            made.append(cached(latents, torch.tensor([1000.0 * (1 - step / steps)]), prompt))
            latents = latents - made[-1] / steps
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [each.computed for each in trajectory.steps] == schedule
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_only_a_forecast_that_goes_by_the_probe_keeps_more_than_the_last_call() -> None:
    depths = {name: DiCache(forecast=name).guard().depth for name in ("aligned", "hold", "newton")}
    assert depths == {"aligned": 2, "hold": 1, "newton": 2}
    looks = [DiCache(forecast=name).policy(None).signal for name in ("aligned", "hold")]
    assert [each.looks_back for each in looks if each is not None] == [2, 0]


def test_without_a_probe_the_steps_tell_how_far_it_is() -> None:
    kept = [Time(6), Time(2)]
    for step, gain in ((7, 1.25), (8, 1.5), (12, 1.5)):
        assert Aligned().weights(kept, Time(step)) == (gain, 1 - gain)
    assert Aligned().weights(kept, Time(12, progress=1.125)) == (1.125, -0.125)
    assert Aligned().weights(kept, Time(12, progress=0.5)) == (1.0, 0.0)
    assert Aligned(most=2.0).weights(kept, Time(12)) == (2.0, -1.0)
    assert Aligned().weights(kept[:1], Time(12, progress=1.2)) == (1.0,)


@torch.no_grad()
def test_explain_foresees_what_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    given = gaussian(0, 1, TOKENS, CHANNELS), torch.tensor([500.0]), gaussian(1, 1, 5, CHANNELS)
    for forecast in ("aligned", "hold"):
        flags = {"cache": "dicache", "threshold": 9.0, "forecast": forecast}
        model = ToyTransformer(blocks=4)
        (graph,) = omni_cache.explain(model, *given, cache_options=flags).graphs
        assert graph.analysis is not None
        history = 2 if forecast == "aligned" else 1
        foreseen = graph.analysis.residual_bytes(history) + graph.analysis.signal_bytes()
        cached = compiled(model, **flags)
        with omni_cache.generation(12), omni_cache.branch("cond"):
            for step in range(12):
                cached(gaussian(step, 1, TOKENS, CHANNELS), torch.tensor([900.0 - step]), given[2])
        assert omni_cache.summary(model).memory_bytes == foreseen
    assert "signal: residual of the first blocks" in capsys.readouterr().out
