"""
How long a call takes, and calls without Python on a GPU.

`torch.utils.benchmark.Timer` would make two more calls before each sample to warm up. Contenders take turns here, so
that would triple a benchmark of hours; and its samples on a GPU are of the host's clock, not of events.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles

import torch


def sample(call: Callable, device: str, calls: int = 1) -> float:
    """Seconds of a call, as the mean of some."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / calls
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begun) / calls


@dataclass(frozen=True)
class Clocked:
    """
    What a call took.

    Attributes:
        wall: Seconds.
        cpu: Seconds of all cores together, those that the system worked for it included; None on a GPU.
        page_faults: How often the system gave a page of memory.
    """

    wall: float
    cpu: float | None
    page_faults: int


def clocked(call: Callable, device: str, calls: int = 1) -> Clocked:
    """What a call takes, as the mean of some."""
    faults, begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    wall = sample(call, device, calls)
    cpu = (time.process_time() - begun) / calls
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Clocked(wall, cpu if device == "cpu" else None, faults // calls)


def summary_of(samples: list[Clocked]) -> dict:
    """`statistics_of` the seconds, on a CPU also of its seconds in `cpu`, and the median of the page faults."""
    summary = statistics_of([taken.wall for taken in samples])
    if samples[0].cpu is not None:
        summary["cpu"] = statistics_of([taken.cpu for taken in samples])
        summary["page_faults"] = sorted(taken.page_faults for taken in samples)[len(samples) // 2]
    return summary


def captured(call: Callable) -> Callable:
    """
    What replays the work of a call on the GPU, as a CUDA graph.

    Raises:
        RuntimeError: it waits for the GPU, which a graph cannot.
        SystemExit: and PyTorch's random numbers do not come after that.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        call(), call()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception:
        torch.cuda.synchronize()
        try:
            torch.randn(1, device="cuda")
        except RuntimeError as error:
            raise SystemExit(f"A CUDA graph that failed has left PyTorch unusable: {error}") from error
        raise

    def replay():
        graph.replay()
        # A graph does not keep what the call reads.
        return call

    return replay


def statistics_of(seconds: list[float]) -> dict:
    """Median, extremes and spread: the middle half's width, relative to the median."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {
        "runs": len(seconds),
        "median_s": middle,
        "least_s": min(seconds),
        "most_s": max(seconds),
        "spread": (high - low) / middle,
    }
