"""
LSH attention as Triton kernels: nothing of the size of the scores is ever in memory, forward or backward.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

import torch
from torch import nn

from .differentiation import OnceDifferentiable, once_differentiable
from .lsh_options import LSHOptions
from .triton_support import kernel_chunk_length


def lsh_attention_triton(
    query_key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    order: torch.Tensor,
    key_mask: torch.Tensor | None,
    options: LSHOptions,
    return_weights: bool = False,
) -> tuple[torch.Tensor, None]:
    """
    Chunked LSH attention (paper section 2, "LSH attention"), all rounds combined.

    A token that sees nothing but itself gets exactly its value, or with `options.value_shift` zeros.

    Args:
        query_key, value: `[B, L, H, D]`, float32, bfloat16 or float16; any strides. With `options.value_shift` the
            values are what the keys carry.
        buckets: `[B, H, R, P]`, integer, the bucket of each position; P is a multiple of the chunk length.
        order: `[B, H, R, P]`, integer, the positions of each round in sorted order; those from L on are padding.
        key_mask: `[B, P]`, bool, or None if every token is real.

    Returns:
        Output `[B, L, H, D]`, and None for the attention map. What `why_not_triton` excludes must not be asked for.
    """
    length, padded_length = query_key.shape[1], order.shape[3]
    chunk_length = kernel_chunk_length(options.chunk_length, length, options.around)
    if chunk_length != options.chunk_length:
        # Only the first chunk of each round has tokens. A negative padding width truncates.
        added = (0, chunk_length - padded_length)
        order, buckets = nn.functional.pad(order, added, value=length), nn.functional.pad(buckets, added)
        key_mask = None if key_mask is None else nn.functional.pad(key_mask, added, value=False)
    own_buckets = None if options.attend_across_buckets else buckets.int().contiguous()
    mask = None if key_mask is None else key_mask.contiguous()
    return _LSHAttention.apply(
        query_key, value, order.int().contiguous(), own_buckets, mask, chunk_length, options
    ), None


class _LSHAttention(OnceDifferentiable):
    @staticmethod
    @torch.compiler.disable
    def forward(ctx, query_key, value, order, buckets, key_mask, chunk_length, options):
        from ..kernels.triton_kernels import KernelOptions
        from ..kernels.triton_launch import IS_INTERPRETED, attention_forward, with_contiguous_rows

        query_key, value = with_contiguous_rows(query_key), with_contiguous_rows(value)
        num_rounds, padded_length = order.shape[2:]
        kernel_options = KernelOptions(
            chunk_length=chunk_length,
            head_size=query_key.shape[-1],
            num_chunks_before=options.num_chunks_before,
            num_chunks_after=options.num_chunks_after,
            causal=options.causal,
            circular_look_around=options.circular_look_around,
            sliding_window=options.sliding_window,
            attend_across_buckets=options.attend_across_buckets,
            shared_qk=True,
            own_value=not options.value_shift,
            is_sorted=True,
            has_mask=key_mask is not None,
            is_padded=padded_length > query_key.shape[1],
            widen=IS_INTERPRETED,
        )
        tables = order, buckets, key_mask
        output, log_sum_exp, key_scale = attention_forward(
            query_key, query_key, value, tables, num_rounds, padded_length, kernel_options
        )
        ctx.save_for_backward(query_key, value, output, log_sum_exp, key_scale, *tables)
        ctx.kernel_options = kernel_options
        return output

    @staticmethod
    @once_differentiable
    @torch.compiler.disable
    def backward(ctx, gradient):
        from ..kernels.triton_launch import attention_backward

        query_key, value, output, log_sum_exp, key_scale, *tables = ctx.saved_tensors
        num_rounds, padded_length = tables[0].shape[2:]
        rows, numbers = (query_key, query_key, value), (log_sum_exp, key_scale)
        gradients = attention_backward(
            rows, gradient, output, numbers, tables, num_rounds, padded_length, ctx.kernel_options
        )
        return *gradients, None, None, None, None, None
