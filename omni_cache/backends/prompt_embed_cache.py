"""Prompt embeddings, kept from one call of a pipeline's ``encode_prompt`` to the next.

    call -> key of arguments and encoders -> kept: a copy of it
                                          -> somebody encodes it: wait -> not kept: encode, keep

Of torch it knows tensors and containers of them, of a pipeline its ``encode_prompt``; what else
decides the result is for `encoders` to know.
"""

from __future__ import annotations

import copy as copying
import functools
import inspect
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from omni_cache.backends.encoders import Encoders
from omni_cache.backends.plain import NotPlainError, device_key, plain
from omni_cache.strategies.base import require

DEFAULT_MAX_SIZE = 32

EMBEDDINGS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "prompt_embeds_mask",
    "negative_prompt_embeds_mask",
)
"""Arguments that bring what there would be to encode: a call with one of them is passed through."""

_INSTALLED = (
    "encode_prompt",
    "__getstate__",
    "_prompt_embed_cache",
    "_prompt_embed_cache_original_fn",
)
"""What an instance gets with its cache, in the order in which it goes."""

ENABLE_VARIABLE = "OMNI_DIFFUSION_PROMPT_EMBED_CACHE"
SIZE_VARIABLE = "OMNI_DIFFUSION_PROMPT_EMBED_CACHE_SIZE"


class _Miss:
    def __repr__(self) -> str:
        return "_CACHE_MISS"


_CACHE_MISS = _Miss()


class PromptEmbedCache:
    """The most recently used values, up to a number of them and of their bytes.

    Each operation is safe among threads. Copies of a cache, and what is unpickled, are empty.

    Attributes:
        max_size: most entries; a change counts from the next `put` on.
        max_bytes: most bytes of the tensors in all entries, None for any; likewise.
        enabled: whether an installed cache is asked at all.
        hits: lookups that found a value.
        misses: lookups that found none.
        bypassed: calls that an installed cache passed through because they have no key.
    """

    def __init__(
        self,
        max_size: int = DEFAULT_MAX_SIZE,
        enabled: bool = True,
        *,
        max_bytes: int | None = None,
    ) -> None:
        """An empty cache.

        Raises:
            ValueError: ``max_size`` is not an int >= 1, or ``max_bytes`` is not None or an
                int >= 1.
        """
        require(isinstance(max_size, int) and max_size >= 1, "max_size", max_size, "an int >= 1")
        fits = max_bytes is None or (isinstance(max_bytes, int) and max_bytes >= 1)
        require(fits, "max_bytes", max_bytes, "None or an int >= 1")
        self.max_size, self.enabled, self.max_bytes = max_size, enabled, max_bytes
        self.hits = self.misses = self.bypassed = 0
        self._lock = threading.RLock()  # what is dropped may call back when it is freed
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._clears = 0

    def get(self, key: Hashable) -> Any:
        """The value itself, which is now the newest; ``_CACHE_MISS`` where there is none."""
        with self._lock:
            if key not in self._entries:
                self.misses += 1
                return _CACHE_MISS
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value, as it is, as the newest; the oldest go until the limits are met.

        One that has more than ``max_bytes`` by itself is not kept, and puts out no other.
        """
        entry = (value, _bytes_of(value))
        with self._lock:
            self._entries.pop(key, None)
            if self.max_bytes is None or entry[1] <= self.max_bytes:
                self._entries[key] = entry
            while len(self._entries) > self.max_size or self._is_too_large():
                self._entries.popitem(last=False)

    def _put_if_not_cleared(self, clears: int, key: Hashable, value: Any) -> None:
        """Keep a value that was begun after a number of clears, if there were no more since."""
        with self._lock:
            if clears == self._clears:
                self.put(key, value)

    def clear(self) -> None:
        """Drop all entries; the counters stay. What is being encoded is not kept, either."""
        with self._lock:
            self._entries.clear()
            self._clears += 1

    def stats(self) -> dict[str, int]:
        """size, max_size, hits, misses and bypassed."""
        with self._lock:
            return {
                "size": len(self._entries),
                "max_size": self.max_size,
                "hits": self.hits,
                "misses": self.misses,
                "bypassed": self.bypassed,
            }

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in all entries."""
        with self._lock:
            return sum(size for _, size in self._entries.values())

    def _is_too_large(self) -> bool:
        return self.max_bytes is not None and self.nbytes > self.max_bytes

    def _count(self, *, hits: int = 0, bypassed: int = 0) -> None:
        with self._lock:
            self.hits += hits
            self.bypassed += bypassed

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(PromptEmbedCache, max_bytes=self.max_bytes)
        return make, (self.max_size, self.enabled)


