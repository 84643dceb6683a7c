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
    from omni_cache.demo.quiet import quiet_libraries

    with quiet_libraries():
        from omni_cache.demo.command import run

    run(output, prompts=prompts, num_inference_steps=steps, inner=inner, seed=seed)
