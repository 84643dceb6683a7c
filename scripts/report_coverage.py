"""What the pass finds in every denoising transformer that the installed diffusers exports.

    python scripts/report_coverage.py           all classes, written to docs/coverage.md and .json
    python scripts/report_coverage.py flux      one case, printed

The list of classes comes from diffusers; tiny configurations and inputs come from a file of cases,
so that a class without one shows up as missing. See ``tests/diffusers_models.py``.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer
from omni_cache.passes import Analysis, parameter_elements, take_out
from omni_cache.passes.cost import arithmetic
from omni_cache.passes.order import computation
from omni_cache.passes.values import describe_value
from omni_cache.passes.views import leaves
from rich.console import Console
from rich.progress import track
from torch import nn

from omni_cache.explanation import examine
from omni_cache.options import CompileOptions

Status = Literal["covered", "held", "refused", "missing"]


class Case(Protocol):
    """A model class at a size that is quick to trace."""

    class_name: str

    @property
    def deep(self) -> Case:
        """The same class with eight blocks, which is what is reported."""

    @property
    def deeper(self) -> Case:
        """The same class with sixteen blocks, which leaves some between the first and the last."""

    def build(self) -> nn.Module:
        """The model."""

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of its ``forward``."""


@dataclass(frozen=True)
class ClassReport:
    """What the pass finds in one class.

    Attributes:
        class_name: its name in diffusers.
        status: ``covered``, with a region whose outputs are all paired; ``held``, with a region and
            an output that has no partner; ``refused``, without a region; ``missing``, without a
            case to try.
        loop: number of blocks of each list of the block loop.
        inputs: the values that enter the region, as ``name: dtype[shape]``.
        outputs: the values that leave it.
        pairs: for each output the inputs that it is a residual update of, empty where it is held.
        signal: kind, dtype and shape.
        nodes: of prologue, body and epilogue.
        share: of the arithmetic (floating-point operations in contractions) inside the region.
        hoisted: for each of `HOISTED`, how much of the arithmetic and of the parameters a step is
            spared by it.
        graphs: how many graphs Dynamo captures, 1 where there is no graph break.
        breaks: why it captures more than one, and where.
        reason: why it is not covered.
        spans: for each of `SPANS`, tried where a class is covered, why it has no region or an
            output without a partner; empty where neither is so.
    """

    class_name: str
    status: Status
    loop: Mapping[str, int] = field(default_factory=dict)
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    pairs: Sequence[Sequence[str]] = ()
    signal: str = ""
    nodes: Sequence[int] = ()
    share: float = 0.0
    hoisted: Mapping[str, Sequence[float]] = field(default_factory=dict)
    graphs: int = 0
    breaks: Sequence[str] = ()
    reason: str = ""
    spans: Mapping[str, str] = field(default_factory=dict)


HOISTED = ("constants", "modulations")
"""What may be computed less often than at every step: once in a generation, or for all timesteps at
once."""

SPANS = {"F1B0": (1, 0), "F4B4": (4, 4)}
"""How many blocks at the beginning and at the end always run."""


def transformer_classes() -> list[str]:
    """The model classes of ``diffusers.models.transformers`` that diffusers exports, by name."""
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    found = []
    for name in dir(diffusers):
        exported = getattr(diffusers, name)
        if not (inspect.isclass(exported) and issubclass(exported, ModelMixin)):
            continue
        if exported.__module__.startswith("diffusers.models.transformers."):
            found.append(name)
    return sorted(found)