def install_prompt_embed_cache(
    pipeline: Any,
    *,
    max_size: int = DEFAULT_MAX_SIZE,
    enabled: bool = True,
    model_tag: str | None = None,
    max_bytes: int | None = None,
    copy: bool = True,
) -> PromptEmbedCache | None:
    """Let a pipeline keep what its ``encode_prompt`` returns.

    Equal prompts that come at the same time are encoded once. If that fails, the error is for the
    one who encoded, and the next in line tries. See `Encoders` for what besides the arguments makes
    a result another one; ``clear()`` the cache after what leaves no trace, such as a write through
    ``weight.data``.

    Copies of the pipeline have no cache, unless its class has a ``__copy__`` of its own.

    Args:
        pipeline: its instance gets ``encode_prompt``, ``_prompt_embed_cache``,
            ``_prompt_embed_cache_original_fn`` and ``__getstate__``.
        max_size: most entries.
        enabled: False passes all calls through until ``cache.enabled`` is set.
        model_tag: a part of the key, by default the name of the pipeline's class.
        max_bytes: most bytes of the tensors in all entries, None for any.
        copy: whether each caller gets tensors and containers of its own. Without copies all get
            what is kept, which nobody may write to.

    Returns:
        The cache. That of before if the pipeline has one, whatever the arguments; None if there is
        no callable ``encode_prompt``, its signature cannot be read, or it is a coroutine function
        or a generator function, whose results can be used but once.

    Raises:
        ValueError: ``max_size`` or ``max_bytes`` is not allowed.
    """
    existing = getattr(pipeline, "_prompt_embed_cache", None)
    if isinstance(existing, PromptEmbedCache):
        return existing
    original = getattr(pipeline, "encode_prompt", None)
    if not callable(original) or _is_used_once(original):
        return None
    try:
        signature = inspect.signature(original)
    except (TypeError, ValueError):
        return None
    cache = PromptEmbedCache(max_size, enabled, max_bytes=max_bytes)
    tag = type(pipeline).__name__ if model_tag is None else model_tag
    encoders = Encoders(pipeline, original)
    queue = _Queue(cache, copy)

    @functools.wraps(original)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        if not cache.enabled or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        try:
            arguments = _arguments_key(signature, args, kwargs)
        except (NotPlainError, TypeError):  # TypeError: the call does not fit the signature
            cache._count(bypassed=1)
            return original(*args, **kwargs)
        state = encoders.look(cache.clear)
        key = (tag, arguments, state)
        return queue.encode(key, functools.partial(original, *args, **kwargs))

    vars(pipeline).update(
        encode_prompt=encode_prompt,
        _prompt_embed_cache=cache,
        _prompt_embed_cache_original_fn=original,
    )
    # What copy, deepcopy and pickle ask an instance for, so that no copy encodes with this one.
    vars(pipeline).setdefault("__getstate__", functools.partial(_state_without_cache, pipeline))
    return cache


def uninstall_prompt_embed_cache(pipeline: Any) -> None:
    """Leave the instance as it was before `install_prompt_embed_cache`.

    An ``encode_prompt`` that somebody has set since stays. Nothing happens where there is no cache.
    """
    attributes = getattr(pipeline, "__dict__", {})
    if isinstance(attributes.get("_prompt_embed_cache"), PromptEmbedCache):
        restored = _without_cache(pipeline, attributes)
        for name in _INSTALLED:  # and no others, which threads may read or set meanwhile
            if name in restored:
                attributes[name] = restored[name]
            else:
                attributes.pop(name, None)


def resolve_prompt_embed_cache_config(
    enable: bool | None = None, max_size: int | None = None
) -> tuple[bool, int]:
    """Whether prompts are to be cached, and how many: what the environment says, else the caller.

    ``OMNI_DIFFUSION_PROMPT_EMBED_CACHE`` is 1, true, yes or on, or 0, false, no or off, in any
    case. ``OMNI_DIFFUSION_PROMPT_EMBED_CACHE_SIZE`` is an integer >= 1. Anything else in them is
    ignored, with a warning.

    Args:
        enable: None for False.
        max_size: None or 0 for 32.

    Raises:
        ValueError: ``max_size`` counts, and is negative.
    """
    told, size = _boolean(ENABLE_VARIABLE), _size(SIZE_VARIABLE)
    if size is None:
        size = max_size or DEFAULT_MAX_SIZE
        require(size >= 1, "max_size", size, "None or an int >= 0")
    return bool(enable) if told is None else told, size


