"""A pipeline as vLLM-Omni has them, without it, and a runner that drives it as theirs does.

A pipeline is a module that owns its transformer and perhaps a scheduler, opens no contexts, and
says in one of several ways, or in none, which guidance branch a call is for. A runner enables a
backend when it loads the pipeline and refreshes it before each request.

    check_requests(lambda: FakePipeline(), lambda: get_cache_backend("tea_cache", {...}), REQUESTS)

runs all requests one after the other, aborted ones among them, and compares each with what a new
pipeline and a new backend make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from toy_transformer import CHANNELS, TOKENS, ToyTransformer, gaussian

Tags = Literal["none", "do_true_cfg", "branch ids", "stamps"]


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        prompt: the words.
        others: words of the other guidance branches, one or two of them.
        steps: their number.
        seed: of the noise.
        announced: the number of steps that the runner is told; None as ``steps``.
        abort: raise `AbortedError` after so many calls of the transformer.
        skipped: the steps at which only the first branch is called (a guidance interval).
        size: how many tokens the latents have.
    """

    prompt: str = "a fox"
    others: tuple[str, ...] = ()
    steps: int = 8
    seed: int = 0
    announced: int | None = None
    abort: int | None = None
    skipped: tuple[int, ...] = ()
    size: int = TOKENS


REQUESTS = (
    Request(),
    Request(),  # the same step count and the same words
    Request("a hare", seed=1),
    Request("a hare", ("blurry",), seed=1),
    Request("an owl", ("blurry",), steps=12, abort=9),
    Request("an owl", ("blurry",), steps=12),
    Request("an owl", ("blurry", "noisy"), steps=6, seed=2),
    Request("a hare", ("blurry", "noisy"), steps=10, abort=7),
    Request("a fox", ("blurry",), steps=8, skipped=(3, 4)),
    Request("a fox", ("noisy",), steps=8, announced=0),
    Request("a fox", steps=5, size=4),
    Request(),
)
"""What one server gets: words, steps, sizes and branches change; some loops are given up."""


class AbortedError(Exception):
    """What a request that is given up raises."""


class FakeTransformer(ToyTransformer):
    """Has the attribute by which pipelines say that calls alternate between two branches."""

    do_true_cfg = False


class FakeScheduler:
    """Euler steps of flow matching; it counts none of them."""

    def __init__(self) -> None:
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None

    def set_timesteps(self, steps: int) -> None:
        self.num_inference_steps = steps
        self.timesteps = torch.linspace(1000, 1000 / steps, steps)

    def step(self, noise: Tensor, latents: Tensor) -> Tensor:
        assert self.num_inference_steps is not None
        return latents - noise / self.num_inference_steps


class FakePipeline(nn.Module):
    """Denoises with one transformer, or with two that take turns.

    Args:
        tags: how the branch of a call is said.
        owns_scheduler: whether it keeps its scheduler where anybody can see it.
        experts: whether a second transformer takes the second half of the steps.
        name: of the attribute that holds the transformer.
        make: makes a transformer, from a seed.
    """

    def __init__(
        self,
        tags: Tags = "none",
        owns_scheduler: bool = True,
        experts: bool = False,
        name: str = "transformer",
        make: Callable[[int], nn.Module] = FakeTransformer,
    ) -> None:
        super().__init__()
        self.tags, self.name = tags, name
        setattr(self, name, make(0))
        if experts:
            self.transformer_2 = make(1)
        self.denoiser = FakeScheduler()
        if owns_scheduler:
            self.scheduler = self.denoiser

    def encode_prompt(self, prompt: str) -> Tensor:
        return gaussian(prompt, 1, 5, CHANNELS)

    def forward(self, request: Request) -> Tensor:
        words = [self.encode_prompt(each) for each in (request.prompt, *request.others)]
        latents, calls = gaussian(request.seed, 1, request.size, CHANNELS), 0
        self.denoiser.set_timesteps(request.steps)
        timesteps = self.denoiser.timesteps
        assert timesteps is not None
        for step, timestep in enumerate(timesteps):
            late = hasattr(self, "transformer_2") and step >= request.steps // 2
            transformer: Any = self.transformer_2 if late else getattr(self, self.name)
            noises = []
            for place, embedding in enumerate(words[: 1 if step in request.skipped else None]):
                if calls == request.abort:
                    raise AbortedError
                self._tag(transformer, place, len(words))
                noises.append(transformer(latents, timestep.expand(1), embedding))
                calls += 1
            noise = noises[0] + sum(0.5 * (noises[0] - each) for each in noises[1:])
            latents = self.denoiser.step(noise, latents)
        return latents

    def _tag(self, transformer: Any, place: int, branches: int) -> None:
        transformer.do_true_cfg = self.tags == "do_true_cfg" and branches > 1
        if self.tags == "branch ids":
            transformer._teacache_branch_id = place
        elif self.tags == "stamps":
            transformer.cfg_branch = "negative" if place else "positive"


class FakeRunner:
    """Loads a pipeline with a backend, and runs requests on it."""

    def __init__(self, pipeline: Any, backend: Any) -> None:
        self.pipeline, self.backend = pipeline, backend
        if backend is not None:
            backend.enable(pipeline)

    @torch.no_grad()
    def run(self, request: Request, refresh: bool = True) -> Tensor | None:
        """The latents; None where the request is aborted."""
        if refresh and self.backend is not None:
            announced = request.steps if request.announced is None else request.announced
            self.backend.refresh(self.pipeline, announced)
        try:
            latents: Tensor = self.pipeline(request)
        except AbortedError:
            return None
        return latents


def check_requests(
    make_pipeline: Callable[[], Any],
    make_backend: Callable[[], Any],
    requests: Sequence[Request] = REQUESTS,
    refresh: bool = True,
) -> None:
    """Every request gives, bit for bit, what it gives on a new pipeline with a new backend."""
    runner = FakeRunner(make_pipeline(), make_backend())
    for place, request in enumerate(requests):
        got = runner.run(request, refresh)
        expected = FakeRunner(make_pipeline(), make_backend()).run(request)
        if got is None or expected is None:
            assert got is expected
        else:
            assert torch.equal(got, expected), f"request {place}: {request}"
