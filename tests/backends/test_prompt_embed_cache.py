"""The prompt cache: what is kept, for whom, and what makes a prompt another one."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import nn

from omni_cache.backends import plain, prompt_embed_cache
from omni_cache.backends.prompt_embed_cache import (
    _CACHE_MISS,
    EMBEDDINGS,
    ENABLE_VARIABLE,
    SIZE_VARIABLE,
    PromptEmbedCache,
    install_prompt_embed_cache,
    resolve_prompt_embed_cache_config,
    uninstall_prompt_embed_cache,
)

Pair = namedtuple("Pair", "embeds mask")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "prompt_cache.md"


class Pipeline:
    """Encodes a prompt to its length times a weight, and counts how often."""

    def __init__(self) -> None:
        self.text_encoder = nn.Linear(1, 3).eval().requires_grad_(False)
        self.transformer = nn.Linear(1, 1)
        self.clip_skip = 1
        self.encoded = 0
        self.before: Any = None

    def encode_prompt(
        self, prompt: Any = "", device: Any = None, scale: Any = 1, **more: Any
    ) -> Any:
        self.encoded += 1
        if self.before is not None:
            self.before()
        size = len(prompt) * self.clip_skip if prompt is not None else 0
        return self.text_encoder(torch.full((1, 1), float(size))), ["mask"]


@pytest.fixture(params=[False, True], ids=["object", "module"])
def pipe(request: pytest.FixtureRequest) -> Any:
    if not request.param:
        return Pipeline()

    class ModulePipeline(nn.Module):
        __init__, encode_prompt = None, Pipeline.encode_prompt  # type: ignore[assignment]

    made = ModulePipeline.__new__(ModulePipeline)
    nn.Module.__init__(made)
    Pipeline.__init__(made)  # type: ignore[arg-type]
    return made


def installed(pipe: Any, **arguments: Any) -> PromptEmbedCache:
    cache = install_prompt_embed_cache(pipe, **arguments)
    assert cache is not None
    return cache


# The cache by itself.


@pytest.mark.parametrize("size", [0, -3, "8", 2.5])
def test_a_size_below_one_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="max_size"):
        PromptEmbedCache(size)
    pipe = Pipeline()
    with pytest.raises(ValueError, match="max_size"):
        install_prompt_embed_cache(pipe, max_size=size)
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize("limit", [0, -1, 1.5])
def test_a_byte_limit_below_one_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        PromptEmbedCache(max_bytes=limit)


def test_the_oldest_goes_first_and_a_lookup_makes_new() -> None:
    cache = PromptEmbedCache(2)
    assert (cache.max_size, cache.enabled) == (2, True)
    assert cache.get("a") is _CACHE_MISS
    value = object()
    cache.put("a", value)
    cache.put("b", None)
    assert cache.get("a") is value
    cache.put("c", 3)
    assert cache.get("b") is _CACHE_MISS
    assert cache.stats() == {"size": 2, "max_size": 2, "hits": 1, "misses": 2, "bypassed": 0}
    cache.max_size = 1
    cache.put("c", 4)
    assert (cache.get("a"), cache.get("c")) == (_CACHE_MISS, 4)


def test_clear_frees_the_entries_and_keeps_the_counters() -> None:
    cache = PromptEmbedCache()
    cache.put("a", torch.ones(8))
    cache.get("a")
    cache.clear()
    assert cache.nbytes == 0
    assert cache.stats() == {"size": 0, "max_size": 32, "hits": 1, "misses": 0, "bypassed": 0}


def test_the_byte_limit_counts_each_storage_once() -> None:
    cache = PromptEmbedCache(max_bytes=100)
    whole = torch.ones(10)
    cache.put("a", (whole[:5], {"b": whole[5:]}, np.ones(2)))
    assert cache.nbytes == 40 + 16
    cache.put("b", torch.ones(25))
    assert cache.get("a") is _CACHE_MISS
    assert cache.nbytes == 100
    cache.put("c", torch.ones(26))
    assert cache.get("c") is _CACHE_MISS
    assert cache.get("b") is not _CACHE_MISS


def test_a_value_that_is_too_large_makes_way_for_no_other_but_new_limits_count() -> None:
    cache = PromptEmbedCache(max_bytes=100)
    for key in "abc":
        cache.put(key, torch.ones(1))
    cache.put("c", torch.ones(26))
    assert [cache.get(key) is _CACHE_MISS for key in "abc"] == [False, False, True]
    cache.max_size = 1
    cache.put("d", torch.ones(26))
    assert cache.stats()["size"] == 1
    assert cache.get("b") is not _CACHE_MISS


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))]
)
def test_a_copy_of_a_cache_is_empty_and_has_its_limits(copied: Any) -> None:
    cache = PromptEmbedCache(3, False, max_bytes=9)
    cache.put("a", 1)
    other = copied(cache)
    assert (other.max_size, other.enabled, other.max_bytes) == (3, False, 9)
    assert other.stats()["size"] == 0


class Machine(RuleBasedStateMachine):
    """The cache does what a list of pairs does."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PromptEmbedCache(3, max_bytes=64)
        self.model: OrderedDict[Any, torch.Tensor] = OrderedDict()
        self.hits = self.misses = 0

    @rule(key=st.integers(0, 5), floats=st.integers(0, 20))
    def put(self, key: int, floats: int) -> None:
        value = torch.zeros(floats)
        self.cache.put(key, value)
        self.model.pop(key, None)
        if floats <= 16:
            self.model[key] = value
        while len(self.model) > self.cache.max_size or self.size > 64:
            self.model.popitem(last=False)

    @rule(key=st.integers(0, 5))
    def get(self, key: int) -> None:
        found = self.cache.get(key)
        assert found is self.model.get(key, _CACHE_MISS)
        self.hits, self.misses = (
            self.hits + (key in self.model),
            self.misses + (key not in self.model),
        )
        if key in self.model:
            self.model.move_to_end(key)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.clear()

    @rule(size=st.integers(1, 4))
    def resize(self, size: int) -> None:
        self.cache.max_size = size

    @property
    def size(self) -> int:
        return sum(4 * len(each) for each in self.model.values())

    @invariant()
    def counts_are_right(self) -> None:
        stats = self.cache.stats()
        assert (stats["size"], self.cache.nbytes) == (len(self.model), self.size)
        assert (stats["hits"], stats["misses"]) == (self.hits, self.misses)


