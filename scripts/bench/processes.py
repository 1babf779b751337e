"""
Where calls are timed: in this process, or in one whose C library keeps the memory that was freed.

glibc gives freed memory back to the system, large pieces at once, and the system clears each page anew when it is
next touched. A step that asks for much memory then spends much of its time on that, whatever it computes. Three
variables of the environment, read when a process starts, tell glibc to keep what it has.
"""

import importlib
import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any
from unittest.mock import patch

import torch
from transformers.utils import logging

from .history import Refused


MEMORIES = ("default", "kept")
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),  # bytes of a piece from which on it is asked for and given back by itself
    "MALLOC_TRIM_THRESHOLD_": str(2**32),  # free bytes at the end above which they are given back
    "MALLOC_TOP_PAD_": str(2**28),  # bytes more than needed that are asked for
}


def why_not(memory: str) -> str | None:
    """Why calls cannot be timed with this kind of memory here; None if they can."""
    if memory == "default" and (found := sorted(name for name in os.environ if name.startswith("MALLOC_"))):
        return f"{', '.join(found)} is set, so this process has not the C library's defaults; unset it"
    if memory == "kept" and platform.libc_ver()[0] != "glibc":
        return "only glibc can be told to keep memory"
    return None


def prepare_process(threads: int) -> None:
    """What a process needs before it measures; what takes long to import is imported."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    importlib.import_module(f"{__package__}.calls")


class Place:
    """
    A process that runs functions: this one ("default"), or one of its own that keeps memory ("kept").

    Args:
        memory: One of `MEMORIES`.
        threads: Of PyTorch.
    """

    def __init__(self, memory: str, threads: int):
        self.memory, self.threads = memory, threads
        self.pool: ProcessPoolExecutor | None = None
        self._start()

    def _start(self) -> None:
        if self.memory == "default":
            prepare_process(self.threads)
            return
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        # The process starts with the first call, and takes the environment of then.
        with patch.dict(os.environ, KEPT):
            self.pool.submit(prepare_process, self.threads).result()

    def run(self, function: Callable, *arguments: Any) -> Any:
        """
        What a function of a module returns.

        Raises:
            Refused: the process was killed; there is a new one.
        """
        if self.pool is None:
            return function(*arguments)
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            self._start()
            raise Refused("its process was killed; most likely memory ran out") from error

    def close(self) -> None:
        """End the process, if it is one of its own."""
        if self.pool:
            self.pool.shutdown()
