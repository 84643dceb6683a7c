"""Plans as files and values: what is saved is loaded, what is broken names its field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans_by_hand import content, curves, gram, plan

import omni_cache
from omni_cache import Plan
from omni_cache.planning.gram import Gram
from omni_cache.strategies import Guard, Time, make_strategy
from omni_cache.strategies.following import BranchWeights, Follow, Planned
from omni_cache.strategies.plans import Content, Weights
from omni_cache.strategies.retiming import retimed

CONTENTS = {
    "one branch": content(),
    "two branches, skips": content("ccrscrsr", ("cond", "uncond")),
    "experts": replace(
        content(),
        signature=replace(
            content().signature,
            transformers={"high": ("A", "1"), "low": ("B", "2")},
            owners=("high",) * 8,
        ),
        grams={"high": content().grams[""], "low": content().grams[""]},
        frontier=tuple(
            replace(each, weights={"high": each.weights[""]}) for each in content().frontier
        ),
    ),
    "little known": replace(
        content(scheduler=None, sigmas=None, timesteps=None, guidance=4.5),
        made=replace(content().made, seconds=None, targets={}, verified=False, judged=0),
        frontier=tuple(
            replace(each, predicted=None, judged=None, seconds=None) for each in content().frontier
        ),
        chosen=1,
    ),
    "equal": replace(
        content(),
        frontier=tuple(
            replace(each, judged=each.judged._replace(psnr=float("inf"), ssim=None, ssim_low=None))
            for each in content().frontier
            if each.judged is not None
        ),
    ),
}


def numbers(grams: Any) -> list[list[float]]:
    return [
        each.ravel().tolist()
        for branches in grams.values()
        for found in branches.values()
        for each in vars(found).values()
    ]


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_holds_all_of_a_plan(name: str, tmp_path: Path) -> None:
    saved = CONTENTS[name]
    saved.save(tmp_path / "plan.json")
    loaded = Content.load(tmp_path / "plan.json")
    assert replace(loaded, grams={}) == replace(saved, grams={})
    assert loaded.grams.keys() == saved.grams.keys()
    assert numbers(loaded.grams) == numbers(saved.grams)


STEP = "frontier[0].steps[2]"
BROKEN: list[tuple[str, Any, str]] = [
    ("format", "omni-cache plan 9", "format='omni-cache plan 9'"),
    ("chosen", 2, "chosen=2 is not allowed; chosen must be an integer from 0 to 1"),
    ("chosen", True, "chosen=True"),
    ("frontier", [], "frontier=[] is not allowed; frontier must be a list of at least one object"),
    ("sensitivity", [1.0], "sensitivity=(1.0,) is not allowed; sensitivity must be 8 numbers"),
    ("spread", [1.0], "spread=(1.0,) is not allowed; spread must be 8 numbers"),
    ("grams", {}, "grams={} is not allowed"),
    ("grams..cond.residuals", [[1.0]], "residuals"),
    ("grams..cond.inputs", "none", "inputs"),
    ("made.verified", 1, "made.verified=1 is not allowed; made.verified must be true or false"),
    ("made.loops", "few", "made.loops='few' is not allowed; made.loops must be a finite number"),
    ("signature.owners", ["x"] * 8, "signature.owners=['x'] is not allowed"),
    ("signature.size", [], "signature.size=[]"),
    ("frontier.0.steps.0.action", "reuse", "frontier[0].steps[0].action='reuse' is not allowed"),
    ("frontier.0.steps.2.action", "guess", f"{STEP}.action='guess' is not allowed; {STEP}.action"),
    ("frontier.0.steps.2.weights", {}, f"{STEP}.weights.cond is missing"),
    ("frontier.0.steps.2.weights.cond.row", [1, 2, 3], f"{STEP}.weights.cond.row=(1.0, 2.0, 3.0)"),
    ("frontier.0.steps.2.weights.cond.row", [float("nan")], f"{STEP}.weights.cond.row=[nan]"),
    (
        "frontier.0.seconds",
        0,
        "frontier[0].seconds=0.0 is not allowed; frontier[0].seconds must be",
    ),
    ("made.loops", 10**400, "made.loops must be a finite number"),
    ("grams..cond.cross", [[10**400]], "cross"),
    ("frontier.0.steps", [], "frontier[0].steps=[]"),
    ("frontier.0.computed_steps", 5, "computed_steps must be 4, as its steps say"),
    ("frontier.0.skipped_steps", 1, "skipped_steps must be 0, as its steps say"),
    ("frontier.0.judged.psnr", "good", "frontier[0].judged.psnr='good'"),
]


@pytest.mark.parametrize(("field", "value", "message"), BROKEN)
def test_a_broken_file_names_its_field(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    content().save(path)
    found = json.loads(path.read_text())
    *outer, last = field.split(".")
    inner = found
    for key in outer:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"plan\.json: ") as error:
        Plan.load(path)
    assert message in str(error.value)


@pytest.mark.parametrize("field", ["format", "made", "signature", "grams", "sensitivity", "chosen"])
def test_a_field_may_not_be_missing(field: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    content().save(path)
    found = json.loads(path.read_text())
    del found[field]
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"{field} is missing"):
        Plan.load(path)


def test_a_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    content().save(path)
    path.write_text(path.read_text()[:500])
    with pytest.raises(ValueError, match="cut off or no JSON"):
        omni_cache.enable(None, cache=path)


def test_a_path_is_a_strategy(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan("ccrscrsr").save(path)
    for given in (path, str(path)):
        found = make_strategy(given, {"guardrail": None, "on_mismatch": "compute"})
        assert isinstance(found, Plan)
        assert (found.guardrail, found.on_mismatch) == (None, "compute")
        assert found.guard() == Guard(None, 2, skips=True)
    with pytest.raises(ValueError, match=r"cache='missing\.json' is not allowed"):
        make_strategy("missing.json", {})
    with pytest.raises(ValueError, match="unknown flag 'threshold'"):
        make_strategy(path, {"threshold": 1.0})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"guardrail": 0.5},
            "guardrail=0.5 is not allowed; guardrail must be a finite number >= 1",
        ),
        ({"guardrail": float("nan")}, "guardrail=nan"),
        ({"on_mismatch": "warn"}, "on_mismatch='warn' is not allowed"),
    ],
)
def test_flags_are_checked(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(content=content(), **flags)


def test_another_point_is_chosen_by_a_target() -> None:
    found = plan()
    assert found.point.computed_steps == 4
    assert found.at(psnr=40.0).point.computed_steps == 4  # judged 40.5
    assert found.at(psnr=41.0).point.computed_steps == 5  # only predicted to reach it
    assert found.at(ssim=0.9).point.computed_steps == 4
    assert found.at(speedup=1.2).point.computed_steps == 5  # 2 s over 1.5 s
    assert found.at(speedup=1.5).point.computed_steps == 4
    assert found.at(computed_steps=7).point.computed_steps == 5
    assert found.at(computed_steps=4).point.computed_steps == 4
    with pytest.raises(ValueError, match=r"psnr=60\.0 is not reached; .* have 40\.5, 46\.5"):
        found.at(psnr=60.0)
    with pytest.raises(ValueError, match="computed_steps=3 is not reached"):
        found.at(computed_steps=3)
    with pytest.raises(ValueError, match="called with one of"):
        found.at(psnr=40.0, ssim=0.9)
    with pytest.raises(ValueError, match="target='lpips' is not allowed"):
        found.at(lpips=0.1)


def test_a_plan_prints_a_line_for_each_step() -> None:
    lines = str(plan("ccrc")).splitlines()
    assert lines[0] == "Plan(3 of 4 steps of ToyTransformer)"
    row = content("ccrc").point.weights[""]["cond"][2].row
    assert lines[1:] == [
        "   0  compute",
        "   1  compute",
        f"   2  reuse   cond: {row[0]:+.4f} {row[1]:+.4f}",
        "   3  compute",
    ]


def forecast(actions: str, planned: dict[int, Weights], **fields: Any) -> Planned:
    own = BranchWeights(planned, gram(np.linspace(1, 0, len(actions))))
    signs = {"c": "compute", "r": "reuse", "s": "skip", "-": ""}
    named = tuple(signs[letter] for letter in actions)
    rule = Planned(depth=2, actions=named, branches={"cond": own}, **fields)
    return rule.of_branch("cond")


def times(*steps: int) -> list[Time]:
    return [Time(step) for step in steps]


def test_weights_are_the_planned_ones_where_the_planned_steps_are_kept() -> None:
    weights = Weights((1.5, -0.5), 0.25)
    rule = forecast("ccrcr", {2: weights, 4: Weights((2.0, -1.0))})
    assert rule.weights(times(1, 0), Time(2)) == (1.5, -0.5)
    assert rule.input_weight(times(1, 0), Time(2)) == 0.25
    # Step 3 was planned and computed; then so was step 1, where now step 2 was inserted.
    assert rule.weights(times(3, 1), Time(4)) == (2.0, -1.0)
    inserted = rule.weights(times(3, 2), Time(4))
    assert inserted != (2.0, -1.0)
    r = curves(np.linspace(1, 0, 5))
    fitted = np.linalg.lstsq(r[[3, 2]].T, r[4], rcond=None)[0]
    np.testing.assert_allclose(inserted, fitted, rtol=1e-3)
    # One that is not finite is missing.
    (alone,) = rule.weights(times(3), Time(4))
    np.testing.assert_allclose(alone, r[3] @ r[4] / (r[3] @ r[3]), rtol=1e-3)
    assert rule.input_weight(times(3), Time(4)) == 0.0


def test_a_check_compares_the_newest_step_with_what_is_expected_of_it() -> None:
    rule = forecast("cccrr", {})
    r = curves(np.linspace(1, 0, 5))[[2, 1, 0]]
    weights = np.linalg.lstsq(r[1:].T, r[0], rcond=None)[0]
    off = np.linalg.norm(r[0] - weights @ r[1:]) / np.linalg.norm(r[0])
    same = rule.check(times(2, 1, 0), (r @ r.T).tolist())
    assert same is not None
    assert same.expected == pytest.approx(off, rel=1e-3)
    assert same.excess == pytest.approx(1.0, rel=1e-3)
    assert rule.branch is not None
    wide = replace(rule, branch=replace(rule.branch, spread=(1.0, 1.0, 1.25, 1.0, 1.0)))
    assert wide.check(times(2, 1, 0), (r @ r.T).tolist()) == (same.observed, 1.25 * same.expected)
    r[0] += 10 * (r[0] - weights @ r[1:])
    other = rule.check(times(2, 1, 0), (r @ r.T).tolist())
    assert other is not None
    assert other.observed == pytest.approx(
        11 * off * np.linalg.norm(curves(np.linspace(1, 0, 5))[2]) / np.linalg.norm(r[0]), rel=1e-2
    )
    assert other.excess > 8
    assert rule.check(times(2), [[1.0]]) is None


def decisions(actions: str, excess: float | None, guardrail: float | None = 3.0) -> str:
    signs = {"c": "compute", "r": "reuse", "s": "skip"}
    gate = Follow(tuple(signs[letter] for letter in actions), guardrail)
    state, found = gate.begin(), ""
    for step in range(len(actions)):
        verdict = gate.decide(state, Time(step), len(actions), excess)
        state = verdict.if_reused if verdict.reuse else verdict.if_computed
        found += "r" if verdict.reuse else "g" if verdict.reason == "guardrail" else "c"
    return found


def test_a_gate_follows_the_plan_and_computes_more_where_it_fails() -> None:
    plan_of = "ccrrrrrcrr"
    assert decisions(plan_of, None) == plan_of
    assert decisions(plan_of, 3.0) == plan_of
    assert decisions(plan_of, 1e9, guardrail=None) == plan_of
    # A distance of 6 over the root of 4 is 3: every third step. One of 3 is 1.5.
    assert decisions(plan_of, 4.0) == "ccrrgrrcgg"
    assert decisions(plan_of, 9.0) == "ccrgrgrcgg"
    assert decisions(plan_of, 1e9) == "ccgggggcgg"


def test_a_gate_computes_what_the_plan_knows_nothing_of() -> None:
    gate = Follow(("compute", "", "reuse"), None)
    assert [gate.foretell(Time(step), 3) for step in range(4)] == [
        "planned",
        "planned",
        None,
        "planned",
    ]


def test_retiming_keeps_the_share_of_computed_steps_and_says_that_it_is_unverified() -> None:
    found = plan()
    sigmas = [*np.linspace(1.0, 0.125, 15).tolist(), 0.0]
    other = found.retimed(sigmas)
    assert "unverified" in repr(other)
    assert len(other.point.actions) == 15
    assert [each.computed_steps for each in other.frontier] == [8, 9]  # of 15, as 4 and 5 of 8
    assert all(each.quality is None for each in other.frontier)
    # Weights fit curves at the new times as those that were made there.
    there = gram(sigmas[:-1])
    ((step, weights), *_) = other.point.weights[""]["cond"].items()
    kept = [i for i in range(step) if other.point.actions[i] == "compute"][::-1][:2]
    r = curves(sigmas[:-1])
    fitted = np.linalg.lstsq(r[kept].T, r[step], rcond=None)[0]
    np.testing.assert_allclose(weights.row, fitted, rtol=2e-2)
    assert isinstance(there, Gram)
    with pytest.raises(ValueError, match="beyond"):
        found.retimed([5.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="sigmas"):
        found.retimed([])
    with pytest.raises(ValueError, match="no sigmas"):
        plan(sigmas=None).retimed(sigmas)


def test_a_loop_whose_times_rise_is_retimed_as_its_mirror_image() -> None:
    """Times that rise from 0 to 1 are those that fall from 1 to 0, read the other way."""
    falling = content()
    sigmas = [*np.linspace(1.0, 0.125, 15).tolist(), 0.0]
    signature = falling.signature
    rising = replace(
        falling, signature=replace(signature, sigmas=tuple(1 - each for each in signature.sigmas))
    )
    one, other = retimed(falling, sigmas), retimed(rising, [1 - each for each in sigmas])
    np.testing.assert_allclose(one.sensitivity, other.sensitivity)
    assert len(set(np.round(other.sensitivity, 6))) > 10  # no one number for all
    for first, second in zip(one.frontier, other.frontier, strict=True):
        assert first.actions == second.actions
    for turned in (sigmas[::-1], [1.0, 0.5, 0.75, 0.0]):
        with pytest.raises(ValueError, match="sigmas must be falling numbers"):
            retimed(falling, turned)


@pytest.mark.parametrize("name", CONTENTS)
def test_two_loads_of_one_file_are_one_value(name: str, tmp_path: Path) -> None:
    saved = Plan(content=CONTENTS[name])
    saved.save(path := tmp_path / "plan.json")
    one, other = Plan.load(path), Plan.load(path)
    assert one == other == saved
    assert len({one, other, saved}) == 1
    grams = {name: {"cond": gram(np.linspace(1, 0, 8), 5)} for name in saved.content.grams}
    assert one != replace(one, content=replace(one.content, grams=grams))
    assert one != replace(one, guardrail=None)


@pytest.mark.parametrize(
    "flag", [{"start": 0.2}, {"end": 0.9}, {"forecast": "newton"}, {"num_inference_steps": 8}]
)
def test_flags_of_other_strategies_are_refused(flag: dict[str, Any]) -> None:
    (name,) = flag
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed; {name} must be left out"):
        Plan(content=content(), **flag)
