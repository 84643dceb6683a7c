"""Real diffusers pipelines with tiny text encoders give the same bits with a prompt cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.models import SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from omni_cache.backends.prompt_embed_cache import (
    install_prompt_embed_cache,
    uninstall_prompt_embed_cache,
)


def tokenizer(folder: Path) -> CLIPTokenizer:
    """One that knows letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{each}</w>" for each in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12
    )


def encoder(seed: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
    )
    return CLIPTextModelWithProjection(config).eval()


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    torch.manual_seed(2)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    ).eval()
    words = tokenizer(tmp_path)
    made = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=encoder(0),
        tokenizer=words,
        text_encoder_2=encoder(1),
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, prompt: str = "a fox", **more: Any) -> Tensor:
    (latents,) = pipe(
        prompt,
        height=64,
        width=64,
        num_inference_steps=2,
        max_sequence_length=12,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        return_dict=False,
        **more,
    )
    return latents


def uncached(pipe: Any, **more: Any) -> Tensor:
    """What the pipeline gives without its cache, which it has again afterwards."""
    attributes = dict(vars(pipe))
    uninstall_prompt_embed_cache(pipe)
    drawn = draw(pipe, **more)
    vars(pipe).update(attributes)
    return drawn


def _in_place(pipe: Any) -> None:
    with torch.no_grad():
        for each in pipe.text_encoder_2.parameters():
            each.mul_(1.1)


def _lora(pipe: Any) -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(config, adapter_name="mine")


def _weaker(pipe: Any) -> None:
    _lora(pipe)
    draw(pipe)
    pipe.set_adapters(["mine"], [0.25])


def _off(pipe: Any) -> None:
    _lora(pipe)
    draw(pipe)
    pipe.text_encoder.disable_adapters()


def _fused(pipe: Any) -> None:
    _lora(pipe)
    draw(pipe)
    pipe.fuse_lora(components=["text_encoder"])


def _fused_and_back(pipe: Any) -> None:
    _fused(pipe)
    draw(pipe)
    pipe.unfuse_lora(components=["text_encoder"])


CHANGES = {
    "weights written in place": _in_place,
    "an adapter": _lora,
    "a weaker adapter": _weaker,
    "an adapter switched off": _off,
    "a fused adapter": _fused,
    "an adapter fused and taken out": _fused_and_back,
    "double precision": lambda pipe: pipe.to(torch.float64),
    "another tokenizer side": lambda pipe: setattr(pipe.tokenizer, "padding_side", "left"),
}


def test_output_is_bit_equal_and_each_prompt_is_encoded_once(pipe: Any) -> None:
    before = dict(vars(pipe))
    cache = install_prompt_embed_cache(pipe)
    assert cache is not None
    expected = uncached(pipe)
    for _ in range(3):
        assert torch.equal(draw(pipe), expected)
    assert (cache.hits, cache.misses, cache.bypassed) == (2, 1, 0)
    assert not torch.equal(draw(pipe, "a hare"), expected)
    assert (cache.hits, cache.misses) == (2, 2)
    uninstall_prompt_embed_cache(pipe)
    assert not vars(pipe).keys() & {"encode_prompt", "__getstate__", "_prompt_embed_cache"}
    assert vars(pipe).keys() >= before.keys()  # a call leaves some of its own
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_after_a_change_of_the_encoders_output_is_bit_equal(pipe: Any, change: Any) -> None:
    cache = install_prompt_embed_cache(pipe)
    assert cache is not None
    draw(pipe)
    change(pipe)
    expected = uncached(pipe)
    for _ in range(2):
        assert torch.equal(draw(pipe), expected)
    draw(pipe)
    assert cache.hits >= 1


def test_the_denoiser_may_change_and_prompts_stay(pipe: Any) -> None:
    cache = install_prompt_embed_cache(pipe)
    assert cache is not None
    draw(pipe)
    with torch.no_grad():
        for each in pipe.transformer.parameters():
            each.mul_(1.1)
    assert torch.equal(draw(pipe), uncached(pipe))
    assert (cache.hits, cache.misses) == (1, 1)
