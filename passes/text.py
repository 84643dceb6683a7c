"""A Dynamo graph, and the guarded graph made of it, as short programs for people to read.

    hidden_states_1 = x_embedder(hidden_states)                           # Linear, 1 op
    hidden_states_2 = blocks[0..18](hidden_states_1, temb, rotary)        # Block ×19, 142 ops each

One line per call of a top-level module; blocks of one structure fold into one line, parameters are
left out. Values are numbered as they appear in the text, not in the graph, so that a change in one
module shows as a change of its line. Knows what the other passes found and changes nothing.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .analysis import Analysis
from .block_loop import find_block_lists, structure_of
from .build import Part, is_guard
from .cost import arithmetic
from .hoist import Hoisted, parameter_elements
from .names import ModulePath, input_name, module_class, op_name, parse_module_source
from .order import computation, modes
from .residual import ResidualPair
from .split import FINITE, WEIGHTS, GuardedGraph
from .storage import FLOAT8
from .values import describe_value, is_static_input, nbytes, same_size, tensor_of
from .views import Cat, Leaf, Permute, Reshape, Slice, View

WIDTH = 100
"""Columns that code takes at most, where its words allow."""

_REACH = 120  # columns that a comment behind it takes at most
_COMMENT_COLUMN = 56
_LISTED = 16  # names of one list that are written out


def graph_text(graph: Graph) -> str:
    """A Dynamo graph as a program, before anything is cut."""
    nodes = computation(graph)
    held = [tensor_of(node) for node in graph.nodes if is_static_input(node)]
    weights = [each for each in held if each is not None]
    names, page = _Names(), _Page()
    work = sum(map(arithmetic, nodes))
    page.remark(f"captured graph: {_count(len(nodes), 'op')}, {work:,} flop in contractions")
    page.remark(f"weights: {_count(len(weights), 'tensor')}, {_bytes(sum(map(nbytes, weights)))}")
    page.open(graph, names)
    page.calls(graph, _Layout(graph), names)
    page.write(f"return {_format(_result(graph).args[0], names.of)}")
    return page.text()


def guarded_text(guarded: GuardedGraph, keeps_results: bool = False, timesteps: int = 1) -> str:
    """A guarded graph as a program: what always runs, and what only when the gate says so.

    Args:
        guarded: the graph.
        keeps_results: whether a trajectory holds what the graph returns, too.
        timesteps: for how many it holds modulations, where they are hoisted.
    """
    analysis = guarded.analysis
    work = sum(arithmetic(node) for node in computation(analysis.graph))
    layout = _Layout(analysis.graph)
    pairs = dict(zip(guarded.residuals, analysis.pairs, strict=False))  # scales follow
    partners = _partners(guarded)
    names, page = _Names(), _Page()
    for line in _findings(guarded, work, guarded.held_bytes(keeps_results, timesteps), timesteps):
        page.remark(line, "    ")
    page.open(analysis.graph, names)

    hoisted = (("constants", guarded.constants), ("modulations", guarded.modulations))
    for title, part in hoisted:
        if part is not None:
            page.part(title, part, names, work)
            page.calls(names.enter(part), layout, names)
            names.leave(part)
            page.outputs(part, names)
            page.write()
    page.part("prologue", guarded.prologue, names, work)
    page.calls(names.enter(guarded.prologue), layout, names)
    names.leave(guarded.prologue)
    for pair in analysis.pairs:
        if pair.partner is not None and not isinstance(pair.partner, Leaf):
            partner = names.name(partners[pair.output], "partner")
            page.write(f"{partner} = {_expression(pair.partner, names)}")
    signal = analysis.signal
    if signal is not None and signal.minus is not None:
        made = names.name(str(guarded.signal), "signal")
        before = _expression(signal.minus, names)
        page.write(f"{made} = {names.of(signal.node)} - {before}")
    page.outputs(guarded.prologue, names)

    page.write()
    page.write(*_gate(guarded, names))
    page.indent += 1
    page.part("body", guarded.body, names, work)
    page.calls(names.enter(guarded.body), layout, names)
    names.leave(guarded.body)
    for residual, pair in pairs.items():
        kept = names.name(residual, "value" if pair.held else "residual")
        if residual in guarded.scales:
            kept = f"{kept}, {names.name(guarded.scales[residual], 'scale')}"
        page.write(
            f"{kept} = {_residual(pair, guarded, partners, names)}", _pair_comment(pair, analysis)
        )
    finite = names.name(FINITE, "finite")
    listed = ", ".join(f"isfinite({names.named(residual)})" for residual in pairs)
    page.write(f"{finite} = all({listed})", "elements that are not are kept as 0")
    page.outputs(guarded.body, names)
    page.indent -= 1
    page.write("else:")
    page.indent += 1
    names.name(WEIGHTS, "weights")
    for entry in guarded.history[1:]:
        for older, newest in zip(entry, guarded.residuals, strict=True):
            names.name(older, "older_residual" if newest in pairs else "older_scale")
    for each in guarded.entered:
        names.name(each.kept, "input_before")
    heading = "reuse" if guarded.merges else "reuse, with the epilogue"
    page.part(heading, guarded.reuse, names, work)
    for place, pair in enumerate(analysis.pairs):
        terms = [] if pair.held else [_partner(pair, partners, names)]
        terms += _forecast(guarded, place, partners, names)
        page.write(f"{names.named(pair.output.name)} = {' + '.join(terms)}")
    page.indent -= 1

    page.write()
    page.part("epilogue", guarded.epilogue, names, work)
    epilogue = names.enter(guarded.epilogue)
    page.calls(epilogue, layout, names)
    page.write(f"return {_format(_result(epilogue).args[0], names.of)}")
    return page.text()


# --- names ---------------------------------------------------------------------------------------


class _Names:
    """A name of its own for every value in a text; a value that crosses a cut keeps its name."""

    def __init__(self) -> None:
        self._taken = {"forward", "gate"}
        self._nodes: dict[Node, str] = {}
        self._crossing: dict[str, str] = {}

    def of(self, node: Node) -> str:
        """The name of a node of the graph that is being written; a copy has that of its source."""
        if _is_copy(node):
            return self.of(node.all_input_nodes[0])
        if node not in self._nodes:
            self._nodes[node] = self._fresh(re.sub(r"(_\d+)+$", "", node.name))
        return self._nodes[node]

    def named(self, crossing: str) -> str:
        """The name of a value that is an input or output of a part."""
        return self._crossing[crossing]

    def name(self, crossing: str, wanted: str) -> str:
        """Name a value that no module computes."""
        if crossing not in self._crossing:
            self._crossing[crossing] = self._fresh(wanted)
        return self._crossing[crossing]

    def argument(self, node: Node) -> str:
        """Name an input of the whole graph."""
        self._nodes[node] = self.name(node.name, re.sub(r"\W+", "_", input_name(node)).strip("_"))
        return self._nodes[node]

    def enter(self, part: Part) -> Graph:
        """Take over the names of a part's inputs."""
        graph = part.module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node, crossing in zip(placeholders, part.inputs, strict=True):
            if not is_static_input(node):
                self._nodes[node] = self._crossing[crossing]
        return graph

    def leave(self, part: Part) -> None:
        """Give a part's outputs the names that they have inside it."""
        results = _result(part.module.graph).args[0]
        assert isinstance(results, tuple)  # the split gives every named value a place
        for node, crossing in zip(results, part.outputs, strict=True):
            if not is_guard(node) or _is_copy(node):
                self._crossing[crossing] = self.of(node)

    def _fresh(self, wanted: str) -> str:
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


