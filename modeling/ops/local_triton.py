"""
Local attention as Triton kernels: those of LSH attention, with tokens in the order of the sequence.

Shapes: B batch, L length, H heads, D head size, P padded length.
"""

import torch
from torch import nn

from .differentiation import OnceDifferentiable, once_differentiable
from .local_options import LocalOptions
from .triton_support import kernel_chunk_length


def local_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    options: LocalOptions,
    return_weights: bool = False,
) -> tuple[torch.Tensor, None]:
    """
    Attention of each chunk to itself and its neighbours.

    Args:
        query, key, value: `[B, L, H, D]`, float32, bfloat16 or float16; any strides.
        key_mask: `[B, P]`, bool, or None if every token is real.

    Returns:
        Output `[B, L, H, D]`, and None for the attention map.
    """
    padded_length = options.padded_length
    chunk_length = kernel_chunk_length(options.chunk_length, query.shape[1], options.around)
    if chunk_length != options.chunk_length:
        # Only the first chunk has tokens. A negative padding width truncates.
        added = (0, chunk_length - padded_length)
        key_mask = None if key_mask is None else nn.functional.pad(key_mask, added, value=False)
        padded_length = chunk_length
    mask = None if key_mask is None else key_mask.contiguous()
    kind = {
        "chunk_length": chunk_length,
        "head_size": query.shape[-1],
        "num_chunks_before": options.num_chunks_before,
        "num_chunks_after": options.num_chunks_after,
        "causal": options.causal,
        "circular_look_around": options.circular_look_around,
        "has_mask": mask is not None,
        "is_padded": padded_length > query.shape[1],
    }
    return _LocalAttention.apply(query, key, value, mask, padded_length, kind), None


class _LocalAttention(OnceDifferentiable):
    @staticmethod
    @torch.compiler.disable
    def forward(ctx, query, key, value, key_mask, padded_length, kind):
        from ..kernels.triton_kernels import KernelOptions
        from ..kernels.triton_launch import IS_INTERPRETED, attention_forward, with_contiguous_rows

        rows = tuple(with_contiguous_rows(each) for each in (query, key, value))
        options = KernelOptions(
            **kind,
            sliding_window=False,
            attend_across_buckets=True,
            shared_qk=False,
            own_value=False,
            is_sorted=False,
            widen=IS_INTERPRETED,
        )
        output, log_sum_exp, _ = attention_forward(*rows, (None, None, key_mask), 1, padded_length, options)
        ctx.save_for_backward(*rows, output, log_sum_exp, key_mask)
        ctx.padded_length, ctx.options = padded_length, options
        return output

    @staticmethod
    @once_differentiable
    @torch.compiler.disable
    def backward(ctx, gradient):
        from ..kernels.triton_launch import attention_backward

        *rows, output, log_sum_exp, key_mask = ctx.saved_tensors
        tables, numbers = (None, None, key_mask), (log_sum_exp, None)
        gradients = attention_backward(rows, gradient, output, numbers, tables, 1, ctx.padded_length, ctx.options)
        return *gradients, None, None, None
