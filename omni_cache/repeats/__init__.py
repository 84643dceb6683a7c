"""Blocks that repeat are traced once: Dynamo follows the first one and copies what it found.

    blocks.0(x)     traced: its nodes, its guards and what it returns are kept
    blocks.1(x)     the same nodes on its own weights, the same guards on its own attributes

Everything else of a compilation is done once for all blocks of one structure; tracing would grow
with depth. A copy is made only of a block that is like the traced one in everything that its
code could tell them apart by, that is called alike and in the same line, and that had no effect but
its result. Any other block is traced. Like `omni_cache.dynamo`, this leans on private names of
PyTorch: where one of them is missing, every block is traced.
"""

from omni_cache.repeats.tracing import traced_once

__all__ = ["traced_once"]
