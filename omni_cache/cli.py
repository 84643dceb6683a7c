"""The `omni-cache` command. Knows arguments only; what a command needs is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

import omni_cache

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"omni-cache {omni_cache.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Make diffusion transformers faster by not recomputing what hardly changed."""


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the pictures, the timeline and the figures.")
    ] = Path("demo-output"),
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts to measure.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Steps of an uncached generation.")] = 28,
    inner: Annotated[str, typer.Option(help="Compiler of the model, cached and not.")] = "inductor",
    seed: Annotated[int, typer.Option(help="Prompt i starts from the noise of seed + i.")] = 0,
) -> None:
    """Generate with the bundled pipeline uncached, with TeaCache and with MagCache, and compare."""
    from omni_cache.demo.command import run

    run(output, prompts=prompts, num_inference_steps=steps, inner=inner, seed=seed)


@app.command()
def coverage(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Cases to try; the findings are then printed and not written."),
    ] = None,
    cases: Annotated[
        Path, typer.Option(help="File with a tiny configuration of each model class.")
    ] = Path("tests/diffusers_models.py"),
    output: Annotated[
        Path, typer.Option(help="Markdown file to write; the JSON lies beside it.")
    ] = Path("docs/coverage.md"),
    workers: Annotated[int, typer.Option(min=1, help="Processes to share the work.")] = 2,
) -> None:
    """Run the pass over every denoising transformer of the installed diffusers.

    Ends with an error when a class that the written report has as covered is so no longer.
    """
    from rich.console import Console
    from rich.progress import track

    from omni_cache import coverage as found

    console = Console()
    before = found.load(output)
    try:
        module = found.load_cases(cases)
        total = len(names or module.CASES)
        reports = list(
            track(found.cover(cases, names or (), workers), "classes", total, console=console)
        )
    except (FileNotFoundError, ValueError) as error:
        console.print(str(error), style="red")
        raise typer.Exit(2) from None
    if names:
        console.print(found.as_markdown(reports, {}), markup=False, soft_wrap=True)
        return
    found.save(reports, module.NOT_DENOISING, output)
    console.print(found.finding(reports))
    lost = found.lost(before, reports)
    if lost:
        console.print(f"covered before, and no longer: {', '.join(lost)}", style="red")
        raise typer.Exit(1)
