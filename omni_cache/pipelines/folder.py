"""Pipelines as the command line has them: loaded from a folder, and asked for one picture."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from omni_cache.pipelines.quiet import quiet_libraries

Picture = npt.NDArray[np.float32]
"""RGB in [0, 1]: (H, W, 3), or (F, H, W, 3) for a video."""


@dataclass(frozen=True)
class Folder:
    """A pipeline in diffusers format, and how it is called.

    Attributes:
        path: of the folder. Nothing is downloaded.
        arguments: what the pipeline's call gets besides prompt, steps and generator, such as
            ``height`` or ``guidance_scale``.
        dtype: of the weights.
        device: where it runs.
    """

    path: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "cpu"

    def load(self) -> Any:
        """The pipeline, silent.

        Raises:
            ValueError: the folder holds none, or ``dtype`` is not one of torch's.
        """
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype={self.dtype!r} is not allowed; dtype must be one of torch's")
        if not (self.path / "model_index.json").is_file():
            raise ValueError(
                f"{self.path} holds no pipeline in diffusers format: model_index.json is missing"
            )
        with quiet_libraries():
            from diffusers import DiffusionPipeline

            pipe = DiffusionPipeline.from_pretrained(self.path, local_files_only=True)
        silence()
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device, dtype)

    def draw(
        self, pipe: Any, prompt: str, seed: int, num_inference_steps: int
    ) -> tuple[Picture, float]:
        """Generate one picture in floating point; also returns the seconds that it took."""
        started = time.perf_counter()
        made = pipe(
            prompt,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **self.arguments,
        )
        pictures = made.images if hasattr(made, "images") else made.frames
        return np.asarray(pictures[0], dtype=np.float32), time.perf_counter() - started


def silence() -> None:
    """Keep the libraries that load and run pipelines from printing."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one on each line that is not empty.

    Raises:
        ValueError: there are none.
    """
    prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompts; write one on each line")
    return prompts