def load_cases(path: Path) -> Any:
    """The module of cases in a file, with ``CASES`` and ``NOT_DENOISING``.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of model cases at {path}; name one with --cases")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def cover(path: Path, names: Sequence[str] = (), workers: int = 2) -> Iterator[ClassReport]:
    """Try the cases of a file, in their order; then report the classes without one.

    Args:
        path: the file.
        names: of the cases to try, all and the missing classes if there are none.
        workers: processes to share the work.

    Raises:
        ValueError: a name is no case's.
    """
    module = load_cases(path)
    for name in names:
        if name not in module.CASES:
            raise ValueError(f"there is no case {name!r}; there are {', '.join(module.CASES)}")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(_report_named, path), names or module.CASES)
    if not names:
        known = {case.class_name for case in module.CASES.values()} | set(module.NOT_DENOISING)
        for class_name in transformer_classes():
            if class_name not in known:
                yield ClassReport(class_name, "missing", reason=f"{path.name} has no case for it")


def _report_named(path: Path, name: str) -> ClassReport:
    case: Case = load_cases(path).CASES[name]
    return report(case)


def report(case: Case) -> ClassReport:
    """What the pass finds in one class."""
    flags = CompileOptions.parse({"cache": "teacache", "coefficients": (1.0, 0.0)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = examine(case.deep.build(), (), case.inputs(), flags)
    graphs: dict[str, Any] = {
        "graphs": len(found.graphs),
        "breaks": [_relative(str(each)) for each in found.breaks[:1]],
    }
    analyses = [each.analysis for each in found.graphs if each.analysis is not None]
    if not analyses:
        return ClassReport(case.class_name, "refused", reason=_relative(found.reason), **graphs)
    figures = describe(max(analyses, key=lambda each: sum(map(arithmetic, each.region.body))))
    reason = held_reason(figures["outputs"], figures["pairs"])
    status: Status = "held" if reason else "covered"
    spans = {} if reason else {name: _span(case, *span) for name, span in SPANS.items()}
    return ClassReport(case.class_name, status, reason=reason, spans=spans, **figures, **graphs)


def _span(case: Case, first: int, last: int) -> str:
    """Why a class is not covered where its first and last blocks always run; empty if it is."""
    blocks = {"fn_compute_blocks": first, "bn_compute_blocks": last}
    flags = CompileOptions.parse({"cache": "dbcache", **blocks})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = case.deeper.build()
        except Exception as error:  # its inputs or its configuration say how many blocks there are
            return f"not tried: the case has no sixteen blocks ({type(error).__name__}: {error})"
        found = examine(model, (), case.inputs(), flags)
    analyses = [each.analysis for each in found.graphs if each.analysis is not None]
    if not analyses:
        return _relative(found.reason)
    figures = describe(max(analyses, key=lambda each: sum(map(arithmetic, each.region.body))))
    return held_reason(figures["outputs"], figures["pairs"])


def held_reason(outputs: Sequence[str], pairs: Sequence[Sequence[str]]) -> str:
    """Why a class with a region is not covered; empty where it is."""
    held = [output for output, pair in zip(outputs, pairs, strict=True) if not pair]
    if not held:
        return ""
    return (
        f"no input of the region is known to have the shape of {', '.join(held)}, so that a reused "
        "step takes over the last value and not the last residual"
    )


def describe(analysis: Analysis) -> dict[str, Any]:
    """The figures of a region, named as in :class:`ClassReport`."""
    region, signal = analysis.region, analysis.signal
    total = sum(map(arithmetic, computation(analysis.graph)))
    return {
        "loop": {each.path: len(each.blocks) for each in analysis.loop.lists},
        "inputs": [_described(node) for node in region.inputs],
        "outputs": [_described(node) for node in region.outputs],
        "pairs": [
            [] if pair.partner is None else [leaf.name for leaf in leaves(pair.partner)]
            for pair in analysis.pairs
        ],
        "signal": "" if signal is None else f"{signal.kind}, {_value(signal.node)}",
        "nodes": [len(each) for each in (region.prologue, region.body, region.epilogue)],
        "share": round(sum(map(arithmetic, region.body)) / total, 4),
        "hoisted": hoisted_shares(analysis, total),
    }


def hoisted_shares(analysis: Analysis, total: int) -> dict[str, list[float]]:
    """The shares of the arithmetic and of the parameters, named as in :class:`ClassReport`."""
    hoisted = take_out(analysis, modulations=True).hoisted
    elements = parameter_elements(analysis.graph)
    cuts = {name: getattr(hoisted, name) for name in HOISTED}
    return {
        name: [round(cut.arithmetic / total, 4), round(cut.weight_elements / elements, 4)]
        for name, cut in cuts.items()
    }


def _described(node: Any) -> str:
    return f"{node.name}: {_value(node)}"


def _value(node: Any) -> str:
    return describe_value(node.meta.get("example_value"))


def _relative(text: str) -> str:
    """Text whose paths begin at the package, so that reports of two machines are alike."""
    for parent in sys.path:
        if parent.endswith("-packages"):
            text = text.replace(f"{parent}/", "")
    return text


# --- what becomes of the reports ------------------------------------------------------------------


def save(reports: Iterable[ClassReport], not_denoising: Mapping[str, str], output: Path) -> None:
    """Write the Markdown report and, beside it, the JSON behind it."""
    reports = sorted(reports, key=lambda each: each.class_name)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(as_markdown(reports, not_denoising), encoding="utf-8")
    data = {
        "diffusers": version("diffusers"),
        "classes": [asdict(each) for each in reports],
        "not_denoising": dict(not_denoising),
    }
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    output.with_suffix(".json").write_text(text, encoding="utf-8")


def load(output: Path) -> list[ClassReport]:
    """The reports saved earlier; none where there are none."""
    path = output.with_suffix(".json")
    if not path.is_file():
        return []
    classes = json.loads(path.read_text(encoding="utf-8"))["classes"]
    return [ClassReport(**each) for each in classes]


def lost(before: Iterable[ClassReport], now: Iterable[ClassReport]) -> list[str]:
    """The classes that were covered before and no longer are."""
    covered = {each.class_name for each in now if each.status == "covered"}
    return [
        each.class_name
        for each in before
        if each.status == "covered" and each.class_name not in covered
    ]


def finding(reports: Sequence[ClassReport]) -> str:
    """How many classes are covered, in one sentence."""
    covered = sum(each.status == "covered" for each in reports)
    return (
        f"{covered} of {len(reports)} denoising transformer classes of diffusers "
        f"{version('diffusers')} ({covered / len(reports):.1%}) have a region, with every output "
        "paired."
    )


def as_markdown(reports: Sequence[ClassReport], not_denoising: Mapping[str, str]) -> str:
    """The report for people."""
    found = [each for each in reports if each.status in ("covered", "held")]
    lines = [
        "# Coverage",
        "",
        finding(reports),
        "",
        "Each class was built with eight blocks at a tiny size, captured by Dynamo and given to "
        "the pass, which knows none of them. Dynamo is asked for one graph first, and for pieces "
        "where there is none, as `omni_cache.enable` does. `scripts/report_coverage.py` makes this "
        "file and the JSON beside it, which names every region input. Hoisted is what `hoist=True` "
        "computes once for a branch of a generation, and with modulations what only the timestep "
        "changes besides; at these sizes attention and the text weigh less than in a real model.",
        "",
        "| class | block loop | region inputs | outputs, each with its partner | signal | nodes: "
        "prologue, body, epilogue | arithmetic in the region | hoisted: arithmetic, parameters | "
        "with modulations | graphs |",
        "|---|---|---:|---|---|---:|---:|---:|---:|---:|",
        *map(_row, found),
    ]
    lines += _span_lines(reports)
    headings = (
        ("held", "With a region, and an output that has no partner"),
        ("refused", "Without a region"),
        ("missing", "Without a case"),
    )
    for status, heading in headings:
        some = [each for each in reports if each.status == status]
        if some:
            lines += ["", f"## {heading}", "", "| class | reason |", "|---|---|"]
            lines += [f"| {each.class_name} | {each.reason} |" for each in some]
    broken = [each for each in reports if each.breaks]
    if broken:
        lines += [
            "",
            "## Graph breaks",
            "",
            "| class | graphs | the first break |",
            "|---|---:|---|",
        ]
        lines += [f"| {each.class_name} | {each.graphs} | {each.breaks[0]} |" for each in broken]
    if not_denoising:
        lines += ["", "## No denoising transformers", "", "| class | what it is |", "|---|---|"]
        lines += [f"| {name} | {what} |" for name, what in sorted(not_denoising.items())]
    return "\n".join(lines) + "\n"


def _span_lines(reports: Sequence[ClassReport]) -> Iterator[str]:
    """What is found where the first and the last blocks always run."""
    tried = [each for each in reports if each.spans]
    if not tried:
        return
    yield from ("", "## Where the first and the last blocks always run", "")
    counts = ", ".join(
        f"{name}: {sum(not each.spans[name] for each in tried)} of {len(tried)}" for name in SPANS
    )
    yield f"Each covered class, built with sixteen blocks. {counts}."
    failed = [(each, name) for each in tried for name in SPANS if each.spans[name]]
    if failed:
        yield from ("", "| class | span | reason |", "|---|---|---|")
        for each, name in failed:
            yield f"| {each.class_name} | {name} | {each.spans[name]} |"


def _row(each: ClassReport) -> str:
    loop = ", ".join(f"`{path}` ×{count}" for path, count in each.loop.items())
    pairs = "; ".join(
        f"{output.partition(': ')[2]} {'← ' + ' + '.join(partners) if partners else 'held'}"
        for output, partners in zip(each.outputs, each.pairs, strict=True)
    )
    nodes = ", ".join(f"{count:,}" for count in each.nodes)
    return (
        f"| {each.class_name} | {loop} | {len(each.inputs)} | {pairs} | {each.signal} | {nodes} | "
        f"{each.share:.1%} | {' | '.join(_hoisted(each))} | {each.graphs} |"
    )


def _hoisted(each: ClassReport) -> Iterator[str]:
    """The shares that are taken out by the constants, and by these and the modulations."""
    arithmetic, parameters = 0.0, 0.0
    for name in HOISTED:
        of_arithmetic, of_parameters = each.hoisted.get(name, (0.0, 0.0))
        arithmetic, parameters = arithmetic + of_arithmetic, parameters + of_parameters
        yield f"{arithmetic:.1%}, {parameters:.1%}"


# --- the command ----------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Cases to try; the findings are then printed and not written."),
    ] = None,
    cases: Annotated[
        Path, typer.Option(help="File with a tiny configuration of each model class.")
    ] = ROOT / "tests" / "diffusers_models.py",
    output: Annotated[
        Path, typer.Option(help="Markdown file to write; the JSON lies beside it.")
    ] = ROOT / "docs" / "coverage.md",
    workers: Annotated[int, typer.Option(min=1, help="Processes to share the work.")] = 2,
) -> None:
    """Run the pass over every denoising transformer of the installed diffusers.

    Ends with an error when a class that the written report has as covered is so no longer.
    """
    console = Console()
    before = load(output)
    try:
        module = load_cases(cases)
        total = len(names or module.CASES)
        reports = list(track(cover(cases, names or (), workers), "classes", total, console=console))
    except (FileNotFoundError, ValueError) as error:
        console.print(str(error), style="red")
        raise typer.Exit(2) from None
    if names:
        console.print(as_markdown(reports, {}), markup=False, soft_wrap=True)
        return
    save(reports, module.NOT_DENOISING, output)
    console.print(finding(reports))
    gone = lost(before, reports)
    if gone:
        console.print(f"covered before, and no longer: {', '.join(gone)}", style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
