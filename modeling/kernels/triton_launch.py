"""
Launches of the Triton kernels: memory, grids and blocks.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .kernel_options import KernelOptions
from .triton_kernels import (
    attention_backward_kernel,
    attention_forward_kernel,
    combine_rounds_kernel,
    key_scale_kernel,
    row_dot_kernel,
    sum_rounds_kernel,
    triton,
)


class Launch(NamedTuple):
    """How a kernel is launched: rows of a chunk that a program works on, its warps, and stages of its loops."""

    block: int
    num_warps: int = 4
    num_stages: int = 1


# By chunk length and head size. Chosen by compiling for sm_90 (scripts/maintain/compile_kernels.py): as many rows as
# there are registers for. From 64 on, 4 warps multiply with the large tensor core instruction. For chunks and heads
# of 64 they are the fastest of twelve on an H100 (`scripts.bench.profile_kernels --tune`).
SHAPES = [(chunk_length, head_size) for chunk_length in (16, 32, 64, 128, 256) for head_size in (32, 64, 128)]
FORWARD_LAUNCHES = {(length, size): Launch(min(length, 64), 1 if length == 16 else 4) for length, size in SHAPES}
BACKWARD_LAUNCHES = {
    (length, size): Launch(min(length, 32 if size == 128 else 64), 1 if length == 16 else 4) for length, size in SHAPES
}
ROWS_PER_PROGRAM, NUMBERS_PER_PROGRAM = 64, 1024
# Triton decides when it is imported.
IS_INTERPRETED = triton is not None and not isinstance(triton.language.cdiv, triton.JITFunction)


def with_contiguous_rows(rows: torch.Tensor) -> torch.Tensor:
    """`rows` with a contiguous last dimension, which is all that the kernels need."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def attention_forward(query, key, value, tables, num_rounds, padded_length, options):
    """
    Chunked attention, all rounds combined.

    Args:
        query, key, value: `[B, L, H, D]`.
        tables: Order and buckets, `[B, H, R, P]`, int32, and mask of keys, `[B, P]`, bool; contiguous, or None.
        num_rounds, padded_length: R and P.
        options: `KernelOptions`; `widen` and the block are set here.

    Returns:
        Output `[B, L, H, D]`; for the backward pass, log-sum-exp and scale of the keys (or None),
        `[B, H, L]`, float32.
    """
    batch, length, heads, size = query.shape
    query, key, value = map(with_contiguous_rows, (query, key, value))
    block, num_warps, num_stages = FORWARD_LAUNCHES[options.chunk_length, size]
    options = _for_launch(options, block)
    sizes = _sizes(query, num_rounds, padded_length, options)
    outputs = torch.empty((num_rounds, *query.shape), dtype=query.dtype, device=query.device)
    log_sum_exps = torch.empty((num_rounds, batch, heads, length), dtype=torch.float32, device=query.device)
    row_programs = triton.cdiv(length, ROWS_PER_PROGRAM) * batch * heads
    row_sizes = {"BLOCK": ROWS_PER_PROGRAM, "SIZE": size, "num_warps": 4}
    with launching_on(query) as launch:
        key_scale = None
        if options.shared_qk:
            key_scale = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
            launch(key_scale_kernel, row_programs, query, key_scale, query.stride()[:3], (heads, length), **row_sizes)
        programs = batch * heads * sizes[3] * (options.chunk_length // block)
        launch(
            attention_forward_kernel, programs, query, key, value, _or_unused(key_scale, log_sum_exps),
            _as_tables(tables, log_sum_exps), outputs, log_sum_exps,
            tuple(rows.stride()[:3] for rows in (query, key, value)), sizes,
            OPTIONS=options, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        if num_rounds == 1:
            return outputs[0], log_sum_exps[0], key_scale
        output, log_sum_exp = torch.empty_like(outputs[0]), torch.empty_like(log_sum_exps[0])
        launch(
            combine_rounds_kernel, row_programs, outputs, log_sum_exps, output, log_sum_exp, (batch, heads, length),
            ROUNDS=num_rounds, **row_sizes,
        )  # fmt: skip
    return output, log_sum_exp, key_scale


def attention_backward(rows, gradient, output, numbers, tables, num_rounds, padded_length, options):
    """
    Gradients of `attention_forward`.

    Args:
        rows: Its query, key and value.
        gradient, output: Gradient of its output, and the output.
        numbers: Log-sum-exp and scale of the keys, as returned.
        tables, num_rounds, padded_length, options: Its other arguments.

    Returns:
        Gradients of query, key and value, `[3, B, L, H, D]`; with `shared_qk` of query and key together, and of value,
        `[2, B, L, H, D]`.
    """
    rows, gradient = tuple(map(with_contiguous_rows, rows)), gradient.contiguous()
    query = rows[0]
    batch, length, heads, size = query.shape
    log_sum_exp, key_scale = numbers
    block, num_warps, num_stages = BACKWARD_LAUNCHES[options.chunk_length, size]
    options = _for_launch(options, block)
    sizes = _sizes(query, num_rounds, padded_length, options)
    num_gradients = 2 if options.shared_qk else 3
    parts = torch.empty((num_gradients, num_rounds, *query.shape), dtype=query.dtype, device=query.device)
    delta = torch.empty_like(log_sum_exp)
    with launching_on(query) as launch:
        row_programs = triton.cdiv(length, ROWS_PER_PROGRAM) * batch * heads
        row_sizes = {"BLOCK": ROWS_PER_PROGRAM, "SIZE": size, "num_warps": 4}
        launch(row_dot_kernel, row_programs, output, gradient, delta, (heads, length), **row_sizes)
        programs = batch * heads * sizes[3] * (options.chunk_length // block)
        launch(
            attention_backward_kernel, programs, (*rows, gradient),
            (_or_unused(key_scale, log_sum_exp), log_sum_exp, delta), _as_tables(tables, log_sum_exp),
            (parts[0], parts[num_gradients - 2], parts[num_gradients - 1]),
            tuple(each.stride()[:3] for each in (*rows, gradient)), sizes,
            OPTIONS=options, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        if num_rounds == 1:
            return parts[:, 0]
        sums, count = torch.empty_like(parts[:, 0]), query.numel()
        programs = num_gradients * triton.cdiv(count, NUMBERS_PER_PROGRAM)
        block = {"BLOCK": NUMBERS_PER_PROGRAM, "num_warps": 4}
        launch(sum_rounds_kernel, programs, parts, sums, count, ROUNDS=num_rounds, **block)
    return sums


# The same object each time: Triton looks kernels up by it.
@lru_cache
def _for_launch(options, block) -> KernelOptions:
    return replace(options, block=block, widen=IS_INTERPRETED)


def _sizes(query, num_rounds, padded_length, options):
    batch, length, heads, _ = query.shape
    chunks_per_round = padded_length // options.chunk_length
    return batch, heads, length, num_rounds * chunks_per_round, chunks_per_round


def _as_tables(tables, unused):
    order, buckets, key_mask = tables
    key_mask = None if key_mask is None else key_mask.view(torch.int8)
    return tuple(_or_unused(table, unused) for table in (order, buckets, key_mask))


def _or_unused(tensor, unused):
    """Kernels take no None for a tensor that they do not read."""
    return unused if tensor is None else tensor


@contextmanager
def launching_on(tensor):
    """
    The function that starts kernels, `(kernel, programs, *arguments, **constants)`, on the device of a tensor.

    Triton launches on the current device, which need not be the tensor's. With fake tensors, which have shapes only,
    there is nothing that a kernel could do.
    """
    if isinstance(tensor, FakeTensor):
        yield lambda *_, **__: None
    elif not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        yield _launch
    else:
        with torch.cuda.device(tensor.device):
            yield _launch


def _launch(kernel, programs, *arguments, **constants):
    kernel[(programs,)](*arguments, **constants)
