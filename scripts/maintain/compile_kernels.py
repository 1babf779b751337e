"""Compile the Triton kernels for an H100 (sm_90), without one, and print what they need of it.

The kernels for chunks of 64 tokens and heads of size 64 must keep what they work on in registers: if one spills, the
exit status is 1. Other shapes may spill, at a loss of speed.

    python -m scripts.maintain.compile_kernels          chunks and heads of 64
    python -m scripts.maintain.compile_kernels --all    every chunk length and head size that there are kernels for
"""

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from hf_reformer.modeling.kernels import triton_hash_kernels, triton_hash_launch, triton_kernels
from hf_reformer.modeling.kernels.kernel_options import KernelOptions
from hf_reformer.modeling.kernels.triton_launch import BACKWARD_LAUNCHES, FORWARD_LAUNCHES, ROWS_PER_PROGRAM, Launch


TARGET, ARCHITECTURE = GPUTarget("cuda", 90, 32), "sm_90a"
MUST_NOT_SPILL = (64, 64)
REGISTERS, SHARED_MEMORY, WARPS, RESERVED_MEMORY = 65536, 228 * 1024, 64, 1024  # of one multiprocessor
ROUNDS = 4
ROW_LAUNCH = Launch(ROWS_PER_PROGRAM)

ROWS, NUMBERS, INDICES, MASK, SIZE = "*bf16", "*fp32", "*i32", "*i8", "i32"
STRIDES = (SIZE, SIZE, SIZE)
LSH = KernelOptions(
    chunk_length=64,
    head_size=64,
    num_chunks_before=1,
    num_chunks_after=0,
    causal=True,
    circular_look_around=False,
    sliding_window=False,
    attend_across_buckets=True,
    shared_qk=True,
    own_value=True,
    is_sorted=True,
    has_mask=False,
    is_padded=False,
    widen=False,
)
VARIANTS = {
    "LSH": LSH,
    "LSH, circle, mask": replace(LSH, causal=False, circular_look_around=True, has_mask=True, is_padded=True),
    "LSH, own bucket": replace(LSH, attend_across_buckets=False, sliding_window=True, is_padded=True),
    "local": replace(LSH, shared_qk=False, own_value=False, is_sorted=False),
}


