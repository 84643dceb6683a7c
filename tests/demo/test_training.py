"""Training, with few steps: it follows from its seed, learns, and leaves a folder that loads."""

import dataclasses
import random

import pytest
import torch
import torch.distributed as dist

from omni_cache.demo import demo_pipeline_path, load_demo_pipeline, training
from omni_cache.demo.architecture import build_pipeline
from omni_cache.demo.drawings import draw, random_scene
from omni_cache.demo.evaluation import Accuracy
from omni_cache.demo.training import (
    Recipe,
    encode,
    read_report,
    to_tensor,
    train,
    train_autoencoder,
)

WORDS = ["a", "red", "circle", "on", "blue", "background", ","]
TINY = Recipe(
    pool=64,
    vae_steps=3,
    steps=4,
    batch_size=4,
    long_text_every=3,
    checkpoint_every=2,
    score_every=4,
    score_captions=2,
)


def weights(pipe):
    parts = (pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    return [parameter for part in parts for parameter in part.parameters()]


def drawings(count):
    rng = random.Random(0)
    return torch.stack([to_tensor(draw(random_scene(rng), rng)) for _ in range(count)])


def test_tokenizers_follow_from_the_vocabulary():
    first, second = build_pipeline(WORDS), build_pipeline(reversed(WORDS))

    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert first.tokenizer_2.get_vocab() == second.tokenizer_2.get_vocab()


def test_the_autoencoder_learns_to_reconstruct_and_unit_latents_come_out():
    torch.manual_seed(0)
    vae = build_pipeline(WORDS).vae
    images = drawings(64)

    def error():
        with torch.no_grad():
            decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
        return (decoded - images).square().mean().item()

    before = error()
    train_autoencoder(vae, images, Recipe(vae_steps=30))

    assert error() < before / 3
    assert encode(vae, images).std().item() == pytest.approx(1, abs=0.02)
    assert encode(vae, images).mean().item() == pytest.approx(0, abs=0.02)


@pytest.fixture
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_the_same_seed_trains_the_same_pipeline_twice(tmp_path):
    for name in ("first", "second"):
        train(TINY, tmp_path / name, tmp_path / f"{name} checkpoints")

    first, second = (load_demo_pipeline(tmp_path / name) for name in ("first", "second"))
    untrained = load_demo_pipeline(tmp_path / "first checkpoints" / "begun")
    assert all(map(torch.equal, weights(first), weights(second)))
    assert first.transformer.proj_out.weight.abs().max() > 0
    assert untrained.transformer.proj_out.weight.abs().max() == 0
    assert first.vae.config.scaling_factor == second.vae.config.scaling_factor != 1
    assert first("a red circle on a blue background", num_inference_steps=2).images[0].size == (
        32,
        32,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_an_interrupted_training_goes_on_to_the_same_end(tmp_path, monkeypatch):
    through = train(TINY, tmp_path / "through", tmp_path / "1", start=demo_pipeline_path())

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "accuracy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "resumed", tmp_path / "2", start=demo_pipeline_path())
    assert torch.load(tmp_path / "2" / "progress.pt")["step"] == 2
    resumed = train(TINY, tmp_path / "resumed", tmp_path / "2", resume=True)

    assert resumed.scores.keys() == through.scores.keys() == {4}
    for path in (tmp_path / "resumed").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
    assert resumed.start == through.start == read_report(demo_pipeline_path())
    assert all(
        map(
            torch.equal,
            weights(load_demo_pipeline(tmp_path / "through")),
            weights(load_demo_pipeline(tmp_path / "resumed")),
        )
    )


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_the_checkpoint_with_the_best_score_is_kept(tmp_path, monkeypatch):
    recipe = dataclasses.replace(TINY, score_every=2, steps=6)
    found = iter([5, 7, 6])
    monkeypatch.setattr(training, "accuracy", lambda *_, **__: Accuracy(100, 0, 0, next(found)))
    saved = []
    monkeypatch.setattr(training, "save", lambda _, folder: saved.append(folder))
    monkeypatch.setattr(
        training, "load_demo_pipeline", lambda _: load_demo_pipeline(demo_pipeline_path())
    )

    progress = train(recipe, tmp_path / "best", tmp_path, start=demo_pipeline_path())

    assert progress.scores == {2: 5, 4: 7, 6: 6}
    assert saved == [tmp_path / "begun", tmp_path / "best", tmp_path / "best"]


def worker(rank, workers, meeting, folder):
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    layer = torch.nn.Linear(3, 2)
    layer.weight.grad = torch.full((2, 3), float(rank))
    layer.bias.grad = torch.full((2,), 10.0 * rank)
    training._average_gradients(list(layer.parameters()))
    torch.save([each.grad for each in layer.parameters()], folder / f"{rank}.pt")


@pytest.mark.slow
def test_every_worker_steps_by_the_mean_of_all_gradients(tmp_path):
    meeting = f"file://{tmp_path}/meeting"
    torch.multiprocessing.spawn(worker, (2, meeting, tmp_path), nprocs=2)

    for rank in range(2):
        weight, bias = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(weight, torch.full((2, 3), 0.5))
        assert torch.equal(bias, torch.full((2,), 5.0))


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [training._schedule(step, 1000) for step in range(1, 1001)]

    assert rates[0] < 0.05
    assert rates[100] == rates[599] == 1
    assert rates[599] > rates[800] > rates[-1] == 0
