"""The search for schedules: exact, for all budgets, and quick enough to be asked at leisure."""

import itertools
import math
import random
import time
from collections.abc import Callable, Collection, Hashable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_cache.planning.gram import FittedCosts, Gram, fits_outputs
from omni_cache.planning.search import COMPUTE, REUSE, SKIP, Schedule, frontier, undominated

Cost = Callable[[tuple[int, ...], int], float]


def random_cost(seed: int, forbidden: float = 0.0) -> Cost:
    """A cost without any structure: a number for each kept set and step, some of them infinite."""

    def cost(kept: tuple[int, ...], step: int) -> float:
        draw = random.Random(f"{seed} {kept} {step}")
        return math.inf if draw.random() < forbidden else draw.random()

    return cost


def by_brute_force(
    steps: int,
    depth: int,
    reuse_cost: Cost,
    skip_cost: Cost | None,
    owner: Sequence[Hashable],
    computed: Sequence[int],
    max_gap: int | None,
) -> dict[tuple[int, int], float]:
    """The least cost of every budget, over all sequences of actions."""
    best: dict[tuple[int, int], float] = {}
    for actions in itertools.product((COMPUTE, REUSE, SKIP)[: 3 if skip_cost else 2], repeat=steps):
        cost, runs = 0.0, {each: [] for each in owner}
        gaps = dict.fromkeys(owner, 0)
        for step, action in enumerate(actions):
            run = runs[owner[step]]
            gaps[owner[step]] += 1
            if action == COMPUTE:
                run.insert(0, step)
                gaps[owner[step]] = 0
            elif not run or step in computed or (max_gap and gaps[owner[step]] >= max_gap):
                cost = math.inf
            else:
                price = reuse_cost if action == REUSE else skip_cost
                cost += price(tuple(run[:depth]), step)
            if cost == math.inf:
                break
        else:
            budget = (actions.count(COMPUTE), actions.count(SKIP))
            best[budget] = min(cost, best.get(budget, math.inf))
    return best


@st.composite
def instances(draw: st.DrawFn) -> dict:
    skips = draw(st.booleans())
    steps = draw(st.integers(1, 7 if skips else 9))
    owners = draw(st.integers(1, 2))
    return {
        "steps": steps,
        "depth": draw(st.integers(1, 3)),
        "seeds": draw(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))),
        "forbidden": draw(st.sampled_from([0.0, 0.2])),
        "skips": skips,
        "owner": [draw(st.integers(1, owners)) for _ in range(steps)],
        "computed": sorted(draw(st.sets(st.integers(0, steps - 1), max_size=2))),
        "max_gap": draw(st.sampled_from([None, None, 1, 2, 4])),
    }


@settings(max_examples=200, deadline=None)
@given(instances())
def test_the_frontier_is_that_of_brute_force(case: dict) -> None:
    reuse_cost = random_cost(case["seeds"][0], case["forbidden"])
    skip_cost = random_cost(case["seeds"][1], case["forbidden"]) if case["skips"] else None
    steps, depth, owner = case["steps"], case["depth"], case["owner"]
    found = frontier(
        steps,
        depth,
        reuse_cost,
        skip_cost,
        owner=owner,
        computed=case["computed"],
        max_gap=case["max_gap"],
    )
    expected = by_brute_force(
        steps, depth, reuse_cost, skip_cost, owner, case["computed"], case["max_gap"]
    )
    costs = {(each.computed, each.skipped): each.cost for each in found}
    assert costs == pytest.approx(expected)
    assert len(found) == len(costs)
    prices = {REUSE: reuse_cost, SKIP: skip_cost}
    for schedule in found:
        assert schedule.cost == pytest.approx(
            sum(
                prices[action](schedule.kept(step, depth, owner), step)
                for step, action in enumerate(schedule.actions)
                if action != COMPUTE
            )
        )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_without_the_dominated_more_time_is_a_smaller_error(seed: int, skips: bool) -> None:
    found = frontier(8, 2, random_cost(seed), random_cost(seed + 1) if skips else None)

    def time_of(schedule: Schedule) -> float:
        return schedule.computed + 0.2 * schedule.reused

    kept = undominated(found, time_of)
    assert kept
    for before, after in itertools.pairwise(kept):
        assert time_of(before) < time_of(after)
        assert before.cost > after.cost
    for dropped in set(found) - set(kept):
        assert any(time_of(each) <= time_of(dropped) and each.cost <= dropped.cost for each in kept)


