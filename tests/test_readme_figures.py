"""The figures of README.md are those of the committed reports."""

import json
from pathlib import Path
from typing import Any

import pytest
import report_readme

ROOT = Path(__file__).parents[1]
NAMES = ("plans", "demo", "forecasts", "speed", "peers", "gpu")
EMPTY = "".join(f"<!-- figures: {each} -->\n<!-- end of figures -->\n" for each in NAMES)


def test_the_readme_is_what_its_script_writes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report_readme.rewritten(text, ROOT / "docs" / "benchmarks") == text


def test_reports_that_were_not_made_are_left_out(tmp_path: Path) -> None:
    assert report_readme.rewritten(EMPTY, tmp_path) == EMPTY


def test_an_unfinished_report_is_left_out(tmp_path: Path) -> None:
    report = {"measured": [], "ratios": [], "is_done": False}
    (tmp_path / "peers.json").write_text(json.dumps(report))
    assert report_readme.peers(tmp_path) == []
    (tmp_path / "peers.json").write_text(json.dumps(report | {"is_done": True}))
    assert report_readme.peers(tmp_path) != []


def test_what_is_outside_of_blocks_stays_and_blocks_are_replaced(tmp_path: Path) -> None:
    text = "Before.\n" + EMPTY.replace(": demo -->\n", ": demo -->\nold\n") + "After.\n"
    assert report_readme.rewritten(text, tmp_path) == f"Before.\n{EMPTY}After.\n"


def test_a_block_that_is_missing_or_unknown_is_an_error(tmp_path: Path) -> None:
    for text in ("", EMPTY.replace("demo", "demonstration"), EMPTY + EMPTY):
        with pytest.raises(ValueError, match="there has to be one each of"):
            report_readme.rewritten(text, tmp_path)


def test_each_report_of_speed_and_memory_has_its_facts(tmp_path: Path) -> None:
    grown = {"plain_ms": 11.0, "reused_beyond_parts_ms": 0.05, "over_ideal": 1.111}
    architecture = {"architecture": "FLUX", "strategy": "MagCache"}
    own = {"float32": {"to_every_step": [50.0, 52.0], "bytes": 400}}
    rounded = {"float8_e4m3fn": {"to_every_step": [49.0, 52.0], "bytes": 101}}
    reports: dict[str, dict[str, Any]] = {
        "growth": {
            "measured": [
                grown,
                {**grown, "plain_ms": 88.0, "over_ideal": 1.04},
                {**grown, "plain_ms": 700.0, "over_ideal": 1.002},
            ]
        },
        "host": {
            "rows": [
                {"strategy": "MagCache", "beyond_us": 41.0},
                {"strategy": "MagCache", "beyond_us": 59.0},
                {"strategy": "StepCache", "beyond_us": 20.0},
                {"strategy": "skips by a plan", "beyond_us": 30.0},
            ]
        },
        "blocks": {
            "rows": [
                {"way": way, "depth": "4+12", "compile_s": seconds}
                for way, seconds in zip(
                    ("plain", "rolled", "compile_repeated_blocks"), (57, 30, 28), strict=True
                )
            ]
        },
        "start": {
            "blocks": "4+12",
            "rows": [
                {"way": "rolled", "start": "warm", "compile_s": 3.21},
                {"way": "plain", "start": "warm", "compile_s": 4.0},
                {"way": "plain", "start": "cold", "compile_s": 40.0},
            ],
        },
        "memory": {
            "rows": [
                {**architecture, "bytes": 1005, "predicted": 1000},
                {**architecture, "bytes": 2010, "predicted": None},
                {**architecture, "bytes": 0, "predicted": None},
            ]
        },
        "history": {"measured": [{"history_dtypes": own | rounded}]},
    }
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    lines = report_readme.speed(tmp_path)
    found = dict(line.split(" | ")[:2] for line in lines[2:])
    assert found == {
        "| cached loop over the work that it cannot avoid, at steps of 11 to 88 ms": (
            "1.040 to 1.111"
        ),
        "| cached loop over the work that it cannot avoid, at steps of 700 ms": "1.002",
        "| reused step there, beyond its compiled parts": "50 us",
        "| host time of a reused step, beyond a plain call": "41 to 59 us",
        "| host time of a step that StepCache measures and repeats, beyond a plain call": "20 us",
        "| host time of a step that a plan skips, beyond a plain call": "30 us",
        "| cold compilation, 4+12 blocks": (
            "30 s (`torch.compile` 57 s, `compile_repeated_blocks` 28 s)"
        ),
        "| start of a second process, 4+12 blocks": "3.2 s (`torch.compile` 4.0 s)",
        "| memory of a trajectory, off what `explain` foresees": "0.50% at most",
        "| memory of peers over it": "2.00",
        '| `history_dtype="float8_e4m3fn"`: median PSNR, less that of float32': (
            "-0.50 dB, in 0.25 of the memory"
        ),
    }


def test_peers_are_shown_by_kind_with_both_ratios(tmp_path: Path) -> None:
    common = {"least": 0.1, "most": 2.0, "allowed": 1.0}
    ratios = [
        {"name": "rolled", "over": over, "what": what, "reached": reached, **common}
        for over, what, reached in (
            ("plain", "computed", 1.01),
            ("ideal", "generation", 1.015),
            ("hooks-magcache, eager", "reused", 0.25),
            ("hooks-magcache, eager", "generation", 0.5),
        )
    ]
    measured = [{"skips": {"reused_ms": 0.1 + took, "own_ms": 0.1}} for took in (0.05, 0.07, 0.09)]
    report = {"ratios": ratios, "measured": measured}
    (tmp_path / "peers.json").write_text(json.dumps(report))
    lines = report_readme.peers(tmp_path)
    assert lines[-1].startswith("There a step that a plan skips takes 70 us:")
    rows = [line for line in lines if line.startswith("| omni")]
    assert rows == ["| omni-cache, MagCache | diffusers' MagCache, eager | 0.250 | 0.500 |"]
