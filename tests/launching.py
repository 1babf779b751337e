"""Processes that a test starts and waits for, but not forever: those of a distributed run may wait for each other."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import psutil


# A busy machine takes a tenth of this.
TIMEOUT_SECONDS = 900


def run_python(*arguments: str | Path, cwd: Path | None = None, timeout: float = TIMEOUT_SECONDS, **environment: str):
    """
    Run Python with these arguments, each process with one thread, and return what a finished one has left.

    Output goes to a file, because a process that outlives its parent would hold a pipe open. After `timeout` seconds
    every process says where it stands, all are ended, and their output is the error.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | environment
    command = [sys.executable, *map(str, arguments)]
    with TemporaryFile("w+") as stdout, TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
        )
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            # A launcher gives its ranks sessions of their own.
            started = psutil.Process(process.pid).children(recursive=True)
            _signal(started, signal.SIGABRT)
            time.sleep(1)
            _signal([*started, process], signal.SIGKILL)
            process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        stdout.seek(0), stderr.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, stdout.read(), stderr.read())
    if timed_out:
        raise TimeoutError(f"{command} did not end within {timeout} s.\n{done.stdout}\n{done.stderr}")
    return done


def _signal(processes, number: int):
    for process in processes:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.send_signal(number)
