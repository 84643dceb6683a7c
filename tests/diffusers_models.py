"""Tiny configurations of the diffusers transformers, for tests and `scripts/report_coverage.py`.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        added: ModuleLists that run between the blocks, and whose results are added to the streams.
        eight_blocks: Arguments to replace in `config` for a block loop of eight blocks in all.
        timestep_argument: The keyword of `forward` that carries the timestep.
        make_inputs: The keyword arguments of `forward` at a moment.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    streams: Mapping[str, tuple[str, ...]]
    added: tuple[str, ...]
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

    @property
    def deeper(self) -> ModelCase:
        """The same class with sixteen blocks."""
        # Numbers of blocks, and what is listed for each block; places of blocks stay.
        twice = {
            name: 2 * each
            for name, each in self.eight_blocks.items()
            if isinstance(each, int) or len(each) == 8
        }
        return replace(self, config={**self.config, **self.eight_blocks, **twice})

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

        Parameters that the class initialises to zero (gates, output layers, padding tokens) or
        not at all get small random values: with zeros, a wrong result could not be told from a
        right one.

        The model has been called once: Z-Image fills its rotary table in the first forward, in a
        way that `torch.compile(fullgraph=True)` cannot capture.
        """
        import diffusers

        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            with _memory_filled_with_nan():
                model: nn.Module = getattr(diffusers, self.class_name)(**self.config)
            for parameter in model.parameters():
                if not parameter.any() or parameter.isnan().any():
                    parameter.normal_(std=0.05)
            model.eval()(**self.inputs())
        return model

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of the block loop of `model`, in the order in which they run."""
        return [
            block for name in self.block_lists for block in model.get_submodule(name).children()
        ]


@contextmanager
def _memory_filled_with_nan() -> Iterator[None]:
    """Let `torch.empty` give NaN, so that what nobody initialises shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


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
    added: tuple[str, ...] = (),
    timestep: str = "timestep",
    **config: Any,
) -> Callable[[Callable[[Moment], dict[str, Any]]], Callable[[Moment], dict[str, Any]]]:
    """Register the decorated function as what makes the inputs of a `ModelCase`, under its name."""

    def register(make_inputs: Callable[[Moment], dict[str, Any]]) -> Any:
        name = make_inputs.__name__
        CASES[name] = ModelCase(
            name, class_name, config, streams, added, eight_blocks, timestep, make_inputs
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
    eight_blocks={"num_layers": 4, "num_single_layers": 4, "approximator_layers": 1},
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
    eight_blocks={"n_layers": 8, "n_refiner_layers": 1},
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


@case(
    "AceStepTransformer1DModel",
    streams={"layers": HIDDEN_STATES},
    in_channels=24,
    audio_acoustic_hidden_dim=8,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    sliding_window=7,
    encoder_hidden_size=TEXT_CHANNELS,
    eight_blocks={"num_hidden_layers": 8},
)
def ace_step(moment: Moment) -> dict[str, Any]:
    # Every second layer attends within the sliding window only. Two frames make a token.
    frames = 2 * HEIGHT * WIDTH
    return {
        "hidden_states": moment.latents(frames, 8),
        "timestep": moment.timestep / 1000,
        "timestep_r": moment.timestep / 1000,
        "encoder_hidden_states": moment.prompt(),
        "context_latents": moment.draw("context", frames, 16),
    }


@case(
    "AllegroTransformer3DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    num_layers=3,
    attention_head_dim=24,
    num_attention_heads=2,
    cross_attention_dim=48,
    caption_channels=TEXT_CHANNELS,
    sample_height=2 * HEIGHT,
    sample_width=2 * WIDTH,
    sample_frames=FRAMES,
    eight_blocks={"num_layers": 8},
)
def allegro(moment: Moment) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *frequencies, _, _, _ = get_3d_rotary_pos_embed_allegro(
        embed_dim=24,
        crops_coords=((0, 0), (HEIGHT, WIDTH)),
        grid_size=(HEIGHT, WIDTH),
        temporal_size=FRAMES,
        interpolation_scale=(2.2, 2.0, 2.0),
    )
    positions = _grid(FRAMES, HEIGHT, WIDTH).T.unsqueeze(1)
    return {
        "hidden_states": moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": moment.prompt().unsqueeze(1),
        "encoder_attention_mask": moment.prompt_mask(),
        "timestep": moment.timestep,
        "image_rotary_emb": (tuple(frequencies), tuple(positions)),
    }


@case(
    "AnyFlowFARTransformer3DModel",
    streams={"blocks": HIDDEN_STATES},
    in_channels=4,
    out_channels=4,
    full_chunk_limit=2,
    num_layers=3,
    attention_head_dim=24,
    num_attention_heads=2,
    text_dim=TEXT_CHANNELS,
    freq_dim=40,
    ffn_dim=64,
    rope_max_seq_len=16,
    chunk_partition=(1, 2, 3),
    eight_blocks={"num_layers": 8},
)
def any_flow_far(moment: Moment) -> dict[str, Any]:
    # Chunks of the video follow each other. This is the third; the first two lie in each block's
    # cache of keys and values, the older one at a quarter of the resolution. A step reads the
    # cache and returns it unchanged; there is one for sixteen blocks.
    per_frame = torch.ones(moment.batch, FRAMES)

    def cache(name: str, tokens: int) -> torch.Tensor:
        kinds = ("keys", "values")
        return torch.stack([moment.draw(f"{kind} {name}", 2, tokens, 24) for kind in kinds])

    return {
        "hidden_states": moment.latents(FRAMES, 4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": per_frame * 1000 * moment.sigma,
        "r_timestep": per_frame * 1000 * (moment.sigma - 1 / NUM_STEPS),
        "encoder_hidden_states": moment.prompt(),
        "chunk_partition": (1, 2, 3),
        "kv_cache": {
            block: {
                "full_cache": cache(f"full {block}", 2 * FRAMES * HEIGHT * WIDTH),
                "compressed_cache": cache(f"compressed {block}", FRAMES * HEIGHT * WIDTH // 2),
            }
            for block in range(16)
        },
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


@case(
    "AnyFlowTransformer3DModel",
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
def any_flow(moment: Moment) -> dict[str, Any]:
    # The flow goes from one time to another, which is the next step's; each frame has its own.
    per_frame = torch.ones(moment.batch, FRAMES)
    return {
        "hidden_states": moment.latents(FRAMES, 4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": per_frame * 1000 * moment.sigma,
        "r_timestep": per_frame * 1000 * (moment.sigma - 1 / NUM_STEPS),
        "encoder_hidden_states": moment.prompt(),
    }


@case(
    "AuraFlowTransformer2DModel",
    streams={
        "joint_transformer_blocks": TEXT_THEN_IMAGE,
        "single_transformer_blocks": HIDDEN_STATES,
    },
    sample_size=2 * WIDTH,
    in_channels=4,
    out_channels=4,
    num_mmdit_layers=2,
    num_single_dit_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    caption_projection_dim=32,
    pos_embed_max_size=64,
    eight_blocks={"num_mmdit_layers": 4, "num_single_dit_layers": 4},
)
def aura_flow(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": moment.prompt(),
        "timestep": moment.timestep / 1000,
    }


@case(
    "BriaFibo2Transformer2DModel",
    streams={"layers": ("x",)},
    in_channels=4,
    dim=48,
    n_layers=4,
    n_refiner_layers=2,
    n_heads=3,
    cap_feat_dim=TEXT_CHANNELS,
    injection_layer_ids=(1, 2),
    perceiver_num_layers=2,
    min_num_gist_tokens=4,
    max_num_gist_tokens=8,
    gist_step=2,
    gist_min_text_len=2,
    gist_max_text_len=14,
    axes_dims=(4, 6, 6),
    axes_lens=(16, 16, 16),
    eight_blocks={"n_layers": 8, "n_refiner_layers": 1},
)
def bria_fibo2(moment: Moment) -> dict[str, Any]:
    # One layer of text features feeds the perceiver, and one each of the layers with injection.
    # A single prompt needs no padding, and the pipeline then passes no mask. The image is larger
    # than elsewhere, since the timestep embedder is a thousand channels wide at any size.
    return {
        "hidden_states": moment.latents(4, 4 * HEIGHT, 4 * WIDTH),
        "timestep": moment.timestep / 1000,
        "encoder_hidden_states": moment.draw("prompt", 3, TEXT, TEXT_CHANNELS),
        "encoder_attention_mask": None,
        "context_latents": None,
    }


@case(
    "BriaFiboTransformer2DModel",
    streams={"transformer_blocks": TEXT_THEN_IMAGE, "single_transformer_blocks": HIDDEN_STATES},
    in_channels=8,
    num_layers=4,
    num_single_layers=4,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    text_encoder_dim=20,
    axes_dims_rope=[4, 6, 6],
    eight_blocks={},
)
def bria_fibo(moment: Moment) -> dict[str, Any]:
    # Before each block, half of the text's channels are replaced by a layer of the text encoder.
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep,
        "encoder_hidden_states": moment.prompt(),
        "text_encoder_layers": [moment.draw(f"layer {i}", TEXT, 20) for i in range(8)],
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": _grid(1, HEIGHT, WIDTH).float(),
    }


@case(
    "BriaTransformer2DModel",
    streams={"transformer_blocks": TEXT_THEN_IMAGE, "single_transformer_blocks": TEXT_THEN_IMAGE},
    in_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    axes_dims_rope=[4, 6, 6],
    eight_blocks={"num_layers": 4, "num_single_layers": 4},
)
def bria(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep,
        "encoder_hidden_states": moment.prompt(),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": _grid(1, HEIGHT, WIDTH).float(),
    }


@case(
    "ChronoEditTransformer3DModel",
    streams={"blocks": HIDDEN_STATES},
    in_channels=8,
    out_channels=4,
    num_layers=3,
    attention_head_dim=24,
    num_attention_heads=2,
    text_dim=TEXT_CHANNELS,
    freq_dim=40,
    ffn_dim=64,
    image_dim=20,
    added_kv_proj_dim=48,
    rope_max_seq_len=16,
    eight_blocks={"num_layers": 8},
)
def chrono_edit(moment: Moment) -> dict[str, Any]:
    # The blocks tell the words from the image's tokens before them by counting 512 from the end.
    condition = moment.draw("condition", 4, FRAMES, 2 * HEIGHT, 2 * WIDTH)
    latents = moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH)
    return {
        "hidden_states": torch.cat([latents, condition], dim=1),
        "timestep": moment.integer_timestep,
        "encoder_hidden_states": moment.draw("prompt", 512, TEXT_CHANNELS),
        "encoder_hidden_states_image": moment.draw("image embedding", 7, 20),
    }


@case(
    "CogView3PlusTransformer2DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT},
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    text_embed_dim=TEXT_CHANNELS,
    time_embed_dim=40,
    condition_dim=8,
    pos_embed_max_size=8,
    sample_size=2 * WIDTH,
    eight_blocks={"num_layers": 8},
)
def cogview3_plus(moment: Moment) -> dict[str, Any]:
    size = torch.tensor([[16.0 * HEIGHT, 16.0 * WIDTH]]).expand(moment.batch, -1)
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": moment.prompt(),
        "timestep": moment.integer_timestep,
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(moment.batch, 2),
    }


@case(
    "CogView4Transformer2DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT},
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    text_embed_dim=TEXT_CHANNELS,
    time_embed_dim=40,
    condition_dim=8,
    rope_axes_dim=(16, 16),
    eight_blocks={"num_layers": 8},
)
def cogview4(moment: Moment) -> dict[str, Any]:
    size = torch.tensor([[16.0 * HEIGHT, 16.0 * WIDTH]]).expand(moment.batch, -1)
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": moment.prompt(),
        "timestep": moment.integer_timestep * 1.0,
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(moment.batch, 2),
    }


@case(
    "ConsisIDTransformer3DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT},
    added=("perceiver_cross_attention",),
    in_channels=8,
    out_channels=4,
    num_layers=4,
    attention_head_dim=16,
    num_attention_heads=3,
    time_embed_dim=40,
    text_embed_dim=TEXT_CHANNELS,
    sample_height=2 * HEIGHT,
    sample_width=2 * WIDTH,
    sample_frames=4 * (FRAMES - 1) + 1,
    max_text_seq_length=TEXT,
    use_rotary_positional_embeddings=True,
    is_train_face=True,
    cross_attn_dim_head=16,
    cross_attn_num_heads=3,
    LFE_id_dim=20,
    LFE_vit_dim=24,
    LFE_depth=2,
    LFE_dim_head=12,
    LFE_num_heads=2,
    LFE_num_id_token=3,
    LFE_num_querie=4,
    LFE_output_dim=32,
    LFE_ff_mult=2,
    LFE_num_scale=2,
    eight_blocks={"num_layers": 8},
)
def consisid(moment: Moment) -> dict[str, Any]:
    # After every second block, the model itself adds what the face contributes to the image.
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    rotary = get_3d_rotary_pos_embed(
        embed_dim=16,
        crops_coords=((0, 0), (HEIGHT, WIDTH)),
        grid_size=(HEIGHT, WIDTH),
        temporal_size=FRAMES,
    )
    latents = moment.latents(FRAMES, 4, 2 * HEIGHT, 2 * WIDTH)
    image = moment.draw("condition", FRAMES, 4, 2 * HEIGHT, 2 * WIDTH)
    return {
        "hidden_states": torch.cat([latents, image], dim=2),
        "encoder_hidden_states": moment.prompt(),
        "timestep": moment.integer_timestep,
        "image_rotary_emb": rotary,
        "id_vit_hidden": [moment.draw(f"face {scale}", 9, 24) for scale in range(2)],
        "id_cond": moment.draw("identity", 20),
    }


@case(
    "Cosmos3OmniTransformer",
    streams={"layers": ("und_seq", "gen_seq")},
    timestep="vision_timesteps",
    head_dim=16,
    hidden_size=32,
    intermediate_size=64,
    latent_channel=4,
    patch_latent_dim=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_hidden_layers=3,
    vocab_size=50,
    rope_axes_dim=[4, 2, 2],
    eight_blocks={"num_hidden_layers": 8},
)
def cosmos3_omni(moment: Moment) -> dict[str, Any]:
    # The pipeline packs one prompt and one video into a sequence; a larger batch does not exist.
    tokens = FRAMES * HEIGHT * WIDTH
    words = torch.arange(TEXT)
    video = torch.arange(TEXT, TEXT + tokens)
    positions = _grid(FRAMES, HEIGHT, WIDTH).T + torch.tensor([[TEXT + 15000], [0], [0]])
    return {
        "input_ids": 3 * words + moment.seed,
        "text_indexes": words,
        "position_ids": torch.cat([words.expand(3, -1), positions], dim=1).float(),
        "und_len": TEXT,
        "sequence_length": TEXT + tokens,
        "vision_tokens": [moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH)[:1]],
        "vision_token_shapes": [(FRAMES, HEIGHT, WIDTH)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((tokens,), 1000 * moment.sigma),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES)],
    }


