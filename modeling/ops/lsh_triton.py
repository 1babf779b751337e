"""
LSH attention as Triton kernels: nothing of the size of the scores is ever in memory, forward or backward.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

import torch
from torch import nn

from ..kernels.kernel_arguments import AttentionInputs
from .lsh_options import LSHOptions
from .triton_attention import attend
from .triton_support import kernel_chunk_length


def lsh_attention_triton(
    query_key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    order: torch.Tensor,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
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
        documents: `[B, P]`, the document of each position, or None if a row is one. No two have a bucket in common.

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
        documents = None if documents is None else nn.functional.pad(documents, added, value=-1)
    # What a query must have in common with a key.
    alike = None if options.attend_across_buckets else buckets
    if alike is None and documents is not None:
        alike = documents[:, None, None].expand(order.shape)
    inputs = AttentionInputs(
        query=query_key,
        key=None,
        value=value,
        order=order.int().contiguous(),
        buckets=None if alike is None else alike.int().contiguous(),
        key_mask=None if key_mask is None else key_mask.contiguous(),
    )
    _, _, num_rounds, padded_length = order.shape
    output = attend(
        inputs,
        num_rounds,
        padded_length,
        options,
        chunk_length=chunk_length,
        sliding_window=options.sliding_window,
        own_value=not options.value_shift,
    )
    return output, None
