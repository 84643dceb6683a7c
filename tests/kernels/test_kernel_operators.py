"""The operators keep the contracts of torch.library and say what is wrong with an argument."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from omni_cache import kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def rel_l1_gate_arguments(device: str = "cpu", **replaced: Any) -> dict[str, Any]:
    arguments = {
        "current": torch.randn(2, 5, 7, device=device),
        "previous": torch.randn(2, 5, 7, device=device),
        "accumulated": torch.zeros(1, dtype=torch.float64, device=device),
        "workspace": kernels.rel_l1_workspace(device),
        "coefficients": torch.tensor([1.0, 0.0], dtype=torch.float64, device=device),
        "threshold": 0.2,
    }
    return arguments | replaced


def magnitude_gate_arguments(device: str = "cpu", **replaced: Any) -> dict[str, Any]:
    arguments = {
        "state": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=device),
        "ratio": torch.tensor(1.01, dtype=torch.float64, device=device),
        "threshold": 0.24,
        "max_skip_steps": 5,
    }
    return arguments | replaced


def magnitude_stats_arguments(device: str = "cpu", **replaced: Any) -> dict[str, Any]:
    arguments = {
        "residual": torch.randn(2, 5, 7, device=device),
        "previous": torch.randn(2, 5, 7, device=device),
    }
    return arguments | replaced


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (4, 6)])
def test_rel_l1_gate_passes_opcheck(device: str, dtype: torch.dtype, shape: tuple[int]) -> None:
    current = torch.randn(shape, device=device).to(dtype)
    arguments = rel_l1_gate_arguments(
        device, current=current, previous=torch.randn_like(current), threshold=torch.inf
    )
    torch.library.opcheck(torch.ops.omni_cache.rel_l1_gate, tuple(arguments.values()))


@pytest.mark.parametrize("device", DEVICES)
def test_rel_l1_gate_passes_opcheck_for_a_strided_signal(device: str) -> None:
    current = torch.randn(4, 6, 10, device=device)[..., ::2].transpose(0, 1)
    arguments = rel_l1_gate_arguments(
        device, current=current, previous=torch.randn(6, 4, 5, device=device)
    )
    torch.library.opcheck(torch.ops.omni_cache.rel_l1_gate, tuple(arguments.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_magnitude_gate_passes_opcheck(device: str, shape: tuple[int]) -> None:
    ratio = torch.full(shape, 0.98, dtype=torch.float64, device=device)
    arguments = magnitude_gate_arguments(device, ratio=ratio)
    torch.library.opcheck(torch.ops.omni_cache.magnitude_gate, tuple(arguments.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (0, 3), (4, 6, 5)])
def test_magnitude_stats_pass_opcheck(device: str, dtype: torch.dtype, shape: tuple[int]) -> None:
    residual = torch.randn(shape, device=device).to(dtype)
    previous = torch.randn(*shape, 2, device=device).to(dtype)[..., 0]
    torch.library.opcheck(torch.ops.omni_cache.magnitude_stats, (residual, previous))


def test_no_gradient_flows_through_a_decision() -> None:
    current = torch.randn(2, 5, 7, requires_grad=True)
    arguments = rel_l1_gate_arguments(current=current)
    torch.library.opcheck(torch.ops.omni_cache.rel_l1_gate, tuple(arguments.values()))
    assert not kernels.rel_l1_gate(**arguments).requires_grad
    assert not arguments["previous"].requires_grad
    assert not kernels.magnitude_stats(current, current).requires_grad


f64 = torch.float64
REJECTED = [
    (kernels.rel_l1_gate, {"current": torch.ones(2, 5, 7, dtype=f64)}, "current.dtype"),
    (kernels.rel_l1_gate, {"previous": torch.ones(2, 35)}, "previous.shape"),
    (kernels.rel_l1_gate, {"previous": torch.ones(2, 5, 7).half()}, "previous.dtype"),
    (kernels.rel_l1_gate, {"previous": torch.ones(2, 7, 5).mT}, "previous.stride()"),
    (kernels.rel_l1_gate, {"previous": torch.ones(2, 5, 7, device="meta")}, "previous.device"),
    (kernels.rel_l1_gate, {"accumulated": torch.zeros(1)}, "accumulated.dtype"),
    (kernels.rel_l1_gate, {"accumulated": torch.zeros((), dtype=f64)}, "accumulated.shape"),
    (kernels.rel_l1_gate, {"workspace": torch.zeros(8)}, "workspace.shape"),
    (kernels.rel_l1_gate, {"coefficients": torch.ones(2)}, "coefficients.dtype"),
    (kernels.rel_l1_gate, {"coefficients": torch.ones(0, dtype=f64)}, "coefficients.shape"),
    (kernels.rel_l1_gate, {"coefficients": torch.ones(1, 2, dtype=f64)}, "coefficients.shape"),
    (kernels.magnitude_gate, {"state": torch.ones(3)}, "state.dtype"),
    (kernels.magnitude_gate, {"state": torch.ones(4, dtype=f64)}, "state.shape"),
    (kernels.magnitude_gate, {"state": torch.ones(6, dtype=f64)[::2]}, "state.stride()"),
    (kernels.magnitude_gate, {"ratio": torch.ones(2, dtype=f64)}, "ratio.shape"),
    (kernels.magnitude_stats, {"residual": torch.ones(2, 5, 7).int()}, "residual.dtype"),
    (kernels.magnitude_stats, {"residual": torch.tensor(1.0)}, "residual.shape"),
    (kernels.magnitude_stats, {"previous": torch.ones(2, 5, 8)}, "previous.shape"),
    (kernels.magnitude_stats, {"previous": torch.ones(2, 5, 7).half()}, "previous.dtype"),
]

ARGUMENTS = {
    kernels.rel_l1_gate: rel_l1_gate_arguments,
    kernels.magnitude_gate: magnitude_gate_arguments,
    kernels.magnitude_stats: magnitude_stats_arguments,
}


@pytest.mark.parametrize(("operator", "replaced", "named"), REJECTED)
def test_a_wrong_argument_is_named_with_what_was_given_and_what_is_allowed(
    operator: Callable[..., Tensor], replaced: dict[str, Tensor], named: str
) -> None:
    arguments = ARGUMENTS[operator](**replaced)
    with pytest.raises(ValueError, match=re.escape(named) + " is .+; allowed: .+"):
        operator(**arguments)


def test_a_wrong_shape_is_named_while_tracing_too() -> None:
    with FakeTensorMode():
        arguments = rel_l1_gate_arguments(previous=torch.ones(2, 5, 8))
        with pytest.raises(
            ValueError, match=r"previous.shape is \(2, 5, 8\); allowed: \(2, 5, 7\)"
        ):
            kernels.rel_l1_gate(**arguments)


def test_the_gates_compile_without_a_graph_break_and_write_their_state() -> None:
    def step(signal: dict[str, Any], magnitude: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return kernels.rel_l1_gate(**signal), kernels.magnitude_gate(**magnitude)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    signal, magnitude = rel_l1_gate_arguments(), magnitude_gate_arguments()
    for _ in range(2):
        eager_signal, eager_magnitude = copy.deepcopy((signal, magnitude))
        expected = step(eager_signal, eager_magnitude)
        assert all(map(torch.equal, compiled(signal, magnitude), expected))
        assert torch.equal(signal["previous"], signal["current"])
        assert torch.equal(signal["accumulated"], eager_signal["accumulated"])
        assert torch.equal(magnitude["state"], eager_magnitude["state"])
        signal["current"] = signal["current"] + 0.01


def test_importing_the_kernels_does_not_import_triton(tmp_path: Path) -> None:
    program = "import sys, omni_cache.kernels; sys.exit('triton.language' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False).returncode == 0
    )
