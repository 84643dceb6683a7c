"""The operators keep the contracts of torch.library and say what is wrong with an argument."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omni_cache.kernels import ops
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from omni_cache import kernels

f64 = torch.float64
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


def rel_l1_arguments(device: str = "cpu", **replaced: Any) -> dict[str, Any]:
    arguments = {
        "current": torch.randn(2, 5, 7, device=device),
        "previous": torch.randn(2, 5, 7, device=device),
        "along": [torch.tensor(981, device=device), torch.tensor([True, False], device=device)],
    }
    return arguments | replaced


def sea_distance_arguments(device: str = "cpu", **replaced: Any) -> dict[str, Any]:
    arguments = {
        "current": torch.randn(2, 4, 6, 3, device=device),
        "previous": torch.randn(2, 4, 6, 3, device=device),
        "sigmas": torch.tensor([0.4, 0.5], dtype=torch.float64, device=device),
        "axes": [1, 2],
        "power": 3.0,
        "along": [torch.tensor(981, device=device)],
    }
    return arguments | replaced


def fingerprint_arguments(device: str = "cpu", **replaced: Any) -> dict[str, Any]:
    return {"tensor": torch.randn(2, 5, 7, device=device)} | replaced


def rel_l1_gate_arguments(device: str = "cpu", **replaced: Any) -> dict[str, Any]:
    arguments = {
        "current": torch.randn(2, 5, 7, device=device),
        "previous": torch.randn(2, 5, 7, device=device),
        "accumulated": torch.zeros(1, dtype=torch.float64, device=device),
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


def inner_products_arguments(device: str = "cpu", **replaced: Any) -> dict[str, Any]:
    arguments = {
        "residual": torch.randn(2, 5, 7, device=device),
        "previous": [torch.randn(2, 5, 7, device=device) for _ in range(3)],
        "samples": 2,
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
@pytest.mark.parametrize("riders", [0, 2])
def test_rel_l1_passes_opcheck(
    device: str, dtype: torch.dtype, shape: tuple[int], riders: int
) -> None:
    current = torch.randn(shape, device=device).to(dtype)
    previous = torch.randn(*shape, 2, device=device).to(dtype)[..., 0]
    arguments = rel_l1_arguments(device, current=current, previous=previous)
    arguments["along"] = arguments["along"][:riders]
    torch.library.opcheck(torch.ops.omni_cache.rel_l1, tuple(arguments.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 6)])
def test_fingerprint_passes_opcheck(device: str, dtype: torch.dtype, shape: tuple[int]) -> None:
    tensor = torch.randn(*shape, 2, device=device).to(dtype)[..., 0]
    torch.library.opcheck(torch.ops.omni_cache.fingerprint, (tensor,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sea_distance_passes_opcheck(device: str, dtype: torch.dtype) -> None:
    arguments = sea_distance_arguments(device)
    for name in ("current", "previous"):
        arguments[name] = arguments[name].to(dtype)
    torch.library.opcheck(torch.ops.omni_cache.sea_distance, tuple(arguments.values()))


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        ({"axes": [0]}, r"axes is \[0\]; allowed: one or more of 1 to 3"),
        ({"axes": []}, "axes is"),
        ({"sigmas": torch.zeros(2)}, r"sigmas.dtype is torch.float32"),
        ({"sigmas": torch.zeros(3, dtype=f64)}, r"sigmas.shape is \(3,\)"),
        ({"previous": torch.zeros(2, 4, 6, 1)}, "previous.shape"),
        ({"current": torch.zeros(0, 1), "previous": torch.zeros(0, 1), "axes": [1]}, "elements"),
    ],
)
def test_sea_distance_says_what_is_wrong(replaced: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ops.sea_distance(**sea_distance_arguments(**replaced))


def test_no_operator_writes_into_its_arguments() -> None:
    gates = ("rel_l1_gate", "magnitude_gate")
    others = ("sea_distance", "fingerprint", "magnitude_stats", "inner_products")
    for name in ("rel_l1", *others, *gates):
        schema = getattr(torch.ops.omni_cache, name).default._schema
        assert not schema.is_mutable
        assert all(each.alias_info is None for each in [*schema.arguments, *schema.returns])


class NoFloat64(TorchDispatchMode):
    """Stands in for a device that has no float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        assert getattr(result, "dtype", None) != torch.float64, func
        return result


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_on_a_device_without_float64_all_numbers_are_float32(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "number_dtype", lambda device: torch.float32)
    arguments = rel_l1_arguments(device)
    with NoFloat64():
        assert ops._rel_l1_aten(**arguments).dtype == torch.float32
        assert ops._fingerprint_aten(arguments["current"]).dtype == torch.float32
        one, three = torch.ones(1, device=device), torch.ones(3, device=device)
        gate = ops._rel_l1_gate_aten(arguments["current"], arguments["previous"], one, three, 0.2)
        assert gate.dtype == torch.float32
        assert ops._magnitude_gate_aten(three, one, 0.24, 5).dtype == torch.float32
        assert ops._inner_products_aten(three, [three], 1).dtype == torch.float32


