"""What is attached to a module under which name, as ``vllm_omni.diffusion.hooks`` keeps it.

A hook here attaches itself to the module (see ``attach``); nothing wraps ``forward`` in addition.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn


class StateManager:
    """States of one class by name, made when they are asked for.

    Args:
        state_class: their class, with a method ``reset``.
        args: to make one.
        kwargs: to make one.
    """

    def __init__(
        self,
        state_class: type[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._make = state_class, tuple(args), dict(kwargs or {})
        self._states: dict[str, Any] = {}
        self._context: str | None = None

    def set_context(self, name: str) -> None:
        """Name the state that is meant from now on."""
        self._context = name

    def get_state(self) -> Any:
        """The state that is meant.

        Raises:
            ValueError: none has been named.
        """
        if self._context is None:
            raise ValueError("no state is named; call set_context(name) first")
        if self._context not in self._states:
            state_class, args, kwargs = self._make
            self._states[self._context] = state_class(*args, **kwargs)
        return self._states[self._context]

    def reset(self) -> None:
        """Forget all of them."""
        self._states.clear()


class ModelHook:
    """What is attached to a module. Subclasses attach in `initialize_hook`."""

    _HOOK_NAME: ClassVar[str] = ""

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Attach to a module; returns it.

        Raises:
            TypeError: a subclass has a `new_forward`, and nothing that puts it in place.
        """
        kind = type(self)
        has_forward = kind.new_forward is not ModelHook.new_forward
        if has_forward and kind.initialize_hook is ModelHook.initialize_hook:
            raise TypeError(
                f"{kind.__name__}.new_forward is never called, since nothing wraps forward here; "
                "attach in initialize_hook, such as by module.register_forward_hook"
            )
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a call of the module returns."""
        return module(*args, **kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget what was kept for a module; returns it."""
        return module

    def remove_hook(self, module: nn.Module) -> None:
        """Take everything off a module again."""


class HookRegistry:
    """The hooks of one module, by name, in its attribute ``_hook_registry``.

    Copies of the module have none, since nothing is attached to them.
    """

    def __init__(self, module: nn.Module) -> None:
        # By weak reference: a module that owned itself would be freed by the cycle collector only.
        self._weak = weakref.ref(module)
        self._hooks: dict[str, ModelHook] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @property
    def module(self) -> nn.Module:
        """The one that they are attached to."""
        module = self._weak()
        assert module is not None  # it owns this
        return module

    @classmethod
    def get_or_create(cls, module: nn.Module) -> HookRegistry:
        """The registry of a module, made where it has none."""
        registry = getattr(module, "_hook_registry", None)
        if not isinstance(registry, cls):
            registry = cls(module)
            vars(module)["_hook_registry"] = registry
        return registry

    def register_hook(self, name: str, hook: ModelHook) -> None:
        """Attach a hook; one of the same name is dropped, with a warning.

        Raises:
            RuntimeError: another hook is attached, since a module follows one cache.
        """
        self.refuse_beside(name)
        if name in self._hooks:
            warnings.warn(f"the hook {name!r} was registered before, and is replaced", stacklevel=3)
            self.remove_hook(name)
        self._hooks[name] = hook
        try:
            hook.initialize_hook(self.module)
        except BaseException:
            del self._hooks[name]
            raise

    def refuse_beside(self, name: str) -> None:
        """Raise where a hook of another name is attached.

        Raises:
            RuntimeError: one is.
        """
        others = [each for each in self._hooks if each != name]
        if others:
            raise RuntimeError(
                f"{type(self.module).__name__} has the hook {others[0]!r}, and can have one that "
                f"takes the place of forward; remove_hook({others[0]!r}) before {name!r}"
            )

    def remove_hook(self, name: str) -> None:
        """Detach a hook; a name that is not there is left alone."""
        hook = self._hooks.pop(name, None)
        if hook is not None:
            hook.remove_hook(self.module)

    def leave_if_empty(self) -> None:
        """Take the registry itself off its module, where it has no hook."""
        if not self._hooks and vars(self.module).get("_hook_registry") is self:
            del vars(self.module)["_hook_registry"]

    def get_hook(self, name: str) -> ModelHook | None:
        """A hook; None where there is none of the name."""
        return self._hooks.get(name)

    def reset_hook(self, name: str) -> None:
        """Forget what a hook has kept; a name that is not there is left alone."""
        hook = self._hooks.get(name)
        if hook is not None:
            hook.reset_state(self.module)

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, its hooks included."""
        return self.module(*args, **kwargs)
