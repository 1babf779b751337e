"""
The Triton kernels of attention as operators, and their gradient; for LSH and for local attention.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

import torch

from ..kernels.kernel_options import KernelOptions
from .differentiation import once_differentiable
from .local_options import LocalOptions
from .lsh_options import LSHOptions
from .operators import arguments_of, operator, schema_of


def attend(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    tables: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
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
        query, key, value: `[B, L, H, D]`; without keys those are the queries at unit length.
        tables: Order and buckets of the tokens, `[B, H, R, P]`, int32, and the mask of keys, `[B, P]`, bool; each
            contiguous or None. Without buckets every key within reach counts.
        num_rounds, padded_length: R and P.
        chunk_length: Instead of the options'.
        sliding_window, own_value: See `KernelOptions`.
    """
    order, buckets, key_mask = tables
    kernel_options = KernelOptions(
        chunk_length=chunk_length,
        head_size=query.shape[3],
        num_chunks_before=options.num_chunks_before,
        num_chunks_after=options.num_chunks_after,
        causal=options.causal,
        circular_look_around=options.circular_look_around,
        sliding_window=sliding_window,
        attend_across_buckets=buckets is None,
        shared_qk=key is None,
        own_value=own_value,
        is_sorted=order is not None,
        has_mask=key_mask is not None,
        is_padded=padded_length > query.shape[1],
    )
    output, *_ = TritonAttention.apply(query, key, value, *tables, num_rounds, padded_length, kernel_options)
    return output


class TritonAttention(torch.autograd.Function):
    """The output of `attend`, and what backward needs."""

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
