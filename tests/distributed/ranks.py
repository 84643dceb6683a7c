"""Processes that run functions of tests as the ranks of a process group, and what they return.

The processes stay for what is run later: each takes seconds to start and to import PyTorch.
"""

from __future__ import annotations

import datetime
import io
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 600
"""Seconds after which ranks count as hanging; generous, because a busy machine compiles slowly."""

_waiting: dict[int, Group] = {}
"""The groups whose processes wait for work, by their number."""


def run_ranks(work: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """Run ``work(rank, *args)`` in a process for each rank; fails where one fails or hangs.

    Returns:
        What each rank returned, in order.
    """
    # A group with a rank that fails is not used again.
    group = _waiting.pop(ranks, None) or Group(ranks)
    returned = group.run(work, args)
    _waiting[ranks] = group
    return returned


class Group:
    """A process for each rank of a process group; they end with this one."""

    def __init__(self, ranks: int) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._connections, self._processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, ranks, port), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, work: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        """What each rank returns; where one does not, all are killed."""
        returned: dict[int, Any] = {}
        try:
            for connection in self._connections:
                connection.send((work, args))
            while len(returned) < len(self._connections):
                for rank in self._answering(returned):
                    try:
                        result, error = self._connections[rank].recv()
                    except EOFError:
                        result, error = None, "its process has ended"
                    if error is not None:
                        pytest.fail(f"rank {rank}: {error}")
                    returned[rank] = torch.load(io.BytesIO(result), weights_only=False)
        except BaseException:
            for process in self._processes:
                process.kill()
                process.join()
            raise
        return [returned[rank] for rank in range(len(self._connections))]

    def _answering(self, returned: dict[int, Any]) -> list[int]:
        """The ranks that have something to say, once there are any."""
        waited_for = {
            each: rank for rank, each in enumerate(self._connections) if rank not in returned
        }
        ready = wait(waited_for, TIMEOUT)
        if not ready:
            pytest.fail(f"hangs: only ranks {sorted(returned)} came back in {TIMEOUT} seconds")
        return [rank for each, rank in waited_for.items() if each in ready]


def _serve(connection: Connection, rank: int, ranks: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    timeout = datetime.timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timeout)
    while True:
        try:
            work, args = connection.recv()
        except EOFError:  # nobody is left to ask for anything
            return
        try:
            # As bytes, because tensors in a connection are lost with the process that made them.
            torch.save(work(rank, *args), made := io.BytesIO())
            connection.send((made.getvalue(), None))
            dist.barrier()
            torch._dynamo.reset()
        except BaseException:
            connection.send((None, traceback.format_exc()))