# --- folding -------------------------------------------------------------------------------------


@dataclass
class _Call:
    """The nodes of one line: a module's, or the model's own between two modules (no path).

    ``block`` and ``last`` are its first and last index, where the module is an element of a list.
    """

    path: ModulePath
    class_name: str
    block: int | None
    last: int | None
    nodes: list[Node]
    between: list[Node]

    @property
    def count(self) -> int:
        return 1 if self.block is None or self.last is None else self.last - self.block + 1


def _fold(graph: Graph, layout: _Layout) -> list[_Call]:
    """The lines of a graph, neighbouring blocks of one structure made into one.

    Nodes of the model's own between two such blocks, which pick a block's part of a tensor, say,
    fold with them.
    """
    folded: list[_Call] = []
    between: list[_Call] = []
    structure, held = "", modes(graph)
    for call in _calls(graph, layout):
        if call.block is None:
            between.append(call)
            continue
        run = folded[-1] if folded else None
        previous, structure = structure, structure_of(call.nodes, held)
        follows = run is not None and (run.path, run.last) == (call.path, call.block - 1)
        if run and follows and structure == previous and not any(each.path for each in between):
            run.between += [node for each in between for node in each.nodes]
            run.nodes += call.nodes
            run.last = call.last
        else:
            folded += [*between, call]
        between = []
    return folded + between


