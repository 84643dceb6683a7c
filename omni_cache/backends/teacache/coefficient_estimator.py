"""Fits TeaCache's polynomial to a pipeline, under the names of vLLM-Omni.

It collects the signal and what leaves the blocks at each step of a run, and fits how much the one
changes to how much the other does. `omni_cache.calibration` measures the model's output instead, of
any model, without keeping tensors; this is for who has code for the former.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from omni_cache.backends.attach import attach, detach, transformers_of
from omni_cache.backends.hooks import ModelHook
from omni_cache.backends.teacache.extractors import EXTRACTOR_REGISTRY
from omni_cache.pipelines import states_of
from omni_cache.runtime.contexts import Observed, observing
from omni_cache.strategies.forecasts import Hold
from omni_cache.strategies.schedules import Compute, Reuse
from omni_cache.strategies.signals import RelativeL1
from omni_cache.strategies.strategy import Guard, Policy, Strategy

Array = npt.NDArray[Any]
Trajectory = list[tuple[Array, Array]]
"""Signal and last hidden state of the blocks, float32, for each step of one branch."""


@dataclass(frozen=True, kw_only=True)
class _Watched(Strategy):
    """Computes every step, of which the signal, what enters the blocks and their residual show."""

    name: ClassVar[str] = "watched"

    def guard(self) -> Guard:
        """The signal that TeaCache compares."""
        return Guard("auto", 1, inputs=True)

    def policy(self, model_class: str | None) -> Policy:
        """The same for every class."""
        gate = Compute(Reuse(), "watched")
        return Policy(RelativeL1(), lambda branch, position: gate, Hold(), None)


class DataCollectionHook(ModelHook):
    """Collects what is to be fitted. Every step of a module is computed meanwhile.

    Args:
        transformer_type: name by which an extractor is registered, if one is.
        flags: further ones for ``omni_cache.enable``, such as ``inner``.
    """

    _HOOK_NAME: ClassVar[str] = "teacache_data_collection"

    def __init__(self, transformer_type: str, **flags: Any) -> None:
        self.transformer_type = transformer_type
        self._flags = flags
        self._found: dict[tuple[int, str], Trajectory] = {}
        self._collecting = ExitStack()
        self._module: Callable[[], nn.Module | None] = lambda: None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Attach to a module."""
        extractor = EXTRACTOR_REGISTRY.get(self.transformer_type)
        attach(module, _Watched(), self._flags, extractor)
        self._module = weakref.ref(module)
        return module

    def remove_hook(self, module: nn.Module) -> None:
        """Leave the module as it was before."""
        self._collecting.close()
        detach(module)

    def start_collection(self) -> None:
        """Collect from now on, in this context, and forget what was collected."""
        self._collecting.close()
        self._found = {}
        self._collecting.enter_context(observing(self._note))

    def stop_collection(self) -> Trajectory:
        """End it.

        Returns:
            What was collected, one branch after the other. Where there are several, `branches` has
            them apart.
        """
        self._collecting.close()
        return [pair for each in self._found.values() for pair in each]

    @property
    def branches(self) -> list[Trajectory]:
        """What was collected of each guidance branch of each generation."""
        return list(self._found.values())

    def _note(self, step: Observed) -> None:
        module = self._module()
        states = [] if module is None else states_of(module)
        if not any(state.latest is step.run for _, state in states):  # another module's
            return
        if step.signal is None or not step.residuals or not step.entered:
            return
        left = step.entered[0].float() + step.residuals[0].float()
        pair = _array(step.signal), _array(left)
        self._found.setdefault((step.generation, step.branch), []).append(pair)


def calculate_relative_l1(cur: Array, nxt: Array) -> float:
    """``sum|cur - nxt| / (sum|cur| + 1e-6)``."""
    return float(np.abs(cur - nxt).sum() / (np.abs(cur).sum() + 1e-6))


