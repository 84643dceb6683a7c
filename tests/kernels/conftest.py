"""Runs each numerics test with every implementation this process can run.

With TRITON_INTERPRET=1 (see test_kernel_interpreter.py) that is Triton's interpreter; without it,
the operators on the CPU and, where there is one, on a CUDA device.
"""

import pytest
import torch
from kernel_implementations import INTERPRETED, Implementation, interpreted, operators_on

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_cuda = pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])


@pytest.fixture(scope="session", params=["interpreter"] if INTERPRETED else ["cpu", on_cuda])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return interpreted() if INTERPRETED else operators_on(request.param)
