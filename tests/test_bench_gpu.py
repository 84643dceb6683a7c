"""The benchmark of FLUX.1 on a GPU runs on a CPU too, at a tiny size."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_gpu.py"


def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setting(bench: Any) -> Any:
    """As few blocks as still make two lists: most of the time goes into capturing them."""
    few = {**bench.TINY.config, "num_layers": 1, "num_single_layers": 2}
    return bench.Setting(bench.TINY._replace(config=few), "cpu", "eager", 1)


KINDS = (
    "plain", "rolled", "reduce-overhead", "hoisted", "hooks-magcache", "first-block", "cache-dit",
    "plan", "hooks-first-block", "regional", "skips", "unrolled", "modulations", "cond",
)  # fmt: skip


def test_every_kind_is_tested(bench: Any) -> None:
    assert tuple(bench.KINDS) == KINDS


@pytest.mark.parametrize("name", [each for each in KINDS if each != "cache-dit"])
def test_a_kind_computes_every_fourth_step_or_all(bench: Any, setting: Any, name: str) -> None:
    found = bench.measure(name, setting)  # which compares the schedule
    kind = bench.KINDS[name]
    assert (found["reused_ms"] is None) == (kind.strategy is None)
    assert (found["reused_parts_ms"] is not None) == kind.is_ours
    if name == "skips":
        assert found["reused_parts_ms"] == 0.0
    elif kind.is_ours:
        assert found["reused_parts_ms"] > 0.0
        assert found["held_mib"] > 0.0


def test_results_are_written_kind_by_kind(tmp_path: Path) -> None:
    # cache-dit changes the classes of its process, so that it gets one of its own.
    chosen = ("--kind", "first-block", "--kind", "cache-dit")
    small = ("--tiny", "--device", "cpu", "--inner", "eager", "--rounds", "1")
    done = run(tmp_path / "results", *small, *chosen, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert list(report["kinds"]) == ["first-block", "cache-dit"]
    assert [bar["name"] for bar in report["bars"]] == [
        "first-block: reused over cache-dit",
        "first-block: generation over cache-dit",
    ]
    text = (tmp_path / "results" / "gpu.md").read_text()
    assert "cache-dit DBCache with 1 block" in text
    assert "did not run" not in text


def test_a_kind_that_time_runs_out_for_is_named_and_no_failure(bench: Any, tmp_path: Path) -> None:
    bench.main(tmp_path / "results", seconds=0.5, tiny=True, device="cpu", inner="eager")
    kinds = json.loads((tmp_path / "results" / "gpu.json").read_text())["kinds"]
    assert list(kinds) == list(bench.KINDS)
    assert all(each["timed_out"] for each in kinds.values())
    text = (tmp_path / "results" / "gpu.md").read_text()
    assert text.count("did not run: no time was left") == len(kinds) - 1


def test_what_the_device_does_is_counted_by_its_names(bench: Any) -> None:
    on_device = [
        "Activity Buffer Request",
        "triton_red_fused_0",
        "gemm",
        "Memcpy DtoH (Device -> Pageable)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
    ]
    calls = [
        "aten::mm",
        "cudaLaunchKernel",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
        "cudaMemcpyAsync",
    ]
    assert bench.counted(on_device, [*on_device, *calls]) == {
        "kernels": 2,
        "launches": 3,
        "copies_to_host": 1,
        "other_copies": 1,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about having no CUDA device")
def test_without_a_gpu_it_fails_and_says_so(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as raised:
        bench.main(tmp_path / "results")
    assert raised.value.exit_code == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
