"""
The Triton kernels of attention as operators, and their gradient; for LSH and for local attention.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

import torch

from ..kernels.kernel_arguments import AttentionInputs, AttentionResults
from ..kernels.kernel_options import KernelOptions
from .differentiation import once_differentiable
from .local_options import LocalOptions
from .lsh_options import LSHOptions
from .operators import AttentionFunction, arguments_of, operator, schema_of


def attend(
    inputs: AttentionInputs,
    num_rounds: int,
    padded_length: int,
    options: LSHOptions | LocalOptions,
    *,
    chunk_length: int,
    sliding_window: bool = False,
    own_value: bool = False,
) -> torch.Tensor:
    """
    Attention by the kernels, `[B, L, H, D]`.

    Args:
        num_rounds, padded_length: R and P.
        chunk_length: Instead of the options'.
        sliding_window, own_value: See `KernelOptions`.
    """
    kernel_options = KernelOptions(
        chunk_length=chunk_length,
        head_size=inputs.query.shape[3],
        num_chunks_before=options.num_chunks_before,
        num_chunks_after=options.num_chunks_after,
        causal=options.causal,
        circular_look_around=options.circular_look_around,
        sliding_window=sliding_window,
        attend_across_buckets=inputs.buckets is None,
        shared_qk=inputs.key is None,
        own_value=own_value,
        is_sorted=inputs.order is not None,
        has_mask=inputs.key_mask is not None,
        is_padded=padded_length > inputs.query.shape[1],
    )
    # Rows that have to be copied are copied here, so that backward gets the copies.
    inputs = inputs.with_contiguous_rows()
    output, *_ = TritonAttention.apply(*inputs, num_rounds, padded_length, kernel_options)
    return output


class TritonAttention(AttentionFunction):
    """`AttentionResults`, of `AttentionInputs`."""

    @staticmethod
    def forward(query, key, value, order, buckets, key_mask, num_rounds, padded_length, options):
        tables = order, buckets, key_mask
        return _triton_attention(query, key, value, *tables, num_rounds, padded_length, *arguments_of(options))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, ctx.num_rounds, ctx.padded_length, options = inputs
        AttentionFunction.setup_context(ctx, (*tensors, options), outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        sizes = ctx.num_rounds, ctx.padded_length
        gradients = _triton_attention_backward(gradient, *ctx.saved_tensors, *sizes, *arguments_of(ctx.options))
        if ctx.options.shared_qk:
            query_grad, value_grad = gradients
            return query_grad, None, value_grad, *[None] * 6
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

    inputs = AttentionInputs(query, key, value, order, buckets, key_mask)
    results = attention_forward(inputs, num_rounds, padded_length, KernelOptions(*options))
    # An operator gives tensors only.
    key_scale = query.new_empty(0, dtype=torch.float32) if results.key_scale is None else results.key_scale
    return results.output, results.log_sum_exp, key_scale


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

    inputs = AttentionInputs(query, key, value, order, buckets, key_mask)
    results = AttentionResults(output, log_sum_exp, key_scale if key is None else None)
    return attention_backward(gradient, inputs, results, num_rounds, padded_length, KernelOptions(*options))
