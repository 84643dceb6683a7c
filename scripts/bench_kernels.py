"""Measures `rel_l1` and `fingerprint` on a GPU, beside a copy and beside the eager formula.

Usage: python scripts/bench_kernels.py FOLDER [--sweep]

Writes FOLDER/kernels.json and FOLDER/kernels.txt. With --sweep, `rel_l1` is measured at other sizes
of its launch too, which takes some ten seconds. Exits with 1 when a bar is missed and with 2 when
there is no CUDA device. Every time is the median over rounds in which the candidates take turns, so
that the clocks of the moment touch all of them alike. The calls of a round rotate through buffers
that together hold several times what the L2 cache does.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from omni_cache.kernels import distance, grid
from omni_cache.kernels.scratch import MAX_PROGRAMS, new_scratch
from torch import Tensor

from omni_cache import kernels

SHAPE, DTYPE = (4096, 3072), torch.bfloat16
SIGNAL_BYTES = 4096 * 3072 * 2
LONG_SHAPE, TIMES_LONGER = (32768, 3072), 8
SETS, LONG_SETS, ROUNDS, SWEEP_ROUNDS = 16, 2, 100, 30
COEFFICIENTS = [0.1, -0.2, 0.3, 1.0, 0.01]
THRESHOLD = 0.2

COPY = "copy of as many bytes"
LARGE_COPY = "copy of 1 GiB"
MEASURE = "rel_l1 on the GPU alone (graph replay)"
MEASURE_CAPTURED = "the same with the memset of a capture"
PRINT = "fingerprint on the GPU alone (graph replay)"
LONG_COPY = "copy, 32768 tokens"
LONG_MEASURE = "rel_l1, 32768 tokens (graph replay)"
MEASURE_CALL = "rel_l1, called from Python"
MEASURE_READ = "rel_l1 and timestep, called and read"
EAGER = "eager formula with .item()"
BYTES = {
    COPY: 2 * SIGNAL_BYTES,
    LARGE_COPY: 2 * 2**30,
    MEASURE: 2 * SIGNAL_BYTES,
    MEASURE_CAPTURED: 2 * SIGNAL_BYTES,
    PRINT: SIGNAL_BYTES,
    LONG_COPY: 2 * TIMES_LONGER * SIGNAL_BYTES,
    LONG_MEASURE: 2 * TIMES_LONGER * SIGNAL_BYTES,
}


class LaunchSize(NamedTuple):
    """How a launch is divided up; `omni_cache.kernels.grid` has what is in force."""

    warps: int
    tile_bytes: int
    programs_per_multiprocessor: int


IN_FORCE = "as it is"
SWEEP = [
    LaunchSize(8, 4096, 4),
    LaunchSize(8, 4096, 8),
    LaunchSize(8, 4096, 12),
    LaunchSize(8, 8192, 4),
    LaunchSize(8, 8192, 6),
    LaunchSize(4, 2048, 12),
    LaunchSize(4, 4096, 8),
    LaunchSize(4, 4096, 12),
    LaunchSize(16, 8192, 3),
    LaunchSize(16, 16384, 2),
]
"""From 16 to 64 warps on a multiprocessor, each thread with one or two loads of 16 bytes."""


class Buffers:
    """Pairs of signals to compare with each other, one way and the other."""

    def __init__(self, shape: tuple[int, int] = SHAPE, sets: int = SETS) -> None:
        self.signals = torch.randn(2, sets, *shape, device="cuda").to(DTYPE)
        self.timesteps = torch.linspace(1000, 1, sets, device="cuda")
        self.targets = torch.empty_like(self.signals[0])
        self.large_source = torch.randn(2**28, device="cuda")
        self.large_target = torch.empty_like(self.large_source)
        self.scratch = new_scratch(self.signals.device)

    def measure(self, side: int, index: int) -> Tensor:
        """Measure, and leave the numbers on the device."""
        return kernels.rel_l1(self.signals[side, index], self.signals[1 - side, index])

    def launch(self, side: int, index: int, size: LaunchSize | None = None) -> Tensor:
        """Measure as outside of a CUDA graph, where the launches of a stream share a scratch."""
        device = self.signals.device
        pair = self.signals[side, index], self.signals[1 - side, index]
        if size is None:
            return distance.launch(
                *pair, (), scratch=self.scratch, programs=grid.programs_on(device)
            )
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        programs = min(size.programs_per_multiprocessor * multiprocessors, MAX_PROGRAMS)
        with (
            patch.object(distance, "WARPS", size.warps),
            patch.object(grid, "TILE_BYTES", size.tile_bytes),
        ):
            return distance.launch(*pair, (), scratch=self.scratch, programs=programs)

    def fingerprint(self, side: int, index: int) -> Tensor:
        """Take a fingerprint, and leave it on the device."""
        return kernels.fingerprint(self.signals[side, index])

    def measure_and_read(self, side: int, index: int) -> bool:
        """Measure with the timestep along, wait for the numbers, and decide on the host."""
        numbers = kernels.rel_l1(
            self.signals[side, index], self.signals[1 - side, index], [self.timesteps[index]]
        )
        moved, size, count, _ = numbers.tolist()
        return decide((moved / count) / (size / count + 1e-8))

    def eager(self, side: int, index: int) -> bool:
        """Decide as a Python hook does."""
        current, previous = self.signals[side, index], self.signals[1 - side, index]
        return decide(((current - previous).abs().mean() / (previous.abs().mean() + 1e-8)).item())

    def copy(self, side: int, index: int) -> None:
        """Move as many bytes as the measurement does."""
        self.targets[index].copy_(self.signals[side, index])

    def large_copy(self, side: int, index: int) -> None:
        """Move far more than any cache holds."""
        self.large_target.copy_(self.large_source)


def decide(distance: float) -> bool:
    """Rescale a distance, and compare it with the threshold."""
    rescaled = 0.0
    for coefficient in COEFFICIENTS:
        rescaled = rescaled * distance + coefficient
    return abs(rescaled) < THRESHOLD


def both_sides(call: Callable[[int, int], object], sets: int = SETS) -> Callable[[], None]:
    """Return a function that makes 2 * `sets` calls, each on data of its own."""

    def run() -> None:
        for side in range(2):
            for index in range(sets):
                call(side, index)

    return run


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """Return a replay of what `run` launches, free of what the host takes to launch it."""
    run()  # compiles, which a capture cannot
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def microseconds_in_turn(
    candidates: dict[str, tuple[Callable[[], None], int]], rounds: int = ROUNDS
) -> dict[str, float]:
    """Return each candidate's median time per call, from what runs it and how often it calls."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for run, _ in candidates.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, (run, calls) in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: median(times) for name, times in samples.items()}


