"""scripts/gpu and the benchmark it runs say what they lack, and leave nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about having no CUDA device")


@pytest.mark.parametrize(
    "command", [["bash", SCRIPTS / "gpu"], [sys.executable, SCRIPTS / "bench_kernels.py"]]
)
def test_without_a_gpu_it_fails_and_says_so(command: list[str | Path], tmp_path: Path) -> None:
    run = subprocess.run(
        [*command, tmp_path / "results"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "needs a CUDA device" in run.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
