"""The exact projection cache: a hit is what the module would compute, or there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni_cache.backends import exact_projection_cache
from omni_cache.backends.exact_projection_cache import ExactProjectionCache


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(4, 2)


def projected(cache: ExactProjectionCache, layer: nn.Module, x: Tensor, name: str = "p") -> Tensor:
    """A projection, which must be what the module gives."""
    cache.prepare(x)
    result = cache.project(name, layer, x, lambda: layer(x))
    assert torch.equal(result, layer(x))
    return result


def counts(cache: ExactProjectionCache) -> tuple[int, int]:
    return cache.hits, cache.misses


@pytest.mark.parametrize("limit", [-1, True, 1.0, None, "1"])
def test_a_limit_that_is_no_plain_int_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        ExactProjectionCache(max_bytes=limit)


def test_equal_bytes_hit_and_the_stored_object_comes_back(layer: nn.Linear) -> None:
    cache = ExactProjectionCache()
    assert cache.max_bytes == 256 * 1024**2
    x = torch.randn(3, 4)
    first = projected(cache, layer, x)
    second = projected(cache, layer, x.clone())
    assert second is projected(cache, layer, x)
    assert second is not first
    assert counts(cache) == (2, 1)
    first.zero_()
    assert projected(cache, layer, x).any()


def test_other_bytes_dtypes_shapes_and_names_miss(layer: nn.Linear) -> None:
    cache = ExactProjectionCache()
    x = torch.zeros(2, 4)
    projected(cache, layer, x)
    projected(cache, layer, x, name="q")
    projected(cache, layer, x + 1)
    projected(cache, layer, torch.zeros(2, 1, 4))
    projected(cache, layer.double(), x.double())
    assert counts(cache) == (0, 5)


def test_only_the_prepared_object_counts(layer: nn.Linear) -> None:
    cache = ExactProjectionCache()
    x = torch.randn(3, 4)
    projected(cache, layer, x)
    other = x.clone()
    cache.project("p", layer, other, lambda: layer(other))
    x.add_(1)  # what was prepared is not what it was
    assert torch.equal(cache.project("p", layer, x, lambda: layer(x)), layer(x))
    cache.clear()
    cache.project("p", layer, x, lambda: layer(x))
    assert counts(cache) == (0, 1)
    cache.prepare(x.clone())  # held weakly, so it is gone
    cache.project("p", layer, x, lambda: layer(x))
    assert counts(cache) == (0, 1)


def test_an_embedding_prepared_in_between_takes_no_results(
    layer: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ExactProjectionCache()
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    cache.prepare(first)
    version_of = exact_projection_cache.version_of

    def version_while_another_prepares(x: Tensor) -> int | None:
        if x is first:  # as a thread may, while `project` checks the first one
            cache.prepare(second)
        return version_of(x)

    monkeypatch.setattr(exact_projection_cache, "version_of", version_while_another_prepares)
    cache.project("p", layer, first, lambda: layer(first))
    monkeypatch.undo()
    projected(cache, layer, second)
    assert counts(cache) == (0, 2)
    projected(cache, layer, first)
    assert counts(cache) == (1, 2)


def test_an_embedding_without_a_version_is_known_by_its_bytes(layer: nn.Linear) -> None:
    cache = ExactProjectionCache()
    with torch.inference_mode():
        x = torch.randn(3, 4)
        projected(cache, layer, x)
        projected(cache, layer, x)
        assert counts(cache) == (1, 1)
        x.add_(1)
        assert torch.equal(cache.project("p", layer, x, lambda: layer(x)), layer(x))
        assert counts(cache) == (1, 1)
        projected(cache, layer, x)
    assert counts(cache) == (1, 2)


def _write(layer: nn.Linear) -> None:
    layer.weight.mul_(2)


def _stack(layer: Any) -> None:
    layer.lora_a_stacked = (torch.ones(1),)


def _write_stack(layer: Any) -> None:
    layer.lora_a_stacked[0].add_(1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": _write,
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
    "other data": lambda layer: setattr(layer.weight, "data", torch.ones(2, 4)),
    "a buffer": lambda layer: layer.register_buffer("scale", torch.ones(1)),
    "quantisation": lambda layer: setattr(layer, "quant_method", SimpleNamespace()),
    "slices": lambda layer: setattr(layer, "_diffusion_lora_active_slices", (True,)),
    "stacked adapters": _stack,
    "an adapter's strength": lambda layer: setattr(layer, "scaling", {"a": 0.5}),
    "training": lambda layer: layer.eval(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_module_misses_and_replaces_the_entry(layer: nn.Linear, change: Any) -> None:
    cache = ExactProjectionCache(max_bytes=3 * 2 * 4)
    x = torch.randn(3, 4)
    projected(cache, layer, x)
    change(layer)
    projected(cache, layer, x)
    assert counts(cache) == (0, 2)
    projected(cache, layer, x)
    assert counts(cache) == (1, 2)
    projected(cache, nn.Linear(4, 2), x)
    assert counts(cache) == (1, 3)


def test_stacked_adapters_that_are_written_to_miss(layer: Any) -> None:
    cache = ExactProjectionCache()
    x = torch.randn(3, 4)
    _stack(layer)
    projected(cache, layer, x)
    _write_stack(layer)
    projected(cache, layer, x)
    assert counts(cache) == (0, 2)


@pytest.mark.parametrize("place", ["own", "pre", "child", "global", "global pre"])
def test_with_hooks_nothing_is_reused(layer: nn.Linear, place: str) -> None:
    module, hooks = nn.Sequential(layer), nn.modules.module

    def hook(*_: Any) -> None: ...

    handle = {
        "own": lambda: module.register_forward_hook(hook),
        "pre": lambda: module.register_forward_pre_hook(hook),
        "child": lambda: layer.register_forward_hook(hook),
        "global": lambda: hooks.register_module_forward_hook(hook),
        "global pre": lambda: hooks.register_module_forward_pre_hook(hook),
    }[place]()
    try:
        cache = ExactProjectionCache()
        x = torch.randn(3, 4)
        projected(cache, module, x)
        projected(cache, module, x)
        assert counts(cache) == (0, 2)
    finally:
        handle.remove()


def test_weights_without_a_version_are_never_reused() -> None:
    with torch.inference_mode():
        layer, x = nn.Linear(4, 2), torch.randn(3, 4)
        cache = ExactProjectionCache()
        projected(cache, layer, x)
        projected(cache, layer, x)
    assert counts(cache) == (0, 2)


def test_numerical_settings_are_part_of_the_key(layer: nn.Linear) -> None:
    cache = ExactProjectionCache()
    x = torch.randn(3, 4)
    projected(cache, layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        projected(cache, layer, x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if before == "highest" else "highest")
    try:
        projected(cache, layer, x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert counts(cache) == (0, 3)
    projected(cache, layer, x)
    assert counts(cache) == (1, 3)


def test_it_is_off_with_no_bytes_with_gradients_and_while_compiling(
    layer: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 4)
    off = ExactProjectionCache(max_bytes=0)
    projected(off, layer, x)
    cache = ExactProjectionCache()
    projected(cache, layer, x)
    with torch.enable_grad():
        assert cache.project("p", layer, x, lambda: layer(x)).requires_grad
        projected(cache, layer, x)
    projected(cache, layer, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    projected(cache, layer, x)
    assert counts(off) == (0, 0)
    assert counts(cache) == (1, 1)


def test_when_it_is_full_the_first_entries_stay(layer: nn.Linear) -> None:
    cache = ExactProjectionCache(max_bytes=2 * 24)
    inputs = [torch.randn(3, 4) for _ in range(4)]
    for _ in range(3):
        for x in inputs:
            projected(cache, layer, x)
    assert counts(cache) == (4, 8)
    cache.clear()
    projected(cache, layer, inputs[3])
    projected(cache, layer, inputs[3])
    assert counts(cache) == (5, 9)


def test_a_precomputed_result_is_asked_for_on_a_miss(layer: nn.Linear) -> None:
    asked: list[tuple[str, Tensor]] = []

    class Precomputed(ExactProjectionCache):
        def _lookup_precomputed(
            self, name: str, embedding: Tensor, signature: Any
        ) -> Tensor | None:
            asked.append((name, embedding))
            return layer(embedding) if name == "known" else None

    cache = Precomputed()
    x = torch.randn(3, 4)
    for name in ("known", "known", "unknown"):
        projected(cache, layer, x, name)
    assert [name for name, _ in asked] == ["known", "unknown"]
    assert all(each is x for _, each in asked)
    handle = layer.register_forward_hook(lambda *_: None)
    projected(cache, layer, x)
    handle.remove()
    assert len(asked) == 2


@pytest.mark.parametrize("others_hit", [True, False])
@pytest.mark.parametrize("how", ["group", "vllm"])
def test_ranks_reuse_where_all_of_them_can(
    layer: nn.Linear, monkeypatch: pytest.MonkeyPatch, how: str, others_hit: bool
) -> None:
    votes: list[int] = []

    def add_up(vote: Tensor) -> Tensor:
        votes.append(int(vote))
        return vote + (int(vote) if others_hit else 0)  # the other rank's vote

    def all_reduce(vote: Tensor, group: Any) -> None:
        vote.copy_(add_up(vote))

    group: Any = None
    if how == "group":
        group = object()
        fake = SimpleNamespace(get_world_size=lambda _: 2, all_reduce=all_reduce)
        monkeypatch.setattr(exact_projection_cache, "dist", fake)
    else:
        fake = SimpleNamespace(
            get_tensor_model_parallel_world_size=lambda: 2,
            get_tp_group=lambda: SimpleNamespace(all_reduce=add_up),
        )
        monkeypatch.setitem(sys.modules, "vllm.distributed", fake)
    cache = ExactProjectionCache(group=group)
    x = torch.randn(3, 4)
    projected(cache, layer, x)
    projected(cache, layer, x)
    assert votes == [0, 1]
    assert counts(cache) == ((1, 1) if others_hit else (0, 2))
    handle = layer.register_forward_hook(lambda *_: None)
    projected(cache, layer, x)  # takes part in the vote all the same
    handle.remove()
    assert votes == [0, 1, 0]


def test_a_real_group_votes(layer: nn.Linear, tmp_path: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        assert exact_projection_cache._votes(True, torch.device("cpu"), dist.group.WORLD) == 1
        cache = ExactProjectionCache(group=dist.group.WORLD)
        x = torch.randn(3, 4)
        projected(cache, layer, x)
        projected(cache, layer, x)
    finally:
        dist.destroy_process_group()
    assert counts(cache) == (1, 1)
