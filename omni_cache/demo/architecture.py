"""The demo pipeline before training: a small FluxPipeline with random weights.

Knows shapes, sizes and vocabularies; knows nothing of data beyond its words, nor of training.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import cast

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT_LENGTH = 16
"""Tokens that the longest caption of the demo's world fits in, for both text encoders."""
LATENT_CHANNELS = 4
_CLIP_WIDTH = 64
_T5_WIDTH = 96


def build_pipeline(words: Iterable[str]) -> FluxPipeline:
    """Build the untrained pipeline; weights come from torch's global generator.

    Args:
        words: the vocabulary, as separate lower-case words and punctuation marks. Other words are
            still accepted, letter by letter.
    """
    vocabulary = sorted(set(words) | set(string.ascii_lowercase))
    tokenizer = _clip_tokenizer(vocabulary)
    tokenizer_2 = _t5_tokenizer(vocabulary)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=_autoencoder(),
        text_encoder=_clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=_transformer(),
    )


def _transformer() -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=6,
        num_attention_heads=5,
        attention_head_dim=32,
        joint_attention_dim=_T5_WIDTH,
        pooled_projection_dim=_CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    # Every block starts as the identity (adaLN-Zero, Peebles and Xie 2022), which trains faster.
    modulations = [
        layer
        for name, layer in transformer.named_modules()
        if name.endswith(
            ("norm1.linear", "norm1_context.linear", ".norm.linear", "norm_out.linear")
        )
    ]
    for layer in [*modulations, transformer.proj_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return cast(FluxTransformer2DModel, transformer)


def _autoencoder() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    # It starts almost linear, with next to no noise on the latents; otherwise the noise drowns the
    # picture and colours are learnt late.
    for block in vae.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
    nn.init.zeros_(vae.encoder.conv_out.weight[LATENT_CHANNELS:])
    nn.init.constant_(vae.encoder.conv_out.bias[LATENT_CHANNELS:], -6.0)
    return cast(AutoencoderKL, vae)


def _clip_tokenizer(vocabulary: list[str]) -> CLIPTokenizer:
    """Byte-pair merges that make one token of every word of the vocabulary.

    The merges are learnt here, and not by a trainer of ``tokenizers``, whose ties fall differently
    from one process to the next.
    """
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        merge = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(merge)
        words = [_merge(word, merge) for word in words]
    letters = [f"{letter}{end}" for letter in string.ascii_lowercase for end in ("", "</w>")]
    marks = [f"{mark}</w>" for mark in vocabulary if not mark.isalpha()]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *marks, *map("".join, merges)]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=TEXT_LENGTH,
    )


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _t5_tokenizer(vocabulary: list[str]) -> T5Tokenizer:
    """A unigram vocabulary in which a whole word always scores above its letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -1.0) for word in vocabulary if word.isalpha()]
    pieces += [(piece, -4.0) for piece in [*string.ascii_lowercase, ","]]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def _clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_CLIP_WIDTH,
            intermediate_size=2 * _CLIP_WIDTH,
            projection_dim=_CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=_T5_WIDTH,
            d_kv=24,
            d_ff=2 * _T5_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
