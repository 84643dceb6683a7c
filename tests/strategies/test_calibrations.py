"""Calibration files: what is saved is loaded, and a file that does not fit names its field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omni_cache import MagCache, TeaCache
from omni_cache.calibration import Calibration
from omni_cache.strategies import Owner, Time
from omni_cache.strategies.calibrations import (
    FORMAT,
    BranchNumbers,
    Schedule,
    TransformerNumbers,
)

STEPS = 4
COND = BranchNumbers((1.0, 0.9, 1.1, 0.8), 0.01)
UNCOND = BranchNumbers((1.0, 0.5, 1.5, 0.7), 0.02)
MAGCACHE = Calibration(
    strategy="magcache",
    num_inference_steps=STEPS,
    generations=2,
    transformers={"transformer": TransformerNumbers("Toy", {"cond": COND, "uncond": UNCOND})},
    date="2026-11-26T12:00:00+00:00",
    versions={"torch": "2.13.0", "diffusers": "0.42.1", "omni-cache": "0.1.0"},
    schedule=Schedule("EulerDiscreteScheduler", (1000.0, 750.0, 500.0, 250.0), None),
)
TEACACHE = replace(
    MAGCACHE,
    strategy="teacache",
    transformers={"transformer": TransformerNumbers("Toy", {"cond": BranchNumbers((2.0,), 0.1)})},
    signal="blocks.0.norm",
)
EXPERTS = replace(
    MAGCACHE,
    transformers={
        "transformer": TransformerNumbers("Toy", {"cond": COND}),
        "transformer_2": TransformerNumbers("Toy", {"cond": UNCOND}),
    },
)


WITH_SIGMAS = replace(
    MAGCACHE, schedule=Schedule("Flow", (1000.0, 750.0, 500.0, 250.0), (1.0, 0.75, 0.5, 0.25))
)


@pytest.mark.parametrize("calibration", [MAGCACHE, TEACACHE, EXPERTS, WITH_SIGMAS])
def test_a_file_holds_all_of_a_calibration(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "file.json")
    assert Calibration.load(tmp_path / "file.json") == calibration
    content = json.loads((tmp_path / "file.json").read_text())
    assert content["format"] == FORMAT
    assert content["num_inference_steps"] == STEPS


def test_numbers_that_no_file_may_have_are_not_saved(tmp_path: Path) -> None:
    numbers = {"cond": BranchNumbers((1.0, float("nan"), 1.0, 1.0), 0.0)}
    broken = replace(MAGCACHE, transformers={"transformer": TransformerNumbers("Toy", numbers)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.save(tmp_path / "file.json")
    assert not (tmp_path / "file.json").exists()


BRANCH = "transformers.transformer.branches.cond"
LIST = "a list of at least one finite number"
BROKEN: list[tuple[str, Any, str]] = [
    # field, what stands there, what must stand there
    ("format", "omni-cache calibration 9", repr(FORMAT)),
    ("format", None, repr(FORMAT)),
    ("strategy", "teacash", "'teacache' or 'magcache'"),
    ("strategy", ["magcache"], "'teacache' or 'magcache'"),
    ("num_inference_steps", 0, "an integer >= 1"),
    ("num_inference_steps", "28", "an integer >= 1"),
    ("generations", 1.5, "an integer >= 1"),
    ("transformers", [], "a JSON object"),
    ("transformers", {}, "an object with entries"),
    ("transformers.transformer", 3, "a JSON object"),
    ("transformers.transformer.model_class", "", "a non-empty string"),
    ("transformers.transformer.branches", {}, "an object with entries"),
    (BRANCH, [1.0], "a JSON object"),
    (f"{BRANCH}.numbers", [], LIST),
    (f"{BRANCH}.numbers", [1.0, "0.9", 1.1, 0.8], LIST),
    (f"{BRANCH}.numbers", [1.0, float("nan"), 1.1, 0.8], LIST),
    (f"{BRANCH}.numbers", [1.0, 0.9, 1.1], "4 positive numbers, one for each step"),
    (f"{BRANCH}.numbers", [1.0, 0.9, 1.1, -0.8], "4 positive numbers, one for each step"),
    (f"{BRANCH}.fit_error", -0.1, "a finite number >= 0"),
    (f"{BRANCH}.fit_error", None, "a finite number >= 0"),
    ("date", 20261126, "a non-empty string"),
    ("versions", "2.13", "a JSON object"),
    ("versions.torch", 2.13, "a non-empty string"),
    ("schedule", "Euler", "a JSON object"),
    ("schedule.scheduler", None, "a non-empty string"),
    ("schedule.timesteps", None, LIST),
    ("schedule.sigmas", ["1"], LIST),
    ("signal", 3, "a non-empty string"),
]

SET = {"transformers.transformer", BRANCH, "versions.torch"}
"""Entries of which there are as many as were measured."""


def written(path: Path, field: str, *value: Any) -> Path:
    """A file with another value in a field, or without it."""
    MAGCACHE.save(path)
    content = json.loads(path.read_text())
    *outer, last = field.split(".")
    place = content
    for each in outer:
        place = place[each]
    if value:
        (place[last],) = value
    else:
        del place[last]
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("field", "value", "allowed"), BROKEN)
def test_a_broken_field_is_refused_by_name(
    field: str, value: Any, allowed: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "file.json", field, value)
    with pytest.raises(ValueError, match="not allowed") as raised:
        MagCache(calibration=path)
    assert str(raised.value).startswith(f"{path}: {field}=")
    assert str(raised.value).endswith(f"{field} must be {allowed}")


@pytest.mark.parametrize("field", sorted({each[0] for each in BROKEN} - SET))
def test_a_missing_field_is_refused_by_name(field: str, tmp_path: Path) -> None:
    path = written(tmp_path / "file.json", field)
    with pytest.raises(ValueError, match=rf"file.json: {field} is missing$"):
        MagCache(calibration=path)


def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    MAGCACHE.save(path)
    text = path.read_text()
    for length in range(0, len(text) - 2, 50):
        path.write_text(text[:length])
        with pytest.raises(ValueError, match=r"file\.json is cut off or no JSON"):
            MagCache(calibration=path)


def test_other_json_and_other_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for content in (b"[1, 2]", b"3"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a JSON object with the format 'omni-cache cal"):
            MagCache(calibration=path)
    path.write_bytes(b"\x89PNG\xff\x00")
    with pytest.raises(ValueError, match="no JSON"):
        MagCache(calibration=path)
    with pytest.raises(ValueError, match=r"calibration='none.json' is not allowed.*No such file"):
        MagCache(calibration="none.json")


def test_the_file_of_another_strategy_is_refused() -> None:
    message = "strategy is 'magcache' in the calibration, and cache='teacache'"
    with pytest.raises(ValueError, match=message):
        TeaCache(calibration=MAGCACHE)


def test_the_file_of_another_class_is_refused() -> None:
    message = "transformers.transformer.model_class is 'Toy' in the calibration, and the model is"
    with pytest.raises(ValueError, match=f"{message} 'FluxTransformer2DModel'"):
        MagCache(calibration=MAGCACHE).policy("FluxTransformer2DModel")
    with pytest.raises(ValueError, match=f"{message} 'Wrapper'"):
        TeaCache(calibration=TEACACHE).for_transformer(Owner("", ("Wrapper", "Linear"), "", None))
    TeaCache(calibration=TEACACHE).for_transformer(Owner("", ("Wrapper", "Toy"), "", None))


@pytest.mark.parametrize("own", [{"mag_ratios": [1.0]}, {"variant": "FLUX.1-dev"}])
def test_numbers_come_from_one_place(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is not allowed; \w+ must be None when"):
        MagCache(calibration=MAGCACHE, **own)


def test_each_branch_gets_its_numbers_and_an_unknown_one_those_of_its_position() -> None:
    for name, position, expected in (("cond", 1, COND), ("uncond", 0, UNCOND), ("x", 1, UNCOND)):
        gate: Any = MagCache(calibration=MAGCACHE).policy("Toy").gate(name, position)
        assert gate.gate.ratios == expected.numbers
        gate = TeaCache(coefficients={"cond": [1.0], "uncond": [2.0]}).policy(None)
    assert gate.gate("uncond", 0).gate.coefficients == (2.0,)


def test_each_expert_gets_its_numbers_and_a_bare_module_is_told_to_say_which() -> None:
    strategy = MagCache(calibration=EXPERTS)
    for name, expected in (("transformer", COND), ("transformer_2", UNCOND)):
        own = strategy.for_transformer(Owner(name, ("Toy",), "", None))
        gate: Any = own.policy("Toy").gate("cond", 0)
        assert gate.gate.ratios == expected.numbers
    for ask in (
        lambda: strategy.for_transformer(Owner("", ("Toy",), "", None)),
        lambda: strategy.policy("Toy"),
    ):
        with pytest.raises(ValueError, match="transformer, transformer_2 in the calibration"):
            ask()


def test_coefficients_come_with_the_signal_that_they_were_fitted_on() -> None:
    assert TeaCache(calibration=TEACACHE).guard().source == "blocks.0.norm"
    assert TeaCache(calibration=replace(TEACACHE, signal=None)).guard().source == "auto"


def test_another_scheduler_is_told_of_by_name() -> None:
    strategy = MagCache(calibration=MAGCACHE)
    with pytest.warns(UserWarning, match=r"schedule.scheduler is 'Euler.*has 'DDIMScheduler'"):
        strategy.for_transformer(Owner("transformer", ("Toy",), "", "DDIMScheduler"))


def test_ratios_are_interpolated_to_another_number_of_steps() -> None:
    flags: dict[str, Any] = {"threshold": 0.25, "retention_ratio": 0, "num_inference_steps": 7}
    # Positions 0, 0.5, 1, 1.5, 2, 2.5, 3 of the four ratios, rounded to the nearest (even) one.
    stretched = [COND.numbers[each] for each in (0, 0, 1, 2, 2, 2, 3)]
    gates = [
        MagCache(**flags, **own).policy("Toy").gate("cond", 0)
        for own in ({"calibration": MAGCACHE}, {"mag_ratios": stretched})
    ]
    schedules = []
    for gate in gates:
        state, reused = gate.begin(), []
        for step in range(7):
            verdict = gate.decide(state, Time(step), 7, None)
            reused.append(verdict.reuse)
            state = verdict.if_reused if verdict.reuse else verdict.if_computed
        schedules.append(reused)
    assert schedules[0] == schedules[1]
    assert any(schedules[0][1:])
    assert not all(schedules[0][1:])