def _calls(graph: Graph, layout: _Layout) -> Iterator[_Call]:
    """The runs of nodes that come from one call of a module, in graph order."""
    current: _Call | None = None
    for node in computation(graph):
        if is_guard(node):
            continue
        path = layout.called(node)
        whole, block = path, None
        if path and path[-1].isdigit():
            path, block = path[:-1], int(path[-1])
        if current is None or (current.path, current.block) != (path, block):
            if current is not None:
                yield current
            class_name = module_class(node, whole) if path else ""
            current = _Call(path, class_name, block, block, [], [])
        current.nodes.append(node)
    if current is not None:
        yield current


class _Layout:
    """Which modules of a model have lines of their own: those that its own code calls.

    The model is the module that holds the heaviest list of blocks, which need not be the outermost.
    A ``Sequential`` of attention blocks counts as a list that is called block by block.
    """

    def __init__(self, graph: Graph) -> None:
        lists = find_block_lists(graph)
        heaviest = max(lists, key=lambda each: each.arithmetic, default=None)
        self._model = tuple(heaviest.path.split(".")[:-1]) if heaviest else ()
        self._lists = {tuple(each.path.split(".")) for each in lists if each.has_attention}

    def called(self, node: Node) -> ModulePath:
        """The path of the module whose line a node belongs to, empty for the model's own code."""
        stack = node.meta.get("nn_module_stack") or {}
        for source, _ in stack.values():
            path = parse_module_source(source)
            if path != self._model[: len(path)] and path not in self._lists:
                return path
        return ()


# --- writing -------------------------------------------------------------------------------------