@case(
    "CosmosTransformer3DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=24,
    num_attention_heads=2,
    mlp_ratio=2.0,
    text_embed_dim=TEXT_CHANNELS,
    adaln_lora_dim=12,
    max_size=(8, 16, 16),
    concat_padding_mask=False,
    eight_blocks={"num_layers": 8},
)
def cosmos(moment: Moment) -> dict[str, Any]:
    # Without the padding mask, whose resizing needs torchvision. Every block adds the learned
    # positions to the stream again.
    return {
        "hidden_states": moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "timestep": moment.timestep / 1000,
        "encoder_hidden_states": moment.prompt(),
        "fps": 30,
    }


@case(
    "DiTTransformer2DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=4,
    out_channels=8,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    sample_size=2 * WIDTH,
    num_embeds_ada_norm=30,
    eight_blocks={"num_layers": 8},
)
def dit(moment: Moment) -> dict[str, Any]:
    # The image is a square, and the condition a class instead of a text.
    return {
        "hidden_states": moment.latents(4, 2 * WIDTH, 2 * WIDTH),
        "timestep": moment.integer_timestep,
        "class_labels": torch.full((moment.batch,), 7 + moment.seed),
    }


@case(
    "EasyAnimateTransformer3DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT},
    in_channels=4,
    out_channels=4,
    patch_size=2,
    num_layers=4,
    mmdit_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    time_embed_dim=40,
    text_embed_dim=TEXT_CHANNELS,
    eight_blocks={"num_layers": 8, "mmdit_layers": 4},
)
def easy_animate(moment: Moment) -> dict[str, Any]:
    # The later blocks share their weights between text and image.
    return {
        "hidden_states": moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "timestep": moment.timestep,
        "encoder_hidden_states": moment.prompt(),
    }


