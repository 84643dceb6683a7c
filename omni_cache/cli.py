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
    steps: Annotated[int, typer.Option(min=3, help="Steps of an uncached generation.")] = 28,
    inner: Annotated[str, typer.Option(help="Compiler of the model, cached and not.")] = "inductor",
    seed: Annotated[int, typer.Option(help="Prompt i starts from the noise of seed + i.")] = 0,
) -> None:
    """Generate with the bundled pipeline uncached, with TeaCache and with MagCache, and compare."""
    from omni_cache.pipelines.quiet import quiet_libraries

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
    from omni_cache.pipelines.quiet import quiet_libraries

    with quiet_libraries():
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
    plan: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A plan that takes part.")
    ] = None,
    inner: Annotated[str, typer.Option(help="Compiler of the model, cached and not.")] = "inductor",
    seed: Annotated[int, typer.Option(help="Prompt i starts from the noise of seed + i.")] = 0,
    arguments: Arguments = "{}",
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Run every strategy, the peers and fewer steps on the same prompts, and write one page."""
    from omni_cache.pipelines.quiet import quiet_libraries

    with quiet_libraries():
        from omni_cache.compare.command import run
        from omni_cache.pipelines.folder import read_prompts
        from omni_cache.strategies import Plan

    with _told_by_typer():
        run(
            _folder(pipeline, arguments, dtype, device),
            read_prompts(prompts),
            steps,
            output,
            peers=peers,
            plan=None if plan is None else Plan.load(plan),
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


@app.command()
def tune(
    pipeline: Pipeline,
    prompts: Prompts,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each generation.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan's file.")] = Path(
        "plan.json"
    ),
    psnr: Annotated[float | None, typer.Option(help="Decibels to reach.")] = None,
    ssim: Annotated[float | None, typer.Option(help="SSIM to reach.")] = None,
    speedup: Annotated[float | None, typer.Option(help="How many times as fast.")] = None,
    computed_steps: Annotated[int | None, typer.Option(help="Steps to compute.")] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Share of the pictures that reach it, in place of half.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="How many pictures calibrate.")] = 16,
    judged: Annotated[int, typer.Option(min=2, help="How many others judge.")] = 16,
    effort: Annotated[str, typer.Option(help="low, default or high.")] = "default",
    minutes: Annotated[float | None, typer.Option(help="How long it may take at most.")] = None,
    strategies: Annotated[
        bool, typer.Option(help="Report on fewer steps and the adaptive strategies too.")
    ] = True,
    inner: Annotated[str, typer.Option(help="Compiler of the model.")] = "inductor",
    seed: Annotated[int, typer.Option(help="Sample i starts from the noise of seed + i.")] = 0,
    arguments: Arguments = "{}",
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Find out for every step whether to compute it, for a quality or a speed that you name.

    A run that was interrupted goes on where it was, as long as its arguments are the same.
    """
    from omni_cache.pipelines.quiet import quiet_libraries

    with quiet_libraries():
        from omni_cache.pipelines.folder import read_prompts
        from omni_cache.tuning.command import run

    with _told_by_typer():
        run(
            _folder(pipeline, arguments, dtype, device),
            read_prompts(prompts),
            steps,
            output,
            psnr=psnr,
            ssim=ssim,
            speedup=speedup,
            computed_steps=computed_steps,
            confidence=confidence,
            samples=samples,
            judged=judged,
            effort=effort,
            minutes=minutes,
            strategies=strategies,
            inner=inner,
            seed=seed,
        )


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