class _Page:
    """Lines of a program, indented, their comments in one column."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.indent = 0

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def write(self, line: str = "", comment: str = "") -> None:
        margin = "    " * self.indent
        line = margin + line
        if comment:
            line = f"{line:<{_COMMENT_COLUMN}}  # {comment}"
        self.lines.append(line.rstrip())

    def call(self, head: str, arguments: str, comment: str) -> None:
        """``head(arguments)  # comment``, with the arguments on lines of their own if need be."""
        margin = "    " * self.indent
        whole = f"{margin}{head}({arguments})"
        if (
            len(whole) <= WIDTH
            and max(len(whole), _COMMENT_COLUMN) + len(f"  # {comment}" if comment else "")
            <= _REACH
        ):
            self.write(f"{head}({arguments})", comment)
            return
        self.write(f"{head}(")
        self.lines += textwrap.wrap(
            arguments, WIDTH, initial_indent=f"{margin}    ", subsequent_indent=f"{margin}    "
        )
        self.lines.append(f"{margin})" + (f"  # {comment}" if comment else ""))

    def remark(self, text: str, hanging: str = "") -> None:
        """A comment, wrapped; what follows its first line is indented by ``hanging``."""
        margin = "    " * self.indent + "# "
        self.lines += textwrap.wrap(
            text, WIDTH, initial_indent=margin, subsequent_indent=margin + hanging
        )

    def open(self, graph: Graph, names: _Names) -> None:
        """The program's own arguments, which are the graph's inputs."""
        self.write("def forward(")
        for node in graph.nodes:
            if node.op == "placeholder" and not is_static_input(node):
                value = node.meta.get("example_value")
                kind = "int" if isinstance(value, torch.SymInt) else describe_value(value)
                self.write(f"    {names.argument(node)}: {kind},")
        self.write("):")
        self.indent = 1

    def part(self, title: str, part: Part, names: _Names, total: int) -> None:
        """The heading of a part: when it runs, what it costs and reads."""
        nodes = [node for node in computation(part.module.graph) if not is_guard(node)]
        work = sum(map(arithmetic, nodes))
        self.remark(f"{title}: {_count(len(nodes), 'op')}, {_share(work, total)} of the arithmetic")
        placeholders = (node for node in part.module.graph.nodes if node.op == "placeholder")
        read = [
            names.named(crossing)
            for node, crossing in zip(placeholders, part.inputs, strict=True)
            if not is_static_input(node)
        ]
        self.remark(f"    in:  {_listed(read)}", " " * 9)
        self._outputs_line = len(self.lines)

    def outputs(self, part: Part, names: _Names) -> None:
        """Add to the heading what a part gives, whose names are known only at its end."""
        listed = _listed([names.named(each) for each in part.outputs])
        rest, self.lines[self._outputs_line :] = self.lines[self._outputs_line :], []
        self.remark(f"    out: {listed}", " " * 9)
        self.lines += rest

    def calls(self, graph: Graph, layout: _Layout, names: _Names) -> None:
        """The lines of a graph."""
        position = {node: at for at, node in enumerate(graph.nodes)}
        for call in _fold(graph, layout):
            nodes = call.nodes + call.between
            inside = set(nodes)
            read = {
                each
                for node in nodes
                for each in node.all_input_nodes
                if each not in inside and not is_static_input(each)
            }
            arguments = [names.of(node) for node in sorted(read, key=position.__getitem__)]
            made = [node for node in nodes if any(user not in inside for user in node.users)]
            results = [names.of(node) for node in sorted(made, key=position.__getitem__)]
            callee = _callee(call)
            if not call.path and len(nodes) == 1:
                self.write(f"{_assigned(results)}{_operation(nodes[0], names)}")
            else:
                room = WIDTH - 4 * self.indent - len(f"{callee}(")
                self.call(f"{_assigned(results, room)}{callee}", _listed(arguments), _cost(call))


def _callee(call: _Call) -> str:
    """What a line calls: ``norm_out``, ``blocks[0..18]``, or ``{mul, add}`` of the model itself."""
    if not call.path:
        names = list(dict.fromkeys(map(op_name, call.nodes)))
        return f"{{{', '.join(names if len(names) <= 3 else [*names[:2], '…'])}}}"
    callee = "".join(f".{step}" if step.isidentifier() else f"[{step!r}]" for step in call.path)
    callee = callee.removeprefix(".")
    if call.block is None:
        return callee
    return f"{callee}[{call.block}]" if call.count == 1 else f"{callee}[{call.block}..{call.last}]"


