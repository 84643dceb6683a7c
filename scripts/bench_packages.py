"""What a step costs in a package, and under the runtime.

A FLUX-architecture transformer with TeaCache, exported, and compiled by Inductor under `enable`:
both in this process, the same calls in turn. The strategy reuses every second step. What counts is
the CPU time of a computed and of a reused step, so that other processes on the machine do not.
Prints one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import bench_blocks
import torch
import typer
from bench_blocks import Depth, Size

import omni_cache
from omni_cache.compare.report import processor
from omni_cache.deployment.loader import load

FLAGS: Mapping[str, Any] = {"cache": "teacache", "coefficients": [0.2], "rel_l1_thresh": 0.3}
"""Every step is as far from the last as any other, so that every second one is reused."""


@torch.no_grad()
def measure(depth: Depth, size: Size, steps: int) -> dict[str, Any]:
    """Medians of both, in milliseconds, and how far their results are apart."""
    module = bench_blocks.build(depth, size.width)
    calls = bench_blocks.inputs(size, steps)
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux.pt2"
        omni_cache.export(module, calls[0], path, num_inference_steps=steps, **FLAGS)
        compiled, megabytes = time.process_time() - begin, path.stat().st_size / 2**20
        branch = load(path).branch()
    omni_cache.enable(module, **FLAGS)
    spent: dict[str, list[float]] = {}
    apart = 0.0
    for loop in range(3):  # the first one compiles
        branch.reset()
        with omni_cache.generation(steps), omni_cache.branch("cond"):
            for place, inputs in enumerate(calls):
                results = {}
                for name, run in (("package", branch), ("enable", module)):
                    start = time.process_time()
                    (results[name],) = run(**inputs)
                    took = 1e3 * (time.process_time() - start)
                    if loop > 0:
                        kind = ("computed", "reused")[place % 2]
                        spent.setdefault(f"{name}_{kind}_ms", []).append(took)
                assert all(bool(each.isfinite().all()) for each in results.values())
                apart = max(apart, float((results["package"] - results["enable"]).abs().max()))
            trajectory = omni_cache.summary(module).trajectories[0]
            assert [each.action for each in branch.steps] == [
                each.action for each in trajectory.steps
            ]
            assert [each.action for each in branch.steps][:2] == ["computed", "reused"]
    medians = {key: statistics.median(each) for key, each in spent.items()}
    return {"export_s": compiled, "package_mb": megabytes, "apart": apart, **medians}


def main(
    blocks: Annotated[str, typer.Option(help="double and single ones")] = "2+4",
    width: int = 256,
    image_tokens: int = 256,
    text_tokens: int = 64,
    steps: int = 8,
) -> None:
    """Measure, and print what came out."""
    depth, size = Depth.parse(blocks), Size(width, image_tokens, text_tokens)
    report = {
        "processor": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "blocks": str(depth),
        **size._asdict(),
        **measure(depth, size, steps),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
