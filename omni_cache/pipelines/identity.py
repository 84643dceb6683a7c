"""Which transformer a module is: its classes, and what it was configured to be."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from omni_cache.strategies import Owner


def owner_of(name: str, module: nn.Module, scheduler: Any = None) -> Owner:
    """What strategies may want to know of a transformer.

    Args:
        name: of the component in its pipeline, "" for a bare module.
        module: the transformer.
        scheduler: of the pipeline, None where there is none.
    """
    classes = tuple(dict.fromkeys(type(each).__name__ for each in module.modules()))
    kind = None if scheduler is None else type(scheduler).__name__
    return Owner(name, classes, _digest(module), kind)


def _digest(module: nn.Module) -> str:
    """Equal for modules of one configuration, whatever their weights, dtype and device.

    A configuration says more than the shapes of the weights, where a module has one. Adapters add
    weights, and quantised ones have other shapes: such a model is another one.
    """
    given: Any = getattr(module, "config", None)  # of anybody's model, it may be of any kind
    named = given.items() if isinstance(given, Mapping) else ()
    config = {str(key): value for key, value in named if not str(key).startswith("_")}
    shapes = {key: list(each.shape) for key, each in module.named_parameters()}
    text = json.dumps([config, shapes], sort_keys=True, default=_described)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(value: Any) -> Any:
    """What JSON does not have, as what is the same in every process."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return _ADDRESS.sub("", repr(value))


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
