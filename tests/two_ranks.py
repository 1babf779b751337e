"""Two processes that compute together over gloo, started once and given one job after the other."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch.distributed.tensor import DTensor
from unwritten_memory import fill_unwritten_memory


can_resume_on_two_cpus = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="Before 5.18 the Trainer asks torch.load for a device cpu:0, which there is none of.",
)
WORLD_SIZE = 2
# Ranks may wait for each other forever when one has failed; no job takes this long.
TIMEOUT_SECONDS = 300


class TwoRanks:
    """
    Runs a job on both ranks, each in a process of its own with one thread.

    Args:
        folder: An empty folder, in which the ranks find each other.
        fill_memory: Whether unwritten memory holds what shows there, too.
    """

    def __init__(self, folder: Path, fill_memory: bool = True):
        self._folder, self._fill_memory = folder, fill_memory
        self._jobs = 0
        self._processes, self._connections = [], []

    def run(self, job: Callable[..., Any], *args) -> list[Any]:
        """
        What `job(rank, *args)` returns on each rank.

        The job is a function of a module. After one that fails both processes begin anew.
        """
        if not self._processes:
            self._start()
        self._jobs += 1
        results = {}
        try:
            for rank, connection in enumerate(self._connections):
                connection.send((f"file://{self._folder}/{self._jobs}", job, rank, args))
            while len(results) < WORLD_SIZE:
                ready = wait([c for c in self._connections if c not in results], TIMEOUT_SECONDS)
                if not ready:
                    raise TimeoutError(f"{job.__name__} did not end within {TIMEOUT_SECONDS} s.")
                for connection in ready:
                    results[connection], error = connection.recv()
                    if error:
                        raise RuntimeError(error)
        except BaseException:
            self.close()
            raise
        return [results[connection] for connection in self._connections]

    def _start(self):
        context = multiprocessing.get_context("spawn")
        for _ in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._fill_memory), daemon=True)
            process.start()
            self._processes.append(process)
            self._connections.append(ours)

    def close(self):
        """End both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, whole where it is in shards."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _serve(connection: Connection, fill_memory: bool):
    torch.set_num_threads(1)
    if fill_memory:
        fill_unwritten_memory()
    while True:
        rendezvous, job, rank, args = connection.recv()
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD_SIZE)
        # A job may end before the other rank has connected.
        dist.barrier()
        try:
            answer = job(rank, *args), None
        except BaseException:
            answer = None, f"rank {rank}: {traceback.format_exc()}"
        connection.send(answer)
        dist.destroy_process_group()
