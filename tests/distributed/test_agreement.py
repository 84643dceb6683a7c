"""What ranks add up before they decide, and what they make of the sums."""

import os
import subprocess
import sys

import pytest
import torch
from ranks import run_ranks

from omni_cache.runtime import agreement
from omni_cache.runtime.agreement import add_up, common, digest, local

GROUPS = [[1], [2], [8], [2, 4]]
"""Groups of ranks, by their sizes."""


@pytest.fixture(autouse=True)
def _all_ranks_find_the_same(monkeypatch):
    """A group is its size here, and all of its ranks have found what this one has."""

    def all_reduce(numbers, group):
        numbers.mul_(group)

    monkeypatch.setattr(agreement.dist, "all_reduce", all_reduce)


def agreed(*ranks):
    """What ranks agree on, of which each has a digest and what it lacks, newest first."""
    depth = len(ranks[0][1])
    parts = [add_up([], torch.tensor(lacking), going_by, []) for going_by, lacking in ranks]
    numbers = sum(parts).tolist()
    assert len(numbers) == depth + 3
    return common(numbers)


@pytest.mark.parametrize("sizes", GROUPS)
def test_sums_go_over_all_groups_one_after_the_other(sizes):
    found = [torch.tensor([1.0, 2.0]), torch.tensor([0.5])]
    numbers = add_up(found, torch.tensor([0.0, 1.0]), digest("the same"), sizes).tolist()
    ranks = torch.tensor(sizes).prod().item()
    assert numbers[:3] == [ranks, 2 * ranks, ranks / 2]
    assert common(numbers[3:]) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 1024])
def test_what_no_rank_lacks_is_reused_up_to_the_first_that_one_does(ranks):
    going_by = 2**20 - 1  # the largest there is, whose square has to be exact
    whole = (going_by, [0.0, 0.0, 0.0])
    assert agreed(*[whole] * ranks) == 3
    for age, lacking in enumerate(([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])):
        assert agreed(*[whole] * (ranks - 1), (going_by, lacking)) == age
        assert agreed(*[(going_by, lacking)] * ranks) == age
    assert agreed(*[whole] * (ranks - 1), (going_by, [0.0, 1.0, 1.0])) == 1


@pytest.mark.parametrize(
    "digests", [(0, 1), (5, 5, 6), (2**20 - 1, 2**20 - 2), (0, 0, 0, 2**20 - 1)]
)
def test_ranks_that_go_by_different_things_reuse_nothing(digests):
    assert agreed(*((each, [0.0]) for each in digests)) == 0


def test_a_digest_is_small_and_tells_states_apart():
    states = [(branch, step, 8, (step / 7,)) for branch in ("cond", "uncond") for step in range(50)]
    digests = {digest(each) for each in states}
    assert len(digests) == len(states)
    assert all(0 <= each < 2**20 for each in digests)


def test_a_digest_is_the_same_in_every_process():
    code = (
        "from omni_cache.runtime.agreement import digest; print(digest(('cond', 3)), hash('cond'))"
    )
    # Another seed than this process has, so that strings have other hashes.
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    made, hashed = map(int, found.stdout.split())
    assert hashed != hash("cond")
    assert made == digest(("cond", 3))


def test_a_tensor_of_one_process_is_its_own_part():
    whole = torch.ones(3)
    assert local(whole) is whole


def parts(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    line = init_device_mesh("cpu", (2,))
    plane = init_device_mesh("cpu", (2, 1))
    own = torch.tensor([1.0, 2.0]) * (1 + rank)
    return {
        "sharded": local(DTensor.from_local(own, line, [Shard(0)])),
        "replicated": local(DTensor.from_local(own, line, [Replicate()], run_check=False)),
        "summand": local(DTensor.from_local(own, line, [Partial()])),
        "sharded and summand": local(DTensor.from_local(own, plane, [Shard(0), Partial()])),
    }


@pytest.mark.slow
def test_a_rank_has_its_own_values_and_the_sum_of_summands():
    for rank, found in enumerate(run_ranks(parts)):
        own, total = [1.0 + rank, 2.0 + 2 * rank], [3.0, 6.0]
        assert {name: each.tolist() for name, each in found.items()} == {
            "sharded": own,
            "replicated": own,
            "summand": total,
            "sharded and summand": own,
        }