class PipelineMachine(RuleBasedStateMachine):
    """A cached pipeline returns what an uncached one does, whatever was changed in between."""

    def __init__(self) -> None:
        super().__init__()
        self.pipe = Pipeline()
        self.cache = installed(self.pipe, max_size=3)

    @rule(
        prompt=st.sampled_from(["", "a", "bc", ["x"], ["x", "y"], torch.tensor([1, 2])]),
        write=st.booleans(),
    )
    def encode(self, prompt: Any, write: bool) -> None:
        with torch.no_grad():
            given, names = self.pipe.encode_prompt(prompt)
            expected, _ = Pipeline.encode_prompt(self.pipe, prompt)
        assert torch.equal(given, expected)
        assert names == ["mask"]
        if write:
            given.zero_()
            names.append("more")

    @rule(number=st.floats(-2, 2))
    def change_weights(self, number: float) -> None:
        with torch.no_grad():
            self.pipe.text_encoder.weight.fill_(number)

    @rule(seed=st.integers(0, 3))
    def replace_encoder(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.pipe.text_encoder = nn.Linear(1, 3).eval().requires_grad_(False)

    @rule(skip=st.integers(1, 2))
    def skip(self, skip: int) -> None:
        self.pipe.clip_skip = skip

    @rule()
    def clear(self) -> None:
        self.cache.clear()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, deadline=None)
TestPipelineMachine = PipelineMachine.TestCase
TestPipelineMachine.settings = settings(max_examples=50, deadline=None)