@case(
    "ErnieImageTransformer2DModel",
    streams={"layers": ("x",)},
    hidden_size=48,
    num_attention_heads=3,
    num_layers=3,
    ffn_hidden_size=96,
    in_channels=8,
    out_channels=8,
    text_in_dim=TEXT_CHANNELS,
    rope_axes_dim=(4, 6, 6),
    eight_blocks={"num_layers": 8},
)
def ernie_image(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(8, HEIGHT, WIDTH),
        "timestep": moment.timestep,
        "text_bth": moment.prompt(),
        "text_lens": moment.prompt_mask().sum(dim=1).long(),
    }


# The blocks before the joint ones see one modality each, and the text's do not see the time.
@case(
    "Flux3Transformer2DModel",
    streams={"single_transformer_blocks": TEXT_THEN_IMAGE},
    in_channels=8,
    cond_in_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    timestep_channels=40,
    axes_dims_rope=(4, 4, 4, 4),
    eight_blocks={"num_layers": 1, "num_single_layers": 8},
)
def flux3(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep / 1000,
        "encoder_hidden_states": moment.prompt(),
        "txt_ids": _grid(1, 1, 1, TEXT),
        "img_ids": _grid(1, HEIGHT, WIDTH, 1),
    }


@case(
    "GlmImageTransformer2DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT},
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    text_embed_dim=TEXT_CHANNELS,
    time_embed_dim=40,
    condition_dim=8,
    prior_vq_quantizer_codebook_size=50,
    eight_blocks={"num_layers": 8},
)
def glm_image(moment: Moment) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    # The cache stays empty when there is no reference image; it has room for sixteen blocks.
    token_ids = moment.draw("prior", HEIGHT * WIDTH).mul(9).long() % 50
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": moment.prompt(),
        "prior_token_id": token_ids,
        "prior_token_drop": torch.zeros_like(token_ids, dtype=torch.bool),
        "timestep": moment.timestep - 1,
        "target_size": torch.tensor([[64.0, 96.0]]).expand(moment.batch, -1),
        "crop_coords": torch.zeros(moment.batch, 2),
        "kv_caches": GlmImageKVCache(num_layers=16),
    }


@case(
    "HeliosTransformer3DModel",
    streams={"blocks": HIDDEN_STATES},
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=TEXT_CHANNELS,
    freq_dim=40,
    ffn_dim=64,
    num_layers=3,
    rope_dim=(4, 6, 6),
    eight_blocks={"num_layers": 8},
)
def helios(moment: Moment) -> dict[str, Any]:
    # The first frame and three lengths of history, each at a coarser scale, go before the chunk.
    size = 2 * HEIGHT, 2 * WIDTH
    prefix, long, mid, last, chunk = torch.arange(1 + 16 + 2 + 1 + FRAMES)[None].split(
        [1, 16, 2, 1, FRAMES], dim=1
    )
    return {
        "hidden_states": moment.latents(4, FRAMES, *size),
        "timestep": moment.timestep,
        "encoder_hidden_states": moment.prompt(),
        "indices_hidden_states": chunk,
        "indices_latents_history_short": torch.cat([prefix, last], dim=1),
        "indices_latents_history_mid": mid,
        "indices_latents_history_long": long,
        "latents_history_short": moment.draw("short", 4, 2, *size),
        "latents_history_mid": moment.draw("mid", 4, 2, *size),
        "latents_history_long": moment.draw("long", 4, 16, *size),
    }


# An image that is not square is padded to `max_resolution`, here to 28 tokens. The image's MLPs are
# mixtures of four experts.
@case(
    "HiDreamImageTransformer2DModel",
    streams={"double_stream_blocks": IMAGE_THEN_TEXT, "single_stream_blocks": HIDDEN_STATES},
    timestep="timesteps",
    patch_size=2,
    in_channels=4,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    caption_channels=(TEXT_CHANNELS, 26),
    text_emb_dim=POOLED_CHANNELS,
    axes_dims_rope=(4, 6, 6),
    max_resolution=(8, 14),
    llama_layers=(0, 1, 2, 2, 2),
    eight_blocks={
        "num_layers": 4,
        "num_single_layers": 4,
        "llama_layers": (0, 1, 2, 2, 2, 2, 2, 2),
    },
)
def hidream_image(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "timesteps": moment.timestep,
        "encoder_hidden_states_t5": moment.prompt(),
        "encoder_hidden_states_llama3": moment.draw("llama", 3, 7, 26).transpose(0, 1),
        "pooled_embeds": moment.pooled_prompt(),
    }


# The last blocks have a second input each, what one of the first blocks returned.
@case(
    "HunyuanDiT2DModel",
    streams={"blocks": HIDDEN_STATES},
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    patch_size=2,
    sample_size=2 * HEIGHT,
    hidden_size=32,
    num_layers=6,
    cross_attention_dim=TEXT_CHANNELS,
    cross_attention_dim_t5=24,
    pooled_projection_dim=POOLED_CHANNELS,
    text_len=TEXT,
    text_len_t5=7,
    eight_blocks={"num_layers": 8},
)
def hunyuan_dit(moment: Moment) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    rotary = get_2d_rotary_pos_embed(
        16, ((0, 0), (HEIGHT, WIDTH)), (HEIGHT, WIDTH), output_type="pt"
    )
    sizes = torch.tensor([[64.0, 96.0, 64.0, 96.0, 0.0, 0.0]])
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": moment.integer_timestep * 1.0,
        "encoder_hidden_states": moment.prompt(),
        "text_embedding_mask": moment.prompt_mask().long(),
        "encoder_hidden_states_t5": moment.draw("t5", 7, 24),
        "text_embedding_mask_t5": torch.ones(moment.batch, 7, dtype=torch.long),
        "image_meta_size": sizes.repeat(moment.batch, 1),
        "style": torch.zeros(moment.batch, dtype=torch.long),
        "image_rotary_emb": rotary,
    }


# Text and ByT5 embeddings are sorted by their masks, so the shapes depend on what the masks hold.
@case(
    "HunyuanImageTransformer2DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT, "single_transformer_blocks": IMAGE_THEN_TEXT},
    in_channels=8,
    out_channels=8,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=3,
    num_refiner_layers=2,
    text_embed_dim=TEXT_CHANNELS,
    text_embed_2_dim=26,
    rope_axes_dim=(8, 8),
    eight_blocks={"num_layers": 4, "num_single_layers": 4},
)
def hunyuan_image(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(8, HEIGHT, WIDTH),
        "timestep": moment.timestep,
        "timestep_r": None,
        "guidance": None,
        "encoder_hidden_states": moment.prompt(),
        "encoder_attention_mask": moment.prompt_mask().long(),
        "encoder_hidden_states_2": moment.draw("byt5", 7, 26),
        "encoder_attention_mask_2": torch.ones(moment.batch, 7, dtype=torch.long),
    }


