"""
LSH attention in plain, readable PyTorch operations: differentiable by autograd, with attention maps, in any dtype.

Shapes: B batch, H heads, D head size, R rounds, P padded length, C chunk length, N = R * P / C chunks, W window
length. Positions are indices into the unsorted, padded sequence.
"""

from functools import reduce
from operator import and_

import torch
from torch import nn

from .chunking import (
    MASKED_SCORE,
    SELF_SCORE,
    gather_rows,
    key_scale,
    look_adjacent,
    pad_rows,
    scatter_to_map,
    unpad_rows,
)
from .lsh_options import LSHOptions
from .visibility import LSHVisibility


def lsh_attention_eager(
    query_key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    order: torch.Tensor,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    options: LSHOptions,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Chunked LSH attention to what `lsh_operator.lsh_attention` has sorted.

    Args:
        query_key, value: `[B, L, H, D]`; with `options.value_shift` the values are what the keys carry.
        buckets: `[B, H, R, P]`, the bucket of each position.
        order: `[B, H, R, P]`, the positions of each round in sorted order.
        key_mask: `[B, P]`, bool, or None if every token is real.
        documents: `[B, P]`, the document of each position, or None if a row is one. No two have a bucket in common.

    Returns:
        Output `[B, L, H, D]`, and with `return_weights` the attention map `[B, H, L, L]`, else None.
    """
    length, padded_length = query_key.shape[1], order.shape[3]
    order = order.long()
    visibility = LSHVisibility(buckets, order, key_mask, options, documents)
    positions, key_positions = visibility.positions, visibility.key_positions
    is_self = positions[..., :, None] == key_positions[..., None, :]

    sorted_positions, in_chunks = order.flatten(2), (-1, options.chunk_length)
    query = gather_rows(pad_rows(query_key, padded_length), sorted_positions).unflatten(2, in_chunks)
    values = gather_rows(pad_rows(value, padded_length), sorted_positions).unflatten(2, in_chunks)
    key = (query * key_scale(query)).to(query.dtype)
    key, values = look_adjacent(key, visibility.offsets), look_adjacent(values, visibility.offsets)

    scores = query @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if not options.allow_duplicate_attention:
        scores = scores - visibility.count_meetings(slice(None)).to(scores.dtype).log()
    conditions = visibility.conditions(slice(None))
    if options.causal:
        conditions.append(positions[..., :, None] >= key_positions[..., None, :])
    if conditions:
        scores = scores.masked_fill(~reduce(and_, conditions), MASKED_SCORE[scores.dtype])
    scores = scores.masked_fill(is_self, SELF_SCORE[scores.dtype])

    rank = order.argsort(dim=-1)
    probabilities, round_weights = _softmax_of_each_round(scores, rank)
    del scores
    if options.value_shift:
        probabilities = probabilities.masked_fill(is_self, 0)
    dropped = nn.functional.dropout(probabilities, p=options.dropout_p)
    output = _combine_rounds((dropped.to(values.dtype) @ values).flatten(2, 3), round_weights, rank)
    output = unpad_rows(output, length)
    if not return_weights:
        return output, None
    sorted_weights = round_weights.gather(3, order).reshape(*positions.shape, 1)
    weights = scatter_to_map(dropped * sorted_weights, positions, key_positions, padded_length)
    return output, weights[:, :, :length, :length]


def _softmax_of_each_round(scores: torch.Tensor, rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Probabilities within each round, and the share of each round in a token's output: softmax over the rounds'
    log-sum-exp. The scores are the largest tensor there is, and not needed any longer.

    Returns:
        `[B, H, N, C, W]`; `[B, H, R, P]`, in original positions.
    """
    probabilities = scores.softmax(dim=-1)
    if rank.shape[2] == 1:
        return probabilities, torch.ones_like(rank, dtype=scores.dtype)
    # A probability is exp(score - log-sum-exp). Score and probability are those of one key: of several that are equal,
    # gradients that each is given a share of would not cancel.
    largest, best = scores.max(-1, keepdim=True)
    largest, best = (
        numbers.flatten(2).view(rank.shape).gather(3, rank) for numbers in (largest, probabilities.gather(-1, best))
    )
    # Large scores are subtracted first: beside them a logarithm has no digits.
    return probabilities, (largest - largest.amax(2, keepdim=True).detach() - best.log()).softmax(dim=2)


def _combine_rounds(output: torch.Tensor, round_weights: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """`[B, H, R * P, D]` in sorted order to the weighted sum over rounds `[B, H, P, D]` in original positions."""
    by_round = output.unflatten(2, rank.shape[2:]).flatten(1, 2)
    unsorted = gather_rows(by_round, rank.flatten(1, 2)).unflatten(1, rank.shape[1:3])
    if rank.shape[2] == 1:
        return unsorted.squeeze(2)
    return (unsorted * round_weights[..., None].to(unsorted.dtype)).sum(dim=2)
