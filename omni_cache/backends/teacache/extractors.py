"""How calls of models are taken apart, where no graph tells: one registry for the whole package."""

from __future__ import annotations

from torch import nn

from omni_cache.capture.extractor import EXTRACTORS as EXTRACTOR_REGISTRY
from omni_cache.capture.extractor import CacheContext, Extractor
from omni_cache.capture.extractor import register_extractor as register

__all__ = ["EXTRACTOR_REGISTRY", "CacheContext", "get_extractor", "register_extractor"]


def register_extractor(transformer_cls_name: str, extractor_fn: Extractor) -> None:
    """Say how calls of a class are taken apart, in place of what was registered before.

    Args:
        transformer_cls_name: the class's name.
        extractor_fn: called as ``extractor_fn(module, *args, **kwargs)`` with the arguments of the
            module's ``forward``.

    Raises:
        TypeError: ``extractor_fn`` is not callable.
    """
    register(transformer_cls_name, extractor_fn)


def get_extractor(transformer_cls: str | type[nn.Module]) -> Extractor:
    """The extractor of a class, which is found along its bases; a name has to match.

    Raises:
        ValueError: none is registered, as for most models: the graph tells.
    """
    if isinstance(transformer_cls, str):
        names = [transformer_cls]
    else:
        names = [each.__name__ for each in transformer_cls.__mro__]
    for name in names:
        if name in EXTRACTOR_REGISTRY:
            return EXTRACTOR_REGISTRY[name]
    known = ", ".join(sorted(EXTRACTOR_REGISTRY)) or "none"
    raise ValueError(
        f"Unknown model type: {names[0]!r}. Extractors are registered for: {known}. A model needs "
        "one only where no graph holds its blocks"
    )
