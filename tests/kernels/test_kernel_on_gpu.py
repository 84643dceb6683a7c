"""What only a GPU can show: full grids, addresses beyond 2**31, launches and recompilations."""

from typing import Any

import pytest
import torch
from omni_cache.kernels import reference
from torch import Tensor
from torch.testing import assert_close

from omni_cache import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def gate_state() -> tuple[Tensor, Tensor, Tensor]:
    """Return a fresh accumulator, a workspace and the identity polynomial."""
    return (
        torch.zeros(1, dtype=torch.float64, device="cuda"),
        kernels.rel_l1_workspace("cuda"),
        torch.tensor([1.0, 0.0], dtype=torch.float64, device="cuda"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rel_l1_gate_on_a_full_grid_gives_the_same_bits_every_time(dtype: torch.dtype) -> None:
    current, start = torch.randn(2, 4096, 3072, device="cuda").to(dtype)
    accumulated, workspace, coefficients = gate_state()
    expected, _, _ = reference.rel_l1_gate(current, start, accumulated, coefficients, 10.0)
    verdicts = []
    for _ in range(100):
        accumulated.zero_()
        previous = start.clone()
        verdicts.append(
            kernels.rel_l1_gate(current, previous, accumulated, workspace, coefficients, 10.0)
        )
        assert torch.equal(previous, current)
    assert_close(verdicts[0], expected, rtol=1e-5, atol=0.0)
    assert all(torch.equal(verdict, verdicts[0]) for verdict in verdicts)


def test_magnitude_stats_on_a_full_grid_give_the_same_bits_every_time() -> None:
    residual, previous = torch.randn(2, 4097, 3072, device="cuda").bfloat16()
    stats = [kernels.magnitude_stats(residual, previous) for _ in range(100)]
    assert_close(stats[0], reference.magnitude_stats(residual, previous), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(other, stats[0]) for other in stats)


def test_rel_l1_gate_addresses_more_than_two_to_the_31_elements() -> None:
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("takes 9 GB of GPU memory")
    current = torch.ones(count, dtype=torch.bfloat16, device="cuda")
    previous = torch.ones_like(current)
    current[-1] = 1024.0
    verdict = kernels.rel_l1_gate(current, previous, *gate_state(), 1.0)
    assert verdict[1].item() == pytest.approx(1023 / count, rel=1e-5)
    assert previous[-1].item() == 1024.0


@pytest.mark.parametrize("strided", [False, True])
def test_rel_l1_gate_is_a_single_launch(strided: bool) -> None:
    pair = torch.randn(2, 64, 6, 256, device="cuda")
    current = pair[0][:, 2] if strided else pair[0][:, 2].contiguous()
    previous = pair[1][:, 2].contiguous()
    state = gate_state()
    kernels.rel_l1_gate(current, previous, *state, 0.2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        kernels.rel_l1_gate(current, previous, *state, 0.2)
        torch.cuda.synchronize()
    launches = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith("Activity Buffer")  # the profiler's own
    ]
    assert launches == ["rel_l1_gate_kernel"]


def test_rel_l1_gate_can_be_captured_in_a_cuda_graph() -> None:
    """Capture fails on any wait for the device."""
    current, previous = torch.randn(2, 64, 256, device="cuda")
    state = gate_state()
    kernels.rel_l1_gate(current, previous, *state, 0.2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        verdict = kernels.rel_l1_gate(current, previous, *state, 0.2)
    current.mul_(1.05)
    graph.replay()
    assert verdict[0].item() == 0.0
    assert verdict[1].item() == pytest.approx(0.05, rel=1e-4)


def test_another_threshold_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[str] = []

    def note(**event: Any) -> None:
        compiled.append(event["repr"])

    current, previous = torch.randn(2, 64, 256, device="cuda")
    state = gate_state()
    kernels.rel_l1_gate(current, previous, *state, 0.2)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    for threshold in (0.1, 0.3, 1.0, float("inf")):
        kernels.rel_l1_gate(current, previous, *state, threshold)
    assert compiled == []
    other_degree = torch.ones(11, dtype=torch.float64, device="cuda")
    kernels.rel_l1_gate(current, previous, *state[:2], other_degree, 0.2)
    assert len(compiled) == 1
