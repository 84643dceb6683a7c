"""Two ranks, each with a part of the weights, by PyTorch's own tensor parallelism (DTensor)."""

import pytest
import torch
from models import TOKENS, WIDTH, DistributedStreamModel, Model
from ranks import run_ranks

import omni_cache

pytestmark = pytest.mark.slow

STEPS = 8
THRESHOLDS = [0.0, 0.2, 0.6]


def denoise(model):
    x = torch.randn(1, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        time = torch.tensor([1000 * (1 - step / STEPS)])
        x = x - model(x, time, torch.ones(1, WIDTH)) / STEPS
    return x


def loop(model, threshold, history_dtype=None):
    flags = {"forecast": "newton", "inner": "eager", "strict": True}
    flags["history_dtype"] = history_dtype
    omni_cache.enable(model, coefficients=[1.0, 0.0], rel_l1_thresh=threshold, **flags)
    with torch.no_grad():
        made = denoise(model)
    trajectories = omni_cache.summary(model).trajectories
    return made, [[step.computed for step in each.steps] for each in trajectories]


def in_parallel(rank, stream, history_dtype):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    # One dimension of a mesh with two; along the other, ranks have requests of their own.
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))["tensor"]
    if stream == "DTensor":
        model = DistributedStreamModel(mesh)
    else:
        model = Model()
        plan = {name: ColwiseParallel() for name in ("q", "k", "v")} | {"out": RowwiseParallel()}
        for block in model.blocks:
            parallelize_module(block, mesh, plan)
    return [loop(model, threshold, history_dtype) for threshold in THRESHOLDS]


@pytest.mark.parametrize(
    ("stream", "history_dtype", "tolerance"),
    [
        ("Tensor", None, 1e-5),
        ("DTensor", None, 1e-5),
        ("DTensor", "float8_e4m3fn", 1e-3),  # an element at the edge may be rounded the other way
    ],
)
def test_ranks_decide_and_compute_as_one_process_would(stream, history_dtype, tolerance):
    found = run_ranks(in_parallel, stream, history_dtype)
    whole, computed = Model(), set()
    for number, threshold in enumerate(THRESHOLDS):
        made, schedule = loop(whole, threshold, history_dtype)
        computed.add(sum(schedule[0]))
        for each in found:
            assert each[number][1] == schedule
            assert (each[number][0] - made).abs().max() < tolerance
    assert len(computed) == len(THRESHOLDS)
