"""The pipeline of digits: training and samples are repeatable, and both branches can be cached."""

import digits
import numpy as np
import pytest
import torch
from digits import Generate, Recipe, build, draw_samples, load, real_pictures, recognise, sheet

import omni_cache

TINY = Recipe(blocks=2, heads=2, head_width=8, steps=3, batch_size=4)
STEPS = 12


def trained(recipe):
    pipe = build(recipe)
    losses = list(digits.train_transformer(pipe, recipe))
    assert len(losses) == recipe.steps
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits")
    trained(TINY).save_pretrained(path)
    return path


def test_the_same_recipe_trains_the_same_weights():
    first, second, untrained = (
        list(pipe.transformer.parameters()) for pipe in (trained(TINY), trained(TINY), build(TINY))
    )

    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, untrained))


def test_training_lowers_the_loss():
    recipe = Recipe(blocks=2, heads=2, head_width=8, steps=60, batch_size=16)
    losses = list(digits.train_transformer(build(recipe), recipe))

    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_sample_is_the_same_every_time_and_unlike_the_others(folder):
    _, generate = load(folder, STEPS)
    _, again = load(folder, STEPS)

    assert generate(3).shape == (digits.SIDE, digits.SIDE)
    assert generate(3).min() >= 0
    assert generate(3).max() <= 1
    assert np.array_equal(generate(3), again(3))
    assert not np.allclose(generate(3), generate(13))


def test_guidance_leads_away_from_the_picture_without_a_digit(folder, monkeypatch):
    _, generate = load(folder, STEPS)
    guided = generate(3)
    monkeypatch.setattr(digits, "GUIDANCE", 0.0)

    assert not np.allclose(generate.pipe([3], [3], STEPS), guided)
    assert np.array_equal(generate.pipe([3], [3], STEPS), generate.pipe([4], [3], STEPS))


@pytest.mark.parametrize("target", ["transformer", "pipe"])
def test_both_branches_reuse_steps_of_an_enabled_model(folder, target):
    model, generate = load(folder, STEPS)
    uncached = generate(3)
    enabled = model if target == "transformer" else generate.pipe
    omni_cache.enable(enabled, "taylorseer", inner="eager")
    for _ in range(2):
        cached = generate(3)
        summary = omni_cache.summary(enabled)

        assert [each.branch for each in summary.trajectories] == ["cond", "uncond"]
        assert all(each.reused_steps > 0 for each in summary.trajectories)
        assert all(len(each.steps) == STEPS for each in summary.trajectories)
        assert 0 < np.abs(cached - uncached).max() < 0.1
    omni_cache.disable(enabled)

    assert np.array_equal(generate(3), uncached)


def test_a_model_that_was_not_trained_yet_is_an_error_that_says_how(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scripts/digits.py train"):
        load(tmp_path / "nowhere")


def test_the_classifier_tells_real_digits_from_noise():
    pictures, shown = real_pictures()

    assert pictures.shape[1:] == (digits.SIDE, digits.SIDE)
    assert (recognise(pictures[:100]) == shown[:100]).mean() > 0.95
    noise = np.random.default_rng(0).random((100, digits.SIDE, digits.SIDE), dtype=np.float32)
    assert (recognise(noise) == np.arange(100) % 10).mean() < 0.5


def test_samples_are_drawn_on_a_sheet_and_counted(folder):
    pictures, right = draw_samples(load(folder, steps=2)[1], 20)

    assert pictures.shape == (20, digits.SIDE, digits.SIDE)
    assert 0 <= right <= 20
    assert sheet(pictures).size == (3 * 10 * (digits.SIDE + 4), 3 * 2 * (digits.SIDE + 4))
    assert isinstance(load(folder)[1], Generate)
