"""Graph passes: find the transformer-block loop of a Dynamo graph and split the graph around it.

    analyse(graph) -> Analysis        what is there: block loop, region, residual pairs, signal
    take_out(analysis) -> Analysis    what no step changes, out of the region
    split(gm, analysis) -> GuardedGraph   the same graph as prologue, body, epilogue and reuse
    roll(part) -> part                a part in which blocks of one structure share one subgraph
    conditional(gm, guarded, ...) -> part   the parts as one that decides by itself
    graph_text / guarded_text         both as short readable programs

Knows graphs only: nothing of strategies, generations or kernels, and no model's name.
"""

from .analysis import Analysis, analyse, take_out
from .block_loop import (
    Block,
    BlockList,
    BlockLoop,
    find_block_lists,
    find_block_loop,
)
from .build import Part
from .cond import BEFORE, Holding, conditional
from .hoist import Cut, Hoisted, parameter_elements
from .region import (
    NoBlockLoopError,
    Region,
    RegionError,
    UnknownNameError,
    check_cuts,
    check_writes,
    close_region,
    overwritten_inputs,
)
from .residual import ResidualPair, pair_outputs
from .roll import calls_of, roll
from .signal import Signal, find_signal, find_timestep, timestep_name
from .split import FINITE, WEIGHTS, Entered, GuardedGraph, split, without_residuals
from .text import graph_text, guarded_text
from .values import is_static_input

__all__ = [
    "BEFORE",
    "FINITE",
    "WEIGHTS",
    "Analysis",
    "Block",
    "BlockList",
    "BlockLoop",
    "Cut",
    "Entered",
    "GuardedGraph",
    "Hoisted",
    "Holding",
    "NoBlockLoopError",
    "Part",
    "Region",
    "RegionError",
    "ResidualPair",
    "Signal",
    "UnknownNameError",
    "analyse",
    "calls_of",
    "check_cuts",
    "check_writes",
    "close_region",
    "conditional",
    "find_block_lists",
    "find_block_loop",
    "find_signal",
    "find_timestep",
    "graph_text",
    "guarded_text",
    "is_static_input",
    "overwritten_inputs",
    "pair_outputs",
    "parameter_elements",
    "roll",
    "split",
    "take_out",
    "timestep_name",
    "without_residuals",
]
