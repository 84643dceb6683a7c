"""The `omni-cache` command. Knows arguments only; what a command needs is imported when it runs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import omni_cache

if TYPE_CHECKING:
    from omni_cache.pipelines.folder import Folder

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


Pipeline = Annotated[
    str, typer.Argument(help='A local diffusers folder, or "demo" for the bundled pipeline.')
]
Prompts = Annotated[
    Path, typer.Option(exists=True, dir_okay=False, help="Text file, one prompt on each line.")
]
Arguments = Annotated[
    str, typer.Option(help="Further arguments of the pipeline's call, as a JSON object.")
]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights, such as bfloat16.")]
Device = Annotated[str, typer.Option(help="Where the pipeline runs, such as cuda.")]


@app.command()
def calibrate(
    pipeline: Pipeline,
    strategy: Annotated[str, typer.Option(help="teacache or magcache.")],
    prompts: Prompts,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each generation.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; calibration-STRATEGY.json.")
    ] = None,
    degree: Annotated[int, typer.Option(min=0, help="Of TeaCache's polynomial.")] = 4,
    inner: Annotated[str, typer.Option(help="Inner compiler.")] = "eager",
    seed: Annotated[int, typer.Option(help="Prompt i starts from the noise of seed + i.")] = 0,
    arguments: Arguments = "{}",
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Measure a strategy's numbers on a pipeline, and write them to a file that enable reads."""
    from omni_cache.calibration.command import run
    from omni_cache.pipelines.folder import read_prompts

    with _told_by_typer():
        run(
            _folder(pipeline, arguments, dtype, device),
            strategy,
            read_prompts(prompts),
            steps,
            output or Path(f"calibration-{strategy}.json"),
            degree=degree,
            inner=inner,
            seed=seed,
        )


@app.command()
def compare(
    pipeline: Pipeline,
    prompts: Prompts,
    steps: Annotated[int, typer.Option(min=1, help="Steps of an uncached generation.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the page, the plot and the table.")
    ] = Path("comparison"),
    peers: Annotated[
        bool, typer.Option("--peers", help="Compare with diffusers' hooks and cache-dit too.")
    ] = False,
    inner: Annotated[str, typer.Option(help="Compiler of the model, cached and not.")] = "inductor",
    seed: Annotated[int, typer.Option(help="Prompt i starts from the noise of seed + i.")] = 0,
    arguments: Arguments = "{}",
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Run every strategy, the peers and fewer steps on the same prompts, and write one page."""
    from omni_cache.compare.command import run
    from omni_cache.pipelines.folder import read_prompts

    with _told_by_typer():
        run(
            _folder(pipeline, arguments, dtype, device),
            read_prompts(prompts),
            steps,
            output,
            peers=peers,
            inner=inner,
            seed=seed,
        )


@contextmanager
def _told_by_typer() -> Iterator[None]:
    """Have what is wrong with a pipeline or an argument told in one line, without a traceback."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None


def _folder(pipeline: str, arguments: str, dtype: str, device: str) -> "Folder":
    from omni_cache.demo import demo_arguments, demo_pipeline_path
    from omni_cache.pipelines.folder import Folder

    try:
        given = json.loads(arguments)
    except json.JSONDecodeError as error:
        raise ValueError(f"arguments={arguments!r} is not allowed; {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"arguments={arguments!r} is not allowed; it must be a JSON object")
    if pipeline == "demo":
        return Folder(demo_pipeline_path(), {**demo_arguments(), **given}, dtype, device)
    return Folder(Path(pipeline), given, dtype, device)
