"""Measure the memory of a step, by means that have nothing to do with the prediction."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ...configuration.configuration_reformer import ReformerConfig
from .memory_estimate import TrainingSetup, TrainingStep


@dataclass(frozen=True)
class Measurement:
    """
    Peaks in bytes.

    Attributes:
        allocated: What PyTorch's allocator had given out, parameters and optimizer state included.
        resident: The same as the system counts: what stands between steps, and what the process gained during one.
            None where the system does not tell.
    """

    allocated: int
    resident: int | None


def measure(config: ReformerConfig, setup: TrainingSetup) -> Measurement:
    """Make a step with real tensors, in a process that has not allocated much before.

    Raises:
        MemoryError: there is not enough memory.
    """
    try:
        step = TrainingStep(config, setup)
        step.make_optimizer()
        return measure_on_cpu(step) if setup.device == "cpu" else measure_on_device(step)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(f"The step does not fit into this machine's memory: {error}") from error
        raise


def measure_on_device(step: TrainingStep) -> Measurement:
    """By the statistics of the device's allocator."""
    device = torch.get_device_module(step.setup.device)
    device.reset_peak_memory_stats()
    step()
    return Measurement(device.max_memory_allocated(), None)


def measure_on_cpu(step: TrainingStep) -> Measurement:
    """By the events of PyTorch's allocator, which the profiler records, and by what the system says."""
    standing, before = standing_bytes(step), resident_bytes("VmRSS")
    if before is not None:
        # The peak starts anew.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
        after = resident_bytes("VmHWM")
    gained = None if before is None or after is None else after - before
    return Measurement(standing + peak_of_events(profiler), None if gained is None else standing + gained)


def peak_of_events(profiler: profile) -> int:
    """The largest sum of what was allocated and not yet freed, since the profiler was started."""
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def standing_bytes(step: TrainingStep) -> int:
    """What is in memory between steps: parameters, buffers, the optimizer's state and the batch."""
    states: Iterable[dict] = [] if step.optimizer is None else step.optimizer.state.values()
    kept = [tensor for state in states for tensor in state.values() if isinstance(tensor, torch.Tensor)]
    given = {id(tensor): tensor for tensor in step.batch.values()}.values()
    return sum(tensor.nbytes for tensor in [*step.model.parameters(), *step.model.buffers(), *kept, *given])


def resident_bytes(entry: str) -> int | None:
    """Resident memory of this process, now (`VmRSS`) or at its peak (`VmHWM`); None where Linux does not tell."""
    status = Path("/proc/self/status")
    found = re.search(rf"{entry}:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    return None if found is None else 1024 * int(found[1])
