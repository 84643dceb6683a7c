"""Which launches share scratch memory; the allocator and the streams are stood in for."""

import pytest
import torch
from omni_cache.kernels import scratch
from torch import Tensor


class Machine:
    """What `scratch_on` asks a CUDA device, with answers to choose. Its memory is the host's."""

    def __init__(self) -> None:
        self.stream = 7
        self.capturing = False
        self.pool = (0, 0)
        self.backend = "native"

    def scratch(self) -> Tensor:
        return scratch.scratch_on(torch.device("cpu"))

    def current_stream(self, device: torch.device) -> "Machine":
        return self

    @property
    def cuda_stream(self) -> int:
        return self.stream

    def memory_snapshot(self) -> list[dict[str, object]]:
        elsewhere = {"address": 0, "total_size": 1, "segment_pool_id": (0, 0)}
        here = {"address": 1, "total_size": 2**64, "segment_pool_id": self.pool}
        return [elsewhere, here]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(scratch, "_KEPT", {})
    monkeypatch.setattr(torch.cuda, "current_stream", machine.current_stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: machine.capturing)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", machine.memory_snapshot)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: machine.backend)
    return machine


def test_launches_on_one_stream_share_a_scratch(machine: Machine) -> None:
    assert machine.scratch() is machine.scratch()


def test_streams_share_nothing(machine: Machine) -> None:
    first = machine.scratch()
    machine.stream = 8
    assert machine.scratch() is not first


def test_a_captured_launch_has_a_scratch_of_its_own(machine: Machine) -> None:
    kept = machine.scratch()
    machine.capturing = True
    first, second = machine.scratch(), machine.scratch()
    machine.capturing = False
    assert len({id(kept), id(first), id(second)}) == 3
    assert machine.scratch() is kept


def test_nothing_in_a_private_pool_is_kept(machine: Machine) -> None:
    machine.pool = (0, 3)
    inside = machine.scratch()
    machine.pool = (0, 0)
    assert machine.scratch() is not inside


def test_nothing_is_kept_under_an_allocator_that_cannot_be_asked(machine: Machine) -> None:
    machine.backend = "cudaMallocAsync"
    assert machine.scratch() is not machine.scratch()


def test_a_scratch_starts_with_its_counter_at_zero(machine: Machine) -> None:
    assert machine.scratch().count_nonzero() == 0
    assert machine.scratch().nbytes == scratch.SCRATCH_BYTES