def test_eight_threads_of_ten_thousand_operations() -> None:
    cache = PromptEmbedCache(16, max_bytes=1000)

    def work(seed: int) -> int:
        draw = np.random.default_rng(seed).integers(0, 40, 10_000)
        gets = 0
        for count, key in enumerate(draw.tolist()):
            if count % 3:
                gets += 1
                found = cache.get(key)
                assert found is _CACHE_MISS or found == key
            else:
                cache.put(key, key)
            if count % 1000 == 0:
                cache.clear()
        return gets

    with ThreadPoolExecutor(8) as pool:
        gets = sum(pool.map(work, range(8)))
    stats = cache.stats()
    assert stats["hits"] + stats["misses"] == gets
    assert stats["size"] <= 16


# Installed.


def test_install_and_uninstall_leave_the_instance_as_it_was(pipe: Any) -> None:
    before = dict(vars(pipe))
    cache = installed(pipe)
    assert pipe._prompt_embed_cache is cache
    assert pipe._prompt_embed_cache_original_fn == type(pipe).encode_prompt.__get__(pipe)
    assert pipe.encode_prompt.__name__ == "encode_prompt"
    assert install_prompt_embed_cache(pipe, max_size=1) is cache
    assert cache.max_size == 32
    uninstall_prompt_embed_cache(pipe)
    assert vars(pipe) == before
    assert list(vars(pipe)) == list(before)
    uninstall_prompt_embed_cache(pipe)
    uninstall_prompt_embed_cache(object())


def test_uninstall_gives_back_an_instances_own_function_and_keeps_a_later_one() -> None:
    own, later = (lambda prompt: prompt), (lambda prompt: prompt * 2)
    pipe = SimpleNamespace(encode_prompt=own)
    installed(pipe)
    uninstall_prompt_embed_cache(pipe)
    assert vars(pipe) == {"encode_prompt": own}
    installed(pipe)
    pipe.encode_prompt = later
    uninstall_prompt_embed_cache(pipe)
    assert vars(pipe) == {"encode_prompt": later}


def test_uninstall_takes_nothing_else_away_even_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = Pipeline()
    installed(pipe)
    restore = prompt_embed_cache._without_cache

    def restore_while_another_sets(*given: Any) -> Any:
        restored = restore(*given)
        pipe.vae = "set by another thread"  # type: ignore[attr-defined]
        return restored

    monkeypatch.setattr(prompt_embed_cache, "_without_cache", restore_while_another_sets)
    uninstall_prompt_embed_cache(pipe)
    assert pipe.vae == "set by another thread"  # type: ignore[attr-defined]
    assert "encode_prompt" not in vars(pipe)


def test_attributes_are_there_while_a_cache_comes_and_goes() -> None:
    pipe = Pipeline()
    done = threading.Event()

    def read() -> int:
        missing = 0
        while not done.is_set():
            missing += not hasattr(pipe, "transformer")
        return missing

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for _ in range(2000):
            installed(pipe)
            uninstall_prompt_embed_cache(pipe)
        done.set()
        assert reading.result() == 0


async def _coroutine(prompt: str) -> str:
    return prompt


def _generator(prompt: str) -> Any:
    yield prompt


@pytest.mark.parametrize(
    "encode", [None, 3, dict, _coroutine, _generator, torch.no_grad()(_generator)]
)
def test_what_cannot_be_kept_is_left_alone(encode: Any) -> None:
    pipe = SimpleNamespace(encode_prompt=encode)
    assert install_prompt_embed_cache(pipe) is None
    assert vars(pipe) == {"encode_prompt": encode}
    assert install_prompt_embed_cache(SimpleNamespace()) is None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_pipeline_has_no_cache_and_encodes_by_itself(pipe: Any, copied: Any) -> None:
    cache = installed(pipe)
    other = copied(pipe)
    assert not {"encode_prompt", "_prompt_embed_cache", "__getstate__"} & set(vars(other))
    other.encode_prompt("a")
    assert (pipe.encoded, other.encoded) == (0, 1)
    assert installed(other) is not cache


