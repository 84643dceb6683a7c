"""What is known of MagCache for each model class: its ratios, and the arithmetic of residuals.

Blocks, streams and residual pairs are found in the graph, so that a class needs nothing but ratios.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from omni_cache.backends.magcache.config import Ratios
from omni_cache.kernels import magnitude_stats
from omni_cache.strategies.gates import nearest_interpolation
from omni_cache.strategies.tables import load_table, magcache_table

Residual = Tensor | tuple[Tensor, ...]


class MagCacheStrategy(ABC):
    """What MagCache asks about a model class.

    Its ratios and its calibration metrics are asked for. The arithmetic of residuals is the graph's
    own when a model is cached; here it is for callers who have hidden states in hand.
    """

    @property
    @abstractmethod
    def mag_ratios(self) -> Ratios:
        """The ratios that were measured, for as many steps as they were measured with."""

    def register_block_metadata(self, block_class: type[Any]) -> Any:
        """Where blocks have their streams; None, since the graph tells."""
        return None

    def compute_residual(self, output: Tensor, head_input: Tensor) -> Residual:
        """What the blocks have added: (B, S, D).

        An output that is longer than the input has the text's tokens before the image's, and the
        image's are meant.

        Raises:
            ValueError: the output is shorter than the input, or of another width.
        """
        if output.shape == head_input.shape:
            return output - head_input
        fits = output.dim() == head_input.dim() == 3
        if not fits or output.shape[::2] != head_input.shape[::2]:
            raise _unlike("output", output, head_input)
        if output.shape[1] < head_input.shape[1]:
            raise _unlike("output", output, head_input)
        return output[:, -head_input.shape[1] :] - head_input

    def apply_residual(self, hidden_states: Tensor, residual: Residual) -> Tensor:
        """Hidden states with a residual added: to the last tokens, where there are more of them.

        Raises:
            ValueError: the residual is longer than the hidden states, or of another width.
        """
        added = _image(residual)
        if hidden_states.shape == added.shape:
            return hidden_states + added
        fits = hidden_states.dim() == added.dim() == 3
        if not fits or hidden_states.shape[::2] != added.shape[::2]:
            raise _unlike("hidden_states", hidden_states, added)
        text = hidden_states.shape[1] - added.shape[1]
        if text < 0:
            raise _unlike("hidden_states", hidden_states, added)
        return torch.cat((hidden_states[:, :text], hidden_states[:, text:] + added), dim=1)

    def apply_residual_tuple(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, residual: Residual
    ) -> tuple[Tensor, Tensor]:
        """Both streams, the residual added to the image's; of a tuple that is the last."""
        return self.apply_residual(hidden_states, residual), encoder_hidden_states

    def compute_calibration_metrics(
        self, current_residual: Residual, previous_residual: Residual | None
    ) -> tuple[float, float, float]:
        """Ratio of the magnitudes, its deviation over tokens, and one minus the cosine.

        Tokens to which nothing was added before have no ratio. 1, 0 and 0 without an earlier
        residual, or one of another shape.
        """
        return calibration_metrics(current_residual, previous_residual)

    def get_calibration_metrics_names(self) -> tuple[str, str, str]:
        """What the three metrics are called."""
        return "norm_ratio", "norm_std", "cos_dis"

    @staticmethod
    def nearest_interp(src_array: Tensor, target_length: int) -> Tensor:
        """Ratios for another number of steps, nearest neighbour; of one step the last ratio.

        Args:
            src_array: (N,).
            target_length: >= 1.
        """
        places = nearest_interpolation(tuple(map(float, range(len(src_array)))), target_length)
        return src_array[[int(place) for place in places]]


class PublishedMagCacheStrategy(MagCacheStrategy):
    """A class whose ratios stand in the packaged tables.

    Args:
        transformer_type: the class's name.
        variant: which ones, where the class has several.
    """

    def __init__(self, transformer_type: str, variant: str | None = None) -> None:
        self.transformer_type, self.variant = transformer_type, variant

    @property
    def mag_ratios(self) -> Ratios:
        """The published ratios; by branch where they differ."""
        table = magcache_table(self.transformer_type, self.variant)
        assert table is not None  # nobody makes one for another class
        rows = {branch: torch.tensor(row) for branch, row in table.ratios.items()}
        return rows if len(rows) > 1 else rows["cond"]


