"""
Where the time of LSH attention on a GPU goes: each kernel of a forward and a backward pass, and what Python adds.

    python -m scripts.bench.profile_kernels # 65,536 tokens, 1, 4 and 8 rounds, bfloat16
    python -m scripts.bench.profile_kernels --chunk-length 128 --head-size 128 --heads 4 --tune

`--tune` tries launches of the attention kernels (rows of a program, warps, stages) and prints the fastest first; what
is worth it goes into `modeling/kernels/triton_launch.py`.

Times: `GPU` is what the kernels took, `call` the time from one call to the next with many in a row, `Python` how long
a call keeps the CPU. The floor is counted: the larger of bytes at the bandwidth that a copy reaches on this machine,
and of operations at the rate of a large matrix product in bfloat16, each for forward and for backward.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import product

import torch
from torch.profiler import ProfilerActivity, profile

from hf_reformer.modeling.kernels import triton_launch
from hf_reformer.modeling.kernels.triton_launch import Launch
from hf_reformer.modeling.ops.lsh_hashing import default_num_buckets, draw_rotations, hash_vectors
from hf_reformer.modeling.ops.lsh_operator import lsh_attention
from hf_reformer.training.provenance import machine, versions

from .timing import sample


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CALLS = 20
# Products of a tile of queries with one of keys: scores and output; in backward by key and by query (see
# `attention_backward_kernel`), which for a look-back of one chunk makes 12.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 4, 12


def make_step(arguments: argparse.Namespace, rounds: int) -> tuple[Callable, Callable]:
    """Forward without gradients, and forward and backward, of hashing and attention on given vectors."""
    size = (arguments.batch_size, arguments.length, arguments.heads, arguments.head_size)
    device, dtype = torch.device("cuda"), DTYPES[arguments.dtype]
    torch.manual_seed(0)
    query_key, value, gradient = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    num_buckets = default_num_buckets(arguments.length, arguments.chunk_length, arguments.length)
    rotations = draw_rotations(*size[2:], rounds, num_buckets, device=device, seed=0).to(dtype)

    def forward():
        buckets = hash_vectors(query_key, rotations, num_buckets)
        options = {"chunk_length": arguments.chunk_length, "causal": True, "num_buckets": num_buckets}
        return lsh_attention(query_key, value, buckets, implementation="triton", **options)[0]

    def forward_and_backward():
        query_key.requires_grad_(), value.requires_grad_()
        gradients = torch.autograd.grad(forward(), (query_key, value), gradient)
        query_key.requires_grad_(False), value.requires_grad_(False)
        return gradients

    return forward, forward_and_backward


def kernel_times(call: Callable) -> dict[str, tuple[float, float]]:
    """Launches and microseconds of each kernel in a call."""
    call(), torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    events = (event for event in profiler.key_averages() if event.self_device_time_total > 0)
    return {event.key: (event.count / CALLS, event.self_device_time_total / CALLS) for event in events}


def call_times(call: Callable) -> tuple[float, float]:
    """Microseconds from call to call, and those that Python takes of them."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(CALLS):
        call()
    python = (time.perf_counter() - begun) / CALLS
    return 1e6 * sample(call, "cuda", CALLS), 1e6 * python


def measure_ceilings() -> tuple[float, float]:
    """Bytes per microsecond of a large copy, read and written, and operations per microsecond in bfloat16."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copied, _ = call_times(lambda: target.copy_(source))
    left, right = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    multiplied, _ = call_times(lambda: left @ right)
    return 2 * 4 * 2**28 / copied, 2 * 8192**3 / multiplied


def floors(arguments: argparse.Namespace, rounds: int, ceilings: tuple[float, float]) -> tuple[float, float]:
    """Microseconds that forward and backward cannot be faster than, by what is read, written and multiplied."""
    rows = arguments.batch_size * arguments.length * arguments.heads
    tensor = rows * arguments.head_size * DTYPES[arguments.dtype].itemsize
    partial = rounds * (tensor + 4 * rows)
    tile = 2 * arguments.chunk_length * arguments.head_size * rows * rounds
    bandwidth, rate = ceilings
    # Reading queries to hash; queries and values; writing outputs of the rounds, reading them, writing the output.
    forward = tensor + 2 * tensor + (partial if rounds == 1 else 2 * partial + tensor)
    # Reading output and gradient, then queries, values and gradient; writing two gradients of each round.
    backward = 2 * tensor + 3 * tensor + 2 * (tensor if rounds == 1 else (2 * rounds + 1) * tensor)
    return (
        max(forward / bandwidth, FORWARD_PRODUCTS * tile / rate),
        max(backward / bandwidth, BACKWARD_PRODUCTS * tile / rate),
    )


def report(arguments: argparse.Namespace, rounds: int, ceilings: tuple[float, float]) -> None:
    """Print the table for a number of rounds."""
    forward, both = make_step(arguments, rounds)
    floor_forward, floor_backward = floors(arguments, rounds, ceilings)
    for title, call, floor in (
        ("forward", forward, floor_forward),
        ("forward+backward", both, floor_forward + floor_backward),
    ):
        kernels, (between, python) = kernel_times(call), call_times(call)
        total = sum(microseconds for _, microseconds in kernels.values())
        print(f"\n{title}, rounds {rounds}: GPU {total:,.0f} us, call {between:,.0f}, Python {python:,.0f}; ", end="")
        print(f"floor {floor:,.0f}, which is {floor / total:.0%}")
        for name, (count, microseconds) in sorted(kernels.items(), key=lambda item: -item[1][1]):
            print(f"{microseconds:10.1f} us {microseconds / total:6.1%} {count:5.0f} x  {name[:90]}")
        sys.stdout.flush()


def tune(arguments: argparse.Namespace, rounds: int) -> None:
    """Try launches of the attention kernels."""
    shape = arguments.chunk_length, arguments.head_size
    found = {"attention_forward_kernel": {}, "attention_backward_kernel": {}}
    blocks = [block for block in (16, 32, 64, 128) if block <= arguments.chunk_length]
    launches = triton_launch.FORWARD_LAUNCHES, triton_launch.BACKWARD_LAUNCHES
    calls = make_step(arguments, rounds)
    for name, table, call in zip(found, launches, calls, strict=True):
        before = table[shape]
        for launch in map(Launch._make, product(blocks[-2:], (2, 4, 8), (1, 2))):
            table[shape] = launch
            try:
                found[name][launch] = kernel_times(call)[name][1]
            except Exception as error:
                print(f"{name}, {launch}: {type(error).__name__}: {str(error).strip()[:80]}", flush=True)
        table[shape] = before
    for name, times in found.items():
        print(f"\n{name}, chunks of {shape[0]}, heads of {shape[1]}, {arguments.dtype}, rounds {rounds}")
        for launch, microseconds in sorted(times.items(), key=lambda item: item[1]):
            print(f"{microseconds:10.1f} us  {launch}")
    sys.stdout.flush()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    for name, value in {"length": 65536, "batch_size": 1, "heads": 8, "head_size": 64, "chunk_length": 64}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 4, 8], help="(default 1 4 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(default %(default)s)")
    parser.add_argument("--tune", action="store_true", help="try launches of the attention kernels")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU")
    print(torch.cuda.get_device_name(), machine(), versions())
    if arguments.tune:
        tune(arguments, arguments.rounds[0])
        return
    ceilings = measure_ceilings()
    print(f"copy {ceilings[0] / 1e6:.2f} TB/s, matrix product {ceilings[1] / 1e6:.0f} TFLOP/s")
    for rounds in arguments.rounds:
        report(arguments, rounds, ceilings)


if __name__ == "__main__":
    main()
