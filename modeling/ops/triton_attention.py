"""
The Triton kernels of attention as operators, and their gradient; for LSH and for local attention.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

import torch

from ..kernels.kernel_options import KernelOptions
from .differentiation import once_differentiable
from .operators import arguments_of, operator, schema_of


class TritonAttention(torch.autograd.Function):
    """
    `[B, L, H, D]` of queries, keys and values to the output, `[B, L, H, D]`, and what backward needs.

    The arguments after them are the order and the buckets of the tokens, `[B, H, R, P]`, int32, and the mask of keys,
    `[B, P]`, bool, each contiguous or None; R and P; and `KernelOptions`. Without keys those are the queries.
    """

    @staticmethod
    def forward(query, key, value, order, buckets, key_mask, num_rounds, padded_length, options):
        tables = order, buckets, key_mask
        return _triton_attention(query, key, value, *tables, num_rounds, padded_length, *arguments_of(options))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, ctx.num_rounds, ctx.padded_length, ctx.options = inputs
        ctx.save_for_backward(*tensors, *outputs)
        ctx.mark_non_differentiable(*outputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        sizes = ctx.num_rounds, ctx.padded_length
        gradients = _triton_attention_backward(gradient, *ctx.saved_tensors, *sizes, *arguments_of(ctx.options))
        if ctx.options.shared_qk:
            return gradients[0], None, gradients[1], *[None] * 6
        return *gradients, *[None] * 6


def _shapes_forward(query, key, value, order, buckets, key_mask, num_rounds, padded_length, *options):
    batch, length, heads, _ = query.shape
    key_scale_shape = (batch, heads, length) if key is None else (0,)
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty((batch, heads, length), dtype=torch.float32),
        query.new_empty(key_scale_shape, dtype=torch.float32),
    )


def _shapes_backward(gradient, query, key, *_):
    return query.new_empty((2 if key is None else 3, *query.shape))


_INPUTS = "Tensor query, Tensor? key, Tensor value, Tensor? order, Tensor? buckets, Tensor? key_mask"
_SIZES = "SymInt num_rounds, SymInt padded_length"


@operator(
    f"({_INPUTS}, {_SIZES}, {schema_of(KernelOptions)}) -> (Tensor output, Tensor log_sum_exp, Tensor key_scale)",
    _shapes_forward,
)
def _triton_attention(query, key, value, order, buckets, key_mask, num_rounds, padded_length, *options):
    from ..kernels.triton_launch import attention_forward

    tables = order, buckets, key_mask
    rows = query, query if key is None else key, value
    output, log_sum_exp, key_scale = attention_forward(
        *rows, tables, num_rounds, padded_length, KernelOptions(*options)
    )
    return output, log_sum_exp, log_sum_exp.new_empty(0) if key_scale is None else key_scale


@operator(
    f"(Tensor gradient, {_INPUTS}, Tensor output, Tensor log_sum_exp, Tensor key_scale, {_SIZES}, "
    f"{schema_of(KernelOptions)}) -> Tensor",
    _shapes_backward,
)
def _triton_attention_backward(
    gradient,
    query,
    key,
    value,
    order,
    buckets,
    key_mask,
    output,
    log_sum_exp,
    key_scale,
    num_rounds,
    padded_length,
    *options,
):
    from ..kernels.triton_launch import attention_backward

    tables = order, buckets, key_mask
    rows = query, query if key is None else key, value
    numbers = log_sum_exp, key_scale if key is None else None
    options = KernelOptions(*options)
    return attention_backward(rows, gradient, output, numbers, tables, num_rounds, padded_length, options)
