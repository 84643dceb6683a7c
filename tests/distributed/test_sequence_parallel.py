"""Two ranks, each with a part of the tokens, whose blocks gather keys and values."""

import contextlib
import random

import pytest
import torch
import torch.distributed as dist
from models import TOKENS, WIDTH, Model, SequenceParallelBlock, take_apart
from plans_by_hand import plan
from ranks import run_ranks

import omni_cache
from omni_cache.pipelines.enable import _enabled
from omni_cache.pipelines.identity import owner_of
from omni_cache.runtime.inference import LEARNED
from omni_cache.strategies.gates import Accumulated

pytestmark = pytest.mark.slow

LENGTHS = [3, 5]
STEPS = 10


class Counted(contextlib.AbstractContextManager):
    """Counts the all_reduce calls within it; the models here gather."""

    def __enter__(self):
        self.calls, self._original = 0, dist.all_reduce
        dist.all_reduce = self._all_reduce
        return self

    def _all_reduce(self, *args, **kwargs):
        self.calls += 1
        return self._original(*args, **kwargs)

    def __exit__(self, *error):
        dist.all_reduce = self._original


def own_tokens(whole, rank):
    start = sum(LENGTHS[:rank])
    return whole[:, start : start + LENGTHS[rank]]


def denoise(model, x, moves=1.0, prompt=None, first=0, until=None, steps=STEPS):
    """What a sampler does; ``moves`` is how far each token goes."""
    prompt = torch.ones(1, WIDTH) if prompt is None else prompt
    for step in range(first, until or steps):
        noise = model(x, torch.tensor([1000 * (1 - step / steps)]), prompt)
        x = x - moves * noise / steps
    return x


def noise(seed=1):
    return torch.randn(1, TOKENS, 4, generator=torch.Generator().manual_seed(seed))


def uneven():
    """The first tokens are those of a given picture and stay; so all of rank 0's do."""
    moves = torch.ones(1, TOKENS, 1)
    moves[:, : LENGTHS[0]] = 0
    return moves


def schedules(model):
    return [
        [step.computed for step in each.steps] for each in omni_cache.summary(model).trajectories
    ]


def parallel_model():
    return Model(SequenceParallelBlock, LENGTHS, dist.group.WORLD)


def enabled(model, **flags):
    """A model that has forgotten whatever it was enabled for before."""
    omni_cache.refresh(
        omni_cache.enable(model, coefficients=[1.0, 0.0], inner="eager", strict=True, **flags)
    )
    return model


THRESHOLDS = [0.0, 0.02, 0.1, 0.3, 1.0]


def follow_one_process(model, rank):
    found = []
    for threshold in THRESHOLDS:
        enabled(model, rel_l1_thresh=threshold)
        with Counted() as counted:
            made = denoise(model, own_tokens(noise(), rank), own_tokens(uneven(), rank))
        found.append((schedules(model), made, counted.calls))
    return found


SAMPLES = {
    "dmd": {"rel_l1_thresh": 0.3, "forecast": "dmd"},
    "foca": {"rel_l1_thresh": 0.3, "forecast": "foca"},
    "first_block_cache": {"cache": "first_block_cache", "threshold": 0.1},
    "stepcache": {"cache": "stepcache", "sim_thresholds": (0.99,), "skip_countdowns": (2,)},
    "easycache": {"cache": "easycache", "threshold": 0.03, "retention_steps": 2},
    "dicache": {"cache": "dicache", "threshold": 0.3},
}
"""Strategies whose decision or forecast takes something else than TeaCache's sums."""


def denoise_with(flags, model, x, moves):
    own = {} if "cache" in flags else {"coefficients": [1.0, 0.0]}
    omni_cache.enable(model, inner="eager", strict=True, **own, **flags)
    with torch.no_grad():
        return denoise(model, x, moves, steps=20)


def follow_one_process_with(flags, rank):
    model = parallel_model()
    made = denoise_with(flags, model, own_tokens(noise(), rank), own_tokens(uneven(), rank))
    return schedules(model), made


