"""
How long a call takes, and calls without Python on a GPU.

`torch.utils.benchmark.Timer` would make two more calls before each sample to warm up. Contenders take turns here, so
that would triple a benchmark of hours; and its samples on a GPU are of the host's clock, not of events.
"""

import time
from collections.abc import Callable
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