def estimate_teacache_coefficients(data: Sequence[Trajectory], poly_order: int = 4) -> list[float]:
    """The polynomial that says best how much the blocks' result changes when the signal does.

    Args:
        data: trajectories of one branch each; consecutive steps of all are fitted together.
        poly_order: degree of the polynomial.

    Returns:
        ``poly_order + 1`` coefficients, highest power first.

    Raises:
        RuntimeError: no trajectory has two steps.
    """
    changes = [
        [calculate_relative_l1(*pair) for pair in zip(now, after, strict=True)]
        for steps in data
        for now, after in pairwise(steps)
    ]
    if not changes:
        raise RuntimeError("no two steps of a trajectory were collected; collect a prompt first")
    signals, results = np.array(changes, dtype=np.float64).T
    return [float(each) for each in np.polyfit(signals, results, poly_order)]


class DefaultAdapter:
    """Loads a pipeline and finds its transformer."""

    @staticmethod
    def load_pipeline(model_path: str, device: str, dtype: torch.dtype) -> Any:
        """A pipeline of diffusers, on a device and in a dtype."""
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(model_path, torch_dtype=dtype).to(device)

    @staticmethod
    def get_transformer(pipeline: Any) -> tuple[nn.Module, str]:
        """The transformer and the name of its class."""
        transformer = transformers_of(pipeline)[0]
        return transformer, type(transformer).__name__


class BagelAdapter(DefaultAdapter):
    """Bagel keeps its transformer as ``bagel``."""

    @staticmethod
    def get_transformer(pipeline: Any) -> tuple[nn.Module, str]:
        """The transformer and the name of its type."""
        return pipeline.bagel, "Bagel"


StableAudioAdapter = Flux2Adapter = LongCatAdapter = DefaultAdapter

_MODEL_ADAPTERS: dict[str, type[DefaultAdapter]] = {
    "Bagel": BagelAdapter,
    "StableAudio": StableAudioAdapter,
    "Flux2": Flux2Adapter,
    "LongCat": LongCatAdapter,
}


class TeaCacheCoefficientEstimator:
    """Collects trajectories of a pipeline and fits the polynomial to them.

    Args:
        model_path: of the pipeline.
        model_type: "Bagel", "StableAudio", "Flux2" or "LongCat", or what was added to
            ``_MODEL_ADAPTERS``.
        device: to run on.
        dtype: to run in.
        flags: further ones for ``omni_cache.enable``, such as ``inner``.

    Raises:
        ValueError: ``model_type`` is unknown.
    """

    def __init__(
        self,
        model_path: str,
        model_type: str = "Bagel",
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        **flags: Any,
    ) -> None:
        if model_type not in _MODEL_ADAPTERS:
            known = ", ".join(_MODEL_ADAPTERS)
            raise ValueError(f"Unsupported model_type: {model_type!r}. Supported are: {known}")
        adapter = _MODEL_ADAPTERS[model_type]
        self.pipeline = adapter.load_pipeline(model_path, device, dtype)
        self.transformer, self.transformer_type = adapter.get_transformer(self.pipeline)
        self.hook = DataCollectionHook(self.transformer_type, **flags)
        self.hook.initialize_hook(self.transformer)
        self.collected_data: list[Trajectory] = []
        self._device = device

    def collect_from_prompt(
        self, prompt: str, num_inference_steps: int = 20, seed: int = 42
    ) -> None:
        """Run the pipeline and keep the trajectory of each branch."""
        self.hook.start_collection()
        generator = torch.Generator(self._device).manual_seed(seed)
        try:
            with torch.no_grad():
                self.pipeline(
                    prompt=prompt, num_inference_steps=num_inference_steps, generator=generator
                )
        finally:
            self.hook.stop_collection()
        self.collected_data += [each for each in self.hook.branches if each]

    def estimate(self, poly_order: int = 4) -> list[float]:
        """The coefficients, highest power first.

        Raises:
            RuntimeError: nothing was collected.
        """
        if not self.collected_data:
            raise RuntimeError("No data was collected; call collect_from_prompt first")
        return estimate_teacache_coefficients(self.collected_data, poly_order)


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().float().cpu().numpy().copy()
    return array
