"""The calibrate command: measure on a pipeline what a strategy needs to know, and write it down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from omni_cache.calibration.estimate import fit, measure
from omni_cache.calibration.figure import plot
from omni_cache.pipelines.folder import Folder
from omni_cache.strategies.calibrations import Calibration


def run(
    pipeline: Folder,
    strategy: str,
    prompts: Sequence[str],
    num_inference_steps: int,
    output: Path,
    *,
    degree: int = 4,
    inner: str = "eager",
    seed: int = 0,
) -> Calibration:
    """Generate each prompt once, fit, and write the calibration and a plot beside it.

    Args:
        pipeline: what to measure.
        strategy: "teacache" or "magcache".
        prompts: one generation each; prompt i starts from the noise of ``seed + i``.
        num_inference_steps: steps of each generation.
        output: the file; the plot has its name, with .png.
        degree: of TeaCache's polynomial.
        inner: the inner compiler.
        seed: of the noise.

    Raises:
        ValueError: an argument is wrong.
        RuntimeError: too few steps for the polynomial's degree.
    """
    console = Console()
    pipe = pipeline.load()

    def generate() -> None:
        for number, prompt in enumerate(track(prompts, "generating", console=console)):
            pipeline.draw(pipe, prompt, seed + number, num_inference_steps)

    measurement = measure(pipe, generate, strategy, num_inference_steps, inner=inner)
    calibration = fit(measurement, degree)
    console.print(table(calibration))
    output.parent.mkdir(parents=True, exist_ok=True)
    calibration.save(output)
    plot(measurement, calibration, output.with_suffix(".png"))
    console.print(f"Use it: omni_cache.enable(pipe, {strategy!r}, calibration={str(output)!r})")
    console.print(f"The fit is drawn in {output.with_suffix('.png')}")
    return calibration


def table(calibration: Calibration) -> Table:
    """The fit error of each transformer and branch."""
    shown = Table(
        title=f"{calibration.strategy}, {calibration.generations} generations of "
        f"{calibration.num_inference_steps} steps",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("transformer", "class", "branch", "numbers", "rms error of the fit"):
        shown.add_column(heading)
    for name, transformer in calibration.transformers.items():
        for branch, each in transformer.branches.items():
            count, error = str(len(each.numbers)), f"{each.fit_error:.3g}"
            shown.add_row(name, transformer.model_class, branch, count, error)
    return shown
