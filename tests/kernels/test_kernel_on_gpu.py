"""What only a GPU can show: full grids, addresses beyond 2**31, launches and recompilations."""

from collections.abc import Callable
from functools import partial
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


def gate_state() -> tuple[Tensor, Tensor]:
    """Return a fresh accumulator and the identity polynomial."""
    return (
        torch.zeros(1, dtype=torch.float64, device="cuda"),
        torch.tensor([1.0, 0.0], dtype=torch.float64, device="cuda"),
    )


def some_riders() -> list[Tensor]:
    timesteps = torch.tensor([[981.25], [960.5]], device="cuda").expand(2, 77)
    return [timesteps, torch.tensor(True, device="cuda")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rel_l1_on_a_full_grid_gives_the_same_bits_every_time(dtype: torch.dtype) -> None:
    current, previous = torch.randn(2, 4096, 3072, device="cuda").to(dtype)
    along = some_riders()
    numbers = [kernels.rel_l1(current, previous, along) for _ in range(100)]
    expected = reference.rel_l1(current, previous, along)
    assert_close(numbers[0].cpu(), expected, rtol=1e-5, atol=0.0)
    assert all(torch.equal(other, numbers[0]) for other in numbers)


def test_fingerprints_on_a_full_grid_are_the_same_every_time() -> None:
    tensor = torch.randn(4097, 3072, device="cuda").bfloat16()
    prints = [kernels.fingerprint(tensor) for _ in range(100)]
    assert all(torch.equal(other, prints[0]) for other in prints)
    assert torch.equal(kernels.fingerprint(tensor.mT.contiguous().mT), prints[0])
    tensor[4096, 3071] += 1
    assert not torch.equal(kernels.fingerprint(tensor), prints[0])


def test_measurements_on_two_streams_do_not_disturb_each_other() -> None:
    pairs = torch.randn(2, 2, 2048, 3072, device="cuda")
    expected = [kernels.rel_l1(*pair) for pair in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    numbers: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for stream, pair, of_pair in zip(streams, pairs, numbers, strict=True):
            with torch.cuda.stream(stream):
                of_pair.append(kernels.rel_l1(*pair))
    torch.cuda.synchronize()
    for of_pair, alone in zip(numbers, expected, strict=True):
        assert all(torch.equal(each, alone) for each in of_pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rel_l1_gate_on_a_full_grid_gives_the_same_bits_every_time(dtype: torch.dtype) -> None:
    current, previous = torch.randn(2, 4096, 3072, device="cuda").to(dtype)
    state = gate_state()
    expected = reference.rel_l1_gate(current, previous, *state, 10.0)
    verdicts = [kernels.rel_l1_gate(current, previous, *state, 10.0) for _ in range(100)]
    assert_close(verdicts[0], expected, rtol=1e-5, atol=0.0)
    assert all(torch.equal(verdict, verdicts[0]) for verdict in verdicts)


def test_magnitude_stats_on_a_full_grid_give_the_same_bits_every_time() -> None:
    residual, previous = torch.randn(2, 4097, 3072, device="cuda").bfloat16()
    stats = [kernels.magnitude_stats(residual, previous) for _ in range(100)]
    assert_close(stats[0], reference.magnitude_stats(residual, previous), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(other, stats[0]) for other in stats)


def test_measurements_address_more_than_two_to_the_31_elements() -> None:
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("takes 9 GB of GPU memory")
    current = torch.ones(count, dtype=torch.bfloat16, device="cuda")
    previous = torch.ones_like(current)
    same = kernels.fingerprint(current)
    assert torch.equal(kernels.fingerprint(previous), same)
    current[-1] = 1024.0
    assert not torch.equal(kernels.fingerprint(current), same)
    numbers = kernels.rel_l1(current, previous).tolist()
    assert numbers == pytest.approx([1023, count, count], rel=1e-5)


def launches(call: Callable[[], object]) -> list[str]:
    """Return what `call` starts on the device, memsets and copies included, once it is warm."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith("Activity Buffer")  # the profiler's own
    ]


@pytest.mark.parametrize("strided", [False, True])
def test_a_measurement_with_all_that_rides_along_is_a_single_launch(strided: bool) -> None:
    pair = torch.randn(2, 64, 6, 256, device="cuda")[:, :, 2]
    current, previous = pair if strided else pair.contiguous()
    measure = partial(kernels.rel_l1, current, previous, some_riders())
    assert launches(measure) == ["rel_l1_kernel"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64])
def test_a_fingerprint_is_a_single_launch(dtype: torch.dtype) -> None:
    tensor = torch.randn(64, 6, 256, device="cuda").to(dtype)[:, 2]
    assert launches(partial(kernels.fingerprint, tensor)) == ["fingerprint_kernel"]


@pytest.mark.parametrize("strided", [False, True])
def test_rel_l1_gate_is_a_single_launch(strided: bool) -> None:
    pair = torch.randn(2, 64, 6, 256, device="cuda")
    current = pair[0][:, 2] if strided else pair[0][:, 2].contiguous()
    previous = pair[1][:, 2].contiguous()
    state = gate_state()
    decide = partial(kernels.rel_l1_gate, current, previous, *state, 0.2)
    assert launches(decide) == ["rel_l1_gate_kernel"]


def test_inner_products_on_a_full_grid_give_the_same_bits_every_time() -> None:
    residual, *previous = torch.randn(4, 2, 1024, 3072, device="cuda").bfloat16()
    products = [kernels.inner_products(residual, previous, 2) for _ in range(100)]
    expected = reference.inner_products(residual, previous, 2)
    assert_close(products[0], expected, rtol=1e-12, atol=1e-12 * expected.max().item())
    assert all(torch.equal(each, products[0]) for each in products)


def test_magnitude_stats_are_a_single_launch() -> None:
    residual, previous = torch.randn(2, 64, 256, device="cuda")
    compare = partial(kernels.magnitude_stats, residual, previous)
    assert launches(compare) == ["magnitude_stats_kernel"]


def test_nothing_of_a_private_pool_outlives_the_launch_that_found_it() -> None:
    residual, previous = torch.randn(2, 64, 256, device="cuda")
    expected = kernels.magnitude_stats(residual, previous)
    pool = torch.cuda.MemPool()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        with torch.cuda.use_mem_pool(pool):
            kernels.magnitude_stats(residual, previous)
        held = [block for segment in pool.snapshot() for block in segment["blocks"]]
        assert all(block["state"] != "active_allocated" for block in held)
        assert torch.equal(kernels.magnitude_stats(residual, previous), expected)


def test_measurements_can_be_captured_in_a_cuda_graph() -> None:
    """Capture fails on any wait for the device."""
    current, previous = torch.randn(2, 64, 256, device="cuda")
    timestep = torch.tensor(999, device="cuda")

    def measure() -> Tensor:
        return torch.cat(
            [
                kernels.rel_l1(current, previous, [timestep]),
                kernels.fingerprint(current),
            ]
        )

    measure()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        numbers = measure()
    for _ in range(3):
        current.mul_(1.05)
        timestep.sub_(20)
        graph.replay()
        assert torch.equal(numbers, measure())


def test_another_timestep_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[str] = []

    def note(**event: Any) -> None:
        compiled.append(event["repr"])

    current, previous = torch.randn(2, 64, 256, device="cuda")
    timesteps = torch.linspace(1000, 1, 50, device="cuda")
    kernels.rel_l1(current, previous, [timesteps[0]])
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    for i in range(50):
        kernels.rel_l1(current, previous, [timesteps[i].expand(i)])
        kernels.rel_l1(current, previous, [timesteps[i:]])
        kernels.rel_l1(current, previous, [timesteps[::2][i:]])
    assert compiled == []


def test_rel_l1_gate_can_be_captured_in_a_cuda_graph() -> None:
    """Capture fails on any wait for the device."""
    previous = torch.randn(64, 256, device="cuda")
    current = previous.clone()
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
    kernels.rel_l1_gate(current, previous, state[0], other_degree, 0.2)
    assert len(compiled) == 1