@torch.no_grad()
def test_positional_and_keyword_calls_agree(pipe: Any) -> None:
    cache = installed(pipe)
    first, _ = pipe.encode_prompt("fox")
    again, _ = pipe.encode_prompt(prompt="fox", device=None, scale=np.int64(1))
    assert torch.equal(first, again)
    assert pipe.encoded == 1
    assert cache.stats() == {"size": 1, "max_size": 32, "hits": 1, "misses": 1, "bypassed": 0}


def encodings(pipe: Any, *calls: dict[str, Any]) -> int:
    before = pipe.encoded
    with torch.no_grad():
        for each in calls:
            pipe.encode_prompt(**{"prompt": "fox", **each})
    return int(pipe.encoded - before)


def test_equal_numbers_of_other_kinds_are_other_prompts(pipe: Any) -> None:
    installed(pipe)
    assert (
        encodings(pipe, *({"scale": each} for each in (True, 1, 1.0, 0.0, -0.0, [1], [True]))) == 7
    )
    assert encodings(pipe, {"scale": float("nan")}, {"scale": float("nan")}) == 1
    assert encodings(pipe, {"scale": (1, 2)}, {"scale": [1, 2]}) == 1
    assert encodings(pipe, {"scale": {"a": 1, "b": b"2"}}, {"scale": {"b": b"2", "a": 1}}) == 1
    assert encodings(pipe, {"scale": torch.float16}, {"scale": torch.float32}) == 2


def test_a_device_is_one_however_it_is_written_and_a_prompt_is_no_device(pipe: Any) -> None:
    installed(pipe)
    names = ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0))
    assert encodings(pipe, *({"device": each} for each in names)) == 1
    assert encodings(pipe, {"device": "cuda:1"}, {"device": "cpu"}, {"device": "nowhere"}) == 3
    assert encodings(pipe, {"prompt": "cuda"}, {"prompt": "cuda:0"}) == 2


