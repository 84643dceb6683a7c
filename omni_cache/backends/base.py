"""What every cache backend offers, under the names of ``vllm_omni.diffusion.cache.base``.

It knows no strategy and no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class CacheBackend(ABC):
    """A cache that a runner enables on a pipeline once, and refreshes before each request.

    Attributes:
        config: what the backend was made with, as it was given and unchecked.
        enabled: whether it is in place on a pipeline.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.enabled = False

    @abstractmethod
    def enable(self, pipeline: Any) -> None:
        """Put the cache in place on a pipeline."""

    @abstractmethod
    def refresh(self, pipeline: Any, num_inference_steps: int | None, verbose: bool = True) -> None:
        """Begin a request: nothing of the one before is seen again.

        Args:
            pipeline: an enabled one.
            num_inference_steps: of the request; 0 or None where they are not known.
            verbose: whether to say what is missing on the pipeline.
        """

    def is_enabled(self) -> bool:
        """Whether the cache is in place on a pipeline."""
        return self.enabled

    def __repr__(self) -> str:
        return f"{type(self).__name__}(config={self.config})"


class CachedTransformer(nn.Module):
    """Base of transformers whose pipeline says on each call whether guidance takes two forwards.

    Attributes:
        do_true_cfg: whether calls alternate between the positive and the negative branch; the
            pipeline sets it.
        enable_separate_cfg: of the class, by the keyword ``class Model(CachedTransformer,
            enable_separate_cfg=False)``: whether each branch has a cache of its own.
    """

    enable_separate_cfg: bool = True

    def __init_subclass__(cls, *, enable_separate_cfg: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.enable_separate_cfg = enable_separate_cfg

    def __init__(self) -> None:
        super().__init__()
        self.do_true_cfg = False
