"""
Local attention as Triton kernels: those of LSH attention, with tokens in the order of the sequence.

Shapes: B batch, L length, H heads, D head size, P padded length.
"""

import torch
from torch import nn

from ..kernels.kernel_arguments import AttentionInputs
from .local_options import LocalOptions
from .triton_attention import attend
from .triton_support import kernel_chunk_length


def local_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    options: LocalOptions,
    return_weights: bool = False,
) -> tuple[torch.Tensor, None]:
    """
    Attention of each chunk to itself and its neighbours.

    Args:
        query, key, value: `[B, L, H, D]`, float32, bfloat16 or float16; any strides.
        key_mask: `[B, P]`, bool, or None if every token is real.
        documents: `[B, P]`, the document of each position, or None if a row is one.

    Returns:
        Output `[B, L, H, D]`, and None for the attention map.
    """
    padded_length = options.padded_length
    chunk_length = kernel_chunk_length(options.chunk_length, query.shape[1], options.around)
    if chunk_length != options.chunk_length:
        # Only the first chunk has tokens. A negative padding width truncates.
        added = (0, chunk_length - padded_length)
        key_mask = None if key_mask is None else nn.functional.pad(key_mask, added, value=False)
        documents = None if documents is None else nn.functional.pad(documents, added, value=-1)
        padded_length = chunk_length
    buckets = None
    if documents is not None:
        # To the kernels a document is a bucket.
        shape = query.shape[0], query.shape[2], 1, padded_length
        buckets = documents[:, None, None].expand(shape).int().contiguous()
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        order=None,
        buckets=buckets,
        key_mask=None if key_mask is None else key_mask.contiguous(),
    )
    return attend(inputs, 1, padded_length, options, chunk_length=chunk_length), None