def test_numbers_of_any_dtype_and_of_one_element_stack() -> None:
    numbers = [
        torch.tensor(0.5),
        torch.tensor([[True]]),
        torch.tensor([3]),
        torch.tensor(2.0, dtype=f64),
    ]
    for dtype in (torch.float32, torch.float64):
        assert_close(ops._stacked(numbers, dtype), torch.tensor([0.5, 1.0, 3.0, 2.0], dtype=dtype))


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float64), ("cuda:1", torch.float64), ("mps", torch.float32)],
)
def test_numbers_are_float64_where_the_device_has_it(device: str, dtype: torch.dtype) -> None:
    assert kernels.number_dtype(torch.device(device)) == dtype


def test_the_sums_of_a_measurement_on_the_cpu_are_those_of_the_formula_bit_by_bit() -> None:
    for dtype in DTYPES:
        current, previous = torch.randn(2, 3, 1111).to(dtype)
        moved, size, count = kernels.rel_l1(current, previous).tolist()
        assert moved == (current.float() - previous).abs_().sum().double().item()
        assert size == previous.abs().sum(dtype=torch.float32).double().item()
        assert count == 3 * 1111


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
        device, current=current, previous=torch.randn(5, 4, 6, device=device).permute(2, 1, 0)
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, f64])
@pytest.mark.parametrize(("shape", "samples"), [((), 1), ((4, 6), 4), ((4, 6), 1), ((0, 3), 0)])
def test_inner_products_pass_opcheck(
    device: str, dtype: torch.dtype, shape: tuple[int], samples: int
) -> None:
    residual, *previous = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    torch.library.opcheck(torch.ops.omni_cache.inner_products, (residual, previous, samples))


def test_inner_products_of_complex_residuals_are_those_of_their_parts() -> None:
    one, other = torch.randn(2, 2, 5, 7, dtype=torch.complex64)
    whole = kernels.inner_products(one, [other], 2).view(2, 2)
    expected = (one * other.conj()).real.double().sum((1, 2))
    assert_close(whole[:, 1], expected, rtol=1e-5, atol=1e-5)
    assert_close(whole[:, 0], one.abs().double().square().sum((1, 2)), rtol=1e-5, atol=0.0)


def test_no_gradient_flows_through_a_decision() -> None:
    current = torch.randn(2, 5, 7, requires_grad=True)
    arguments = rel_l1_gate_arguments(current=current)
    torch.library.opcheck(torch.ops.omni_cache.rel_l1_gate, tuple(arguments.values()))
    assert not kernels.rel_l1_gate(**arguments).requires_grad
    assert not kernels.magnitude_stats(current, current).requires_grad
    assert not kernels.rel_l1(current, current.detach(), [current[0, 0, 0]]).requires_grad
    assert not kernels.fingerprint(current).requires_grad
    assert not kernels.inner_products(current, [current]).requires_grad