class _Encoding:
    """One that runs: others wait until it is done, and look at what was kept."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.kept: Any = _CACHE_MISS


class _Queue:
    """Those who ask for the same prompt at the same time: the first one encodes it.

    A thread that encodes never waits for another encoding, so ``encode_prompt`` may call itself.
    """

    def __init__(self, cache: PromptEmbedCache, copy: bool) -> None:
        self._cache, self._copy = cache, copy
        self._lock = threading.Lock()
        self._running: dict[tuple[Hashable, int], _Encoding] = {}
        self._thread = threading.local()

    def encode(self, key: Hashable, original: Callable[[], Any]) -> Any:
        """What is kept for a key, or what ``original()`` returns."""
        clears = self._cache._clears
        while True:
            with self._lock:
                running = self._running.get((key, clears))
                if running is None or self._is_encoding():
                    kept = self._cache.get(key)
                    if kept is _CACHE_MISS:
                        mine = _Encoding()
                        self._running.setdefault((key, clears), mine)
                    break
            running.done.wait()
            kept = running.kept
            if kept is not _CACHE_MISS:
                self._cache._count(hits=1)
                break
        if kept is _CACHE_MISS:
            return self._encode(key, clears, original, mine)
        return _copied(kept) if self._copy else kept

    def _encode(
        self, key: Hashable, clears: int, original: Callable[[], Any], mine: _Encoding
    ) -> Any:
        outer, self._thread.encodes = self._is_encoding(), True
        try:
            result = original()
            mine.kept = _to_keep(result, self._copy)
            if mine.kept is not _CACHE_MISS:
                self._cache._put_if_not_cleared(clears, key, mine.kept)
            return result
        finally:
            self._thread.encodes = outer
            with self._lock:
                if self._running.get((key, clears)) is mine:
                    del self._running[key, clears]
            mine.done.set()

    def _is_encoding(self) -> bool:
        return getattr(self._thread, "encodes", False)


def _to_keep(result: Any, copy: bool) -> Any:
    """What is kept of a result; ``_CACHE_MISS`` if another call could not do with it.

    Those are a result that gradients flow through, and one that is used up by its first use.
    """
    leaves = tree_leaves(result)
    gradients = torch.is_grad_enabled() and any(
        getattr(each, "requires_grad", 0) for each in leaves
    )
    if gradients or any(isinstance(each, (Iterator, AsyncIterator, Awaitable)) for each in leaves):
        return _CACHE_MISS
    if not copy:
        return tree_map(lambda each: each.detach() if isinstance(each, Tensor) else each, result)
    try:
        return _copied(result)
    except Exception:  # the caller has its result, whatever there may be against a copy of it
        return _CACHE_MISS


def _copied(value: Any) -> Any:
    """Containers, tensors and other objects of one's own, outside of any graph of gradients."""
    return tree_map(
        lambda each: each.detach().clone() if isinstance(each, Tensor) else copying.deepcopy(each),
        value,
    )


def _arguments_key(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Hashable:
    """Equal for calls that bind equal values to the same parameters."""
    bound = signature.bind_partial(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name)
    for name in EMBEDDINGS:
        if arguments.get(name) is not None:
            raise NotPlainError(f"{name} is what there would be to encode")
    return tuple((name, _argument_key(name, arguments[name])) for name in sorted(arguments))


def _argument_key(name: str, value: Any) -> Hashable:
    if isinstance(value, str) and (name == "device" or name.endswith("_device")):
        try:
            return device_key(torch.device(value))
        except RuntimeError:  # no device: encode_prompt will say so, or knows better
            return plain(value)
    return plain(value)


def _bytes_of(value: Any) -> int:
    """Bytes that a value holds on to: of each storage once, and of arrays."""
    sizes: dict[int, int] = {}
    for each in tree_leaves(value):
        if isinstance(each, Tensor):
            try:
                storage = each.untyped_storage()
                sizes[storage._cdata] = storage.nbytes()
            except RuntimeError:  # it wraps other tensors
                sizes[id(each)] = each.numel() * each.element_size()
        else:
            sizes[id(each)] = getattr(each, "nbytes", 0)
    return sum(sizes.values())


def _is_used_once(function: Callable[..., Any]) -> bool:
    inner = inspect.unwrap(function)
    tests = (
        inspect.iscoroutinefunction,
        inspect.isgeneratorfunction,
        inspect.isasyncgenfunction,
    )
    return any(is_one(each) for is_one in tests for each in (function, inner))


def _state_without_cache(pipeline: Any) -> Any:
    own = getattr(type(pipeline), "__getstate__", None)
    is_default = own is getattr(object, "__getstate__", None)
    state = vars(pipeline) if own is None or is_default else own(pipeline)
    return _without_cache(pipeline, state) if isinstance(state, dict) else state


def _without_cache(pipeline: Any, attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes that an instance would have if no cache had been installed."""
    rest = dict(attributes)
    del rest["_prompt_embed_cache"]
    original = rest.pop("_prompt_embed_cache_original_fn")
    if getattr(rest.get("__getstate__"), "func", None) is _state_without_cache:
        del rest["__getstate__"]
    current = rest.get("encode_prompt")
    if current is None or getattr(current, "__wrapped__", None) != original:
        return rest
    del rest["encode_prompt"]
    kind = type(pipeline)
    inherited = inspect.getattr_static(kind, "encode_prompt", None)
    if inherited is None or inherited.__get__(pipeline, kind) != original:
        rest["encode_prompt"] = original
    return rest


def _boolean(variable: str) -> bool | None:
    text = os.environ.get(variable, "").strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    if text:
        _ignore(variable, "1, true, yes, on, 0, false, no or off")
    return None


def _size(variable: str) -> int | None:
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    try:
        size = int(text)
    except ValueError:
        size = 0
    if size < 1:
        _ignore(variable, "an integer >= 1")
        return None
    return size


def _ignore(variable: str, allowed: str) -> None:
    given = os.environ[variable]
    warnings.warn(f"{variable}={given!r} is ignored; it must be {allowed}", stacklevel=4)
