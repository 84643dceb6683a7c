"""The page: plot, table and pictures in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from importlib import resources
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from omni_cache.compare.report import (
    HEADINGS,
    Comparison,
    Row,
    cells,
    frontier,
    notes,
    provenance,
    title,
)
from omni_cache.pipelines.folder import Picture
from omni_cache.quality import Fidelity

_SIDE = 256
"""Pixels of the longer side of a picture on the page, at most."""


def as_png(picture: Picture) -> bytes:
    """A picture for the page, smaller if it is large; of a video, the frame in the middle."""
    frame = picture[len(picture) // 2] if picture.ndim == 4 else picture
    image = Image.fromarray((frame.clip(0, 1) * 255).round().astype(np.uint8))
    image.thumbnail((_SIDE, _SIDE))
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True)
    return written.getvalue()


def write_page(comparison: Comparison, plot: Path, path: Path) -> None:
    """Write the page.

    Args:
        comparison: what was compared; the page shows the pictures that its rows have kept.
        plot: the PNG of the frontier plot.
        path: of the page.
    """
    template = (resources.files(__package__) / "page.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    best = {id(row) for row in frontier(comparison.rows)}
    rows = [
        {
            "name": f"{row.line} ({row.kind.family})",
            "setting": row.setting.label,
            "cells": shown,
            "best": id(row) in best,
            "pictures": _pictures(row),
        }
        for row, shown in zip(comparison.rows, cells(comparison), strict=True)
    ]
    page = environment.from_string(template).render(
        title=title(comparison),
        notes=notes(comparison),
        plot=data_uri(plot.read_bytes()),
        headings=HEADINGS,
        rows=rows,
        prompts=comparison.task.prompts[: len(comparison.uncached.pictures)],
        about=provenance(comparison.task),
    )
    path.write_text(page, "utf-8")


def _pictures(row: Row) -> list[dict[str, str]]:
    return [
        {"source": data_uri(png), "caption": f"{steps:g} steps, {_words(fidelity)}"}
        for png, steps, fidelity in zip(row.pictures, row.computed, row.fidelity, strict=False)
    ]


def _words(fidelity: Fidelity) -> str:
    return "identical" if fidelity.psnr is None else f"{fidelity.psnr:.1f} dB"


def data_uri(png: bytes) -> str:
    """A PNG file as an address that a page can have in itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
