"""Tiny configurations of the diffusers transformers, for tests and `omni-cache coverage`.

    @case("FluxTransformer2DModel", streams={"transformer_blocks": TEXT_THEN_IMAGE}, num_layers=2)
    def flux(moment): return {"hidden_states": moment.latents(24, 8), ...}

Each case knows how to build one model class with some hundred thousand random weights, and how to
make the inputs that the class's own pipeline would pass at a step of a denoising loop. It also
names the block loop and the streams that run through it, which is what tests expect the pass to
find.

This file knows diffusers and torch only, nothing of omni-cache. Text length, image length and
width of the streams differ within a case, so that a mixed-up axis fails instead of broadcasting.
The forms of the inputs are those of the pipelines' `__call__` in diffusers 0.42.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

NUM_STEPS = 28
"""Steps of the denoising loop that `ModelCase.inputs` walks through."""

FRAMES, HEIGHT, WIDTH = 3, 4, 6
"""Size of the latents in tokens (images have one frame)."""

TEXT = 5
"""Length of the prompt in tokens."""

TEXT_CHANNELS = 28
"""Channels of the prompt embeddings."""

POOLED_CHANNELS = 20
"""Channels of the pooled prompt embedding."""


@dataclass(frozen=True)
class Moment:
    """One forward of a denoising loop: a step, and the seed and batch size of the generation."""

    step: int
    seed: int
    batch: int

    @property
    def sigma(self) -> float:
        """Share of noise in the latents: 1 at step 0, just above 0 at the last step."""
        return 1.0 - self.step / NUM_STEPS

    @property
    def timestep(self) -> Tensor:
        """The scheduler's timestep, (B,) float32, falling from 1000 towards 0."""
        return torch.full((self.batch,), 1000.0 * self.sigma)

    @property
    def integer_timestep(self) -> Tensor:
        """The timestep of schedulers that count training steps, (B,) int64, falling from 999."""
        return torch.full((self.batch,), round(999 * self.sigma))

    def draw(self, name: str, *shape: int) -> Tensor:
        """A (B, *shape) Gaussian that depends on the seed and its name, but not on the step."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        return torch.randn(self.batch, *shape, generator=generator)

    def latents(self, *shape: int) -> Tensor:
        """(B, *shape) latents on the straight line from noise to image, so they move slowly."""
        return torch.lerp(self.draw("image", *shape), self.draw("noise", *shape), self.sigma)

    def prompt(self) -> Tensor:
        """(B, TEXT, TEXT_CHANNELS) prompt embeddings."""
        return self.draw("prompt", TEXT, TEXT_CHANNELS)

    def pooled_prompt(self) -> Tensor:
        """(B, POOLED_CHANNELS) pooled prompt embedding."""
        return self.draw("pooled", POOLED_CHANNELS)

    def prompt_mask(self) -> Tensor:
        """(B, TEXT) float mask, 1 for a word and 0 for the padding that ends the prompt."""
        mask = torch.ones(self.batch, TEXT)
        mask[:, -1] = 0
        return mask

    def constant(self, value: float) -> Tensor:
        """(B,) float32, such as a guidance scale."""
        return torch.full((self.batch,), value)


@dataclass(frozen=True)
class ModelCase:
    """One transformer class at a tiny size.

    Attributes:
        name: Short name, used as the test's id and as the golden's file name.
        class_name: The class in `diffusers`, imported when `build` is called.
        config: Arguments of the class.
        streams: For each ModuleList of the block loop, in order, the arguments of a block's
            `forward` that carry the residual streams, in the order in which the block returns them.
        eight_blocks: Arguments to replace in `config` for a block loop of eight blocks in all.
        timestep_argument: The keyword of `forward` that carries the timestep.
        make_inputs: The keyword arguments of `forward` at a moment.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    streams: Mapping[str, tuple[str, ...]]
    eight_blocks: Mapping[str, Any]
    timestep_argument: str
    make_inputs: Callable[[Moment], dict[str, Any]]

    @property
    def block_lists(self) -> tuple[str, ...]:
        """Paths of the ModuleLists that make up the block loop, in order."""
        return tuple(self.streams)

    @property
    def deep(self) -> ModelCase:
        """The same class with eight blocks."""
        return replace(self, config={**self.config, **self.eight_blocks})

    def inputs(self, step: int = 0, seed: int = 0, batch: int = 1) -> dict[str, Any]:
        """Keyword arguments of `forward` as the class's pipeline passes them.

        `step` walks along the 28-step schedule, `seed` chooses the initial noise and the prompt.
        """
        import diffusers

        inputs = self.make_inputs(Moment(step, seed, batch))
        accepted = inspect.signature(getattr(diffusers, self.class_name).forward).parameters
        return {**inputs, "return_dict": False} if "return_dict" in accepted else inputs

    def build(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, fp32 on the CPU, with random weights fixed by `seed`.

        Parameters that the class initialises to zero (gates, output layers, padding tokens) get
        small random values: with zeros, a wrong result could not be told from a right one.

        The model has been called once: Z-Image fills its rotary table in the first forward, in a
        way that `torch.compile(fullgraph=True)` cannot capture.
        """
        import diffusers

        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model: nn.Module = getattr(diffusers, self.class_name)(**self.config)
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
            model.eval()(**self.inputs())
        return model

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of the block loop of `model`, in the order in which they run."""
        return [
            block for name in self.block_lists for block in model.get_submodule(name).children()
        ]


CASES: dict[str, ModelCase] = {}
"""All cases by name, in the order of this file."""

HIDDEN_STATES = ("hidden_states",)
TEXT_THEN_IMAGE = ("encoder_hidden_states", "hidden_states")
IMAGE_THEN_TEXT = ("hidden_states", "encoder_hidden_states")


def case(
    class_name: str,
    *,
    streams: Mapping[str, tuple[str, ...]],
    eight_blocks: Mapping[str, Any],
    timestep: str = "timestep",
    **config: Any,
) -> Callable[[Callable[[Moment], dict[str, Any]]], Callable[[Moment], dict[str, Any]]]:
    """Register the decorated function as what makes the inputs of a `ModelCase`, under its name."""

    def register(make_inputs: Callable[[Moment], dict[str, Any]]) -> Any:
        name = make_inputs.__name__
        CASES[name] = ModelCase(
            name, class_name, config, streams, eight_blocks, timestep, make_inputs
        )
        return make_inputs

    return register


def _grid(*sizes: int) -> Tensor:
    """(prod(sizes), len(sizes)) coordinates of a grid, the last axis fastest."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


@case(
    "FluxTransformer2DModel",
    streams={"transformer_blocks": TEXT_THEN_IMAGE, "single_transformer_blocks": TEXT_THEN_IMAGE},
    in_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    pooled_projection_dim=POOLED_CHANNELS,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
    eight_blocks={"num_layers": 4, "num_single_layers": 4},
)
def flux(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep / 1000,
        "guidance": moment.constant(3.5),
        "pooled_projections": moment.pooled_prompt(),
        "encoder_hidden_states": moment.prompt(),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": _grid(1, HEIGHT, WIDTH).float(),
    }


@case(
    "Flux2Transformer2DModel",
    streams={"transformer_blocks": TEXT_THEN_IMAGE, "single_transformer_blocks": HIDDEN_STATES},
    in_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    timestep_guidance_channels=40,
    axes_dims_rope=(4, 4, 4, 4),
    eight_blocks={"num_layers": 4, "num_single_layers": 4},
)
def flux2(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep / 1000,
        "guidance": moment.constant(4.0),
        "encoder_hidden_states": moment.prompt(),
        "txt_ids": _grid(1, 1, 1, TEXT).expand(moment.batch, -1, -1),
        "img_ids": _grid(1, HEIGHT, WIDTH, 1).expand(moment.batch, -1, -1),
    }


@case(
    "ChromaTransformer2DModel",
    streams={"transformer_blocks": TEXT_THEN_IMAGE, "single_transformer_blocks": HIDDEN_STATES},
    in_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    axes_dims_rope=(4, 6, 6),
    approximator_num_channels=16,
    approximator_hidden_dim=36,
    approximator_layers=3,
    eight_blocks={"num_layers": 4, "num_single_layers": 4},
)
def chroma(moment: Moment) -> dict[str, Any]:
    image_mask = torch.ones(moment.batch, HEIGHT * WIDTH)
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep / 1000,
        "encoder_hidden_states": moment.prompt(),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": _grid(1, HEIGHT, WIDTH).float(),
        "attention_mask": torch.cat([moment.prompt_mask(), image_mask], dim=1),
    }


@case(
    "SD3Transformer2DModel",
    streams={"transformer_blocks": TEXT_THEN_IMAGE},
    sample_size=16,
    in_channels=4,
    out_channels=4,
    num_layers=5,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    caption_projection_dim=32,
    pooled_projection_dim=POOLED_CHANNELS,
    pos_embed_max_size=8,
    dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
    eight_blocks={"num_layers": 8},
)
def sd3(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": moment.timestep,
        "encoder_hidden_states": moment.prompt(),
        "pooled_projections": moment.pooled_prompt(),
    }


@case(
    "QwenImageTransformer2DModel",
    streams={"transformer_blocks": TEXT_THEN_IMAGE},
    in_channels=8,
    out_channels=2,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    axes_dims_rope=(4, 6, 6),
    eight_blocks={"num_layers": 8},
)
def qwen_image(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep / 1000,
        "guidance": None,
        "encoder_hidden_states_mask": moment.prompt_mask().long(),
        "encoder_hidden_states": moment.prompt(),
        "img_shapes": [[(1, HEIGHT, WIDTH)]] * moment.batch,
    }


@case(
    "WanTransformer3DModel",
    streams={"blocks": HIDDEN_STATES},
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=24,
    num_attention_heads=2,
    text_dim=TEXT_CHANNELS,
    freq_dim=40,
    ffn_dim=64,
    rope_max_seq_len=16,
    eight_blocks={"num_layers": 8},
)
def wan(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "timestep": moment.integer_timestep,
        "encoder_hidden_states": moment.prompt(),
    }


@case(
    "HunyuanVideoTransformer3DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT, "single_transformer_blocks": IMAGE_THEN_TEXT},
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_single_layers=3,
    num_refiner_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    text_embed_dim=TEXT_CHANNELS,
    pooled_projection_dim=POOLED_CHANNELS,
    rope_axes_dim=(4, 6, 6),
    eight_blocks={"num_layers": 4, "num_single_layers": 4},
)
def hunyuan_video(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "timestep": moment.timestep,
        "encoder_hidden_states": moment.prompt(),
        "encoder_attention_mask": moment.prompt_mask(),
        "pooled_projections": moment.pooled_prompt(),
        "guidance": moment.constant(6000.0),
    }


@case(
    "CogVideoXTransformer3DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT},
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    time_embed_dim=40,
    text_embed_dim=TEXT_CHANNELS,
    sample_height=2 * HEIGHT,
    sample_width=2 * WIDTH,
    sample_frames=4 * (FRAMES - 1) + 1,
    max_text_seq_length=TEXT,
    use_rotary_positional_embeddings=True,
    eight_blocks={"num_layers": 8},
)
def cogvideox(moment: Moment) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    rotary = get_3d_rotary_pos_embed(
        embed_dim=16,
        crops_coords=((0, 0), (HEIGHT, WIDTH)),
        grid_size=(HEIGHT, WIDTH),
        temporal_size=FRAMES,
    )
    return {
        "hidden_states": moment.latents(FRAMES, 4, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": moment.prompt(),
        "timestep": moment.integer_timestep,
        "image_rotary_emb": rotary,
    }


@case(
    "LTXVideoTransformer3DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=8,
    out_channels=8,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    cross_attention_dim=32,
    caption_channels=TEXT_CHANNELS,
    eight_blocks={"num_layers": 8},
)
def ltx_video(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(FRAMES * HEIGHT * WIDTH, 8),
        "encoder_hidden_states": moment.prompt(),
        "timestep": moment.timestep,
        "encoder_attention_mask": moment.prompt_mask(),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


@case(
    "ZImageTransformer2DModel",
    streams={"layers": ("x",)},
    timestep="t",
    in_channels=4,
    dim=48,
    n_layers=3,
    n_refiner_layers=2,
    n_heads=3,
    n_kv_heads=3,
    cap_feat_dim=TEXT_CHANNELS,
    axes_dims=[4, 6, 6],
    axes_lens=[48, 16, 16],
    eight_blocks={"n_layers": 8},
)
def z_image(moment: Moment) -> dict[str, Any]:
    # The pipeline passes lists, one entry per image, and a time that rises from 0 to 1.
    return {
        "x": list(moment.latents(4, 1, 2 * HEIGHT, 2 * WIDTH).unbind()),
        "t": (1000 - moment.timestep) / 1000,
        "cap_feats": list(moment.prompt().unbind()),
    }


@case(
    "PixArtTransformer2DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=4,
    out_channels=8,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    cross_attention_dim=32,
    caption_channels=TEXT_CHANNELS,
    sample_size=2 * HEIGHT,
    eight_blocks={"num_layers": 8},
)
def pixart(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": moment.prompt(),
        "encoder_attention_mask": moment.prompt_mask(),
        "timestep": moment.integer_timestep,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@case(
    "SanaTransformer2DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=TEXT_CHANNELS,
    sample_size=HEIGHT,
    eight_blocks={"num_layers": 8},
)
def sana(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, HEIGHT, WIDTH),
        "encoder_hidden_states": moment.prompt(),
        "encoder_attention_mask": moment.prompt_mask().long(),
        "timestep": moment.integer_timestep * 1.0,
    }


NOT_DENOISING: dict[str, str] = {}
"""Model classes that diffusers keeps among its transformers and that no denoising loop calls, with
what they are."""

# --- reading what they return ---------------------------------------------------------------------

REPRESENTATIVES = {
    name: CASES[name]
    for name in (
        "flux",
        "flux2",
        "chroma",
        "sd3",
        "qwen_image",
        "wan",
        "hunyuan_video",
        "cogvideox",
        "ltx_video",
        "z_image",
        "pixart",
        "sana",
    )
}
"""A dozen classes with every kind of stream, for tests that look more closely."""


def sample(output: tuple[Any, ...]) -> Tensor:
    """All predictions in what a model returned, as one tensor with the batch in front.

    Every class returns a tuple whose first element is the prediction. Some give one tensor per
    image, and some one per modality; different shapes are flattened and put side by side.
    """
    found = tree_leaves(output)
    tensors = [each for each in found if isinstance(each, Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    if len({each.shape for each in tensors}) == 1:
        return torch.stack(tensors)
    return torch.cat([each.flatten(1) for each in tensors], dim=1)
