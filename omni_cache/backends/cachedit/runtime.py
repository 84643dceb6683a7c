"""cache-dit for one request and not for the next: a pipeline says before each what it wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omni_cache.backends.cachedit.backend import CacheDiTBackend


@dataclass(frozen=True)
class CacheDiTRequestSpec:
    """What a request wants.

    Attributes:
        installation_key: equal for requests that one installation serves.
        cache_config: what to install where the key is another; a dict or ``DiffusionCacheConfig``.
        num_inference_steps: steps of the request.
    """

    installation_key: str
    cache_config: Any
    num_inference_steps: int


class RequestScopedCacheDiTRuntime:
    """Has on a pipeline what each request wants.

    Args:
        pipeline: the pipeline.
        engine: of the backends that it makes, as for `CacheDiTBackend`.
    """

    def __init__(self, pipeline: Any, engine: str | None = None) -> None:
        self._pipeline, self._engine = pipeline, engine
        self._backend: CacheDiTBackend | None = None
        self._key: str | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether the pipeline has a cache that this runtime has installed or adopted."""
        return self._backend is not None and self._backend.is_enabled()

    def adopt(self, backend: CacheDiTBackend, *, installation_key: str) -> None:
        """Take over a backend that is enabled on the pipeline. Twice the same is no error.

        Raises:
            RuntimeError: another one, or one with another key, is installed.
            ValueError: the backend is not enabled.
        """
        if self._backend is not None:
            if (self._backend, self._key) == (backend, installation_key):
                return
            raise RuntimeError(
                f"installation_key={installation_key!r} is not allowed while "
                f"{self._key!r} is installed; call disable first"
            )
        if not backend.is_enabled():
            raise ValueError("backend is not enabled; call backend.enable(pipeline) first")
        self._backend, self._key = backend, installation_key

    def prepare(self, spec: CacheDiTRequestSpec | None) -> None:
        """Begin a request: refresh what is installed where it is the same, else change it.

        Args:
            spec: what the request wants, None for no cache.

        Raises:
            ValueError: as :meth:`CacheDiTBackend.enable`; nothing is installed then.
        """
        if spec is None or spec.installation_key != self._key:
            self.disable()
        if spec is None:
            return
        if self._backend is None:
            backend = CacheDiTBackend(spec.cache_config, self._engine)
            backend.enable(self._pipeline)
            self.adopt(backend, installation_key=spec.installation_key)
        self.refresh(spec.num_inference_steps)

    def refresh(self, num_inference_steps: int) -> None:
        """Begin another loop of so many steps, with what is installed; without, nothing happens."""
        if self._backend is not None:
            self._backend.refresh(self._pipeline, num_inference_steps)

    def disable(self) -> None:
        """Take the cache off, where there is one. Nothing is installed then, even on error."""
        backend, self._backend, self._key = self._backend, None, None
        if backend is not None:
            backend.disable(self._pipeline)
