"""Real diffusers pipelines around the tiny transformers, without text encoders and VAE.

They are called with embeddings in place of a prompt and give latents in place of a picture: the
denoising loop, which is what caching listens to, is all that they do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)
from diffusers_models import CASES, POOLED_CHANNELS, TEXT, TEXT_CHANNELS
from torch import Tensor

STEPS = 8

# As few blocks as there can be: most of what a test takes is their compilation.
_FLUX = {"num_layers": 1, "num_single_layers": 1}
_SD3 = {"num_layers": 2, "dual_attention_layers": ()}
_WAN = {"num_layers": 1}


def transformer(name: str, config: Mapping[str, Any], seed: int = 0) -> Any:
    """One of the tiny transformers, with another configuration."""
    case = CASES[name]
    return replace(case, config={**case.config, **config}).build(seed)


def embedding(name: str, *shape: int) -> Tensor:
    """What a text encoder would make of a prompt, (1, *shape)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(1, *shape, generator=generator)


@dataclass(frozen=True)
class TinyPipeline:
    """A kind of pipeline.

    Attributes:
        build: Makes one; all that are made have equal weights.
        branches: The names that its guidance branches have in the summary.
        size: The arguments for the size of what it generates.
        guidance: The argument that switches guidance on.
        pooled: Whether it takes a pooled prompt embedding, too.
    """

    build: Callable[[], Any]
    branches: tuple[str, ...]
    size: dict[str, int]
    guidance: dict[str, float]
    pooled: bool = True

    def generate(
        self,
        pipe: Any,
        prompt: str = "a fox",
        seed: int = 0,
        steps: int = STEPS,
        after_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """The latents for a prompt; `after_step` is called with the index of each step done."""
        arguments: dict[str, Any] = {**self.size, **self.guidance}
        for kind, words in (("", prompt), ("negative_", "blurry")):
            arguments[f"{kind}prompt_embeds"] = embedding(words, TEXT, TEXT_CHANNELS)
            if self.pooled:
                arguments[f"{kind}pooled_prompt_embeds"] = embedding(words, POOLED_CHANNELS)

        def callback(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            if after_step is not None:
                after_step(step)
            return tensors

        (latents,) = pipe(
            **arguments,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=callback,
            output_type="latent",
            return_dict=False,
        )
        return latents


def _flux() -> Any:
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=transformer("flux", _FLUX),
            vae=None,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
        )
    )


def _sd3() -> Any:
    return _quiet(
        StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=transformer("sd3", _SD3),
            vae=None,
            text_encoder=None,
            text_encoder_2=None,
            text_encoder_3=None,
            tokenizer=None,
            tokenizer_2=None,
            tokenizer_3=None,
        )
    )


def _wan(experts: int) -> Any:
    models = [transformer("wan", _WAN, seed) for seed in range(experts)]
    return _quiet(
        WanPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=models[0],
            transformer_2=models[1] if experts > 1 else None,
            boundary_ratio=0.8 if experts > 1 else None,
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )
    )


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


WAN = TinyPipeline(
    lambda: _wan(experts=1),
    branches=("cond", "uncond"),
    size={"height": 64, "width": 96, "num_frames": 5},
    guidance={"guidance_scale": 3.0},
    pooled=False,
)

PIPELINES = {
    # Names its branches, not its steps.
    "flux": TinyPipeline(
        _flux,
        branches=("cond", "uncond"),
        size={"height": 64, "width": 96},
        guidance={"true_cfg_scale": 2.0},
    ),
    # Names neither: both branches are one batch.
    "sd3": TinyPipeline(
        _sd3,
        branches=("branch 0",),
        size={"height": 64, "width": 96},
        guidance={"guidance_scale": 3.0},
    ),
    # Names branches and steps.
    "wan": WAN,
    # Two transformers that take turns.
    "wan with experts": replace(WAN, build=lambda: _wan(experts=2)),
}