def _ratios(transformer_type: str, variant: str) -> Tensor:
    table = magcache_table(transformer_type, variant)
    assert table is not None  # it is packaged
    return torch.tensor(table.ratios["cond"])


class FluxMagCacheStrategy(MagCacheStrategy):
    """FLUX.1, with vLLM-Omni's ratios."""

    FLUX_MAG_RATIOS: ClassVar[Tensor] = _ratios(
        "FluxTransformer2DModel", "FLUX.1-dev (vLLM-Omni table)"
    )

    @property
    def mag_ratios(self) -> Ratios:
        """For 28 steps."""
        return self.FLUX_MAG_RATIOS


class Flux2MagCacheStrategy(FluxMagCacheStrategy):
    """FLUX.2, with vLLM-Omni's ratios."""

    FLUX2_MAG_RATIOS: ClassVar[Tensor] = _ratios("Flux2Transformer2DModel", "FLUX.2-dev")

    @property
    def mag_ratios(self) -> Ratios:
        """For 28 steps."""
        return self.FLUX2_MAG_RATIOS


class MagCacheStrategyRegistry:
    """The strategies by the name of the transformer's class.

    A class that nobody has registered has that of the packaged tables, if these have its ratios.
    """

    _registry: ClassVar[dict[str, MagCacheStrategy]] = {
        "FluxTransformer2DModel": FluxMagCacheStrategy(),
        "Flux2Transformer2DModel": Flux2MagCacheStrategy(),
    }

    @classmethod
    def register(cls, transformer_type: str, strategy: MagCacheStrategy) -> None:
        """Set the strategy of a class, in place of any other."""
        cls._registry[transformer_type] = strategy

    @classmethod
    def get(cls, transformer_type: str) -> MagCacheStrategy:
        """The strategy of a class.

        Raises:
            ValueError: there is none; the message lists the known ones.
        """
        found = cls.get_if_exists(transformer_type)
        if found is None:
            known = ", ".join(sorted({*cls._registry, *_published()}))
            raise ValueError(f"Unknown model type: {transformer_type!r}; known are: {known}")
        return found

    @classmethod
    def get_if_exists(cls, transformer_type: str) -> MagCacheStrategy | None:
        """The strategy of a class; None where there is none."""
        if transformer_type in cls._registry:
            return cls._registry[transformer_type]
        is_published = transformer_type in _published()
        return PublishedMagCacheStrategy(transformer_type) if is_published else None


def calibration_metrics(
    current_residual: Residual, previous_residual: Residual | None
) -> tuple[float, float, float]:
    """What `MagCacheStrategy.compute_calibration_metrics` says unless a class says otherwise."""
    if previous_residual is None:
        return 1.0, 0.0, 0.0
    current, previous = map(_image, (current_residual, previous_residual))
    if current.shape != previous.shape:
        return 1.0, 0.0, 0.0
    # The kernel measures the dtypes that models run in; float64 is measured in float32.
    dtype = torch.float32 if current.dtype == torch.float64 else current.dtype
    ratio, deviation, distance = magnitude_stats(current.to(dtype), previous.to(dtype)).tolist()
    return ratio, deviation, distance


def register_strategy(transformer_type: str, strategy: MagCacheStrategy) -> None:
    """Set the strategy of a class; see `MagCacheStrategyRegistry.register`."""
    MagCacheStrategyRegistry.register(transformer_type, strategy)


def get_strategy(transformer_type: str) -> MagCacheStrategy:
    """The strategy of a class; see `MagCacheStrategyRegistry.get`."""
    return MagCacheStrategyRegistry.get(transformer_type)


def _published() -> set[str]:
    return {entry["transformer_class"] for entry in load_table("magcache_ratios")}


def _image(residual: Residual) -> Tensor:
    return residual[-1] if isinstance(residual, tuple) else residual


def _unlike(name: str, given: Tensor, other: Tensor) -> ValueError:
    shape = tuple(given.shape)
    return ValueError(
        f"{name} of shape {shape} is not allowed; {name} must be of shape {tuple(other.shape)}, or "
        "(B, S, D) with a larger S"
    )
