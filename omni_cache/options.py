"""The compile-time flags: a dict of options becomes ``CompileOptions``, with errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni_cache.dynamo import inductor_modes, inductor_options, inductor_setting, list_backends
from omni_cache.strategies import Guard, Strategy, TeaCache
from omni_cache.strategies.base import one_of
from omni_cache.strategies.named import make_strategy

FLAGS = (
    "cache",
    "inner",
    "inner_options",
    "mode",
    "lowering",
    "blocks",
    "signal",
    "region",
    "hoist",
    "history_dtype",
    "history_device",
    "process_group",
    "strict",
)
"""Flags of the backend; a strategy adds its own fields."""


@dataclass(frozen=True)
class CompileOptions:
    """The flags of one compilation, checked.

    Attributes:
        guard: what graphs are compiled for, None for ``cache="none"``.
        strategy: what calls follow; None where that is for the bound call's model to say.
        inner: the compiler of the parts: a registered backend's name or a callable.
        inner_options: options for the inner compiler, ``mode`` its mode.
        blocks: whether blocks of one structure are compiled once ("rolled") or each ("unrolled").
        signal: the signal flag, None to leave the choice to the strategy.
        region: names of the ModuleLists of the block loop, None to find them.
        hoist: whether what does not change over a generation is computed once in it;
            ``"modulations"`` for what the timestep alone changes too, for many timesteps at once.
        history_dtype: what floating residuals are kept in, None for their own dtype.
        history_device: where they are kept, None where they are made.
        process_group: the ranks that compute a call together, None to find them.
        strict: raise when a graph cannot be cached.
    """

    guard: Guard | None
    strategy: Strategy | None = None
    inner: str | Callable[..., Any] = "inductor"
    inner_options: Mapping[str, Any] | None = None
    mode: str | None = None
    blocks: str = "unrolled"
    signal: str | None = None
    region: tuple[str, ...] | None = None
    hoist: bool | str = False
    history_dtype: torch.dtype | None = None
    history_device: torch.device | None = None
    process_group: Any = None
    strict: bool = False

    @property
    def inductor_patches(self) -> dict[str, Any]:
        """What mode and inner options set in Inductor's configuration."""
        mode = inductor_modes().get(self.mode or "default", {})
        return {**mode, **(self.inner_options or {})}

    @property
    def inner_reuses_memory(self) -> bool:
        """Whether a part's outputs are overwritten by its next call (CUDA graphs).

        What stands in Inductor's own configuration, set there or by the environment, counts where
        neither mode nor inner options say otherwise.
        """
        if self.inner == "cudagraphs":
            return True
        asked: bool | None = self.inductor_patches.get("triton.cudagraphs")
        if asked is None and (self.inner == "inductor" or callable(self.inner)):
            asked = inductor_setting("triton.cudagraphs")
        return bool(asked)

    @classmethod
    def parse(
        cls,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
        beside: Sequence[str] = (),
    ) -> CompileOptions:
        """Check a dict of flags.

        Args:
            options: flags as a user writes them; see the README for what there is.
            mode: ``torch.compile``'s own ``mode``, passed through to the inner compiler.
            beside: flags that the caller takes besides, to be named where one is unknown.

        Raises:
            ValueError: a flag is unknown or its value is not allowed; the message names the flag,
                what was given and what is allowed.
        """
        given = dict(options or {})
        guard = given.pop("cache") if isinstance(given.get("cache"), Guard) else None
        strategy = _strategy(given, beside) if guard is None else None
        guard = strategy.guard() if strategy is not None else guard
        inner = given.pop("inner", "inductor")
        if not callable(inner):
            one_of("inner", inner, list_backends(exclude_tags=()), "or a callable")
        if inner == "omni_cache":
            raise ValueError("inner='omni_cache' is not allowed; inner must be another compiler")
        inner_options = given.pop("inner_options", None)
        if inner_options is not None and not isinstance(inner_options, Mapping):
            raise ValueError(f"inner_options={inner_options!r} is not allowed; it must be a dict")
        inner_mode = given.pop("mode", mode)
        if inner_mode is not None and not isinstance(inner_mode, str):
            raise ValueError(f"mode={inner_mode!r} is not allowed; mode must be a string or None")
        if inner == "inductor":
            _check_inductor(inner_mode, inner_options or {})
        lowering = given.pop("lowering", "dispatch")
        one_of("lowering", lowering, ("dispatch", "cond"))
        is_within = lowering == "cond" and guard is not None
        if is_within and strategy is not None:
            guard = strategy.guard_within()
        # Only a compiler whose work grows with the number of blocks gains by it.
        blocks = given.pop(
            "blocks", "rolled" if inner == "inductor" and not is_within else "unrolled"
        )
        one_of("blocks", blocks, ("rolled", "unrolled"))
        signal = _signal(given.pop("signal", None))
        if signal is not None and guard is not None and guard.source is None:
            name = "it" if strategy is None else f"cache={strategy.name!r}"
            raise ValueError(f"signal={signal!r} is not allowed; {name} decides without one")
        hoist = given.pop("hoist", False)
        one_of("hoist", hoist, (True, False, "modulations"))
        strict = given.pop("strict", False)
        one_of("strict", strict, (True, False))
        checked = cls(
            guard=guard,
            strategy=strategy,
            inner=inner,
            inner_options=inner_options,
            mode=inner_mode,
            blocks=blocks,
            signal=signal,
            region=_region(given.pop("region", "auto")),
            hoist=hoist,
            history_dtype=_history_dtype(given.pop("history_dtype", None)),
            history_device=_history_device(given.pop("history_device", None)),
            process_group=_process_group(given.pop("process_group", None)),
            strict=strict,
        )
        if is_within:
            checked._check_within()
        return checked

    def _check_within(self) -> None:
        """Refuse what a graph that decides by itself does not do.

        Raises:
            ValueError: a flag is one of that; the message names it, and what is allowed.
        """
        guard = self.guard
        assert guard is not None
        name = None if self.strategy is None else self.strategy.name
        if guard.whole:
            raise ValueError(
                f"lowering='cond' is not allowed with cache={name!r}, which reuses the whole model "
                "and decides by earlier results; lowering must be 'dispatch', which runs nothing "
                "of a reused step"
            )
        if guard.source is None:
            raise ValueError(
                f"lowering='cond' is not allowed with cache={name!r}, which goes by steps alone: "
                "the host knows them without a read, and torch.cond would add one; lowering must "
                "be 'dispatch'"
            )
        for flag, is_wrong, given, allowed in (
            ("mode", self.inner_reuses_memory, self.mode or self.inner, "one without CUDA graphs"),
            ("blocks", self.blocks == "rolled", self.blocks, "'unrolled'"),
            ("hoist", bool(self.hoist), self.hoist, "False"),
            ("history_device", self.history_device is not None, self.history_device, "None"),
            ("process_group", self.process_group is not None, self.process_group, "None"),
        ):
            if is_wrong:
                raise ValueError(
                    f"{flag}={given!r} is not allowed with lowering='cond'; {flag} must be "
                    f"{allowed}, or lowering 'dispatch'"
                )