def _cost(call: _Call) -> str:
    """``Linear, 1 op``, or ``Block ×19, 142 ops each``."""
    ops = _count(len(call.nodes) // call.count, "op")
    if call.count > 1:
        between = f", {len(call.between)} more between them" if call.between else ""
        return f"{call.class_name} ×{call.count}, {ops} each{between}"
    return f"{call.class_name}, {ops}" if call.path else ops


def _operation(node: Node, names: _Names) -> str:
    """One operation as it would be written: ``cat([a, b], dim=1)``, ``a[:, 5:]``."""
    if op_name(node) == "getitem":
        index = _format(node.args[1], names.of)
        return f"{_format(node.args[0], names.of)}[{index.strip('()')}]"
    arguments = [_format(each, names.of) for each in node.args]
    arguments += [f"{name}={_format(each, names.of)}" for name, each in node.kwargs.items()]
    return f"{op_name(node)}({', '.join(arguments)})"


def _format(value: Any, name: Any) -> str:
    if isinstance(value, Node):
        return str(name(value))
    if isinstance(value, tuple):
        inner = ", ".join(_format(each, name) for each in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(_format(each, name) for each in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_format(each, name)}' for key, each in value.items())}}}"
    if isinstance(value, slice):
        ends = ["" if end is None else _format(end, name) for end in (value.start, value.stop)]
        return ":".join(ends) + ("" if value.step is None else f":{_format(value.step, name)}")
    return "..." if value is Ellipsis else str(value).removeprefix("torch.")


def _expression(view: View, names: _Names) -> str:
    """A view as it would be written: ``cat([text, image], dim=1)[:, 5:]``."""
    if isinstance(view, Leaf):
        return names.named(view.node.name)
    if isinstance(view, Cat):
        parts = ", ".join(_expression(part, names) for part in view.parts)
        return f"cat([{parts}], dim={view.dim})"
    inner = _expression(view.of, names)
    if isinstance(view, Slice):
        start = view.start or ""
        stop = "" if same_size(view.stop, view.of.shape[view.dim]) else view.stop
        return f"{inner}[{':, ' * view.dim}{start}:{stop}]"
    if isinstance(view, Permute):
        return f"{inner}.permute({', '.join(map(str, view.dims))})"
    assert isinstance(view, Reshape)
    return f"{inner}.reshape({', '.join(map(str, view.shape))})"


def _is_copy(node: Node) -> bool:
    """Whether a node only copies a value: to lay it out anew, or because it is written into."""
    return is_guard(node) and node.target is torch.clone


def _partner(pair: ResidualPair, partners: Mapping[Node, str], names: _Names) -> str:
    """The partner of an output as what is added to it, or subtracted from it."""
    cast = "" if pair.cast is None else f".to({_format(pair.cast, names.of)})"
    return names.named(partners[pair.output]) + cast


def _residual(
    pair: ResidualPair, guarded: GuardedGraph, partners: Mapping[Node, str], names: _Names
) -> str:
    """What is kept of an output: what was added to its partner, in the dtype of the history."""
    kept = names.named(pair.output.name)
    if not pair.held:
        kept = f"{kept} - {_partner(pair, partners, names)}"
    value, dtype = tensor_of(pair.output), guarded.history_dtype
    if dtype is None or value is None or dtype == value.dtype or not value.is_floating_point():
        return kept
    if dtype is FLOAT8:
        return f"in_8_bits({kept})"
    return f"{kept if pair.held else f'({kept})'}.to({_format(dtype, names.of)})"


def _forecast(
    guarded: GuardedGraph, place: int, partners: Mapping[Node, str], names: _Names
) -> list[str]:
    """The terms that stand in for a residual, by its place among all; newest first."""
    name = guarded.residuals[place]
    kept = _entries(guarded, name, names)
    output = guarded.analysis.pairs[place].output
    value = tensor_of(output)
    if value is None or not (value.is_floating_point() or value.is_complex()):
        return [kept[0]]
    if name in guarded.scales:
        scales = _entries(guarded, guarded.scales[name], names)
        kept = [f"{each} * {scale}" for each, scale in zip(kept, scales, strict=True)]
    before = (each for each in guarded.entered if each.name == partners.get(output))
    kept += [names.named(name) for each in before for name in (each.name, each.kept)]
    weights = names.named(WEIGHTS)
    return [f"{weights}[:, {age}] * {each}" for age, each in enumerate(kept)]


def _entries(guarded: GuardedGraph, name: str, names: _Names) -> list[str]:
    """What the history calls an output of the body, newest first."""
    place = guarded.residuals.index(name)
    return [names.named(entry[place]) for entry in guarded.history]


def _partners(guarded: GuardedGraph) -> dict[Node, str]:
    """The name of the value that an output is a residual update of, by output."""
    pairs = guarded.analysis.pairs
    partners = {
        pair.output: pair.partner.node.name for pair in pairs if isinstance(pair.partner, Leaf)
    }
    # The prologue composes the others, and returns them last, before a signal that it makes.
    composed = [pair.output for pair in pairs if not pair.held and pair.output not in partners]
    signal = guarded.analysis.signal
    outputs = guarded.prologue.outputs
    outputs = outputs[:-1] if signal is not None and signal.minus is not None else outputs
    made = outputs[len(outputs) - len(composed) :]
    return {**partners, **dict(zip(composed, made, strict=True))}


def _pair_comment(pair: ResidualPair, analysis: Analysis) -> str:
    value = tensor_of(pair.output)
    size = f"{describe_value(value)}, {_bytes(nbytes(value))}" if value is not None else ""
    if analysis.whole:
        return size
    if pair.held:
        return f"{size}; kept as a value: no input matches its shape"
    return f"{size}; {_count(pair.additions, 'residual addition')}"


def _gate(guarded: GuardedGraph, names: _Names) -> tuple[str, str]:
    signal = guarded.analysis.signal
    if signal is None:
        return 'if gate() == "compute":', "decides without a signal"
    value = describe_value(signal.node.meta.get("example_value"))
    return (
        f'if gate({names.named(str(guarded.signal))}) == "compute":',
        f"signal: {signal.kind}, {value}",
    )


def _findings(
    guarded: GuardedGraph, work: int, held: Mapping[str, int], timesteps: int
) -> list[str]:
    """What a reader wants to know first: the block loop, what can be saved, what it takes."""
    analysis = guarded.analysis
    blocks = analysis.loop.blocks
    structures = len({block.structure for block in blocks})
    lists = ", ".join(f"{each.path} ×{len(each.blocks)}" for each in analysis.loop.lists)
    region = analysis.region.body
    hoisted = analysis.hoisted
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in held.items())
    listed += f" for {_count(timesteps, 'timestep')}" if "modulations" in held else ""
    timestep = "none" if analysis.timestep is None else input_name(analysis.timestep)
    return [
        f"block loop: {lists}, {_count(structures, 'structure')} in all",
        f"region: {_count(len(region), 'op')}, {_share(sum(map(arithmetic, region)), work)} of the "
        "arithmetic, skipped on a reused step",
        *([] if hoisted is None else _taken_out(analysis.graph, hoisted, work)),
        f"timestep: {timestep}",
        f"a trajectory holds {_bytes(sum(held.values()))}: {listed}",
    ]


_AT_ONCE = (
    "hoisted, changes with the timestep alone, computed for a known list of timesteps at once and "
    "else at every step"
)


def _taken_out(graph: Graph, hoisted: Hoisted, work: int) -> Iterator[str]:
    """What is computed less often than at every step."""
    elements = parameter_elements(graph)
    cuts = {
        "hoisted, computed once in a generation and branch": hoisted.constants,
        _AT_ONCE
        if hoisted.takes_modulations
        else "not hoisted, changes with the timestep alone": hoisted.modulations,
    }
    for what, cut in cuts.items():
        if cut.results:
            yield (
                f"{what}: {_share(cut.arithmetic, work)} of the arithmetic, "
                f"{_share(cut.weight_elements, elements)} of the parameters "
                f"({_bytes(cut.weight_bytes)}) in {_count(len(cut.results), 'tensor')}, "
                f"{_bytes(cut.held_bytes)}"
            )
    if not hoisted.constants.results:
        yield "hoisted: nothing is worth it that no input changes"


def _result(graph: Graph) -> Node:
    result: Node = graph.find_nodes(op="output")[0]
    return result


def _assigned(names: list[str], room: int = WIDTH) -> str:
    """``a, b = ``, with as many names written out as there is room for."""
    if not names:
        return ""
    shown = len(names)
    while shown > 1 and len(_listed(names, shown)) + len(" = ") > room:
        shown -= 1
    return f"{_listed(names, shown)} = "


def _listed(names: Iterable[str], limit: int = _LISTED) -> str:
    names = list(names)
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])}, … {len(names) - limit} more"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.1f}%"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _bytes(count: int) -> str:
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
