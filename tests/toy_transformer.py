"""A transformer that compiles in a blink, and denoising loops over it as users write them.

The runtime knows no model, so its tests need none that is real: two blocks of attention with a
modulated input, a timestep and a prompt. What a generation does is read from every prediction that
its loop made and from the summary.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import omni_cache

TOKENS, CHANNELS, WIDTH = 6, 4, 16

TEACACHE: dict[str, Any] = {"cache": "teacache", "coefficients": [1.0, 0.0], "rel_l1_thresh": 0.12}
"""Reuses about every second step of an eight-step loop over the toy."""

MAGCACHE: dict[str, Any] = {
    "cache": "magcache",
    "mag_ratios": [1.0, 0.9, 1.1, 0.95, 1.05, 0.9, 1.08, 0.97],
    "threshold": 0.21,
    "max_skip_steps": 2,
    "num_inference_steps": 8,
}
"""Likewise; the ratios differ from step to step, so that a wrong step index shows."""

NEVER_REUSE: dict[str, Any] = {**TEACACHE, "rel_l1_thresh": 0.0}
ALWAYS_REUSE: dict[str, Any] = {**TEACACHE, "rel_l1_thresh": 1e9}

STRATEGIES = {"teacache": TEACACHE, "magcache": MAGCACHE}


class Block(nn.Module):
    """x + out(attention(norm(x) * (1 + scale) + shift)), (B, S, WIDTH) -> (B, S, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        scale, shift = self.modulation(time)[:, None].chunk(2, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift)[:, None].chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0])


class ToyTransformer(nn.Module):
    """Denoises (B, S, CHANNELS) latents, given a timestep and (B, L, CHANNELS) prompts."""

    def __init__(self, seed: int = 0, blocks: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(CHANNELS, WIDTH)
            self.embed_time = nn.Linear(1, WIDTH)
            self.embed_prompt = nn.Linear(CHANNELS, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(blocks))
            self.project = nn.Linear(WIDTH, CHANNELS)
        self.eval().requires_grad_(False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        prompt: Tensor | None = None,
        mask: Tensor | None = None,
        return_dict: bool = False,
    ) -> Any:
        x = self.embed(hidden_states)
        time = x.mean(1) if prompt is None else self.embed_prompt(prompt).mean(1)
        if timestep is not None:
            moment = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
            each = moment.float().mean(1) if moment.dim() == 2 else moment.float()  # per token
            time = time + self.embed_time(each.reshape(-1, 1) / 500)
        for block in self.blocks:
            x = block(x, time, mask)
        noise = self.project(x)
        return {"sample": noise} if return_dict else noise


def gaussian(name: object, *shape: int) -> Tensor:
    """A Gaussian tensor that depends on its name alone; a new object each time."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(name).encode()))
    return torch.randn(shape, generator=generator)


class AbandonedError(Exception):
    """What an abandoned loop raises."""


@dataclass(frozen=True)
class Loop:
    """A denoising loop as a user writes it.

    Attributes:
        prompts: one per guidance branch, by a name that stands for its words.
        seed: of the initial noise.
        steps: their number.
        explicit: say ``generation`` and ``branch``, instead of leaving it to the timestep.
        calls: raise `AbandonedError` after so many calls of the model; None to go to the end.
    """

    prompts: Sequence[str] = ("cond",)
    seed: int = 0
    steps: int = 8
    explicit: bool = False
    calls: int | None = None

    @property
    def timesteps(self) -> list[float]:
        """Falling from 1000 to above 0."""
        return [1000.0 * (1 - step / self.steps) for step in range(self.steps)]

    def run(self, model: Callable[..., Tensor]) -> list[Tensor]:
        """Every prediction of the loop, in the order of the calls."""
        return list(self.predictions(model))

    def predictions(self, model: Callable[..., Tensor]) -> Iterator[Tensor]:
        """The predictions one by one, so that loops can take turns."""
        # Pipelines encode the prompt once and pass the same objects at every step.
        prompts = {name: gaussian(name, 1, 5, CHANNELS) for name in self.prompts}
        latents = gaussian(self.seed, 1, TOKENS, CHANNELS)
        calls = 0
        with omni_cache.generation(self.steps) if self.explicit else contextlib.nullcontext():
            for timestep in self.timesteps:
                noises = []
                for name, prompt in prompts.items():
                    if calls == self.calls:
                        raise AbandonedError
                    with omni_cache.branch(name) if self.explicit else contextlib.nullcontext():
                        noises.append(model(latents, torch.tensor([timestep]), prompt))
                    calls += 1
                    yield noises[-1]
                latents = latents - torch.stack(noises).mean(0) / self.steps


def compiled(
    model: nn.Module, *, dynamic: bool | None = None, **flags: Any
) -> Callable[..., Tensor]:
    """The model, compiled with TeaCache and inner="eager" unless the flags say otherwise."""
    options = {"inner": "eager", **(flags if "cache" in flags else {**TEACACHE, **flags})}
    return torch.compile(model, backend="omni_cache", dynamic=dynamic, options=options)  # type: ignore[no-any-return]


def alone(loop: Loop, **flags: Any) -> list[Tensor]:
    """The predictions of a loop over a newly built and compiled model: nothing came before."""
    return loop.run(compiled(ToyTransformer(), **flags))


def digest(predictions: Iterable[Tensor]) -> str:
    """Equal for two lists of predictions exactly when they agree bit for bit."""
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in predictions)).hexdigest()


def same(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Whether two lists of tensors agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def computed(target: Any) -> list[list[bool]]:
    """For each branch of the latest generation, which steps were computed."""
    return [
        [step.computed for step in trajectory.steps]
        for trajectory in omni_cache.summary(target).trajectories
    ]


def reasons(target: Any) -> list[list[str]]:
    """For each branch of the latest generation, the reasons of its steps."""
    return [
        [step.reason for step in trajectory.steps]
        for trajectory in omni_cache.summary(target).trajectories
    ]


class FlakyCompiler:
    """An inner compiler whose parts raise once, when so many of them have run."""

    def __init__(self) -> None:
        self.compilations = 0
        self.remaining: int | None = None

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        self.compilations += 1

        def run(*args: Any) -> Any:
            if self.remaining is not None:
                self.remaining -= 1
                if self.remaining < 0:
                    self.remaining = None
                    raise AbandonedError
            return gm.forward(*args)

        return run


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Expect the loop in this context to be abandoned."""
    try:
        yield
    except AbandonedError:
        return
    raise AssertionError("the loop was not abandoned")
