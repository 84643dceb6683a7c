"""Processes that run a function of a test as the ranks of a process group, and what they return."""

from __future__ import annotations

import datetime
import io
import os
import socket
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 600
"""Seconds after which ranks count as hanging; generous, because a busy machine compiles slowly."""


def run_ranks(work: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """Run ``work(rank, *args)`` in a process for each rank; fails where one fails or hangs.

    Returns:
        What each rank returned, in order.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_begin, args=(work, rank, ranks, port, results, args), daemon=True)
        for rank in range(ranks)
    ]
    for each in processes:
        each.start()
    returned: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result, error = results.get(timeout=TIMEOUT)
            if error is not None:
                pytest.fail(f"rank {rank}: {error}")
            returned[rank] = torch.load(io.BytesIO(result), weights_only=False)
    except Empty:
        pytest.fail(f"hangs: only ranks {sorted(returned)} came back in {TIMEOUT} seconds")
    finally:
        for each in processes:
            each.kill()
            each.join()
    return [returned[rank] for rank in range(ranks)]


def _begin(
    work: Callable[..., Any], rank: int, ranks: int, port: int, results: Any, args: tuple[Any, ...]
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    try:
        timeout = datetime.timedelta(seconds=TIMEOUT / 2)
        dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timeout)
        # As bytes, because tensors in a queue are lost with the process that made them.
        torch.save(work(rank, *args), made := io.BytesIO())
        results.put((rank, made.getvalue(), None))
        dist.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
