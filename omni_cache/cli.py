"""The `omni-cache` command. Knows arguments only; what a command needs is imported when it runs."""

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
