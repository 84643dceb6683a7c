"""Benchmarks whose kinds run in turn: what takes turns, what goes on, and what is made of it."""

import importlib
import json
import multiprocessing
import multiprocessing.dummy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer


@pytest.fixture(scope="module")
def scripts() -> Any:
    names = ("bench_gpu", "bench_turns", "bench_peers", "bench_growth", "bench_history")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def threads(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds wait in threads of this process, because imports take longer than all else."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "none")
    context = SimpleNamespace(
        Pipe=multiprocessing.dummy.Pipe, Process=multiprocessing.dummy.Process
    )
    monkeypatch.setattr(scripts.bench_turns, "get_context", lambda method: context)


# Turns.


def test_every_kind_runs_once_in_a_round_until_all_end(scripts: Any, threads: None) -> None:
    setting = scripts.bench_gpu.Setting(scripts.bench_gpu.TINY, "cpu", None, 1)
    wanted = {
        "plain": scripts.bench_turns.Want("plain", setting, 2),
        "cached": scripts.bench_turns.Want("rolled", setting, 8),
    }
    with scripts.bench_turns.Turns(wanted) as turns:
        rounds = [turns.round() for _ in range(2)]
    assert turns.failed == {}
    for each in rounds:
        assert list(each) == ["plain", "cached"]
        assert each["plain"]["reused_ms"] is None
        assert each["plain"]["generation_ms"] > each["plain"]["computed_ms"] > 0
        assert 0 < each["cached"]["reused_parts_ms"] < each["cached"]["reused_ms"]
        assert each["cached"]["held_mib"] > 0
        assert 0 < each["cached"]["own_ms"] < each["cached"]["reused_ms"]


def test_a_kind_that_fails_is_named_and_the_others_go_on(
    scripts: Any, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, setting: Any) -> Any:
        raise RuntimeError("no such peer\nand more")

    kinds = scripts.bench_gpu.KINDS
    monkeypatch.setitem(kinds, "hooks-magcache", kinds["hooks-magcache"].__class__("x", broken))
    setting = scripts.bench_gpu.Setting(scripts.bench_gpu.TINY, "cpu", None, 1)
    wanted = {
        name: scripts.bench_turns.Want(name, setting, 2) for name in ("hooks-magcache", "plain")
    }
    with scripts.bench_turns.Turns(wanted) as turns:
        assert list(turns.round()) == ["plain"]
    assert turns.failed == {"hooks-magcache": "RuntimeError: no such peer"}


@pytest.mark.parametrize("name", ["hooks-magcache", "hooks-first-block", "first-block"])
def test_eager_kinds_keep_the_schedule_in_batches_and_on_oblong_pictures(
    scripts: Any, name: str
) -> None:
    size = scripts.bench_gpu.TINY._replace(image_tokens=8, batch=2)
    setting = scripts.bench_gpu.Setting(size, "cpu", None, 1)
    runner, _ = scripts.bench_gpu.prepared(name, setting)  # which compares the schedule
    assert runner.loop.noise.shape == (2, 8, size.config["in_channels"])
    assert runner.loop.same["img_ids"].amax(0).tolist() == [0, 1, 3]


# Reports.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/bench_growth.py", "FOLDER"])


def test_an_interrupted_report_goes_on_and_a_finished_one_begins_anew(
    scripts: Any, tmp_path: Path, command: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, path, settings = scripts.bench_turns, tmp_path / "x" / "growth.json", {"size": (1, 2)}
    report = turns.begun(path, settings)
    assert report["measured"] == []
    assert report["environment"]["command"] == "python scripts/bench_growth.py FOLDER"
    report["measured"].append({"found": 1})
    turns.write(report, path, "text\n")
    assert path.with_suffix(".md").read_text() == "text\n"
    assert turns.begun(path, settings) == report
    assert turns.begun(path, {"size": (1, 3)})["measured"] == []
    report["is_done"] = True
    turns.write(report, path, "text\n")
    assert turns.begun(path, settings)["measured"] == []
    report["is_done"] = False
    turns.write(report, path, "text\n")
    monkeypatch.setattr(sys, "argv", ["scripts/bench_growth.py", "FOLDER", "--rounds", "9"])
    assert turns.begun(path, settings)["measured"] == []


def test_growth_measures_the_points_that_are_missing(
    scripts: Any, tmp_path: Path, command: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Canned:
        failed: dict[str, str] = {}  # noqa: RUF012

        def __init__(self, wanted: dict[str, Any]) -> None:
            asked.append(wanted["rolled, 1"].setting.size)
            if len(asked) == 2:
                raise KeyboardInterrupt

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def round(self) -> dict[str, dict[str, Any]]:
            plain = {"computed_ms": 100.0, "generation_ms": 202.0}
            cached = {
                "computed_ms": 101.0,
                "reused_ms": 1.5,
                "reused_parts_ms": 1.0,
                "own_ms": 0.1,
                "generation_ms": 212.0,
                "held_mib": 3.0,
            }
            pair = {"plain, 0": plain, "rolled, 0": cached}
            return {**pair, "plain, 1": plain, "rolled, 1": {**cached, "computed_ms": 103.0}}

    monkeypatch.setattr(scripts.bench_growth, "Turns", Canned)
    points = ["256,1+2,1,128", "1024,2+4,2,64"]
    arguments = {"rounds": 3, "processes": 2, "points": points, "inner": "eager"}
    with pytest.raises(KeyboardInterrupt):
        scripts.bench_growth.main(tmp_path, **arguments)
    assert "**Interrupted:**" in (tmp_path / "growth.md").read_text()
    scripts.bench_growth.main(tmp_path, **arguments)
    assert [(each.image_tokens, each.batch) for each in asked] == [(256, 1), (1024, 2), (1024, 2)]
    report = json.loads((tmp_path / "growth.json").read_text())
    assert report["is_done"]
    for row in report["measured"]:
        assert row["over_ideal"] == pytest.approx(212 / (202 + 6 * 1.1))
        assert row["computed_over_plain"] == pytest.approx(1.02)
        assert row["reused_beyond_parts_ms"] == pytest.approx(0.5)
    text = (tmp_path / "growth.md").read_text()
    assert "| 1,024 | 2+4 | 2 | 64 | 100.00 | 102.00 | 1.020 | 1.500 | 500 | 1.016 | 3.00 |" in text
    assert "Interrupted" not in text


def test_a_point_that_cannot_be_read_is_an_error(scripts: Any) -> None:
    assert scripts.bench_growth.Point.parse("1024,1+2,4,64") == (1024, 1, 2, 4, 64)
    for text in ("1024", "1024,3,1,64", "x,1+2,1,64", "0,1+2,1,64", "1024,1+2,1,96"):
        with pytest.raises(typer.BadParameter, match=r"1024,1\+2,1,128|1 or more|multiples"):
            scripts.bench_growth.Point.parse(text)


# Peers.


def found(computed: float, reused: float, whole: float, parts: float | None = None) -> Any:
    return {
        "computed_ms": computed,
        "reused_ms": reused,
        "generation_ms": whole,
        "reused_parts_ms": parts,
        "own_ms": 0.01 * computed,
    }


def test_ratios_are_those_of_a_round_and_of_one_strategy(scripts: Any) -> None:
    rounds = [
        {
            "plain": found(10 * load, None, 280 * load),
            "rolled": found(10.1 * load, 0.2 * load, 78 * load, 0.1 * load),
            "hooks-magcache": found(10 * load, 0.4 * load, 80 * load),
            "cache-dit": found(10 * load, 1 * load, 90 * load),
            "rolled, eager": found(20 * load, 0.5 * load, 150 * load, 0.4 * load),
            "hooks-magcache, eager": found(20 * load, 1 * load, 300 * load),
        }
        for load in (1.0, 5.0, 2.0)  # others are at work too
    ]
    names = list(rounds[0])
    ratios = [*scripts.bench_peers.ratios({"measured": rounds, "kinds": names})]
    reached = {(each.name, each.over, each.what): each.reached for each in ratios}
    assert reached == {
        ("rolled", "plain", "computed"): pytest.approx(1.01),
        ("rolled", "ideal", "generation"): pytest.approx(78 / (70 + 21 * (0.1 + 0.101))),
        ("rolled", "hooks-magcache", "reused"): pytest.approx(0.5),
        ("rolled", "hooks-magcache", "generation"): pytest.approx(78 / 80),
        ("rolled", "hooks-magcache, eager", "reused"): pytest.approx(0.2),
        ("rolled", "hooks-magcache, eager", "generation"): pytest.approx(0.26),
        ("rolled, eager", "hooks-magcache, eager", "reused"): pytest.approx(0.5),
        ("rolled, eager", "hooks-magcache, eager", "generation"): pytest.approx(0.5),
    }
    assert {each.passed for each in ratios if each.over == "ideal"} == {False}


def test_peers_report_has_each_ratio_and_each_failure(
    scripts: Any, tmp_path: Path, command: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Canned:
        def __init__(self, wanted: dict[str, Any]) -> None:
            self.wanted = wanted
            self.failed = {"hooks-magcache": "RuntimeError: no such peer"}

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def round(self) -> dict[str, dict[str, Any]]:
            assert self.wanted["rolled"].setting.inner == "aot_eager"
            assert self.wanted["hooks-magcache, eager"].setting.inner is None
            assert self.wanted["hooks-magcache, eager"].kind == "hooks-magcache"
            return {
                "rolled": found(10.0, 0.2, 75.0, 0.1),
                "hooks-magcache, eager": found(20.0, 1.0, 100.0),
            }

    monkeypatch.setattr(scripts.bench_peers, "Turns", Canned)
    only = ["rolled", "hooks-magcache", "hooks-magcache, eager"]
    with pytest.raises(typer.Exit):
        scripts.bench_peers.main(tmp_path, rounds=2, only=only, inner="aot_eager", tiny=True)
    text = (tmp_path / "peers.md").read_text()
    assert "| ours, MagCache | 10.00 | 0.200 | 75.0 |" in text
    assert "- diffusers MagCache, blocks compiled did not run: RuntimeError: no such peer" in text
    assert (
        "| ours, MagCache: generation over diffusers MagCache, eager | 0.750 "
        "| 0.750, 0.750 | 1 | passed |"
    ) in text


def test_every_kind_has_words_for_the_readme(scripts: Any) -> None:
    readme = importlib.import_module("report_readme")
    assert set(readme.KINDS) == set(scripts.bench_gpu.KINDS)
    titles = [readme.kind(name) for name in scripts.bench_peers.KINDS_HERE]
    assert len({*titles}) == len(titles)


# Residuals in fewer bits.


@pytest.mark.slow
def test_history_is_judged_beside_every_step_and_beside_float32(
    scripts: Any, tmp_path: Path, command: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = scripts.bench_history
    chosen = {"TaylorSeer, taylor 1": history.STRATEGIES["TaylorSeer, taylor 1"]}
    monkeypatch.setattr(history, "STRATEGIES", chosen)
    monkeypatch.setattr(history, "CALIBRATION_PROMPTS", 1)
    history.main(tmp_path, prompts=1, steps=6)
    report = json.loads((tmp_path / "history.json").read_text())
    (row,) = report["measured"]
    kept = row["history_dtypes"]
    assert [each["computed_steps"] for each in kept.values()] == [4, 4, 4]
    assert kept["float32"]["to_float32"] == [None]
    assert kept["bfloat16"]["to_float32"] > kept["float8_e4m3fn"]["to_float32"] > [30.0]
    assert kept["bfloat16"]["bytes"] * 2 == kept["float32"]["bytes"]
    assert "| TaylorSeer, taylor 1 | float32 | 4 | 1.00 | " in (tmp_path / "history.md").read_text()