def loop_over_thresholds(model, count, rank):
    found, draw = [], random.Random(0)
    for number in range(count):
        enabled(model, rel_l1_thresh=draw.uniform(0, 0.5))
        denoise(model, own_tokens(noise(number), rank), rank, steps=6)
        found += schedules(model)
    return found


def release(trajectory, course):
    trajectory.release()


def change_layout(trajectory, course):
    trajectory.layout = trajectory.layout._replace(computation="another")


def lose_finiteness(trajectory, course):
    trajectory.history.kept[0].is_finite = False


def lose_finiteness_unread(trajectory, course):
    newest = trajectory.history.kept[0]
    newest.is_finite, newest.finite = None, torch.tensor(False)


def accumulate(trajectory, course):
    trajectory.state = Accumulated(5.0)


def forget_a_step(trajectory, course):
    course.last = course.last._replace(index=course.last.index - 1)


def learn_late(trajectory, course):
    course.conditioning = course.conditioning._replace(calls=LEARNED)


DISTURBANCES = {
    each.__name__: each
    for each in (
        release,
        change_layout,
        lose_finiteness,
        lose_finiteness_unread,
        accumulate,
        forget_a_step,
        learn_late,
    )
}


def go_on_after(disturb, model, rank):
    """A loop in which all is reused that can be, and in whose middle one rank is disturbed."""
    enabled(model, rel_l1_thresh=10.0, forecast="newton")
    x = denoise(model, own_tokens(noise(), rank), steps=STEPS, until=5)
    state = _enabled[model].state
    if rank == 1:
        (trajectory,) = state.latest.trajectories.values()
        (course,) = state.latest.courses.values()
        disturb(trajectory, course)
    denoise(model, x, first=5)
    return schedules(model)


def change_the_prompt_of_one_rank(model, rank):
    enabled(model, rel_l1_thresh=10.0)
    x = denoise(model, own_tokens(noise(), rank), until=5)
    denoise(model, x, first=5, prompt=torch.ones(1, WIDTH) * (1 + rank))
    return schedules(model)


def two_branches(model, rank):
    """Guidance whose prompts only rank 1 can tell apart, and whose order changes."""
    enabled(model, rel_l1_thresh=10.0)
    x = own_tokens(noise(), rank)
    for step in range(STEPS):
        for branch in (0, 1) if step < 5 else (1, 0):
            prompt = torch.ones(1, WIDTH) * (1 + branch * rank)
            x = x - model(x, torch.tensor([1000.0 - 50 * step]), prompt) / STEPS
    return schedules(model)


def measure_nothing(rank):
    """MagCache, on ranks one of which has residuals that are not finite."""
    model = parallel_model()
    omni_cache.enable(
        model, "magcache", mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, inner="eager"
    )
    with Counted() as counted:
        x = denoise(model, own_tokens(noise(), rank), until=5)
        state = _enabled[model].state
        (trajectory,) = state.latest.trajectories.values()
        trajectory.history.kept[0].is_finite = rank == 0
        denoise(model, x, first=5)
    return schedules(model), counted.calls


def follow_a_plan(model, x, moves):
    """The same steps on every rank, without a word between them."""
    fields = {
        "branches": ("branch 0",),
        "transformers": {"": ("Model", owner_of("", model).digest)},
        "timesteps": tuple(1000 * (1 - step / STEPS) for step in range(STEPS)),
        "size": (TOKENS, 4),
    }
    followed = plan("ccrcrrcrrr", guardrail=3.0, **fields)
    omni_cache.enable(model, followed, inner="eager", strict=True)
    with Counted() as counted, torch.no_grad():
        made = denoise(model, x, moves)
    return schedules(model), made, counted.calls


def planned(rank):
    return follow_a_plan(parallel_model(), own_tokens(noise(), rank), own_tokens(uneven(), rank))


class ExtractedModel(Model):
    """One whose blocks no graph shows."""


def extracted(rank):
    """Blocks that only an extractor knows, whose group the caller names."""
    omni_cache.register_extractor(ExtractedModel, take_apart)
    model, found = ExtractedModel(SequenceParallelBlock, LENGTHS, dist.group.WORLD), []
    for threshold in THRESHOLDS:
        enabled(model, rel_l1_thresh=threshold, process_group=dist.group.WORLD)
        with Counted() as counted:
            denoise(model, own_tokens(noise(), rank), own_tokens(uneven(), rank))
        found.append((schedules(model), counted.calls))
    return found