REJECTED = [
    (kernels.rel_l1, {"current": torch.ones(2, 5, 7, dtype=f64)}, "current.dtype"),
    (kernels.rel_l1, {"previous": torch.ones(2, 35)}, "previous.shape"),
    (kernels.rel_l1, {"previous": torch.ones(2, 5, 7).half()}, "previous.dtype"),
    (kernels.rel_l1, {"previous": torch.ones(2, 5, 7, device="meta")}, "previous.device"),
    (kernels.rel_l1, {"along": [torch.ones(())] * 5}, "len(along)"),
    (kernels.rel_l1, {"along": [torch.ones(()), torch.ones(3) * 1j]}, "along[1].dtype"),
    (kernels.rel_l1, {"along": [torch.ones((), device="meta")]}, "along[0].device"),
    (kernels.fingerprint, {"tensor": torch.ones(2, 5).to_sparse()}, "tensor.layout"),
    (kernels.rel_l1_gate, {"current": torch.ones(2, 5, 7, dtype=f64)}, "current.dtype"),
    (kernels.rel_l1_gate, {"previous": torch.ones(2, 35)}, "previous.shape"),
    (kernels.rel_l1_gate, {"previous": torch.ones(2, 5, 7).half()}, "previous.dtype"),
    (kernels.rel_l1_gate, {"previous": torch.ones(2, 5, 7, device="meta")}, "previous.device"),
    (kernels.rel_l1_gate, {"accumulated": torch.zeros(1)}, "accumulated.dtype"),
    (kernels.rel_l1_gate, {"accumulated": torch.zeros(2, dtype=f64)}, "accumulated.shape"),
    (kernels.rel_l1_gate, {"coefficients": torch.ones(2)}, "coefficients.dtype"),
    (kernels.rel_l1_gate, {"coefficients": torch.ones(0, dtype=f64)}, "coefficients.shape"),
    (kernels.rel_l1_gate, {"coefficients": torch.ones(1, 2, dtype=f64)}, "coefficients.shape"),
    (kernels.magnitude_gate, {"state": torch.ones(3)}, "state.dtype"),
    (kernels.magnitude_gate, {"state": torch.ones(4, dtype=f64)}, "state.shape"),
    (kernels.magnitude_gate, {"state": torch.ones(6, dtype=f64)[::2]}, "state.stride()"),
    (kernels.magnitude_gate, {"ratio": torch.ones(2, dtype=f64)}, "ratio.shape"),
    (kernels.inner_products, {"residual": torch.ones(2, 5, 7).int()}, "residual.dtype"),
    (kernels.inner_products, {"previous": [torch.ones(2, 5, 8)]}, "previous[0].shape"),
    (kernels.inner_products, {"previous": [torch.ones(2, 5, 7).half()]}, "previous[0].dtype"),
    (kernels.inner_products, {"previous": [torch.ones(2, 5, 7)] * 16}, "len(previous)"),
    (kernels.inner_products, {"samples": 5}, "samples"),
    (kernels.inner_products, {"samples": 0}, "samples"),
    (kernels.magnitude_stats, {"residual": torch.ones(2, 5, 7).int()}, "residual.dtype"),
    (kernels.magnitude_stats, {"residual": torch.tensor(1.0)}, "residual.shape"),
    (kernels.magnitude_stats, {"previous": torch.ones(2, 5, 8)}, "previous.shape"),
    (kernels.magnitude_stats, {"previous": torch.ones(2, 5, 7).half()}, "previous.dtype"),
]

ARGUMENTS = {
    kernels.rel_l1: rel_l1_arguments,
    kernels.fingerprint: fingerprint_arguments,
    kernels.rel_l1_gate: rel_l1_gate_arguments,
    kernels.magnitude_gate: magnitude_gate_arguments,
    kernels.magnitude_stats: magnitude_stats_arguments,
    kernels.inner_products: inner_products_arguments,
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


def test_measurements_compile_without_a_graph_break() -> None:
    def measure(signal: dict[str, Any], prompt: Tensor) -> Tensor:
        return torch.cat([kernels.rel_l1(**signal), kernels.fingerprint(prompt)])

    compiled = torch.compile(measure, backend="aot_eager", fullgraph=True)
    arguments, prompt = rel_l1_arguments(), torch.randn(3, 5)
    assert torch.equal(compiled(arguments, prompt), measure(arguments, prompt))


def test_the_gates_compile_without_a_graph_break() -> None:
    def step(signal: dict[str, Any], magnitude: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return kernels.rel_l1_gate(**signal), kernels.magnitude_gate(**magnitude)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    arguments = rel_l1_gate_arguments(), magnitude_gate_arguments()
    assert all(map(torch.equal, compiled(*arguments), step(*arguments)))


def test_importing_the_kernels_does_not_import_triton(tmp_path: Path) -> None:
    program = "import sys, omni_cache.kernels; sys.exit('triton.language' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False).returncode == 0
    )