def test_token_ids_are_known_by_their_content(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = installed(pipe)
    ids = torch.arange(6)
    same = [{"prompt": ids}, {"prompt": torch.arange(6)}, {"prompt": torch.arange(12)[:6].clone()}]
    assert encodings(pipe, *same, {"prompt": torch.arange(11)[::2].div(2).long()}) == 1
    assert (
        encodings(pipe, *({"prompt": each} for each in (ids + 1, ids.int(), ids.view(2, 3)))) == 3
    )
    assert encodings(pipe, {"prompt": [ids, ids > 2]}, {"prompt": (ids.clone(), ids > 2)}) == 1
    assert cache.bypassed == 0
    monkeypatch.setattr(plain, "MAX_HASHED_BYTES", 47)
    assert encodings(pipe, {"prompt": ids}, {"prompt": ids}) == 2
    assert cache.bypassed == 2


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_given_embeddings_pass_through(pipe: Any, name: str) -> None:
    cache = installed(pipe)
    assert encodings(pipe, {name: 1}, {name: 1}) == 2
    assert cache.stats() == {"size": 0, "max_size": 32, "hits": 0, "misses": 0, "bypassed": 2}
    assert encodings(pipe, {name: None}, {name: None}) == 1


def _endless() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


@pytest.mark.parametrize(
    "value",
    [torch.ones(2), np.ones(2), object(), [object()], {"a": torch.ones(1)}, {1, 2}, _endless()],
)
def test_what_is_no_plain_data_passes_through(value: Any) -> None:
    pipe = Pipeline()
    cache = installed(pipe)
    assert encodings(pipe, {"scale": value}, {"scale": value}) == 2
    assert cache.bypassed == 2


def test_a_call_that_does_not_fit_raises_what_it_would_raise() -> None:
    pipe = SimpleNamespace(encode_prompt=lambda prompt: prompt)
    cache = installed(pipe)
    with pytest.raises(TypeError):
        pipe.encode_prompt("a", "b")
    assert cache.bypassed == 1


def test_disabled_it_passes_through_and_counts_nothing(pipe: Any) -> None:
    cache = installed(pipe, enabled=False)
    assert encodings(pipe, {}, {}) == 2
    assert cache.stats() == {"size": 0, "max_size": 32, "hits": 0, "misses": 0, "bypassed": 0}
    cache.enabled = True
    assert encodings(pipe, {}, {}) == 1


@torch.no_grad()
def test_nobody_changes_what_the_next_one_gets() -> None:
    pipe = Pipeline()
    installed(pipe)
    expected = pipe.encode_prompt("fox")[0].clone()
    for _ in range(3):
        embeds, names = pipe.encode_prompt("fox")
        assert torch.equal(embeds, expected)
        assert names == ["mask"]
        embeds.zero_()
        names.append("mine")
    first = pipe.encode_prompt("fox!")
    first[0].zero_()
    first[1].clear()
    assert pipe.encode_prompt("fox!")[0].any()
    assert pipe.encode_prompt("fox!")[1] == ["mask"]


@torch.no_grad()
def test_without_copies_all_get_what_is_kept() -> None:
    pipe = Pipeline()
    installed(pipe, copy=False)
    first = pipe.encode_prompt("fox")
    second = pipe.encode_prompt("fox")
    assert second is pipe.encode_prompt("fox")
    assert second[0].data_ptr() == first[0].data_ptr()


@pytest.mark.parametrize("share", [True, False])
@torch.no_grad()
def test_containers_keep_their_types(share: bool) -> None:
    kept = Pair(torch.ones(1), {"mask": [torch.zeros(1), None, "text"]})
    pipe = SimpleNamespace(encode_prompt=lambda prompt: kept)
    installed(pipe, copy=share)
    pipe.encode_prompt("fox")
    found = pipe.encode_prompt("fox")
    assert type(found) is Pair
    assert type(found.mask) is dict
    assert found.mask["mask"][1:] == [None, "text"]


def test_gradients_are_never_cut_off_and_modes_do_not_mix() -> None:
    pipe = Pipeline()
    cache = installed(pipe)
    pipe.text_encoder.requires_grad_(True)
    for _ in range(2):
        assert pipe.encode_prompt("fox")[0].requires_grad
    assert pipe.encoded == 2
    with torch.inference_mode():
        pipe.encode_prompt("fox")
    with torch.no_grad():
        assert not pipe.encode_prompt("fox")[0].is_inference()
        with torch.autocast("cpu", torch.bfloat16):
            assert pipe.encode_prompt("fox")[0].dtype is torch.bfloat16
    assert cache.stats()["size"] == 3


def test_an_iterator_is_not_kept() -> None:
    pipe = SimpleNamespace(encode_prompt=lambda prompt: iter([prompt]))
    installed(pipe)
    assert [list(pipe.encode_prompt("a")) for _ in range(2)] == [["a"], ["a"]]


# What makes it another encoder.


def _in_place(pipe: Any) -> None:
    with torch.no_grad():
        pipe.text_encoder.weight.mul_(2)


def _parameter(pipe: Any) -> None:
    pipe.text_encoder.weight = nn.Parameter(torch.ones(3, 1), requires_grad=False)


CHANGES = {
    "in place": _in_place,
    "another parameter": _parameter,
    "other data": lambda pipe: setattr(pipe.text_encoder.weight, "data", torch.ones(3, 1)),
    "state dict": lambda pipe: pipe.text_encoder.load_state_dict(nn.Linear(1, 3).state_dict()),
    "another encoder": lambda pipe: setattr(pipe, "text_encoder", copy.deepcopy(pipe.text_encoder)),
    "dtype": lambda pipe: pipe.text_encoder.to(torch.float32).double().float(),
    "training": lambda pipe: pipe.text_encoder.train(),
    "a setting that the code reads": lambda pipe: setattr(pipe, "clip_skip", 2),
    "a tokenizer": lambda pipe: setattr(pipe, "tokenizer", {1, 2}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_encoder_encodes_anew(pipe: Any, change: Any) -> None:
    installed(pipe)
    assert encodings(pipe, {}, {}) == 1
    change(pipe)
    assert encodings(pipe, {}, {}) == 1
    with torch.no_grad():
        expected = type(pipe).encode_prompt(pipe, "fox")[0]
        assert torch.equal(pipe.encode_prompt("fox")[0], expected)


def _encoded(encoder: nn.Module, prompt: str) -> torch.Tensor:
    return encoder(torch.full((1, 1), float(len(prompt)), dtype=torch.float32))


class Plain:
    """A pipeline whose encoder has a name that says nothing."""

    def __init__(self) -> None:
        self.llm = nn.Linear(1, 3).requires_grad_(False)
        self.bundle = SimpleNamespace(first=self.llm)
        self.bundles = SimpleNamespace(all={"first": self.llm})
        self._held = lambda: self.llm

    @property
    def text_encoder(self) -> nn.Module:
        return self._held()

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [self._held()]

    @property
    def inner(self) -> nn.Module:
        return self.llm

    @cached_property
    def kept_llm(self) -> Any:
        return SimpleNamespace(llm=self._held())

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        shape: tuple[int, ...] = ()
        return _encoded(self.llm, prompt).reshape(*shape, 1, 3)

    def _by_llm(self, prompt: str) -> torch.Tensor:
        return _encoded(self.llm, prompt)

    @classmethod
    def _of_class(cls, prompt: str) -> torch.Tensor:
        return _encoded(cls.of_class, prompt)  # type: ignore[attr-defined]

    _by_partial = partialmethod(_by_llm)


class Derived(Plain):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return super().encode_prompt(prompt)


class DerivedTwice(Derived):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return super(DerivedTwice, self).encode_prompt(prompt)  # noqa: UP008


class ByName(Derived):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return Plain.encode_prompt(self, prompt)


class OfTheBase(Plain):
    def _by_llm(self, prompt: str) -> torch.Tensor:
        return super()._by_llm(prompt)

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return self._by_llm(prompt)


class ByAnother(Plain):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return super()._by_llm(prompt)


class Partly(Plain):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return self._by_partial(prompt)


class Property(Plain):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return _encoded(self.text_encoder, prompt)


class Properties(Plain):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return _encoded(self.text_encoders[0], prompt)


class InnerProperty(Plain):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return _encoded(self.inner, prompt)


class CachedProperty(Plain):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return _encoded(self.kept_llm.llm, prompt)


class Bundle(Plain):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return _encoded(self.bundle.first, prompt)


class Bundles(Plain):
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return _encoded(self.bundles.all["first"], prompt)


class OfClass(Plain):
    def __init__(self) -> None:
        super().__init__()
        OfClass.of_class = self.llm

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return self._of_class(prompt)


WAYS = [
    *(Plain, Derived, DerivedTwice, ByName, OfTheBase, ByAnother, Partly),
    *(Property, Properties, InnerProperty, CachedProperty, Bundle, Bundles, OfClass),
]


@pytest.mark.parametrize("kind", WAYS)
@torch.no_grad()
def test_the_encoder_is_found_in_whatever_way_the_code_reaches_it(kind: Any) -> None:
    pipe = kind()
    cache = installed(pipe)
    for _ in range(2):
        pipe.encode_prompt("fox")
    assert cache.hits == 1
    pipe.llm.weight.add_(1)
    assert torch.equal(pipe.encode_prompt("fox"), kind.encode_prompt(pipe, "fox"))
    assert cache.hits == 1


@torch.no_grad()
def test_an_encoder_that_only_a_property_of_its_name_gives_is_found() -> None:
    class Closed(Plain):
        def encode_prompt(self, prompt: str) -> torch.Tensor:
            return _encoded(getattr(self, "text" + "_encoder"), prompt)

    pipe = Closed()
    installed(pipe)
    first = pipe.encode_prompt("fox")
    pipe.llm.weight.add_(1)
    assert not torch.equal(pipe.encode_prompt("fox"), first)


@torch.no_grad()
def test_classes_and_things_without_a_length_are_known_by_which_they_are() -> None:
    class Endless:
        def __len__(self) -> int:
            raise TypeError("nobody knows")

    class Classes(Plain):
        tokenizer_class: Any = dict
        stream = Endless()

        def encode_prompt(self, prompt: str) -> torch.Tensor:
            return _encoded(self.llm, f"{prompt}{self.tokenizer_class()}{type(self.stream)}")

    pipe = Classes()
    cache = installed(pipe)
    pipe.encode_prompt("fox")
    pipe.encode_prompt("fox")
    assert cache.hits == 1
    Classes.tokenizer_class = list
    pipe.encode_prompt("fox")
    assert cache.hits == 1


@torch.no_grad()
def test_a_property_that_has_nothing_to_give_is_left_out() -> None:
    class Unloaded(Plain):
        @property
        def text_encoder(self) -> Any:
            raise RuntimeError("not loaded")

    pipe = Unloaded()
    cache = installed(pipe)
    pipe.encode_prompt("fox")
    pipe.encode_prompt("fox")
    assert cache.hits == 1


def test_the_denoiser_is_trained_without_an_encoding(pipe: Any) -> None:
    installed(pipe)
    encodings(pipe, {})
    with torch.no_grad():
        pipe.transformer.weight.mul_(2)
    pipe.transformer.train()
    assert encodings(pipe, {}) == 0


def test_stale_embeddings_are_freed(pipe: Any) -> None:
    cache = installed(pipe)
    encodings(pipe, {"prompt": "a"}, {"prompt": "b"})
    _in_place(pipe)
    encodings(pipe, {"prompt": "c"})
    assert cache.stats()["size"] == 1


def test_an_encoder_that_hooks_move_about_is_the_same() -> None:
    pipe = Pipeline()
    installed(pipe)
    pipe.text_encoder._hf_hook = object()

    def move() -> None:
        weight = pipe.text_encoder.weight
        pipe.text_encoder.weight = nn.Parameter(weight.clone(), requires_grad=False)

    move()  # as such hooks do when they are attached
    pipe.before = move
    assert encodings(pipe, {}, {}) == 1


def test_a_tokenizers_state_counts() -> None:
    pipe = Pipeline()
    pipe.tokenizer = SimpleNamespace(padding_side="left", tokenizer=None)
    installed(pipe)
    assert encodings(pipe, {}, {}) == 1
    pipe.tokenizer.padding_side = "right"
    assert encodings(pipe, {}, {}) == 1
    pipe.tokenizer.padding_side = "left"
    assert encodings(pipe, {}) == 0


def test_adapters_may_be_switched_to_and_fro() -> None:
    pipe = Pipeline()
    layer = pipe.text_encoder
    layer.scaling, layer._active_adapter, layer._disable_adapters = {"a": 1.0}, ["a"], False
    installed(pipe)
    assert encodings(pipe, {}) == 1
    layer.scaling["a"] = 0.5
    assert encodings(pipe, {}, {}) == 1
    layer._disable_adapters = True
    assert encodings(pipe, {}, {}) == 1
    layer.scaling["a"], layer._disable_adapters = 1.0, False
    assert encodings(pipe, {}) == 0
    layer.merged_adapters = ["a"]
    assert encodings(pipe, {}, {}) == 1


# Together.


@pytest.mark.parametrize("again", range(3))
def test_a_herd_encodes_once(again: int) -> None:
    pipe = Pipeline()
    cache = installed(pipe)
    gate = threading.Barrier(8)
    release = threading.Event()
    pipe.before = lambda: release.wait(0.2)

    def ask(_: int) -> torch.Tensor:
        gate.wait()
        with torch.no_grad():
            embeds = pipe.encode_prompt("fox")[0]
        copied = embeds.clone()
        embeds.zero_()
        return copied

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert pipe.encoded == 1
    assert all(torch.equal(each, found[0]) and each.any() for each in found)
    assert (cache.hits, cache.misses) == (7, 1)


def test_an_error_is_for_the_one_who_encoded_and_the_next_one_tries() -> None:
    pipe = Pipeline()
    cache = installed(pipe)
    gate = threading.Barrier(4)

    def fail() -> None:
        threading.Event().wait(0.1)
        if pipe.encoded == 1:
            raise RuntimeError("no memory")

    pipe.before = fail

    def ask(_: int) -> str:
        gate.wait()
        try:
            with torch.no_grad():
                pipe.encode_prompt("fox")
        except RuntimeError as error:
            return str(error)
        return "encoded"

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(ask, range(4))) == ["encoded"] * 3 + ["no memory"]
    assert pipe.encoded == 2
    assert (cache.hits, cache.misses) == (2, 2)


def test_encode_prompt_may_call_itself_and_two_that_call_each_other_do_not_lock() -> None:
    meet = threading.Barrier(2, timeout=5)
    inner = threading.local()

    def encode(prompt: str) -> Any:
        if not getattr(inner, "is_in", False):
            inner.is_in = True
            meet.wait()
            pipe.encode_prompt(prompt[::-1])
            pipe.encode_prompt(prompt)
        return [prompt]

    pipe = SimpleNamespace(encode_prompt=encode)
    installed(pipe)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(pipe.encode_prompt, each) for each in ("ab", "ba")]
        assert [each.result(timeout=10) for each in asked] == [["ab"], ["ba"]]


def test_what_was_being_encoded_at_a_clear_is_not_kept() -> None:
    pipe = Pipeline()
    cache = installed(pipe)
    pipe.before = lambda: cache.clear() if pipe.encoded == 1 else None
    assert encodings(pipe, {}) == 1
    assert (cache.stats()["size"], cache.nbytes) == (0, 0)
    assert encodings(pipe, {}, {}) == 1
    assert cache.stats()["size"] == 1


def test_threads_of_one_pipeline_get_what_they_asked_for() -> None:
    pipe = Pipeline()
    cache = installed(pipe, max_size=4)
    with torch.no_grad():
        expected = [Pipeline.encode_prompt(pipe, "x" * each)[0] for each in range(8)]

    @torch.no_grad()
    def work(seed: int) -> None:
        for each in np.random.default_rng(seed).integers(0, 8, 300).tolist():
            assert torch.equal(pipe.encode_prompt("x" * each)[0], expected[each])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert cache.hits + cache.misses == 8 * 300


def test_a_pipeline_that_is_dropped_takes_its_cache_along() -> None:
    import weakref

    pipe = Pipeline()
    alive = weakref.ref(installed(pipe))
    del pipe
    gc.collect()
    assert alive() is None


# The environment.


@pytest.mark.parametrize(
    ("enable", "size", "given", "expected"),
    [
        (None, None, (), (False, 32)),
        (None, None, (True, 5), (True, 5)),
        (None, None, (True, 0), (True, 32)),
        (" On ", "7", (False, 5), (True, 7)),
        ("FALSE", None, (True,), (False, 32)),
        ("1", "7", (None, -3), (True, 7)),
    ],
)
def test_the_environment_counts_before_the_caller(
    monkeypatch: pytest.MonkeyPatch, enable: Any, size: Any, given: Any, expected: Any
) -> None:
    for name, value in ((ENABLE_VARIABLE, enable), (SIZE_VARIABLE, size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert resolve_prompt_embed_cache_config(*given) == expected


@pytest.mark.parametrize("text", ["0", "-3", "many"])
def test_other_text_is_ignored_with_a_warning(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(SIZE_VARIABLE, text)
    with pytest.warns(UserWarning, match=f"{SIZE_VARIABLE}='{text}' is ignored"):
        assert resolve_prompt_embed_cache_config(True, 5) == (True, 5)
    monkeypatch.delenv(SIZE_VARIABLE)
    monkeypatch.setenv(ENABLE_VARIABLE, "perhaps")
    with pytest.warns(UserWarning, match=f"{ENABLE_VARIABLE}='perhaps' is ignored"):
        assert resolve_prompt_embed_cache_config(True) == (True, 32)


def test_a_negative_size_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SIZE_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="max_size=-3"):
        resolve_prompt_embed_cache_config(True, -3)


def test_the_page_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    pipe = Pipeline()
    names: dict[str, Any] = {"pipe": pipe, "prompts": ["a fox", "a hare"]}
    with torch.no_grad():
        exec(compile(block, PAGE, "exec", dont_inherit=True), names)
    assert names["stats"]["misses"] == 2
    assert "encode_prompt" not in vars(pipe)
