"""Two ranks with requests of their own."""

import pytest
import torch
import torch.distributed as dist
from models import TOKENS, WIDTH, Model
from ranks import run_ranks

import omni_cache

pytestmark = pytest.mark.slow


def requests_of_their_own(rank):
    """Rank 0 asks for few steps and leaves; rank 1 begins when rank 0 is done, and has more."""
    model = omni_cache.enable(Model(), rel_l1_thresh=10.0, inner="eager", strict=True)
    if rank == 1:
        dist.barrier()
    steps, x = (4, 9)[rank], torch.randn(1, TOKENS, 4)
    for step in range(steps):
        x = x - model(x, torch.tensor([1000 * (1 - step / steps)]), torch.ones(1, WIDTH)) / steps
    if rank == 0:
        dist.barrier()
    (trajectory,) = omni_cache.summary(model).trajectories
    return [step.computed for step in trajectory.steps]


def test_neither_waits_for_the_other():
    few, many = run_ranks(requests_of_their_own)
    assert few == [True, *[False] * 3]
    assert many == [True, *[False] * 8]
