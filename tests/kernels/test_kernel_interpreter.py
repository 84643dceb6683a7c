"""The Triton kernels compute what the reference says, on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def test_every_kernel_passes_the_numerics_tests_in_the_interpreter(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    # Whether a kernel is interpreted is settled when it is defined, so it takes a process of its
    # own. Away from the repository root, where `import omni_cache` would find no kernels.
    command = [sys.executable, "-m", "pytest", str(HERE / "test_kernel_numerics.py"), "-q"]
    command += ["-p", "no:cacheprovider", f"--rootdir={HERE.parents[1]}"]
    command += ["--exhaustive"] if pytestconfig.getoption("--exhaustive") else []
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
