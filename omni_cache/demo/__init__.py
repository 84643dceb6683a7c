"""The bundled demo: a tiny trained FLUX pipeline, and the command that measures caching on it.

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import FluxPipeline

__all__ = ["demo_arguments", "demo_pipeline_path", "load_demo_pipeline"]


def demo_pipeline_path() -> Path:
    """The folder of the bundled pipeline, in diffusers format."""
    return Path(__file__).parent / "pipeline"


def demo_arguments() -> dict[str, Any]:
    """What the bundled pipeline's call takes, since FLUX draws larger pictures by default."""
    folder = demo_pipeline_path()
    size = json.loads((folder / "vae" / "config.json").read_text())["sample_size"]
    tokenizer = json.loads((folder / "tokenizer_2" / "tokenizer_config.json").read_text())
    return {"height": size, "width": size, "max_sequence_length": tokenizer["model_max_length"]}


def load_demo_pipeline(path: Path | None = None) -> FluxPipeline:
    """Load the bundled pipeline offline, in float32, on the CPU.

    ``FluxPipeline`` draws 128x128 latents by default, whatever the transformer was trained on;
    here ``default_sample_size`` is set to the trained size, so that ``pipe(prompt)`` needs no
    ``height`` and ``width``.

    Args:
        path: another folder, written by ``scripts/train_demo``.
    """
    from omni_cache.pipelines.quiet import quiet_libraries

    with quiet_libraries():
        from diffusers import FluxPipeline

        pipe = FluxPipeline.from_pretrained(path or demo_pipeline_path(), local_files_only=True)
    pipe.default_sample_size = pipe.vae.config.sample_size // pipe.vae_scale_factor
    return pipe