@dataclass
class Compiled:
    """A kernel, and what it needs."""

    name: str
    shape: tuple[int, int]
    warps: int
    registers: int
    spilled: int
    shared_memory: int
    wgmma: int

    @property
    def programs(self) -> int:
        """Programs that run on one multiprocessor at a time."""
        per_thread = -(-self.registers // 8) * 8
        return min(
            REGISTERS // (per_thread * 32 * self.warps),
            SHARED_MEMORY // (self.shared_memory + RESERVED_MEMORY),
            WARPS // self.warps,
        )

    def as_row(self) -> str:
        """A row of the table."""
        numbers = (self.warps, self.registers, self.spilled, self.shared_memory, self.programs, self.wgmma)
        shape, dtype = "C {:3} D {:3}".format(*self.shape), "fp32" if "float32" in self.name else "bf16"
        return " | ".join([f"{self.name:32}", shape, dtype, *(f"{number:9}" for number in numbers)])


HEADER = " | ".join(
    [f"{'kernel':32}", f"{'shape':11}", "type"]
    + [f"{title:>9}" for title in ("warps", "registers", "spilled B", "shared B", "CTAs/SM", "wgmma")]
)


def compile_kernel(name: str, signature: dict, constants: dict, launch: Launch) -> tuple[str, int]:
    """The assembly (PTX) and the bytes of shared memory of a kernel."""
    kernel = getattr(triton_kernels, name, None) or getattr(triton_hash_kernels, name)
    types = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    places = list_places({i: types[argument] for i, argument in enumerate(kernel.arg_names)})
    # As at a launch: memory begins at a multiple of 16 bytes, and rows do.
    aligned = {place: [["tt.divisibility", 16]] for place, type_ in places if type_.startswith("*")}
    strides = kernel.arg_names.index("strides") if "strides" in signature else None
    aligned |= {place: [["tt.divisibility", 16]] for place, type_ in places if place[0] == strides}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source, target=TARGET, options={"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    )
    return compiled.asm["ptx"], compiled.metadata.shared


def list_places(types, before=()):
    """Each argument's type with its place: its number, or several for one within tuples."""
    places = []
    for i, type_ in types.items() if isinstance(types, dict) else enumerate(types):
        places += list_places(type_, (*before, i)) if isinstance(type_, tuple) else [((*before, i), type_)]
    return places


def measure(
    title: str, shape: tuple[int, int], name: str, signature: dict, constants: dict, launch: Launch
) -> Compiled:
    """Compile one kernel and read what it needs from the assembler's report."""
    assembly, shared_memory = compile_kernel(name, signature, constants, launch)
    assembler = get_ptxas(TARGET.arch).path
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(assembly, encoding="utf-8")
        command = [assembler, "-v", f"--gpu-name={ARCHITECTURE}", path, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    text = report.stdout + report.stderr
    return Compiled(
        name=title,
        shape=shape,
        warps=launch.num_warps,
        registers=int(re.search(r"Used (\d+) registers", text).group(1)),
        spilled=int(re.search(r"(\d+) bytes spill stores", text).group(1)),
        shared_memory=shared_memory,
        wgmma=assembly.count("wgmma.mma_async"),
    )


def attention_kernels(shape: tuple[int, int], variant: str):
    """The arguments of `measure` for the attention kernels of one shape."""
    forward, backward = FORWARD_LAUNCHES[shape], BACKWARD_LAUNCHES[shape]
    options = replace(VARIANTS[variant], chunk_length=shape[0], head_size=shape[1])
    tables, sizes = (INDICES, INDICES, MASK), (SIZE,) * 5
    signature = {
        **dict.fromkeys(("query", "key", "value", "output"), ROWS),
        **dict.fromkeys(("key_scale", "log_sum_exp"), NUMBERS),
        "tables": tables,
        "strides": (STRIDES,) * 3,
        "sizes": sizes,
    }
    constants = {"OPTIONS": replace(options, block=forward.block)}
    yield f"forward: {variant}", shape, "attention_forward_kernel", signature, constants, forward
    signature = {
        "rows": (ROWS,) * 4,
        "numbers": (NUMBERS,) * 3,
        "tables": tables,
        "gradients": (ROWS,) * 3,
        "strides": (STRIDES,) * 4,
        "sizes": sizes,
    }
    constants = {"OPTIONS": replace(options, block=backward.block)}
    yield f"backward: {variant}", shape, "attention_backward_kernel", signature, constants, backward


def row_kernels(shape: tuple[int, int]):
    """The arguments of `measure` for the kernels that go over rows once."""
    constants = {"BLOCK": ROWS_PER_PROGRAM, "SIZE": shape[1]}
    combine = {"outputs": ROWS, "log_sum_exps": NUMBERS, "output": ROWS, "log_sum_exp": NUMBERS, "sizes": (SIZE,) * 3}
    yield "combine rounds", shape, "combine_rounds_kernel", combine, constants | {"ROUNDS": ROUNDS}, ROW_LAUNCH
    scale = {"rows": ROWS, "scale": NUMBERS, "strides": STRIDES, "sizes": (SIZE, SIZE)}
    yield "key scale", shape, "key_scale_kernel", scale, constants, ROW_LAUNCH
    delta = {"left": ROWS, "right": ROWS, "products": NUMBERS, "sizes": (SIZE, SIZE)}
    yield "row dot", shape, "row_dot_kernel", delta, constants, ROW_LAUNCH
    add = {"parts": ROWS, "sums": ROWS, "count": SIZE}
    yield "sum rounds", shape, "sum_rounds_kernel", add, {"ROUNDS": ROUNDS, "BLOCK": 1024}, ROW_LAUNCH


def hash_kernels(shape: tuple[int, int]):
    """The arguments of `measure` for the kernels that hash and sort 65,536 tokens: 2,048 buckets in two factors."""
    signature = {
        **dict.fromkeys(("vectors", "rotations"), ROWS),
        "buckets": INDICES,
        "strides": STRIDES,
        "sizes": (SIZE,) * 2,
    }
    rows, _ = triton_hash_launch.hash_block(torch.bfloat16)
    constants = {
        "HALF": 16,
        "SECOND_HALF": 32,
        "COLUMNS": 16,
        "SECOND_COLUMNS": 32,
        "BLOCK": rows,
        "SIZE": shape[1],
        "WIDEN": False,
    }
    constants["ROUNDS"] = ROUNDS
    yield "hash", shape, "hash_kernel", signature, constants, ROW_LAUNCH
    wide = signature | dict.fromkeys(("vectors", "rotations"), NUMBERS)
    rows, columns = triton_hash_launch.hash_block(torch.float32)
    constants |= {
        "HALF": 64,
        "SECOND_HALF": 128,
        "COLUMNS": columns,
        "SECOND_COLUMNS": columns,
        "BLOCK": rows,
        "SIZE": 128,
    }
    yield "hash, float32, heads of 128", shape, "hash_kernel", wide, constants, ROW_LAUNCH
    tile = triton_hash_launch.TOKENS_PER_TILE
    sort = Launch(tile, triton_hash_launch.SORT_WARPS)
    tokens = {**dict.fromkeys(("positions", "sorted_tiles"), INDICES), "sizes": (SIZE,) * 3}
    constants = {"IS_FIRST": False, "BITS": 11, "TILE": tile}
    signature = tokens | {"buckets": INDICES, "key_mask": MASK, "counts": INDICES, "shift": SIZE}
    yield "sort tiles", shape, "sort_tiles_kernel", signature, constants | {"HAS_MASK": True}, sort
    added, fixed = {"counts": INDICES, "totals": INDICES, "tiles": SIZE}, {"BITS": 11, "DIGITS": 64, "TILES": 16}
    yield "add counts", shape, "add_counts_kernel", added, fixed, ROW_LAUNCH
    signature = tokens | dict.fromkeys(("before", "totals", "moved"), INDICES)
    yield "move by digit", shape, "move_by_digit_kernel", signature, constants, ROW_LAUNCH


def main() -> int:
    """Print the table; 1 if a kernel spills that must not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="all chunk lengths and head sizes")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 leaves nothing to compile; unset it.", file=sys.stderr)
        return 1
    shapes = sorted(FORWARD_LAUNCHES) if arguments.all else [MUST_NOT_SPILL]
    print(HEADER)
    spilling = []
    for shape in shapes:
        jobs = [job for variant in VARIANTS for job in attention_kernels(shape, variant)]
        if shape == MUST_NOT_SPILL:
            jobs += [*row_kernels(shape), *hash_kernels(shape)]
        for job in jobs:
            compiled = measure(*job)
            print(compiled.as_row(), flush=True)
            if shape == MUST_NOT_SPILL and compiled.spilled:
                spilling.append(compiled.name)
    if spilling:
        print(f"These spill, and must not: {'; '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