def measure(buffers: Buffers, long: Buffers) -> dict[str, float]:
    """Return microseconds per call by what was called."""
    on_the_gpu = {
        COPY: (captured(both_sides(buffers.copy)), 2 * SETS),
        LARGE_COPY: (captured(both_sides(buffers.large_copy, sets=1)), 2),
        MEASURE: (captured(both_sides(buffers.launch)), 2 * SETS),
        MEASURE_CAPTURED: (captured(both_sides(buffers.measure)), 2 * SETS),
        PRINT: (captured(both_sides(buffers.fingerprint)), 2 * SETS),
        LONG_COPY: (captured(both_sides(long.copy, LONG_SETS)), 2 * LONG_SETS),
        LONG_MEASURE: (captured(both_sides(long.launch, LONG_SETS)), 2 * LONG_SETS),
    }
    from_python = {
        MEASURE_CALL: (both_sides(buffers.measure), 2 * SETS),
        MEASURE_READ: (both_sides(buffers.measure_and_read), 2 * SETS),
        EAGER: (both_sides(buffers.eager), 2 * SETS),
    }
    return microseconds_in_turn(on_the_gpu) | microseconds_in_turn(from_python)


def sweep(buffers: Buffers, long: Buffers) -> list[dict[str, Any]]:
    """Return what `rel_l1` reaches at each launch size, in GB/s at both lengths."""
    names = {IN_FORCE: None} | {str(tuple(size)): size for size in SWEEP}
    rates = []
    for data, sets, size_in_bytes in (
        (buffers, SETS, BYTES[MEASURE]),
        (long, LONG_SETS, BYTES[LONG_MEASURE]),
    ):
        candidates = {
            name: (captured(both_sides(partial(data.launch, size=size), sets)), 2 * sets)
            for name, size in names.items()
        }
        times = microseconds_in_turn(candidates, SWEEP_ROUNDS)
        rates.append({name: size_in_bytes / time / 1e3 for name, time in times.items()})
    short, long_rates = rates
    return [
        {"size": name, "gigabytes_per_second": short[name], "at_32768_tokens": long_rates[name]}
        for name in names
    ]


