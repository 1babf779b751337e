"""
Local attention in plain, readable PyTorch operations: differentiable by autograd, with attention maps, in any dtype.

Shapes: B batch, L length, H heads, D head size, P padded length, C chunk length, N = P / C chunks, W window length.
"""

import torch
from torch import nn

from .chunking import MASKED_SCORE, circular_offsets, look_adjacent, pad_rows, scatter_to_map, unpad_rows
from .local_options import LocalOptions
from .visibility import visible_local_keys


def local_attention_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    options: LocalOptions,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention of each chunk to itself and its neighbours.

    Args:
        query, key, value: `[B, L, H, D]`.
        key_mask: `[B, P]`, bool, or None if every token is real.
        documents: `[B, P]`, the document of each position, or None if a row is one.

    Returns:
        Output `[B, L, H, D]`, and with `return_weights` the attention map `[B, H, L, L]`, else None.
    """
    length, chunk_length = query.shape[1], options.chunk_length
    positions = torch.arange(options.padded_length, device=query.device).view(1, 1, -1, chunk_length)
    offsets = circular_offsets(options.num_chunks_before, options.num_chunks_after, positions.shape[2])
    key_positions = look_adjacent(positions, offsets)
    visible = visible_local_keys(positions[0, 0], key_positions[0, 0], key_mask, options, slice(None), documents)

    query, key, value = (
        pad_rows(rows, options.padded_length).unflatten(2, (-1, chunk_length)) for rows in (query, key, value)
    )
    key, value = look_adjacent(key, offsets), look_adjacent(value, offsets)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], MASKED_SCORE[scores.dtype])
    probabilities = nn.functional.dropout(scores.softmax(dim=-1), p=options.dropout_p)
    output = unpad_rows((probabilities.to(value.dtype) @ value).flatten(2, 3), length)
    if not return_weights:
        return output, None
    heads = (*probabilities.shape[:2], -1, -1)
    weights = scatter_to_map(
        probabilities, positions.expand(heads), key_positions.expand(heads), options.padded_length
    )
    return output, weights[:, :, :length, :length]
