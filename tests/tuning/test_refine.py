"""What plans are made of is measured right, and refining lowers what a plan is judged by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_tune import STEPS, denoised
from toy_transformer import ToyTransformer

from omni_cache.strategies import Guard
from omni_cache.strategies.plans import Content, Made, Point, Weights
from omni_cache.tuning.budget import Budget
from omni_cache.tuning.calibrate import Calibrated, calibrate
from omni_cache.tuning.drafts import Drafts
from omni_cache.tuning.gather import mean, spread
from omni_cache.tuning.refine import (
    Refiner,
    directions_of,
    first_difference,
    jacobian_steps,
    moved,
)
from omni_cache.tuning.rehearse import Rehearsal, rehearsing
from omni_cache.tuning.sensitivity import measure

SAMPLES = range(3)
MADE = Made("2026-11-26T12:00:00+00:00", "high", 3, 0, 0.0, None, {})


@contextmanager
def calibrated(
    branches: tuple[str, ...] = ("cond",), seed: int = 0
) -> Iterator[tuple[Rehearsal, Calibrated, Drafts]]:
    model = ToyTransformer(seed)
    budget = Budget("high", len(SAMPLES), lambda *_: None)
    flags = {"inner": "eager"}
    with rehearsing(
        model,
        lambda each: denoised(model, each, branches),
        flags,
        Guard(None, 3, inputs=True),
        budget,
    ) as rehearsal:
        found = calibrate(rehearsal, SAMPLES)
        ones = (1.0,) * STEPS
        content = Content(found.signature, MADE, mean(found.grams), ones, ones, (), 0)
        rehearsal.content = content
        yield rehearsal, found, Drafts(content, 3)


def test_inner_products_are_those_of_the_residuals() -> None:
    with calibrated() as (_, found, _drafts):
        gram = found.grams[0][""]["cond"]
        model = ToyTransformer()
        residuals, outputs = [], []
        latents_of = model.embed.register_forward_hook(
            lambda module, args, out: residuals.append([out])
        )
        after = model.project.register_forward_pre_hook(
            lambda module, args: residuals[-1].append(args[0])
        )
        ends = model.register_forward_hook(lambda module, args, out: outputs.append(out))
        denoised(model, 0)
        for hook in (latents_of, after, ends):
            hook.remove()
        r = torch.stack([(out - into).flatten() for into, out in residuals]).double().numpy()
        v = torch.stack([each.flatten() for each in outputs]).double().numpy()
    for vectors, measured in ((r, gram.residuals), (v, gram.outputs)):
        products = vectors @ vectors.T
        assert measured == pytest.approx(products / np.diag(products).mean(), rel=1e-4, abs=1e-5)


def test_a_mean_has_every_sample_count_alike() -> None:
    with calibrated() as (_, found, _drafts):
        for each in found.grams:
            assert np.diag(each[""]["cond"].residuals).mean() == pytest.approx(1.0)
        together = mean(found.grams)[""]["cond"]
        stacked = np.mean([each[""]["cond"].residuals for each in found.grams], axis=0)
        assert together.residuals == pytest.approx(stacked)


def test_the_spread_is_how_much_further_off_the_worst_sample_is() -> None:
    with calibrated() as (_, found, _drafts):
        factors = spread(found.grams)
        own = [each[""]["cond"].residuals[:2, :2] for each in found.grams]
        assert spread(found.grams[:1] * 2) == pytest.approx([1.0] * STEPS)
    together = np.mean(own, axis=0)
    weight = together[0, 1] / together[0, 0]

    def off(g: np.ndarray) -> float:
        return float(np.sqrt((g[1, 1] - 2 * weight * g[0, 1] + weight**2 * g[0, 0]) / g[1, 1]))

    assert len(factors) == STEPS
    assert factors[0] == 1.0
    assert factors[1] == pytest.approx(max(1.0, max(map(off, own)) / off(together)), rel=1e-4)
    assert max(factors) > 1.01


def test_sensitivity_is_what_holding_a_step_does_to_the_end() -> None:
    with calibrated() as (rehearsal, found, _drafts):
        before = rehearsal.budget.loops
        sensitivity = measure(rehearsal, found.grams, [[3, 7]])
        # The uncached loop, and of each run the steps behind the one that is held.
        assert rehearsal.budget.loops - before == pytest.approx(1 + (6 + 2) / STEPS)
        held = Point(
            tuple("reuse" if step == 3 else "compute" for step in range(STEPS)),
            1,
            {"": {"cond": {3: Weights((1.0,))}}},
        )
        reference = found.references[0]
        final = np.mean(rehearsal.play(held, 0).result.difference(reference) ** 2)
        g = found.grams[0][""]["cond"].residuals
        own = g[3, 3] - 2 * g[3, 2] + g[2, 2]
        # What was not measured lies between, or is as at the nearest step.
        alone = measure(rehearsal, found.grams, [[3]])
        assert alone.residuals == pytest.approx([final / own] * STEPS, rel=1e-3)
        assert sensitivity.residuals[0] == pytest.approx(final / own, rel=1e-3)
        assert np.ptp(np.sign(np.diff(sensitivity.residuals[2:9]))) <= 1


def test_a_run_is_resumed_from_the_first_step_that_differs() -> None:
    with calibrated() as (rehearsal, _, drafts):
        (point, *_) = drafts.of(4)
        base = rehearsal.play(point, 0, records=True)
        assert base.ran == 4
        way, *_ = directions_of(point, drafts.content.grams)
        tried = moved(point, [(way, 0.05)])
        whole = rehearsal.play(tried, 0)
        resumed = rehearsal.play(tried, 0, known=base.tape.before(way.steps[0]))
        assert whole.result.difference(resumed.result).any() == False  # noqa: E712
        assert whole.result.difference(base.result).any()
        assert resumed.ran == jacobian_steps([way], point.actions)
        assert whole.ran == 4 > resumed.ran > 0


@pytest.mark.parametrize(
    "branches",
    # Two have all that one has, and what each adds to the other's loop.
    [pytest.param(("cond",), marks=pytest.mark.exhaustive), ("cond", "uncond")],
)
def test_gauss_newton_improves_weights_that_are_off(branches: tuple[str, ...]) -> None:
    with calibrated(branches) as (rehearsal, found, drafts):
        grams = drafts.content.grams
        (point, *_) = drafts.of(4)
        off = moved(point, [(each, each.size / 2) for each in directions_of(point, grams)])
        refiner = Refiner(rehearsal, found.references, grams)
        refined = refiner.gauss_newton(off, SAMPLES)
        gained = refiner.loss(off, SAMPLES) - refiner.loss(refined, SAMPLES)
        assert gained > 6.0
        assert refined.actions == point.actions
        for branch in branches:
            assert refined.weights[""][branch] != off.weights[""][branch]


@pytest.mark.parametrize(("gains", "length"), [((0.01, 0.01, 99.0), 0.25), ((0.01,) * 3, 0.0)])
def test_a_step_that_gains_less_than_it_flatters_is_shortened_or_not_taken(
    monkeypatch: pytest.MonkeyPatch, gains: tuple[float, ...], length: float
) -> None:
    with calibrated() as (rehearsal, found, drafts):
        grams = drafts.content.grams
        (point, *_) = drafts.of(4)
        off = moved(point, [(each, each.size / 2) for each in directions_of(point, grams)])
        refiner = Refiner(rehearsal, found.references, grams)
        before, left = refiner.loss(off, SAMPLES), iter((99.0, *gains))
        monkeypatch.setattr(Refiner, "loss", lambda *_: before - next(left))
        monkeypatch.setattr("omni_cache.tuning.refine._left_out", lambda *_: -0.1)
        whole, refined = (refiner.gauss_newton(off, SAMPLES) for _ in range(2))
    assert (refined is off) == (length == 0.0)
    rows = [
        np.array([each.row for each in one.weights[""]["cond"].values() if len(each.row) == 3])
        for one in (off, whole, refined)
    ]
    assert rows[2] - rows[0] == pytest.approx(length * (rows[1] - rows[0]))
    assert len(list(left)) == 0


def test_drafts_weigh_the_input_or_do_not() -> None:
    with calibrated() as (rehearsal, found, drafts):
        weighs = {each.weighs_inputs: each for each in drafts.of(4)}
        assert set(weighs) == {False, True}
        ways = {each: directions_of(weighs[each], drafts.content.grams) for each in weighs}
        assert not any(each.input_weight for each in ways[False])
        assert any(each.input_weight for each in ways[True])
        refiner = Refiner(rehearsal, found.references, drafts.content.grams)
        refined = refiner.gauss_newton(weighs[True], SAMPLES)
        assert refiner.loss(refined, SAMPLES) <= refiner.loss(weighs[True], SAMPLES)


def test_weights_that_nothing_improves_stay() -> None:
    with calibrated() as (rehearsal, found, drafts):
        whole = Point(("compute",) * STEPS, 3, {"": {"cond": {}}})
        refiner = Refiner(rehearsal, found.references, drafts.content.grams)
        assert refiner.gauss_newton(whole, SAMPLES) is whole


def actions(letters: str) -> tuple[str, ...]:
    return tuple({"c": "compute", "r": "reuse"}[each] for each in letters)


def test_moves_are_of_one_computed_step_by_one() -> None:
    with calibrated() as (_, _found, drafts):
        point = drafts.fitted(actions("crrcrcrrrc"), False)
        found = {each.actions for each in drafts.moves(point)}
        expected = ("crcrrcrrrc", "crrrccrrrc", "crrccrrrrc", "crrcrrcrrc", "crrcrcrrcr")
        assert found == {actions(each) for each in expected}


def test_the_best_of_several_moves_is_found_from_where_they_differ() -> None:
    with calibrated() as (rehearsal, found, drafts):
        refiner = Refiner(rehearsal, found.references, drafts.content.grams)
        point = drafts.fitted(actions("cccrrrrrrr"), False)
        moves = drafts.moves(point)
        before = rehearsal.budget.loops
        best = refiner.best_move(point, moves, SAMPLES)
        spent = rehearsal.budget.loops - before
        assert [first_difference(point, each) for each in moves] == [2]
        assert spent == pytest.approx(len(SAMPLES) * (3 + 1) / STEPS)
        assert (best.actions, best.weights) == (moves[0].actions, moves[0].weights)
        assert refiner.loss(best, SAMPLES) < refiner.loss(point, SAMPLES)
        assert refiner.best_move(best, [point], SAMPLES) is best


def test_drafts_of_more_steps_forecast_better() -> None:
    with calibrated() as (rehearsal, found, drafts):
        refiner = Refiner(rehearsal, found.references, drafts.content.grams)
        losses: list[Any] = [refiner.loss(drafts.of(count)[0], SAMPLES) for count in (2, 4, 7)]
        assert losses == sorted(losses, reverse=True)


def test_what_was_chosen_by_samples_is_not_predicted_to_do_as_well_on_others() -> None:
    """The mean over several models of how much better refined plans do on their own samples."""
    seen, predicted = [], []
    others = range(len(SAMPLES), len(SAMPLES) + 6)
    for seed in (1, 2, 3, 5):
        with calibrated(seed=seed) as (rehearsal, found, drafts):
            refiner = Refiner(rehearsal, found.references, drafts.content.grams)
            judge = Refiner(
                rehearsal,
                [*found.references, *(rehearsal.play(None, each).result for each in others)],
                drafts.content.grams,
            )
            (draft, *_) = drafts.of(3)
            assert draft.optimism == 0.0
            point = refiner.best_move(draft, drafts.moves(draft), SAMPLES)
            point = refiner.gauss_newton(point, SAMPLES)
            point = refiner.gauss_newton(point, SAMPLES)

            def gained(samples: range) -> float:
                return judge.loss(draft, samples) - judge.loss(point, samples)  # noqa: B023

            seen.append(gained(SAMPLES) - gained(others))
            predicted.append(point.optimism)
    assert np.mean(seen) > 0.7
    assert np.mean(predicted) == pytest.approx(np.mean(seen), abs=1.0)


def test_drafts_skip_as_much_as_hardly_costs_anything() -> None:
    with calibrated() as (_rehearsal, _found, drafts):
        content = drafts.content
        skipping = Drafts(content, 3, skips=True)
        for count in (3, 5):
            for point in skipping.of(count):
                assert point.computed_steps == count
                priced_steps = {
                    step: weights
                    for step, weights in point.weights[""]["cond"].items()
                    if point.actions[step] == "skip"
                }
                assert len(priced_steps) == point.skipped_steps
            least = {each.cost for each in drafts._schedules(1.0, False)[count]}
            chosen = skipping._schedule(1.0, False, count)
            others = skipping._schedules(1.0, False)[count]
            limit = 1.1 * min(each.cost for each in others)
            assert min(each.cost for each in others) <= min(least)
            assert chosen.cost <= limit
            assert all(each.cost > limit for each in others if each.skipped > chosen.skipped)
            assert not any(each.skipped_steps for each in drafts.of(count))
