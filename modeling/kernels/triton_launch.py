"""
Launches of the Triton kernels: memory, grids and blocks.

Shapes as in `kernel_arguments`.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .kernel_arguments import AttentionInputs, AttentionResults, KernelSizes
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
# of 64 these launches are the fastest of twelve on an H100 (`scripts.bench.profile_kernels --tune`).
SHAPES = [(chunk_length, head_size) for chunk_length in (16, 32, 64, 128, 256) for head_size in (32, 64, 128)]
FORWARD_LAUNCHES = {(length, size): Launch(min(length, 64), 1 if length == 16 else 4) for length, size in SHAPES}
BACKWARD_LAUNCHES = {
    (length, size): Launch(min(length, 32 if size == 128 else 64), 1 if length == 16 else 4) for length, size in SHAPES
}
ROWS_PER_PROGRAM, NUMBERS_PER_PROGRAM = 64, 1024
# Triton decides when it is imported.
IS_INTERPRETED = triton is not None and not isinstance(triton.language.cdiv, triton.JITFunction)


def attention_forward(
    inputs: AttentionInputs, num_rounds: int, padded_length: int, options: KernelOptions
) -> AttentionResults:
    """
    Chunked attention, all rounds combined.

    Args:
        num_rounds, padded_length: R and P.
        options: `widen` and the block are set here.
    """
    inputs = inputs.with_contiguous_rows()
    query = inputs.query
    shape = FORWARD_LAUNCHES[options.chunk_length, options.head_size]
    options = _for_launch(options, shape.block)
    sizes = _sizes(query, num_rounds, padded_length, options)
    by_token, by_head = (sizes.batch, sizes.heads, sizes.length), (sizes.heads, sizes.length)
    outputs = torch.empty((num_rounds, *query.shape), dtype=query.dtype, device=query.device)
    log_sum_exps = torch.empty((num_rounds, *by_token), dtype=torch.float32, device=query.device)
    row_programs, row_constants = _over_rows(sizes, options)
    with launching_on(query) as launch:
        key_scale = None
        if options.shared_qk:
            key_scale = torch.empty(by_token, dtype=torch.float32, device=query.device)
            launch(key_scale_kernel, row_programs, query, key_scale, query.stride()[:3], by_head, **row_constants)
        rows = query, query if inputs.key is None else inputs.key, inputs.value
        launch(
            attention_forward_kernel, _over_chunks(sizes, options), *rows, _or_unused(key_scale, log_sum_exps),
            _tables_of(inputs, log_sum_exps), outputs, log_sum_exps, _strides_of(rows), tuple(sizes),
            OPTIONS=options, num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip
        if num_rounds == 1:
            return AttentionResults(outputs.squeeze(0), log_sum_exps.squeeze(0), key_scale)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        log_sum_exp = torch.empty(by_token, dtype=torch.float32, device=query.device)
        launch(
            combine_rounds_kernel, row_programs, outputs, log_sum_exps, output, log_sum_exp,
            by_token, ROUNDS=num_rounds, **row_constants,
        )  # fmt: skip
    return AttentionResults(output, log_sum_exp, key_scale)


def attention_backward(
    gradient: torch.Tensor,
    inputs: AttentionInputs,
    results: AttentionResults,
    num_rounds: int,
    padded_length: int,
    options: KernelOptions,
) -> torch.Tensor:
    """
    Gradients of `attention_forward`, whose arguments and results these are.

    Args:
        gradient: Of the output.

    Returns:
        Gradients of query, key and value, `[3, B, L, H, D]`; with `shared_qk` of query and key together, and of value,
        `[2, B, L, H, D]`.
    """
    inputs, gradient = inputs.with_contiguous_rows(), gradient.contiguous()
    query, log_sum_exp = inputs.query, results.log_sum_exp
    shape = BACKWARD_LAUNCHES[options.chunk_length, options.head_size]
    options = _for_launch(options, shape.block)
    sizes = _sizes(query, num_rounds, padded_length, options)
    num_gradients = 2 if options.shared_qk else 3
    parts = torch.empty((num_gradients, num_rounds, *query.shape), dtype=query.dtype, device=query.device)
    delta = torch.empty_like(log_sum_exp)
    row_programs, row_constants = _over_rows(sizes, options)
    with launching_on(query) as launch:
        by_head = sizes.heads, sizes.length
        launch(row_dot_kernel, row_programs, results.output, gradient, delta, by_head, **row_constants)
        rows = query, query if inputs.key is None else inputs.key, inputs.value, gradient
        # Shared queries and keys have one gradient.
        query_parts, key_parts, value_parts = parts[0], parts[-2], parts[-1]
        launch(
            attention_backward_kernel, _over_chunks(sizes, options), rows,
            (_or_unused(results.key_scale, log_sum_exp), log_sum_exp, delta), _tables_of(inputs, log_sum_exp),
            (query_parts, key_parts, value_parts), _strides_of(rows), tuple(sizes),
            OPTIONS=options, num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip
        if num_rounds == 1:
            return parts.squeeze(1)
        sums, count = torch.empty((num_gradients, *query.shape), dtype=query.dtype, device=query.device), query.numel()
        programs = num_gradients * triton.cdiv(count, NUMBERS_PER_PROGRAM)
        launch(
            sum_rounds_kernel, programs, parts, sums, count,
            ROUNDS=num_rounds, BLOCK=NUMBERS_PER_PROGRAM, num_warps=4,
        )  # fmt: skip
    return sums


# The same object each time: Triton looks kernels up by it.
@lru_cache
def _for_launch(options, block) -> KernelOptions:
    return replace(options, block=block, widen=IS_INTERPRETED)


def _sizes(query, num_rounds, padded_length, options):
    batch, length, heads, _ = query.shape
    chunks_per_round = padded_length // options.chunk_length
    return KernelSizes(batch, heads, length, num_rounds * chunks_per_round, chunks_per_round)


def _over_chunks(sizes, options):
    """Programs of a kernel that works on blocks of chunks."""
    return sizes.batch * sizes.heads * sizes.num_chunks * (options.chunk_length // options.block)


def _over_rows(sizes, options):
    """Programs of a kernel that goes over rows once, and what it is compiled for."""
    programs = triton.cdiv(sizes.length, ROWS_PER_PROGRAM) * sizes.batch * sizes.heads
    return programs, {"BLOCK": ROWS_PER_PROGRAM, "SIZE": options.head_size, "num_warps": 4}


def _strides_of(rows):
    return tuple(each.stride()[:3] for each in rows)


def _tables_of(inputs, unused):
    key_mask = None if inputs.key_mask is None else inputs.key_mask.view(torch.int8)
    return tuple(_or_unused(table, unused) for table in (inputs.order, inputs.buckets, key_mask))


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