def _strategy(given: dict[str, Any], beside: Sequence[str]) -> Strategy | None:
    """Take the strategy and its fields out of the flags; refuse what is unknown."""
    strategy = make_strategy(given.pop("cache", TeaCache.name), given, FLAGS, beside)
    for field in strategy.field_names() if strategy is not None else ():
        given.pop(field, None)
    return strategy


def _check_inductor(mode: str | None, options: Mapping[str, Any]) -> None:
    """Refuse now what Inductor would stumble over in the middle of a compilation."""
    if mode is not None:
        one_of("mode", mode, tuple(inductor_modes()))
    known = inductor_options()
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(str(option), known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"inner_options: inductor has no option {option!r}{hint}")


def _signal(given: Any) -> str | None:
    if given is not None and (not isinstance(given, str) or not given):
        raise ValueError(
            f"signal={given!r} is not allowed; signal must be 'auto', 'timestep_embedding', "
            "'latents' or the path of a module, such as 'transformer_blocks.0.norm1'"
        )
    return given


def _history_dtype(given: Any) -> torch.dtype | None:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    kept = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn")
    if given is not None and not any(dtype is getattr(torch, name) for name in kept):
        raise ValueError(
            f"history_dtype={given!r} is not allowed; history_dtype must be None or one of "
            f"{', '.join(map(repr, kept))}"
        )
    return dtype


def _history_device(given: Any) -> torch.device | None:
    try:
        return None if given is None else torch.device(given)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"history_device={given!r} is not allowed; history_device must be None or a device, "
            "such as 'cpu'"
        ) from None


def _process_group(given: Any) -> Any:
    if given is None:
        return None
    if torch.distributed.is_available():
        if isinstance(given, torch.distributed.ProcessGroup):
            return given
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(given, DeviceMesh) and given.ndim == 1:
            return given.get_group()
    raise ValueError(
        f"process_group={given!r} is not allowed; process_group must be a ProcessGroup that this "
        "process belongs to, a DeviceMesh with one dimension, or None to find it"
    )


def _region(given: Any) -> tuple[str, ...] | None:
    if given == "auto":
        return None
    names = (given,) if isinstance(given, str) else given
    listed = isinstance(names, (tuple, list)) and len(names) > 0
    if not listed or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"region={given!r} is not allowed; region must be 'auto' or the names of the "
            "ModuleLists that make up the block loop"
        )
    return tuple(names)