# As for text to video: the frame condition, its mask and the image's embedding are zero.
@case(
    "HunyuanVideo15Transformer3DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT},
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    num_refiner_layers=2,
    text_embed_dim=TEXT_CHANNELS,
    text_embed_2_dim=26,
    image_embed_dim=22,
    rope_axes_dim=(4, 6, 6),
    eight_blocks={"num_layers": 8},
)
def hunyuan_video_15(moment: Moment) -> dict[str, Any]:
    condition = torch.zeros(moment.batch, 5, FRAMES, HEIGHT, WIDTH)
    return {
        "hidden_states": torch.cat([moment.latents(4, FRAMES, HEIGHT, WIDTH), condition], dim=1),
        "image_embeds": torch.zeros(moment.batch, 9, 22),
        "timestep": moment.timestep,
        "encoder_hidden_states": moment.prompt(),
        "encoder_attention_mask": moment.prompt_mask(),
        "encoder_hidden_states_2": moment.draw("byt5", 7, 26),
        "encoder_attention_mask_2": torch.ones(moment.batch, 7),
    }


@case(
    "HunyuanVideoFramepackTransformer3DModel",
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
    has_image_proj=True,
    image_proj_dim=22,
    has_clean_x_embedder=True,
    eight_blocks={"num_layers": 4, "num_single_layers": 4},
)
def hunyuan_video_framepack(moment: Moment) -> dict[str, Any]:
    # The first frame and three lengths of history, as Helios has them, but after the chunk.
    size = 2 * HEIGHT, 2 * WIDTH
    prefix, chunk, once, twice, four_times = torch.arange(1 + FRAMES + 1 + 2 + 16).split(
        [1, FRAMES, 1, 2, 16]
    )
    return {
        "hidden_states": moment.latents(4, FRAMES, *size),
        "timestep": moment.timestep,
        "encoder_hidden_states": moment.prompt(),
        "encoder_attention_mask": moment.prompt_mask(),
        "pooled_projections": moment.pooled_prompt(),
        "image_embeds": moment.draw("image embedding", 9, 22),
        "indices_latents": chunk,
        "guidance": moment.constant(6000.0),
        "latents_clean": moment.draw("clean", 4, 2, *size),
        "indices_latents_clean": torch.cat([prefix, once]),
        "latents_history_2x": moment.draw("2x", 4, 2, *size),
        "indices_latents_history_2x": twice,
        "latents_history_4x": moment.draw("4x", 4, 16, *size),
        "indices_latents_history_4x": four_times,
    }


# One sequence holds padding, prompt and image in this order; time rises from 0 to 1.
@case(
    "Ideogram4Transformer2DModel",
    streams={"layers": HIDDEN_STATES},
    in_channels=8,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    intermediate_size=64,
    adaln_dim=20,
    llm_features_dim=TEXT_CHANNELS,
    mrope_section=(4, 2, 2),
    eight_blocks={"num_layers": 8},
)
def ideogram4(moment: Moment) -> dict[str, Any]:
    words, pixels = TEXT - 1, HEIGHT * WIDTH
    padding, llm, output_image = [-1], [3], [2]
    text_ids = torch.arange(words)[:, None].expand(-1, 3)
    position_ids = torch.cat([torch.zeros(1, 3).long(), text_ids, 65536 + _grid(1, HEIGHT, WIDTH)])
    segment_ids = torch.tensor(padding + [1] * (words + pixels))
    indicator = torch.tensor([0] + llm * words + output_image * pixels)
    features = moment.prompt() * moment.prompt_mask().flip(1)[..., None]
    return {
        "hidden_states": torch.nn.functional.pad(moment.latents(pixels, 8), (0, 0, TEXT, 0)),
        "timestep": 1 - moment.timestep / 1000,
        "encoder_hidden_states": torch.nn.functional.pad(features, (0, 0, 0, pixels)),
        "position_ids": position_ids.expand(moment.batch, -1, -1),
        "segment_ids": segment_ids.expand(moment.batch, -1),
        "indicator": indicator.expand(moment.batch, -1),
    }


# A sample is a list of patches: those of the image, then those of a smaller reference image.
@case(
    "JoyImageEditPlusTransformer3DModel",
    streams={"double_blocks": IMAGE_THEN_TEXT},
    in_channels=4,
    hidden_size=48,
    num_attention_heads=3,
    text_dim=TEXT_CHANNELS,
    num_layers=3,
    rope_dim_list=(4, 6, 6),
    eight_blocks={"num_layers": 8},
)
def joy_image_edit_plus(moment: Moment) -> dict[str, Any]:
    patches = moment.latents(HEIGHT * WIDTH, 4, 1, 2, 2)
    reference = moment.draw("reference", 3 * 4, 4, 1, 2, 2)
    return {
        "hidden_states": torch.cat([patches, reference], dim=1),
        "timestep": moment.timestep,
        "encoder_hidden_states": moment.prompt(),
        "encoder_hidden_states_mask": moment.prompt_mask().long(),
        "shape_list": [[(1, HEIGHT, WIDTH), (1, 3, 4)]] * moment.batch,
    }


@case(
    "JoyImageEditTransformer3DModel",
    streams={"double_blocks": IMAGE_THEN_TEXT},
    in_channels=4,
    hidden_size=48,
    num_attention_heads=3,
    text_dim=TEXT_CHANNELS,
    num_layers=3,
    rope_dim_list=(4, 6, 6),
    eight_blocks={"num_layers": 8},
)
def joy_image_edit(moment: Moment) -> dict[str, Any]:
    size = 1, 4, 1, 2 * HEIGHT, 2 * WIDTH
    return {
        "hidden_states": torch.cat([moment.draw("reference", *size), moment.latents(*size)], dim=1),
        "timestep": moment.timestep,
        "encoder_hidden_states": moment.prompt(),
    }


@case(
    "Kandinsky5Transformer3DModel",
    streams={"visual_transformer_blocks": ("visual_embed",)},
    in_visual_dim=4,
    out_visual_dim=4,
    in_text_dim=TEXT_CHANNELS,
    in_text_dim2=POOLED_CHANNELS,
    time_dim=40,
    model_dim=48,
    ff_dim=96,
    num_text_blocks=2,
    num_visual_blocks=3,
    axes_dims=(4, 6, 6),
    visual_cond=True,
    eight_blocks={"num_visual_blocks": 8},
)
def kandinsky5(moment: Moment) -> dict[str, Any]:
    latents = moment.latents(FRAMES, 2 * HEIGHT, 2 * WIDTH, 4)
    condition = torch.zeros(moment.batch, FRAMES, 2 * HEIGHT, 2 * WIDTH, 5)
    return {
        "hidden_states": torch.cat([latents, condition], dim=-1),
        "encoder_hidden_states": moment.prompt(),
        "pooled_projections": moment.pooled_prompt(),
        "timestep": moment.timestep,
        "visual_rope_pos": [torch.arange(size) for size in (FRAMES, HEIGHT, WIDTH)],
        "text_rope_pos": torch.arange(TEXT),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
    }


