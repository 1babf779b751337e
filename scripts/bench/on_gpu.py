"""
What matters most of what needs a GPU, in one command of less than ten minutes, for a machine that is lent by the hour.

    python -m scripts.bench.on_gpu --out runs/gpu

In this order: the tests that need a GPU; where the time of LSH attention goes, kernel by kernel; attention beside
PyTorch's FlashAttention from 1K to 64K tokens, and from which length on it is faster; a training step and its peak of
memory; attention beside cuDNN's kernel, and beside FlexAttention, which compiles for each length. Each part is a
command that is also useful alone. A part that fails or takes too long is stopped, said to be so, and does not stop the
next. What a part leaves of its time goes to those behind it.

In the folder: what each part has printed, the figures of the benchmarks, and `parts.json`, written after each part.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hf_reformer.training.provenance import machine, versions


MINUTES = 9.5
LENGTHS = "1024 4096 16384 65536"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """
    A command, and its share of the time.

    Attributes:
        name: Of its file in the folder.
        arguments: What the Python that runs this is given.
        share: Of all the time, at most, beside what the parts before have left.
    """

    name: str
    arguments: list[str]
    share: float


@dataclass
class Outcome:
    """How a part has ended: the exit status, or None if its time was over, and seconds."""

    name: str
    status: int | None
    seconds: float


def parts_of(folder: Path) -> list[Part]:
    """The parts, what matters most first."""

    def benchmark(name: str, cases: str, rounds: str, contenders: str, share: float, lengths: str = LENGTHS) -> Part:
        options = {"cases": cases, "lengths": lengths, "rounds": rounds, "contenders": contenders}
        given = [word for option, values in options.items() for word in (f"--{option}", *values.split())]
        start = ["-m", "scripts.bench.benchmark", "--device", "cuda", "--dtype", "bf16", "--repeats", "10"]
        return Part(name, [*start, *given, "--out", str(folder / f"{name}.json")], share)

    tests = [ROOT / "tests" / "test_cuda.py", *sorted((ROOT / "tests").glob("test_triton*.py"))]
    return [
        # With a line for each test, so that what was stopped says how far it came.
        Part("tests", ["-m", "pytest", "-v", "--tb=short", *map(str, tests)], 0.3),
        Part("kernels", ["-m", "scripts.bench.profile_kernels"], 0.12),
        benchmark("attention", "attention", "1 4 8", "ours-triton sdpa-flash", 0.18),
        benchmark("step", "step memory", "1 4", "ours-triton stock llama", 0.2, "4096 16384 65536"),
        # Each alone: where a contender does not work, its benchmark ends.
        benchmark("attention_cudnn", "attention", "1 4", "ours-triton sdpa-cudnn", 0.08),
        benchmark("attention_flex", "attention", "1 4", "ours-triton flex", 0.12),
    ]


def run_parts(parts: list[Part], folder: Path, seconds: float) -> list[Outcome]:
    """
    Run one part after another, and write down how each has ended.

    Args:
        parts: Their shares add up to 1.
        folder: For what they print, `NAME.log`, and `parts.json`.
        seconds: For all.
    """
    outcomes, begun, allowed = [], time.monotonic(), 0.0
    for part in parts:
        allowed += part.share * seconds
        left = allowed - (time.monotonic() - begun)
        print(f"{part.name}: at most {left:.0f} s", file=sys.stderr, flush=True)
        outcomes.append(run_part(part, folder, left))
        print(in_words(outcomes[-1]), flush=True)
        record = {"parts": [asdict(outcome) for outcome in outcomes], "machine": machine(), "versions": versions()}
        (folder / "parts.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return outcomes


def run_part(part: Part, folder: Path, seconds: float) -> Outcome:
    """Run a part for so many seconds at most."""
    begun = time.monotonic()
    command = [sys.executable, *part.arguments]
    with (folder / f"{part.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # And the processes that it has started, which may hold the GPU's memory.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(part.name, status, time.monotonic() - begun)


def in_words(outcome: Outcome) -> str:
    """How a part has ended, as a line."""
    words = {0: "done", None: "stopped, since its time was over"}
    return f"{outcome.name}: {words.get(outcome.status, f'failed, status {outcome.status}')} ({outcome.seconds:.0f} s)"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="a folder (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all (default %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0:
        parser.error(f"--minutes must be above 0, but is {arguments.minutes}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run all parts; the exit status is 1 if one has not come to its end."""
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU; `python -m scripts.bench.benchmark` times what a CPU can do.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = arguments.out.resolve()
    outcomes = run_parts(parts_of(folder), folder, 60 * arguments.minutes)
    raise SystemExit(any(outcome.status != 0 for outcome in outcomes))


if __name__ == "__main__":
    main()