def test_of_schedules_that_cost_the_same_the_fastest_is_left() -> None:
    slow, fast = Schedule((COMPUTE, COMPUTE), 1.0), Schedule((COMPUTE, REUSE), 1.0)
    assert undominated([slow, fast], lambda each: each.computed) == [fast]


def test_a_schedule_knows_what_is_kept_at_each_step() -> None:
    schedule = Schedule((COMPUTE, COMPUTE, REUSE, COMPUTE, SKIP), 0.0)
    assert (schedule.computed, schedule.reused, schedule.skipped) == (3, 1, 1)
    assert schedule.kept(2, 2) == (1, 0)
    assert schedule.kept(4, 2) == (3, 1)
    assert schedule.kept(3, 5) == (1, 0)
    assert schedule.kept(4, 2, owner="ababb") == (3, 1)
    assert schedule.kept(2, 2, owner="ababa") == (0,)


def test_each_kept_set_is_priced_once() -> None:
    asked: list[tuple[tuple[int, ...], int]] = []

    def cost(kept: tuple[int, ...], step: int) -> float:
        asked.append((kept, step))
        return random_cost(0)(kept, step)

    frontier(10, 3, cost)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_a_cost_that_is_no_number_is_refused_with_its_place(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"step 3 costs .* from the kept set \(2, 0\)"):
        frontier(4, 2, lambda kept, step: wrong if (kept, step) == ((2, 0), 3) else 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps and depth"),
        ({"depth": 0}, "steps and depth"),
        ({"max_gap": 0}, "max_gap"),
        ({"owner": "aab"}, "owner names 3 of 4"),
        ({"computed": [4]}, "computed has to lie in"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frontier(**{"steps": 4, "depth": 2, "reuse_cost": lambda kept, step: 1.0, **arguments})


def smooth_gram(steps: int, own: Collection[int] | None = None) -> Gram:
    """The Gram of a smooth trajectory, of which the transformer runs the steps ``own``."""
    generator = np.random.default_rng(0)
    times = np.linspace(0, 1, steps)[:, None]
    waves = np.cos(times * generator.uniform(0, 9, 64) + generator.uniform(0, 6, 64))
    inner = waves @ waves.T / 64
    for step in set(range(steps)) - set(range(steps) if own is None else own):
        inner[step], inner[:, step] = np.nan, np.nan
    return Gram(inner, inner, inner, inner)


def test_kept_sets_priced_together_give_the_same_schedules() -> None:
    """Two experts with steps of their own, whose forecasts and skips are fitted."""
    grams = [smooth_gram(12, range(5)), smooth_gram(12, range(5, 12))]
    reuse = FittedCosts(grams, np.linspace(1, 2, 12))
    skip = FittedCosts(grams, np.full(12, 1.2), fits_outputs)
    owner = [step >= 5 for step in range(12)]
    together = frontier(12, 2, reuse, skip, owner=owner)
    one_by_one = frontier(
        12,
        2,
        lambda kept, step: reuse(kept, step),
        lambda kept, step: skip(kept, step),
        owner=owner,
    )
    assert [each.actions for each in together] == [each.actions for each in one_by_one]
    assert all(each.actions[0] == each.actions[5] == COMPUTE for each in together)
    assert min(each.computed for each in together) == 2


@pytest.mark.parametrize("skips", [False, True], ids=["reuse", "reuse-and-skip"])
@pytest.mark.parametrize(("steps", "max_gap", "seconds"), [(28, None, 1.0), (50, 10, 10.0)])
def test_long_loops_are_searched_in_seconds(
    steps: int, max_gap: int | None, seconds: float, skips: bool
) -> None:
    reuse = FittedCosts([smooth_gram(steps)], np.ones(steps))
    skip = FittedCosts(reuse.grams, np.full(steps, 1.1), fits_outputs) if skips else None
    start = time.process_time()
    found = frontier(steps, 3, reuse, skip, max_gap=max_gap)
    assert time.process_time() - start < (3 * seconds if skips else seconds)
    assert found[0].computed == steps
    errors = [each.cost for each in found if not each.skipped]
    assert errors == sorted(errors)