# Attention works on blocks of 8 x 8 tokens.
@case(
    "Kandinsky6SRTransformer3DModel",
    streams={"visual_transformer_blocks": HIDDEN_STATES},
    in_visual_dim=4,
    out_visual_dim=4,
    time_dim=40,
    model_dim=48,
    ff_dim=96,
    num_visual_blocks=3,
    axes_dims=(4, 6, 6),
    nabla_window=(3, 1, 1),
    eight_blocks={"num_visual_blocks": 8},
)
def kandinsky6_sr(moment: Moment) -> dict[str, Any]:
    latents = moment.latents(FRAMES, 8, 16, 4)
    anchor = torch.zeros(moment.batch, FRAMES, 8, 16, 5)
    return {
        "hidden_states": torch.cat([latents, anchor], dim=-1),
        "timestep": moment.timestep,
    }


@case(
    "Kandinsky6Transformer3DModel",
    streams={"visual_transformer_blocks": ("vis", "aud")},
    in_visual_dim=4,
    out_visual_dim=4,
    in_text_dim=TEXT_CHANNELS,
    in_text_dim2=POOLED_CHANNELS,
    time_dim=40,
    model_dim=48,
    ff_dim=96,
    num_text_blocks=2,
    num_visual_blocks=3,
    axes_dims=(4, 6, 6),
    in_audio_dim=6,
    out_audio_dim=6,
    model_dim_a=32,
    ff_dim_a=64,
    eight_blocks={"num_visual_blocks": 8},
)
def kandinsky6(moment: Moment) -> dict[str, Any]:
    latents = moment.latents(FRAMES, 2 * HEIGHT, 2 * WIDTH, 4)
    condition = torch.zeros(moment.batch, FRAMES, 2 * HEIGHT, 2 * WIDTH, 5)
    return {
        "hidden_states": torch.cat([latents, condition], dim=-1),
        "audio_hidden_states": moment.latents(11, 6),
        "encoder_hidden_states": moment.prompt(),
        "pooled_projections": moment.pooled_prompt(),
        "timestep": moment.timestep,
        "visual_rope_pos": None,
        "encoder_attention_mask": None,
        "visual_token_type_ids": None,
    }


# A word has one embedding from each of several layers of the text encoder.
@case(
    "Krea2Transformer2DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=8,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    timestep_embed_dim=40,
    text_hidden_dim=TEXT_CHANNELS,
    num_text_layers=3,
    text_num_attention_heads=2,
    text_num_key_value_heads=2,
    text_intermediate_size=32,
    axes_dims_rope=(4, 6, 6),
    eight_blocks={"num_layers": 8},
)
def krea2(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "encoder_hidden_states": moment.draw("prompt", TEXT, 3, TEXT_CHANNELS),
        "timestep": moment.timestep / 1000,
        "position_ids": torch.cat([torch.zeros(TEXT, 3), _grid(1, HEIGHT, WIDTH).float()]),
        "encoder_attention_mask": moment.prompt_mask().bool(),
    }


@case(
    "LTX2VideoTransformer3DModel",
    streams={"transformer_blocks": ("hidden_states", "audio_hidden_states")},
    in_channels=8,
    out_channels=8,
    num_attention_heads=2,
    attention_head_dim=16,
    cross_attention_dim=32,
    audio_in_channels=6,
    audio_out_channels=6,
    audio_num_attention_heads=2,
    audio_attention_head_dim=12,
    audio_cross_attention_dim=24,
    num_layers=3,
    caption_channels=TEXT_CHANNELS,
    eight_blocks={"num_layers": 8},
)
def ltx2_video(moment: Moment) -> dict[str, Any]:
    audio_length, timestep = 9, moment.timestep
    video_coordinates = torch.stack([_grid(FRAMES, HEIGHT, WIDTH).T] * 2, dim=-1).float()
    audio_coordinates = torch.stack([_grid(audio_length).T.reshape(1, -1)] * 2, dim=-1) / 25
    return {
        "hidden_states": moment.latents(FRAMES * HEIGHT * WIDTH, 8),
        "audio_hidden_states": moment.latents(audio_length, 6),
        "encoder_hidden_states": moment.prompt(),
        "audio_encoder_hidden_states": moment.draw("audio prompt", TEXT, TEXT_CHANNELS),
        "timestep": timestep,
        "sigma": timestep,
        "encoder_attention_mask": moment.prompt_mask().long(),
        "audio_encoder_attention_mask": moment.prompt_mask().long(),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "fps": 24.0,
        "audio_num_frames": audio_length,
        "video_coords": video_coordinates.expand(moment.batch, -1, -1, -1),
        "audio_coords": audio_coordinates.expand(moment.batch, -1, -1, -1),
        "use_cross_timestep": True,
    }


# A spatial and a temporal block take turns, and the layout of the stream changes with each.
@case(
    "LatteTransformer3DModel",
    streams={"transformer_blocks": HIDDEN_STATES, "temporal_transformer_blocks": HIDDEN_STATES},
    in_channels=4,
    out_channels=8,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    cross_attention_dim=32,
    attention_bias=True,
    sample_size=2 * HEIGHT,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    caption_channels=TEXT_CHANNELS,
    video_length=FRAMES,
    eight_blocks={"num_layers": 4},
)
def latte(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": moment.prompt(),
        "timestep": moment.integer_timestep,
        "enable_temporal_attentions": True,
    }


@case(
    "LongCatAudioDiTTransformer",
    streams={"blocks": HIDDEN_STATES},
    dit_dim=32,
    dit_depth=3,
    dit_heads=2,
    dit_text_dim=TEXT_CHANNELS,
    latent_dim=8,
    eight_blocks={"dit_depth": 8},
)
def longcat_audio_dit(moment: Moment) -> dict[str, Any]:
    # The time rises from 0 to 1. The audio to continue is empty.
    length = 24
    return {
        "hidden_states": moment.latents(length, 8),
        "encoder_hidden_states": moment.prompt(),
        "encoder_attention_mask": moment.prompt_mask().bool(),
        "timestep": moment.constant(1 - moment.sigma),
        "attention_mask": torch.ones(moment.batch, length, dtype=torch.bool),
        "latent_cond": torch.zeros(moment.batch, length, 8),
    }


@case(
    "LongCatImageTransformer2DModel",
    streams={"transformer_blocks": TEXT_THEN_IMAGE, "single_transformer_blocks": TEXT_THEN_IMAGE},
    in_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    pooled_projection_dim=POOLED_CHANNELS,
    axes_dims_rope=[4, 6, 6],
    eight_blocks={"num_layers": 4, "num_single_layers": 4},
)
def longcat_image(moment: Moment) -> dict[str, Any]:
    word = torch.arange(TEXT)
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep / 1000,
        "guidance": None,
        "encoder_hidden_states": moment.prompt(),
        "txt_ids": torch.stack([torch.zeros_like(word), word, word], dim=1).float(),
        "img_ids": (_grid(1, HEIGHT, WIDTH) + torch.tensor([1, TEXT, TEXT])).float(),
    }


@case(
    "Lumina2Transformer2DModel",
    streams={"layers": HIDDEN_STATES},
    sample_size=2 * WIDTH,
    in_channels=4,
    hidden_size=48,
    num_layers=3,
    num_refiner_layers=2,
    num_attention_heads=3,
    num_kv_heads=1,
    multiple_of=16,
    axes_dim_rope=(4, 6, 6),
    axes_lens=(16, 16, 16),
    cap_feat_dim=TEXT_CHANNELS,
    eight_blocks={"num_layers": 8, "num_refiner_layers": 1},
)
def lumina2(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": 1 - moment.timestep / 1000,
        "encoder_hidden_states": moment.prompt(),
        "encoder_attention_mask": moment.prompt_mask().long(),
        "attention_kwargs": None,
    }


