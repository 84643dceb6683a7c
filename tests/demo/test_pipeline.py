"""The committed pipeline folder: loads offline, stays small, draws what captions say."""

import json
import random

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from omni_cache.demo import demo_pipeline_path, load_demo_pipeline
from omni_cache.demo.architecture import TEXT_LENGTH
from omni_cache.demo.drawings import IMAGE_SIZE, Colours, random_scene, recognise
from omni_cache.demo.evaluation import accuracy
from omni_cache.demo.recognition import recognise_shape


@pytest.fixture(scope="module")
def pipe():
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt, seed=0, steps=28, **flags):
    generator = torch.Generator().manual_seed(seed)
    images = pipe(prompt, num_inference_steps=steps, generator=generator, **flags).images
    return np.asarray(images[0])


def test_the_folder_is_small_and_holds_no_pickles():
    files = [path for path in demo_pipeline_path().rglob("*") if path.is_file()]

    assert sum(path.stat().st_size for path in files) <= 15e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


def test_it_is_a_flux_pipeline_for_diffusers_as_it_is():
    pipe = FluxPipeline.from_pretrained(demo_pipeline_path(), local_files_only=True)

    assert {type(component).__name__ for component in pipe.components.values()} >= {
        "AutoencoderKL",
        "CLIPTextModel",
        "FluxTransformer2DModel",
        "T5EncoderModel",
    }
    assert pipe.transformer.dtype == torch.float32
    assert len(pipe.transformer.transformer_blocks) > 1
    assert len(pipe.transformer.single_transformer_blocks) > 1


def test_a_prompt_alone_draws_a_picture_of_the_trained_size(pipe):
    picture = draw(pipe, "a red circle on a blue background")

    assert picture.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert recognise_shape(picture) == "circle"
    assert recognise(picture).shape == "red"
    assert recognise(picture).background == "blue"


def test_padding_the_text_does_not_change_what_is_drawn(pipe):
    prompt = "a yellow square on a purple background"

    for length in (TEXT_LENGTH, 512):
        found = recognise(draw(pipe, prompt, max_sequence_length=length))
        assert found == Colours(shape="yellow", background="purple")


def test_another_seed_draws_another_picture(pipe):
    prompt = "a green diamond on a white background"

    first, again, other = (draw(pipe, prompt, seed, steps=4) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_every_caption_fits_the_tokenizers(pipe):
    rng = random.Random(0)
    for _ in range(300):
        caption = random_scene(rng).caption
        words = len(caption.replace(",", " ,").split())

        assert len(pipe.tokenizer(caption).input_ids) == words + 2 <= TEXT_LENGTH
        assert len(pipe.tokenizer_2(caption).input_ids) == words + 1 <= TEXT_LENGTH


def test_an_unknown_word_is_spelt_and_not_lost(pipe):
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        ids = tokenizer("fox", add_special_tokens=False).input_ids

        assert len(ids) >= 3
        assert tokenizer.unk_token_id not in ids


def test_the_folder_says_how_it_was_trained():
    report = json.loads((demo_pipeline_path() / "training.json").read_text())

    assert report["accuracy"]["captions"] == 100
    assert report["accuracy"]["both"] >= 90
    assert {"date", "recipe", "versions"} <= report.keys()


def test_it_draws_the_right_shape_and_colours_for_most_captions(pipe):
    found = accuracy(pipe, captions=12, seed=7, batch_size=12)

    assert found.both >= 10, found


@pytest.mark.exhaustive
def test_it_draws_the_right_shape_and_colours_for_about_nine_captions_in_ten(pipe):
    found = accuracy(pipe, captions=100, seed=77)

    assert found.both >= 85, found  # other captions than training.json counts
