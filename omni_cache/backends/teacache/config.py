"""What TeaCache is configured with. It knows the published tables, and no module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omni_cache.strategies.base import is_number, require
from omni_cache.strategies.tables import teacache_classes, teacache_signal, teacache_table

DEFAULT_THRESHOLD = 0.2


@dataclass
class TeaCacheConfig:
    """TeaCache for one type of transformer.

    Attributes:
        rel_l1_thresh: accumulated relative change at which a step is computed, > 0. By default the
            published one of the type, else 0.2.
        coefficients: the rescaling polynomial, five numbers, highest power first. By default the
            published one of the type.
        transformer_type: name of the transformer's class. It need not be known where coefficients
            are given.
        signal: what the coefficients were fitted on, as the flag ``signal``; not an argument.

    Raises:
        KeyError: no coefficients are published for ``transformer_type``, and none are given.
        ValueError: the threshold is not a number > 0, or there are not five coefficients.
    """

    rel_l1_thresh: float | None = None
    coefficients: Sequence[float] | None = None
    transformer_type: str = "QwenImageTransformer2DModel"

    def __post_init__(self) -> None:
        published = self.transformer_type in teacache_classes()
        table = teacache_table(self.transformer_type) if published else None
        if self.rel_l1_thresh is None:
            threshold = None if table is None else table.rel_l1_thresh
            self.rel_l1_thresh = DEFAULT_THRESHOLD if threshold is None else threshold
        threshold = self.rel_l1_thresh
        fits = is_number(threshold) and threshold > 0
        require(fits, "rel_l1_thresh", threshold, "a finite number > 0")
        if self.coefficients is None:
            if table is None:
                known = ", ".join(teacache_classes())
                raise KeyError(
                    f"transformer_type={self.transformer_type!r} has no published coefficients; "
                    f"pass coefficients=[...], or choose one of: {known}"
                )
            self.coefficients = list(table.coefficients)
        given = self.coefficients
        fits = hasattr(given, "__len__") and len(given) == 5 and all(map(is_number, given))
        require(fits, "coefficients", given, "five numbers, highest power first")
        is_published = table is not None and tuple(given) == table.coefficients
        self.signal = teacache_signal(self.transformer_type) if is_published else "auto"