@case(
    "LuminaNextDiT2DModel",
    streams={"layers": HIDDEN_STATES},
    sample_size=2 * WIDTH,
    in_channels=4,
    hidden_size=48,
    num_layers=3,
    num_attention_heads=3,
    num_kv_heads=1,
    multiple_of=16,
    cross_attention_dim=TEXT_CHANNELS,
    eight_blocks={"num_layers": 8},
)
def lumina_next(moment: Moment) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": 1 - moment.timestep / 1000,
        "encoder_hidden_states": moment.prompt(),
        "encoder_mask": moment.prompt_mask().long(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 8, 8),
        "cross_attention_kwargs": {"base_sequence_length": 4096},
    }


@case(
    "MiniMaxH3Transformer3DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    num_attention_heads=2,
    attention_head_dim=16,
    hidden_size=48,
    num_layers=3,
    num_refiner_layers=2,
    ffn_dim=64,
    in_channels=2,
    audio_in_channels=6,
    text_dim=TEXT_CHANNELS,
    freq_dim=40,
    time_embed_hidden_dim=36,
    time_embed_dim=20,
    rope_freq_dim=2,
    eight_blocks={"num_layers": 8},
)
def minimax_h3(moment: Moment) -> dict[str, Any]:
    # One row per token of text, audio and video, and one time per schedule, rising from 0 to 1.
    # At the first step, where the schedules agree, the pipeline passes that time only once.
    audio_length, video_length = 8, FRAMES * HEIGHT * WIDTH
    tags = torch.tensor([1] * TEXT + [2] * audio_length + [0] * video_length)
    text, audio, video = (torch.nonzero(tags == tag).flatten() for tag in (1, 2, 0))
    places = torch.zeros(len(tags), 3, dtype=torch.float64)
    places[text, 0] = torch.arange(TEXT).double()
    places[audio, 0] = TEXT + torch.arange(audio_length).double()
    places[video] = _grid(FRAMES, HEIGHT, WIDTH).double() + torch.tensor([TEXT, 0, 0])
    audio_sigma = 3 * moment.sigma / (1 + 2 * moment.sigma)
    return {
        "hidden_states": moment.latents(video_length, 8),
        "audio_hidden_states": moment.latents(audio_length, 6),
        "encoder_hidden_states": moment.prompt(),
        "timestep": torch.tensor([1 - audio_sigma, 1 - moment.sigma]),
        "timestep_indices": (tags != 2).long(),
        "attention_kwargs": None,
        "token_tags": tags,
        "position_ids": places,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


# The time enters as the first token of the stream and modulates nothing.
@case(
    "MiniMaxMusic3Transformer1DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=8,
    condition_dim=TEXT_CHANNELS,
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=16,
    ff_inner_dim=64,
    rotary_dim=8,
    fourier_embedding_dim=40,
    eight_blocks={"num_layers": 8},
)
def minimax_music3(moment: Moment) -> dict[str, Any]:
    length = 24
    return {
        "hidden_states": moment.latents(8, length),
        "timestep": moment.constant(1 - moment.sigma),
        "encoder_hidden_states": moment.draw("condition", length, TEXT_CHANNELS),
    }


# The last block returns the text as it came.
@case(
    "MochiTransformer3DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT},
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    pooled_projection_dim=24,
    in_channels=4,
    text_embed_dim=40,
    time_embed_dim=36,
    eight_blocks={"num_layers": 8},
)
def mochi(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": moment.draw("prompt", TEXT, 40),
        "timestep": 1000 - moment.timestep,
        "encoder_attention_mask": moment.prompt_mask().bool(),
        "attention_kwargs": None,
    }


# The last two blocks of the second list are a decoder, as in Motif-Video 2B: it begins again with
# the embedded latents, and has the result of all blocks before it in the place of the text.
@case(
    "MotifVideoTransformer3DModel",
    streams={"transformer_blocks": IMAGE_THEN_TEXT, "single_transformer_blocks": IMAGE_THEN_TEXT},
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=4,
    num_decoder_layers=2,
    text_embed_dim=TEXT_CHANNELS,
    rope_axes_dim=(4, 6, 6),
    enable_text_cross_attention_dual=True,
    enable_text_cross_attention_single=True,
    eight_blocks={"num_layers": 4, "num_single_layers": 4},
)
def motif_video(moment: Moment) -> dict[str, Any]:
    # Beside the latents lie those of a given first frame, and a mask: there is no such frame.
    given = torch.zeros(moment.batch, 5, FRAMES, 2 * HEIGHT, 2 * WIDTH)
    latents = moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH)
    return {
        "hidden_states": torch.cat([latents, given], dim=1),
        "timestep": moment.timestep,
        "attention_kwargs": None,
        "encoder_hidden_states": moment.prompt(),
        "encoder_attention_mask": moment.prompt_mask().bool(),
    }


# The first three blocks and the last one are dense.
@case(
    "NucleusMoEImageTransformer2DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=8,
    out_channels=2,
    num_layers=6,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=TEXT_CHANNELS,
    axes_dims_rope=(4, 6, 6),
    num_experts=4,
    moe_intermediate_dim=40,
    capacity_factors=2.0,
    eight_blocks={"num_layers": 8},
)
def nucleus_moe_image(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep / 1000,
        "encoder_hidden_states": moment.prompt(),
        "encoder_hidden_states_mask": moment.prompt_mask().long(),
        "img_shapes": [(1, HEIGHT, WIDTH)] * moment.batch,
        "attention_kwargs": None,
    }


# A language model: the time is one token of the stream and modulates only the output layer.
@case(
    "OmniGenTransformer2DModel",
    streams={"layers": HIDDEN_STATES},
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=64,
    num_layers=3,
    pad_token_id=0,
    vocab_size=40,
    rope_scaling={"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    pos_embed_max_size=8,
    time_step_dim=36,
    eight_blocks={"num_layers": 8},
)
def omnigen(moment: Moment) -> dict[str, Any]:
    # The time rises from 0 to 1. Words see what comes before them, the image sees everything.
    length = TEXT + 1 + HEIGHT * WIDTH
    mask = torch.ones(length, length).tril()
    mask[TEXT + 1 :] = 1
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": moment.constant(1 - moment.sigma),
        "input_ids": moment.draw("prompt", TEXT, 40).argmax(dim=-1),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.expand(moment.batch, -1, -1),
        "position_ids": torch.arange(length).expand(moment.batch, -1),
    }


@case(
    "OvisImageTransformer2DModel",
    streams={"transformer_blocks": TEXT_THEN_IMAGE, "single_transformer_blocks": TEXT_THEN_IMAGE},
    in_channels=8,
    out_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=TEXT_CHANNELS,
    axes_dims_rope=(4, 6, 6),
    eight_blocks={"num_layers": 4, "num_single_layers": 4},
)
def ovis_image(moment: Moment) -> dict[str, Any]:
    word = torch.arange(TEXT)
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep / 1000,
        "encoder_hidden_states": moment.prompt(),
        "txt_ids": torch.stack([torch.zeros_like(word), word, word], dim=1).float(),
        "img_ids": _grid(1, HEIGHT, WIDTH).float(),
        "joint_attention_kwargs": {},
    }


@case(
    "PRXTransformer2DModel",
    streams={"blocks": HIDDEN_STATES},
    in_channels=4,
    context_in_dim=TEXT_CHANNELS,
    hidden_size=32,
    num_heads=2,
    depth=3,
    axes_dim=[8, 8],
    eight_blocks={"depth": 8},
)
def prx(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": moment.timestep / 1000,
        "encoder_hidden_states": moment.prompt(),
        "attention_mask": moment.prompt_mask().bool(),
    }


# Denoises one embedding of an image. The time is one token of the stream and modulates nothing.
@case(
    "PriorTransformer",
    streams={"transformer_blocks": HIDDEN_STATES},
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    embedding_dim=TEXT_CHANNELS,
    num_embeddings=TEXT,
    eight_blocks={"num_layers": 8},
)
def prior(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(TEXT_CHANNELS),
        "timestep": moment.integer_timestep[0],
        "proj_embedding": moment.draw("pooled", TEXT_CHANNELS),
        "encoder_hidden_states": moment.prompt(),
        "attention_mask": moment.prompt_mask().bool(),
    }


