"""Analysis and split of a graph take time in proportion to its size.

scripts/bench_passes.py measures the same over more depths and writes the figures down.
"""

from __future__ import annotations

import gc
import math
import time

import pytest
from omni_cache.passes import analyse, graph_text, guarded_text, split
from sketch import deep_transformer
from torch.fx import GraphModule

SHALLOW, DEEP = 20, 160


def seconds(gm: GraphModule) -> float:
    """Processor time, which other work on the machine hardly changes; the best of three."""
    best = math.inf
    for _ in range(3):
        gc.collect()
        start = time.process_time()
        split(gm, analyse(gm.graph))
        best = min(best, time.process_time() - start)
    return best


@pytest.fixture(scope="module")
def shallow() -> GraphModule:
    return deep_transformer(SHALLOW)


@pytest.fixture(scope="module")
def deep() -> GraphModule:
    return deep_transformer(DEEP)


@pytest.fixture(scope="module")
def deep_takes(deep: GraphModule) -> float:
    return seconds(deep)


def test_eight_times_the_depth_takes_about_eight_times_as_long(
    shallow: GraphModule, deep_takes: float
) -> None:
    # A quadratic step would take 64 times as long, once it matters at all.
    assert deep_takes / seconds(shallow) < 2.5 * DEEP / SHALLOW


def test_a_deep_graph_takes_less_than_two_seconds(deep: GraphModule, deep_takes: float) -> None:
    size = len(deep.graph.nodes)
    assert size > 10_000
    assert deep_takes * 20_000 / size < 2


def test_a_text_takes_linear_time_too(shallow: GraphModule, deep: GraphModule) -> None:
    taken: dict[str, float] = {}
    for name, gm in (("shallow", shallow), ("deep", deep)):
        guarded = split(gm, analyse(gm.graph))
        start = time.process_time()
        graph_text(gm.graph)
        guarded_text(guarded)
        taken[name] = time.process_time() - start
    assert taken["deep"] / taken["shallow"] < 2.5 * DEEP / SHALLOW
