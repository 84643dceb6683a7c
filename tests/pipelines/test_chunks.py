"""Pipelines that go through their timesteps several times after one ``set_timesteps``.

Long videos are made chunk by chunk. Every chunk is a generation of its own, with the schedule of
the first one and with its predictions: nothing of a chunk reaches the next.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from toy_pipeline import ToyPipeline, magcache_schedule
from toy_transformer import CHANNELS, TEACACHE, TOKENS, gaussian

import omni_cache

RATIOS = [1.0, 0.95, 1.04, 0.9, 1.08, 0.93, 1.1, 0.85]
MAGCACHE: dict[str, Any] = {
    "cache": "magcache",
    "mag_ratios": RATIOS,
    "threshold": 0.3,
    "max_skip_steps": 2,
    "retention_ratio": 0.2,
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "teacache": {**TEACACHE, "force_last_step": True},
    "magcache": MAGCACHE,
}


def copied(pipe: Chunked) -> Any:
    """A scheduler for the chunk alone, as SkyReels-V2 makes it."""
    return copy.deepcopy(pipe.scheduler)


def rewound(pipe: Chunked) -> Any:
    """The pipeline's own, which begins to count anew."""
    pipe.scheduler._step_index = None
    return pipe.scheduler


def same(pipe: Chunked) -> Any:
    """The pipeline's own, which keeps no count."""
    return pipe.scheduler


FLOW = diffusers.FlowMatchEulerDiscreteScheduler
WAYS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "copied": (FLOW, copied),
    "rewound": (FLOW, rewound),
    "uncounted": (diffusers.DDIMScheduler, same),
    "copied, second order": (diffusers.FlowMatchHeunDiscreteScheduler, copied),
}
"""What chunks are stepped by."""


class Chunked(ToyPipeline):
    """Makes chunks, each with noise of its own, and keeps the schedule that each of them had."""

    def __init__(self, way: str, prompts: Sequence[str], names_branches: bool) -> None:
        kind, self.begin = WAYS[way]
        super().__init__(scheduler=kind(), names_branches=names_branches)
        self.prompts = prompts

    @torch.no_grad()
    def __call__(
        self, chunks: Sequence[int], steps: int = 8, ends: dict[int, int] | None = None
    ) -> list[torch.Tensor]:
        """The latents of chunks by their seeds; ``ends`` has those that end early, and when."""
        self.schedules: list[list[list[int]]] = []
        words = {name: gaussian(name, 1, 5, CHANNELS) for name in self.prompts}
        self.scheduler.set_timesteps(steps)
        made = []
        for chunk, seed in enumerate(chunks):
            calls = (ends or {}).get(chunk, -1)
            latents, scheduler = gaussian(seed, 1, TOKENS, CHANNELS), self.begin(self)
            for timestep in self.scheduler.timesteps:
                noises = []
                for name, prompt in words.items():
                    if calls == 0:
                        break
                    calls -= 1
                    named = self.transformer.cache_context(name)
                    with named if self.names_branches else nullcontext():
                        noises.append(self.transformer(latents, timestep.expand(1), prompt))
                if calls == 0:
                    break
                noise = torch.stack(noises).mean(0)
                latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
            self.schedules.append(
                [
                    [step.index for step in each.steps if step.computed]
                    for each in omni_cache.summary(self).trajectories
                ]
            )
            made.append(latents)
        return made


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def enabled(way: str, prompts: Sequence[str], named: bool, **flags: Any) -> Chunked:
    return omni_cache.enable(Chunked(way, prompts, named), inner="eager", **flags)


PROMPTS = [("cond",), ("cond", "uncond")]
BRANCHES = [
    # Two branches show all that one does, and that they are told apart.
    pytest.param(PROMPTS[0], True, marks=pytest.mark.exhaustive),
    (PROMPTS[1], True),
    (PROMPTS[1], False),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("prompts", "named"), BRANCHES)
@pytest.mark.parametrize("way", WAYS)
def test_every_chunk_is_made_as_if_it_were_the_only_one(
    way: str, prompts: Sequence[str], named: bool, strategy: str
) -> None:
    if way == "copied, second order" and not named:
        pytest.skip("nothing tells two calls at one timestep apart from two branches")
    flags = STRATEGIES[strategy]
    alone = enabled(way, prompts, named, **flags)
    pipe = enabled(way, prompts, named, **flags)
    # Other numbers of steps than there are ratios, too, and more than a strategy assumes.
    for steps, chunks in ((8, [0, 1, 2]), (5, [3, 0]), (40, [1, 2]), (8, [0])):
        made = pipe(chunks, steps)
        for number, seed in enumerate(chunks):
            (expected,) = alone([seed], steps)
            assert pipe.schedules[number] == alone.schedules[0], (steps, number)
            assert len(pipe.schedules[number]) == len(prompts)
            assert torch.equal(made[number], expected), (steps, number)


@pytest.mark.parametrize("prompts", PROMPTS, ids=["one", "two"])
@pytest.mark.parametrize("way", ["copied", "rewound", "uncounted"])
def test_ratios_are_those_of_the_chunks_own_steps(way: str, prompts: Sequence[str]) -> None:
    pipe = enabled(way, prompts, True, **MAGCACHE)
    pipe([0, 1, 2])
    assert pipe.schedules == [[magcache_schedule(MAGCACHE, 8)] * len(prompts)] * 3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("prompts", "named"), BRANCHES)
@pytest.mark.parametrize("way", ["copied", "rewound", "uncounted"])
def test_a_chunk_after_one_that_ended_early_sees_nothing_of_it(
    way: str, prompts: Sequence[str], named: bool, strategy: str
) -> None:
    flags = STRATEGIES[strategy]
    alone, pipe = (enabled(way, prompts, named, **flags) for _ in range(2))
    expected = alone([1])
    for calls in (2 * len(prompts), 2 * len(prompts) + 1, 7 * len(prompts)):
        made = pipe([0, 1, 1], ends={0: calls})
        for number in (1, 2):
            assert pipe.schedules[number] == alone.schedules[0], (calls, number)
            assert torch.equal(made[number], expected[0]), (calls, number)


@pytest.mark.parametrize("named", [True, False], ids=["named", "inferred"])
def test_chunks_of_one_step_are_all_computed(named: bool) -> None:
    alone, pipe = (enabled("copied", ("cond",), named, **MAGCACHE) for _ in range(2))
    made = pipe([0, 1, 2], steps=1)
    assert all(torch.equal(each, alone([seed], steps=1)[0]) for seed, each in enumerate(made))