# As with `use_kv_cache=False`: otherwise the pipeline leaves the prompt out after the first step.
@case(
    "QwenImage21Transformer2DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=8,
    out_channels=8,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    context_in_dim=TEXT_CHANNELS,
    axes_dims_rope=(4, 6, 6),
    eight_blocks={"num_layers": 8},
)
def qwen_image_21(moment: Moment) -> dict[str, Any]:
    # The language model counts four tokens of the image as one.
    slots = torch.arange(TEXT + HEIGHT * WIDTH // 4) >= TEXT
    return {
        "hidden_states": moment.latents(HEIGHT * WIDTH, 8),
        "timestep": moment.timestep / 1000,
        "encoder_hidden_states": moment.prompt(),
        "encoder_hidden_states_mask": moment.prompt_mask().bool(),
        "img_shapes": [[(1, HEIGHT, WIDTH)]] * moment.batch,
        "img_mask": slots.expand(moment.batch, -1),
        "attention_kwargs": None,
        "kv_cache": None,
        "kv_cache_mode": None,
    }


# Every second block is followed by an update of the pairs, which are no block of the list. One
# pass over the blocks, as in the last steps of the released schedule; the first have six.
@case(
    "RFD4ProteinaTransformer",
    streams={"transformer_layers": ("values",)},
    timestep="bb_ca_time",
    nlayers=4,
    token_dim=32,
    nheads=2,
    dim_cond=40,
    pair_repr_dim=12,
    latent_dim=8,
    token_type_emb_dim=6,
    cath_emb_dim=4,
    t_emb_dim=36,
    seq_sep_dim=7,
    xt_pair_dist_dim=10,
    tri_mult_c=16,
    num_sequence_classes=11,
    eight_blocks={"nlayers": 8},
)
def rfd4_proteina(moment: Moment) -> dict[str, Any]:
    tokens = HEIGHT * WIDTH
    words = torch.ones(moment.batch, tokens, dtype=torch.bool)
    chain = torch.arange(tokens).expand(moment.batch, -1) // 16
    distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
    time = 1 - moment.timestep / 1000
    atoms = {
        f"condition_{name}_1_atom": moment.draw(name, tokens, 37) > 1
        for name in ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord")
    }
    return {
        "bb_ca": moment.latents(tokens, 3),
        "local_latents": moment.latents(tokens, 8),
        "bb_ca_time": time,
        "local_latents_time": time**2,
        "padding_mask": words,
        "token_type": torch.zeros_like(chain),
        "atom37_mask": moment.draw("atoms", tokens, 37) > 0,
        "conditioning": {
            **atoms,
            "condition_sequence_1_residue": chain,
            "condition_index-group_1_token": chain,
            "molecule_iid": chain,
            "molecule_entity_id": chain,
            "token_bond_path_length": distance.expand(moment.batch, -1, -1),
            "is_in_context_conditioning": ~words,
            "supports_local_latent": words,
        },
        "recycle_depth": 1,
        "attention_kwargs": None,
    }


@case(
    "SanaVideoTransformer3DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=TEXT_CHANNELS,
    rope_max_seq_len=16,
    eight_blocks={"num_layers": 8},
)
def sana_video(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": moment.prompt(),
        "encoder_attention_mask": moment.prompt_mask().long(),
        "timestep": moment.integer_timestep,
    }


# A cache entry for each block: the number of blocks is part of the inputs.
@case(
    "SanaWMLTX2RefinerTransformer3DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=8,
    out_channels=8,
    num_layers=8,
    attention_head_dim=16,
    num_attention_heads=2,
    cross_attention_dim=32,
    audio_in_channels=4,
    audio_out_channels=4,
    audio_attention_head_dim=4,
    audio_num_attention_heads=2,
    audio_cross_attention_dim=8,
    caption_channels=TEXT_CHANNELS,
    eight_blocks={},
)
def sana_wm_refiner(moment: Moment) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    def rotary(first: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        position = torch.arange(first * HEIGHT * WIDTH, (first + frames) * HEIGHT * WIDTH)
        angles = torch.outer(position, 0.5 ** torch.arange(16)).repeat_interleave(2, dim=-1)[None]
        return angles.cos(), angles.sin()

    # The first frame of the film, the frame before this part, and the three of this part.
    cache = SanaWMRefinerKVCache(8)
    cache.sink_pe = rotary(0, 1)
    for index, layer in enumerate(cache.layer_caches):
        kept = moment.draw(f"cache {index}", 4, HEIGHT * WIDTH, 32).unbind(1)
        layer.store_sink(*kept[:2])
        layer.store_history(*kept[2:])
    return {
        "hidden_states": moment.latents(FRAMES * HEIGHT * WIDTH, 8),
        "encoder_hidden_states": moment.prompt(),
        "timestep": moment.timestep[:, None].expand(-1, FRAMES * HEIGHT * WIDTH),
        "video_rotary_emb": rotary(2, FRAMES),
        "encoder_attention_mask": moment.prompt_mask(),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
    }


# Every second block attends by softmax, the others by a linear recurrence over the frames.
@case(
    "SanaWMTransformer3DModel",
    streams={"blocks": ("x",)},
    in_channels=8,
    num_layers=4,
    hidden_size=48,
    num_attention_heads=3,
    softmax_every_n=2,
    linear_head_dim=16,
    chunk_plucker_channels=6,
    caption_channels=TEXT_CHANNELS,
    eight_blocks={"num_layers": 8},
)
def sana_wm(moment: Moment) -> dict[str, Any]:
    # A camera that moves forward; the first frame is given, so its time is 0.
    pose = torch.eye(4).repeat(moment.batch, FRAMES, 1, 1)
    pose[..., 2, 3] = torch.arange(FRAMES) / 10
    lens = torch.tensor([6.0, 6.0, WIDTH / 2, HEIGHT / 2]).expand(moment.batch, FRAMES, -1)
    given = torch.tensor([0.0] + [1.0] * (FRAMES - 1))
    return {
        "hidden_states": moment.latents(8, FRAMES, HEIGHT, WIDTH),
        "timestep": moment.timestep[:, None, None] * given,
        "encoder_hidden_states": moment.prompt()[:, None],
        "data_info": {"img_hw": torch.tensor([[32.0 * HEIGHT, 32.0 * WIDTH]])},
        "mask": moment.prompt_mask().long(),
        "camera_conditions": torch.cat([pose.flatten(2), lens], dim=-1),
        "chunk_plucker": moment.draw("rays", 6, FRAMES, HEIGHT, WIDTH),
    }


@case(
    "SkyReelsV2Transformer3DModel",
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
def skyreels_v2(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "timestep": moment.integer_timestep,
        "encoder_hidden_states": moment.prompt(),
    }


@case(
    "StableAudio3DiTModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    io_channels=8,
    embed_dim=32,
    depth=3,
    num_heads=2,
    cond_token_dim=TEXT_CHANNELS,
    global_cond_dim=TEXT_CHANNELS,
    local_add_cond_dim=9,
    timestep_features_dim=40,
    num_memory_tokens=4,
    eight_blocks={"depth": 8},
)
def stable_audio_3(moment: Moment) -> dict[str, Any]:
    duration = moment.draw("duration", TEXT_CHANNELS)
    return {
        "hidden_states": moment.latents(8, HEIGHT * WIDTH),
        "timestep": moment.timestep / 1000,
        "encoder_hidden_states": torch.cat([moment.prompt(), duration[:, None]], dim=1),
        "global_hidden_states": duration,
        "encoder_attention_mask": torch.cat(
            [moment.prompt_mask(), moment.constant(1.0)[:, None]], dim=1
        ),
    }


@case(
    "StableAudioDiTModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    in_channels=8,
    out_channels=8,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    num_key_value_attention_heads=1,
    cross_attention_dim=16,
    time_proj_dim=40,
    global_states_input_dim=2 * TEXT_CHANNELS,
    cross_attention_input_dim=TEXT_CHANNELS,
    eight_blocks={"num_layers": 8},
)
def stable_audio(moment: Moment) -> dict[str, Any]:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    # Start and end of the clip follow the prompt, and go in front of the sound as one token.
    clip = moment.draw("clip", 2, TEXT_CHANNELS)
    rotary = get_1d_rotary_pos_embed(
        8, HEIGHT * WIDTH + 1, use_real=True, repeat_interleave_real=False
    )
    return {
        "hidden_states": moment.latents(8, HEIGHT * WIDTH),
        "timestep": moment.timestep[:1] / 1000,
        "encoder_hidden_states": torch.cat([moment.prompt(), clip], dim=1),
        "global_hidden_states": clip.flatten(1)[:, None],
        "rotary_embedding": rotary,
    }


@case(
    "T5FilmDecoder",
    streams={"decoders": HIDDEN_STATES},
    timestep="decoder_noise_time",
    input_dims=8,
    targets_length=HEIGHT * WIDTH,
    d_model=32,
    num_layers=3,
    num_heads=2,
    d_kv=16,
    d_ff=64,
    eight_blocks={"num_layers": 8},
)
def t5_film(moment: Moment) -> dict[str, Any]:
    # The notes to play, and the sound before this part.
    notes = (moment.draw("notes", TEXT, 32), moment.prompt_mask())
    sound = (moment.draw("sound", 7, 32), torch.ones(moment.batch, 7))
    return {
        "encodings_and_masks": [notes, sound],
        "decoder_input_tokens": moment.latents(HEIGHT * WIDTH, 8),
        "decoder_noise_time": moment.integer_timestep / 1000,
    }


# As in VQ-Diffusion: the latents are codes, 11 for those still unknown, and the time has no batch.
@case(
    "Transformer2DModel",
    streams={"transformer_blocks": HIDDEN_STATES},
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    cross_attention_dim=TEXT_CHANNELS,
    attention_bias=True,
    sample_size=HEIGHT,
    num_vector_embeds=12,
    num_embeds_ada_norm=100,
    norm_type="ada_norm",
    activation_fn="geglu-approximate",
    eight_blocks={"num_layers": 8},
)
def transformer_2d(moment: Moment) -> dict[str, Any]:
    codes = moment.draw("image", HEIGHT * HEIGHT, 11).argmax(dim=-1)
    unknown = torch.special.ndtr(moment.draw("order", HEIGHT * HEIGHT)) < moment.sigma
    return {
        "hidden_states": torch.where(unknown, 11, codes),
        "encoder_hidden_states": moment.prompt(),
        "timestep": torch.tensor(round(99 * moment.sigma)),
    }


@case(
    "WanAnimateTransformer3DModel",
    streams={"blocks": HIDDEN_STATES},
    added=("face_adapter",),
    in_channels=12,
    latent_channels=4,
    out_channels=4,
    num_layers=4,
    attention_head_dim=24,
    num_attention_heads=2,
    text_dim=TEXT_CHANNELS,
    image_dim=12,
    added_kv_proj_dim=48,
    freq_dim=40,
    ffn_dim=64,
    rope_max_seq_len=16,
    motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 4},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=8,
    face_encoder_hidden_dim=8,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=2,
    eight_blocks={"num_layers": 8},
)
def wan_animate(moment: Moment) -> dict[str, Any]:
    # One latent frame of the reference image goes before the video's, of four frames each.
    reference = moment.draw("reference", 8, FRAMES, 2 * HEIGHT, 2 * WIDTH)
    return {
        "hidden_states": torch.cat(
            [moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH), reference], dim=1
        ),
        "timestep": moment.integer_timestep,
        "encoder_hidden_states": moment.prompt(),
        "encoder_hidden_states_image": moment.draw("clip", 7, 12),
        "pose_hidden_states": moment.draw("pose", 4, FRAMES - 1, 2 * HEIGHT, 2 * WIDTH),
        "face_pixel_values": moment.draw("face", 3, 4 * (FRAMES - 2) + 1, 16, 16).clamp(-1, 1),
        "motion_encode_batch_size": None,
    }


# The control branch runs before the loop; what it gives is added after the blocks it is named for.
@case(
    "WanVACETransformer3DModel",
    streams={"blocks": HIDDEN_STATES},
    added=("vace_blocks",),
    in_channels=4,
    out_channels=4,
    num_layers=4,
    attention_head_dim=24,
    num_attention_heads=2,
    text_dim=TEXT_CHANNELS,
    freq_dim=40,
    ffn_dim=64,
    rope_max_seq_len=16,
    vace_layers=(0, 2),
    vace_in_channels=12,
    eight_blocks={"num_layers": 8, "vace_layers": (0, 5)},
)
def wan_vace(moment: Moment) -> dict[str, Any]:
    return {
        "hidden_states": moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "timestep": moment.integer_timestep,
        "encoder_hidden_states": moment.prompt(),
        "control_hidden_states": moment.draw("control", 12, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "control_hidden_states_scale": torch.ones(2),
    }


# A mask in blocks of 128 tokens, and keys and values of a driving video that was run before.
@case(
    "WanAnimate2Transformer3DModel",
    streams={"blocks": HIDDEN_STATES},
    text_len=TEXT + 2,
    in_dim=12,
    dim=48,
    ffn_dim=64,
    freq_dim=40,
    text_dim=TEXT_CHANNELS,
    out_dim=4,
    num_heads=2,
    num_layers=3,
    use_img_emb=False,
    eight_blocks={"num_layers": 8},
)
def wan_animate_2(moment: Moment) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    cache = WanAnimate2KVCache(16)
    for index, layer in enumerate(cache.layer_caches):
        driving = moment.draw(f"cache {index}", 2, (FRAMES - 1) * HEIGHT * WIDTH, 2, 24)
        layer.store(*driving.unbind(1))
    reference = moment.draw("reference", 8, FRAMES, 2 * HEIGHT, 2 * WIDTH)
    return {
        "hidden_states": list(moment.latents(4, FRAMES, 2 * HEIGHT, 2 * WIDTH).unbind()),
        "timestep": moment.integer_timestep,
        "encoder_hidden_states": list(moment.prompt().unbind()),
        "condition_latents": list(reference.unbind()),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": FRAMES * HEIGHT * WIDTH,
        "reference_grid_sizes": torch.tensor([[FRAMES - 1, HEIGHT, WIDTH]] * moment.batch),
        "origin_len": 4 * (FRAMES - 2) + 1,
        "origin_area": [16 * HEIGHT, 16 * WIDTH],
        "is_uncondtion": False,
    }


NOT_DENOISING = {
    "DreamLiteTransformer2DModel": "a building block of UNets",
    "MiniMaxMusic3RVQDepthDecoder": "an autoregressive decoder of audio codes",
    "TransformerTemporalModel": "a building block of UNets",
}
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


def sample(output: Any) -> Tensor:
    """All predictions in what a model returned, as one tensor.

    Most classes return a tuple of one prediction, with the batch in front. Some give one tensor per
    image, and some one per modality or a cache besides; different shapes are flattened and put one
    behind the other.
    """
    tensors = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
    is_one_per_image = isinstance(output, tuple) and isinstance(output[0], list)
    if len(tensors) == 1 and not is_one_per_image:
        return tensors[0]
    if len({each.shape for each in tensors}) == 1:
        return torch.stack(tensors)
    return torch.cat([each.flatten() for each in tensors])
