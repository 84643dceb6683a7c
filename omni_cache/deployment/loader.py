"""Runs a package that ``omni_cache.export`` wrote. Imports PyTorch and nothing else.

    model = load("flux.pt2")
    branch = model.branch()                    # one for each guidance branch of each request
    for timestep in timesteps:
        noise = branch(hidden_states=latents, timestep=timestep, ...)
    branch.reset()                             # before the next loop

``export`` writes this file beside every package, as ``omni_cache_loader.py``: omni_cache does not
have to be installed where a package runs. A package holds compiled graphs and one JSON file, which
says how a call's arguments become their inputs and what a step does. What depends on the step alone
is in the JSON, and decided here. What depends on data is decided within the graph.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = "omni-cache package 1"
MANIFEST = "omni_cache.json"
"""The name of the JSON file within the package."""

Graph = Callable[[list[Tensor]], Sequence[Tensor]]


class StepRecord(NamedTuple):
    """What happened in one call.

    Attributes:
        index: the step.
        action: "computed", "reused" (the blocks did not run) or "skipped" (nothing ran).
        distance: the change of the signal since the call that it is compared with; None where the
            step did not depend on it.
    """

    index: int  # type: ignore[assignment]  # hides a method that nobody needs here
    action: str
    distance: float | None


def load(path: str | os.PathLike[str], device_index: int = -1) -> Model:
    """Load a package.

    Args:
        path: of the ``.pt2``.
        device_index: on which of several GPUs it runs; -1 for the current one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no package of ``omni_cache.export``, or of a newer one.
    """
    from torch.export.pt2_archive._package import load_pt2

    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"path={name!r}: there is no such file")
    contents = load_pt2(name, device_index=device_index)
    found = contents.extra_files.get(MANIFEST)
    manifest = json.loads(found) if found is not None else {}
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"path={name!r} is not allowed; path must be a package that omni_cache.export wrote "
            f"({FORMAT!r}), and this one says {manifest.get('format')!r}"
        )
    graphs = {key: runner.loader.boxed_run for key, runner in contents.aoti_runners.items()}
    device = None if device_index < 0 else torch.device("cuda", device_index)
    return Model(manifest, graphs, device)


class Model:
    """A loaded package. It holds weights and no state, so that threads may share it.

    Args:
        manifest: the JSON of the package.
        graphs: the compiled graphs by name, each from a flat list of tensors to such a list.
        device: where tensors lie instead of the device that the package was exported on.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        graphs: Mapping[str, Graph],
        device: torch.device | None = None,
    ) -> None:
        self.manifest = manifest
        self.graphs = graphs
        self.device = device or torch.device(manifest["device"])

    @property
    def num_inference_steps(self) -> int:
        """The number of steps that the package was exported for."""
        steps: int = self.manifest["steps"]
        return steps

    def branch(self, name: str | None = None) -> Branch:
        """A new trajectory: what is kept for one guidance branch of one request.

        Args:
            name: which of the exported branches it is; the first by default. It matters to plans
                and to strategies with numbers of each branch.

        Raises:
            ValueError: nothing was exported for a branch of that name.
        """
        names = self.manifest["branches"]
        if name is None:
            name = names[0]
        if name not in names:
            raise ValueError(
                f"name={name!r} is not allowed; name must be one of {', '.join(map(repr, names))}, "
                "the branches that were exported"
            )
        kind = Deciding if self.manifest["kind"] == "cond" else Following
        return kind(self, name)

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The inputs of the graphs, from a call's arguments.

        Raises:
            TypeError: an argument is missing, unknown, or no tensor where one was exported.
            ValueError: it is of another shape, dtype or device, or another constant.
        """
        manifest = self.manifest
        if len(args) > len(manifest["parameters"]):
            raise TypeError(
                f"{len(args)} positional arguments were given; allowed are "
                f"{', '.join(manifest['parameters'])}"
            )
        given = dict(zip(manifest["parameters"], args, strict=False))
        twice = sorted(given.keys() & kwargs.keys())
        if twice:
            raise TypeError(f"{twice[0]} was given twice, by position and by name")
        found = dict(leaves({**given, **kwargs}))
        constants = manifest["constants"]
        for path, value in found.items():
            if path in constants:
                if isinstance(value, Tensor) or value != constants[path]:
                    raise ValueError(
                        f"{path}={value!r} is not allowed; it was exported with "
                        f"{constants[path]!r}, which is a constant of the package"
                    )
            elif path not in manifest["tensors"]:
                known = ", ".join([*manifest["tensors"], *constants])
                raise TypeError(f"{path} is not an argument of the package; these are: {known}")
        tensors = {path: self._checked(path, found) for path in manifest["tensors"]}
        return [tensors[path] for path in manifest["inputs"].values()]

    def _checked(self, path: str, found: Mapping[str, Any]) -> Tensor:
        kind = self.manifest["tensors"][path]
        if path not in found:
            raise TypeError(f"{path} is missing")
        value = found[path]
        if not isinstance(value, Tensor):
            raise TypeError(f"{path}={value!r} is not allowed; {path} must be a tensor")
        mine = [list(value.shape), str(value.dtype), value.device.type]
        if mine != [kind["shape"], kind["dtype"], self.device.type]:
            shape, dtype, device = mine
            raise ValueError(
                f"{path} of shape {shape}, {dtype}, on {device} is not allowed; the package was "
                f"exported for shape {kind['shape']}, {kind['dtype']}, on {self.device.type}"
            )
        # Compiled code takes memory as it is: contiguous, and aligned as allocators align it.
        value = value.contiguous()
        return value.clone() if value.data_ptr() % 16 else value

    def result(self, flat: Sequence[Any], inputs: Sequence[Tensor]) -> Any:
        """What the module returns, of the graph's outputs."""
        return _built(self.manifest["result"], flat, inputs)

    def blanks(self, kinds: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Zeros, for what a graph takes and does not look at before something is kept."""
        return [
            torch.zeros(each["shape"], dtype=dtype_of(each["dtype"]), device=self.device)
            for each in kinds
        ]


class Branch:
    """What is kept for one guidance branch of one request. Call it as the module is called.

    Args:
        model: the package.
        name: of the branch.

    Attributes:
        step: the index of the next call. Calls count it; set it where a loop begins later, or
            where another model runs some of the steps.
        steps: one record for each call since the last reset.
    """

    def __init__(self, model: Model, name: str) -> None:
        self.model = model
        self.name = name
        self._first = self._expected = 0
        self.reset()

    def reset(self, step: int | None = None) -> None:
        """Begin anew: the next call is computed, and all that was kept is freed.

        Args:
            step: the index of the next call; by default the first of the package.
        """
        self.step: int = self.model.manifest["begins"] if step is None else step
        self._records: list[tuple[int, str, Tensor | None]] = []
        self._begin(self.step)

    @property
    def steps(self) -> list[StepRecord]:
        """What happened since the last reset. On a GPU, reading it waits for the device."""
        return [
            StepRecord(index, action, None if distance is None else float(distance))
            for index, action, distance in self._records
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step, with the arguments that the module takes; returns what the module returns.

        A step that does not follow the last one begins anew.

        Raises:
            IndexError: the package has no such step.
            TypeError: an argument is missing, unknown or no tensor.
            ValueError: an argument is of another shape, dtype or device, or another constant.
        """
        index, total = self.step, self.model.num_inference_steps
        if not isinstance(index, int) or not 0 <= index < total:
            raise IndexError(
                f"step={index!r} is not allowed; the package was exported for "
                f"num_inference_steps={total}. Call reset() before the next loop"
            )
        inputs = self.model.inputs(args, kwargs)
        if index != self._expected:
            self._begin(index)
        with torch.inference_mode(False), torch.no_grad():
            flat, action, distance = self._run(index, inputs)
        self._records.append((index, action, distance))
        self.step = index + 1
        self._expected = index + 1
        return self.model.result(flat, inputs)

    def _begin(self, index: int) -> None:
        """Free all that is kept."""
        self._first = index
        self._expected = index

    def _run(self, index: int, inputs: list[Tensor]) -> tuple[Sequence[Any], str, Tensor | None]:
        """The graph's outputs, what was done, and the distance."""
        raise NotImplementedError


class Deciding(Branch):
    """A branch whose graph decides, by how much the signal has changed.

    One graph is a pure function: inputs and what is kept go in, the result and what is to be kept
    come out. Of a reused step the residuals come out empty, so that nobody waits for a flag.
    """

    def _begin(self, index: int) -> None:
        super()._begin(index)
        manifest, device = self.model.manifest, self.model.device
        depth = manifest["depth"]
        number = dtype_of(manifest["number"])
        self._gate = torch.tensor(manifest["gate"], dtype=number, device=device)
        self._finite = torch.zeros(depth, dtype=torch.bool, device=device)
        self._times = torch.zeros(depth, 2, dtype=number, device=device)
        self._history: list[list[Tensor]] = []
        self._blanks = self.model.blanks(manifest["residuals"])
        (self._signal,) = self.model.blanks([manifest["signal"]])

    def _run(self, index: int, inputs: list[Tensor]) -> tuple[Sequence[Any], str, Tensor | None]:
        manifest, device = self.model.manifest, self.model.device
        allowed = len(self._history) > 0 and manifest["allowed"][index]
        held = [*self._history, *[self._blanks] * (manifest["depth"] - len(self._history))]
        made = self.model.graphs["step"](
            [
                *inputs,
                _constant(allowed, "torch.bool", device),
                # Where the graph has no timestep, none is known.
                _constant((index, math.nan), manifest["number"], device),
                self._gate,
                self._signal,
                self._finite,
                self._times,
                *(each for entry in held for each in entry),
            ]
        )
        count = manifest["results"]
        flat, (self._gate, signal, distance, at, finite, *residuals) = made[:count], made[count:]
        computed = residuals[0].shape[0] > 0
        if computed:
            newest = [each[0] for each in residuals]
            self._history = [newest, *self._history][: manifest["depth"]]
            self._finite = torch.cat([finite, self._finite[:-1]])
            self._times = torch.cat([at, self._times[:-1]])
        if computed or manifest["against"] == "last call":
            self._signal = signal
        return flat, "computed" if computed else "reused", distance if allowed else None


class Following(Branch):
    """A branch that goes by steps alone: what each does was known when the package was written."""

    def _begin(self, index: int) -> None:
        super()._begin(index)
        self._kept: list[Kept] = []

    def _run(self, index: int, inputs: list[Tensor]) -> tuple[Sequence[Any], str, Tensor | None]:
        manifest = self.model.manifest
        planned = manifest["schedules"][self.name][self._first][index - self._first]
        if planned["action"] == "skipped":
            return self._skipped(planned["row"]), "skipped", None
        values: dict[str, Any] = dict(zip(manifest["inputs"], inputs, strict=True))
        self._part("prologue", values)
        if planned["action"] == "reused":
            self._reuse(planned["row"], values)
        else:
            # Before the blocks run, which may write into what enters.
            entered = {
                each["kept"]: kept_as(values[each["name"]], each) for each in manifest["entered"]
            }
            self._part("body", values)
        flat = self._part("epilogue", values)
        if planned["action"] == "computed":
            residuals = [values[name] for name in manifest["history"][0]]
            # The caller may write into results.
            results = [each.clone() for each in flat] if manifest["skips"] else []
            for each in self._kept:
                each.entered.clear()
            self._kept = [Kept(residuals, entered, results), *self._kept][: manifest["depth"]]
        return flat, planned["action"], None

    def _part(self, name: str, values: dict[str, Any]) -> Sequence[Any]:
        """Run a part on values by name, add what it makes, and return it."""
        part = self.model.manifest["parts"][name]
        if part["computes"]:
            made = self.model.graphs[name]([values[each] for each in part["inputs"]])
        else:
            made = [values[each] for each in part["returns"]]
        values.update(zip(part["outputs"], made, strict=False))
        return made

    def _reuse(self, row: Sequence[float], values: dict[str, Any]) -> None:
        manifest = self.model.manifest
        missing = len(manifest["history"]) - len(self._kept)
        # The weight of what stands in for a missing entry is 0.
        entries = [*self._kept, *[self._kept[0]] * missing]
        for names, kept in zip(manifest["history"], entries, strict=True):
            values.update(zip(names, kept.residuals, strict=True))
        values.update(self._kept[0].entered)
        name, dtype = manifest["weights"]
        values[name] = _constant((tuple(row),), dtype, self.model.device)
        self._part("reuse", values)

    def _skipped(self, row: Sequence[float]) -> list[Tensor]:
        kept = self._kept[: len(row)]
        return [weighed(row, tensors) for tensors in zip(*(k.results for k in kept), strict=True)]


class Kept(NamedTuple):
    """What a computed step leaves: residuals, partners by name, results if steps are skipped."""

    residuals: Sequence[Tensor]
    entered: dict[str, Tensor]
    results: Sequence[Tensor]


def kept_as(tensor: Tensor, entered: Mapping[str, Any]) -> Tensor:
    """A partner as reused steps weigh it; a dtype that cannot hold it leaves 0."""
    dtype = entered["dtype"]
    if dtype is not None and dtype != str(tensor.dtype):
        return tensor.to(dtype_of(dtype)).nan_to_num(0.0, 0.0, 0.0)
    return tensor.clone() if entered["copies"] else tensor


def weighed(row: Sequence[float], entries: Sequence[Tensor]) -> Tensor:
    """``sum_i row[i] * entries[i]``, summed in float32 at least; the newest of what has no sum."""
    newest = entries[0]
    if not (newest.is_floating_point() or newest.is_complex()):
        return newest.clone()
    precise = torch.promote_types(newest.dtype, torch.float32)
    terms = [weight * each.to(precise) for weight, each in zip(row, entries, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.to(newest.dtype)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of dicts, lists and tuples within each other, by paths such as ``extra.scale.0``.

    An empty one is a leaf, a tuple as a list.
    """
    if isinstance(value, Mapping) and value:
        items: Any = value.items()
    elif isinstance(value, (list, tuple)) and value:
        items = enumerate(value)
    else:
        yield path, [] if isinstance(value, tuple) else value
        return
    for key, each in items:
        yield from leaves(each, f"{path}.{key}" if path else str(key))


def _built(spec: Mapping[str, Any], flat: Sequence[Any], inputs: Sequence[Tensor]) -> Any:
    """A result: of outputs, inputs and constants, in tuples, lists and dicts."""
    ((kind, value),) = spec.items()
    if kind == "output":
        return flat[value]
    if kind == "input":
        return inputs[value]
    if kind == "constant":
        return value
    if kind == "dict":
        return {key: _built(each, flat, inputs) for key, each in value.items()}
    found = [_built(each, flat, inputs) for each in value]
    return tuple(found) if kind == "tuple" else found


def dtype_of(name: str) -> torch.dtype:
    """A dtype by its name, ``torch.float32`` say."""
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype


@lru_cache(maxsize=1024)
def _constant(value: Any, dtype: str, device: torch.device) -> Tensor:
    """A number or a row of them where the graph runs; few are asked for, and copied once."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype_of(dtype)).to(device)
