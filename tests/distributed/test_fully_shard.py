"""Two ranks that share the weights of every block, by ``fully_shard`` (FSDP2).

PyTorch keeps Dynamo out of its hooks, so that no graph holds blocks that are sharded one by one: an
extractor does. A model that is sharded as a whole is captured behind its hooks.
"""

import pytest
import torch
from models import TOKENS, WIDTH, Model, take_apart
from ranks import run_ranks

import omni_cache
from omni_cache import RegionError

pytestmark = pytest.mark.slow

STEPS = 8
TEACACHE = {"cache": "teacache", "coefficients": [1.0, 0.0]}
MAGCACHE = {
    "cache": "magcache",
    "mag_ratios": [1.0, 0.9, 1.1, 0.95, 1.05, 0.9, 1.08, 0.97],
    "num_inference_steps": STEPS,
}
FLAGS = [
    {**TEACACHE, "rel_l1_thresh": 0.0},
    {**TEACACHE, "rel_l1_thresh": 0.2},
    {**TEACACHE, "rel_l1_thresh": 0.6},
    {**MAGCACHE, "threshold": 0.06},
    {**MAGCACHE, "threshold": 0.21, "max_skip_steps": 2},
]


class Extracted(Model):
    """One that an extractor takes apart."""


def denoise(model, seed=1):
    x = torch.randn(1, TOKENS, 4, generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        time = torch.tensor([1000 * (1 - step / STEPS)])
        x = x - model(x, time, torch.ones(1, WIDTH)) / STEPS
    return x


def loops(model, inner="eager", shard_enabled=None, seed=1):
    omni_cache.register_extractor(Extracted, take_apart)
    found = []
    for flags in FLAGS:
        omni_cache.enable(model, inner=inner, strict=True, **flags)
        if shard_enabled is not None and not found:
            shard_enabled(model)
        made = denoise(model, seed)
        trajectories = omni_cache.summary(model).trajectories
        found.append((made, [[step.computed for step in each.steps] for each in trajectories]))
    return found


def shard_whole(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def shard_blocks(model):
    for block in model.blocks:
        shard_whole(block)
    return model


def refusal(model):
    omni_cache.enable(model, inner="eager", strict=True)
    try:
        denoise(model)
    except RegionError as error:
        return str(error)


def work(rank):
    return {
        "refusal": refusal(shard_blocks(Model())),
        "enabled before": loops(Extracted(), shard_enabled=shard_blocks),
        "enabled after": loops(shard_blocks(Extracted()), "aot_eager"),
        "whole": loops(shard_whole(Model())),
        "own requests": loops(shard_blocks(Extracted()), seed=rank),
    }


@pytest.fixture(scope="module")
def found():
    return run_ranks(work)


@pytest.mark.parametrize("way", ["enabled before", "enabled after", "whole"])
def test_ranks_decide_and_compute_as_one_process_would(found, way):
    with torch.no_grad():
        expected = loops(Model() if way == "whole" else Extracted())
    for each in found:
        for (made, schedule), (whole, one) in zip(each[way], expected, strict=True):
            assert schedule == one
            assert (made - whole).abs().max() < 1e-5
    assert len({sum(schedule[0]) for _, schedule in expected}) > 3


def test_ranks_with_requests_of_their_own_decide_alike(found):
    one, other = ([schedule for _, schedule in each["own requests"]] for each in found)
    assert one == other


def test_without_an_extractor_the_reason_is_told(found):
    for each in found:
        assert "fully_shard" in each["refusal"]
        assert "register_extractor" in each["refusal"]