def everything(rank, count):
    # Each is compiled once, for all that is asked of it.
    model, forecasting = parallel_model(), parallel_model()
    return {
        "extracted": extracted(rank),
        "thresholds": follow_one_process(model, rank),
        "with": {name: follow_one_process_with(each, rank) for name, each in SAMPLES.items()},
        "random": loop_over_thresholds(model, count, rank),
        **{name: go_on_after(each, forecasting, rank) for name, each in DISTURBANCES.items()},
        "prompt": change_the_prompt_of_one_rank(model, rank),
        "branches": two_branches(model, rank),
        "magcache": measure_nothing(rank),
        "plan": planned(rank),
    }


@pytest.fixture(scope="module")
def count(pytestconfig):
    """Of random thresholds."""
    return 200 if pytestconfig.getoption("--exhaustive") else 50


@pytest.fixture(scope="module")
def found(count):
    return run_ranks(everything, count)


def test_ranks_follow_a_plan_without_a_collective(found):
    alone, made, _ = follow_a_plan(Model(), noise(), uneven())
    assert alone == [[each == "c" for each in "ccrcrrcrrr"]]
    for rank, each in enumerate(found):
        schedule, part, calls = each["plan"]
        assert schedule == alone
        assert (part - own_tokens(made, rank)).abs().max() < 1e-5
        assert calls == 0


def test_ranks_with_parts_of_unequal_size_decide_as_one_process_would(found):
    whole, computed = Model(), set()
    for number, threshold in enumerate(THRESHOLDS):
        enabled(whole, rel_l1_thresh=threshold)
        with torch.no_grad():
            made = denoise(whole, noise(), uneven())
        computed.add(sum(schedules(whole)[0]))
        for rank, each in enumerate(found):
            schedule, part, _ = each["thresholds"][number]
            assert schedule == schedules(whole)
            assert (part - own_tokens(made, rank)).abs().max() < 1e-5
    assert len(computed) > 3


@pytest.mark.parametrize("name", SAMPLES)
def test_whatever_is_measured_ranks_do_as_one_process_would(found, name):
    whole = Model()
    made = denoise_with(SAMPLES[name], whole, noise(), uneven())
    (expected,) = schedules(whole)
    assert 3 <= sum(expected) < len(expected) - 3
    for rank, each in enumerate(found):
        schedule, part = each["with"][name]
        assert schedule == [expected]
        assert (part - own_tokens(made, rank)).abs().max() < 1e-4


def test_every_call_has_one_collective_of_the_cache(found):
    for each in found:
        assert [calls for _, _, calls in each["thresholds"]] == [STEPS] * len(THRESHOLDS)


def test_ranks_agree_at_random_thresholds(found, count):
    one, other = (each["random"] for each in found)
    assert one == other
    assert len(one) == count
    assert len(set(map(str, one))) > 3


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_where_one_rank_cannot_reuse_all_compute_once_and_go_on(found, disturbance):
    one, other = (each[disturbance] for each in found)
    assert one == other
    assert one == [[True, *[False] * 4, True, *[False] * 4]]


def test_an_extracted_model_agrees_over_the_group_that_is_named(found):
    one, other = (each["extracted"] for each in found)
    assert one == other
    assert all(calls == STEPS for _, calls in one)
    assert len({sum(schedule[0]) for schedule, _ in one}) > 2


def test_another_prompt_on_one_rank_is_another_request_on_all(found):
    for each in found:
        assert each["prompt"] == [[True, *[False] * 4]]  # the rest of the loop, as one of its own


def test_branches_that_one_rank_tells_apart_are_told_apart_on_all(found):
    one, other = (each["branches"] for each in found)
    assert one == other
    assert [len(branch) for branch in one] == [STEPS, STEPS]


def test_a_gate_that_measures_nothing_uses_no_collective_and_no_rank_departs(found):
    (one, calls), (other, other_calls) = (each["magcache"] for each in found)
    assert one == other
    assert 0 < sum(one[0]) < STEPS
    assert calls == other_calls == 0