def environment() -> dict[str, str]:
    """Return what the figures depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def bars(times: dict[str, float]) -> list[dict[str, Any]]:
    """Return what the kernel must reach, what it reached, and whether that is enough."""
    reached = {
        "bandwidth of rel_l1 over that of a copy": (
            bandwidth(times, MEASURE) / bandwidth(times, COPY),
            0.85,
        ),
        "the same at 32768 tokens": (
            bandwidth(times, LONG_MEASURE) / bandwidth(times, LONG_COPY),
            0.85,
        ),
    }
    return [
        {"name": name, "reached": value, "needed": needed, "passed": value >= needed}
        for name, (value, needed) in reached.items()
    ]


def bandwidth(times: dict[str, float], name: str) -> float:
    """Return GB/s: bytes read and written, over the median time."""
    return BYTES[name] / times[name] / 1e3


def as_text(result: dict[str, Any]) -> str:
    """Return the result as lines for people."""
    lines = [f"{key:9} {value}" for key, value in result["environment"].items()]
    lines += ["", f"{result['shape']} {result['dtype']}, median of {result['rounds']} rounds", ""]
    for name, time in result["microseconds_per_call"].items():
        rate = result["gigabytes_per_second"].get(name)
        lines.append(f"{name:46} {time:9.2f} us" + (f" {rate:8.0f} GB/s" if rate else ""))
    faster = result["microseconds_per_call"][EAGER] / result["microseconds_per_call"][MEASURE_CALL]
    lines += ["", f"{'speed of rel_l1 over that of the eager formula':52} {faster:6.2f}"]
    for bar in result["bars"]:
        verdict = "passed" if bar["passed"] else "MISSED"
        lines.append(f"{bar['name']:52} {bar['reached']:6.2f}  needed {bar['needed']}  {verdict}")
    if result["sweep"]:
        lines += ["", "rel_l1 by (warps, bytes of a tile, programs per multiprocessor), GB/s"]
        lines += [
            f"{each['size']:20} {each['gigabytes_per_second']:6.0f}"
            f"   at 32768 tokens {each['at_32768_tokens']:6.0f}"
            for each in result["sweep"]
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write and judge; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sweep", action="store_true", help="try other sizes of the launch too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_kernels needs a CUDA device, and torch sees none here.", file=sys.stderr)
        return 2
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    data = Buffers(), Buffers(LONG_SHAPE, LONG_SETS)
    times = measure(*data)
    result: dict[str, Any] = {
        "environment": environment(),
        "shape": list(SHAPE),
        "dtype": str(DTYPE).removeprefix("torch."),
        "rounds": ROUNDS,
        "bytes_per_call": BYTES,
        "microseconds_per_call": times,
        "gigabytes_per_second": {name: bandwidth(times, name) for name in BYTES},
        "bars": bars(times),
        "sweep": sweep(*data) if options.sweep else [],
    }
    (folder / "kernels.json").write_text(json.dumps(result, indent=2) + "\n")
    text = as_text(result)
    (folder / "kernels.txt").write_text(text)
    print(text)
    return 0 if all(bar["passed"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
