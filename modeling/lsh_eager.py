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
    circular_offset,
    gather_rows,
    look_adjacent,
    neighbour_exists,
    scatter_to_map,
    unit_keys,
)
from .lsh_options import LSHOptions


def lsh_attention_eager(
    query_key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    order: torch.Tensor,
    key_mask: torch.Tensor | None,
    options: LSHOptions,
    return_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Chunked LSH attention over rows that `lsh_operator.lsh_attention` has padded to a multiple of the chunk length.

    Args:
        query_key, value: `[B, H, P, D]`.
        buckets: `[B, H, R, P]`, the bucket of each position.
        order: `[B, H, R, P]`, the positions of each round in sorted order.
        key_mask: `[B, P]`, bool, or None if every token is real.

    Returns:
        Output `[B, H, P, D]`, and with `return_weights` the attention map `[B, H, P, P]`, else None.
    """
    chunk_length, around = options.chunk_length, options.around
    sorted_positions = order.flatten(2)
    positions = sorted_positions.unflatten(2, (-1, chunk_length))
    key_positions = look_adjacent(positions, *around)

    query = gather_rows(query_key, sorted_positions).unflatten(2, (-1, chunk_length))
    key = look_adjacent(unit_keys(query), *around)
    values = look_adjacent(gather_rows(value, sorted_positions).unflatten(2, (-1, chunk_length)), *around)

    rank = order.argsort(dim=-1)
    probabilities, round_weights = _softmax_of_each_round(
        _scores(query, key, positions, key_positions, buckets, order, rank, key_mask, options), rank
    )
    dropped = nn.functional.dropout(probabilities, p=options.dropout_p)
    output = (dropped.to(values.dtype) @ values).flatten(2, 3)
    weights = None
    if return_weights:
        sorted_weights = round_weights.gather(3, order).reshape(*positions.shape, 1)
        weights = scatter_to_map(dropped * sorted_weights, positions, key_positions, order.shape[3])
    return _combine_rounds(output, round_weights, rank), weights


def _scores(query, key, positions, key_positions, buckets, order, rank, key_mask, options):
    """`[B, H, N, C, W]`, float32 at least, with what a query must not see masked."""
    scores = query @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    bucket_ids = None if options.attend_across_buckets else _bucket_ids(buckets)
    if not options.allow_duplicate_attention:
        met = _count_meetings(rank, positions, key_positions, bucket_ids, options)
        scores = scores - met.to(scores.dtype).log()
    visible = _visible_keys(order, positions, key_positions, key_mask, bucket_ids, options)
    if visible is not None:
        scores = scores.masked_fill(~visible, MASKED_SCORE)
    return scores.masked_fill(positions[..., :, None] == key_positions[..., None, :], SELF_SCORE)


def _visible_keys(order, positions, key_positions, key_mask, bucket_ids, options):
    """`[B, H, N, C, W]` (or broadcastable), True where a query may attend to a key; None for everywhere."""
    conditions, around = [], options.around
    if options.causal:
        conditions.append(positions[..., :, None] >= key_positions[..., None, :])
    if key_mask is not None:
        heads = order.shape[1]
        is_real = key_mask[:, None, :].expand(-1, heads, -1).gather(2, key_positions.flatten(2))
        conditions.append(is_real.view_as(key_positions)[..., None, :])
    if not options.circular_look_around:
        num_chunks, chunk_length = positions.shape[2:]
        chunks_per_round = num_chunks // order.shape[2]
        conditions.append(neighbour_exists(num_chunks, chunks_per_round, *around, chunk_length, order.device))
    if options.sliding_window:
        conditions.append(_within_sliding_window(options, order.device))
    if bucket_ids is not None:
        sorted_ids = bucket_ids.gather(3, order).reshape(positions.shape)
        conditions.append(sorted_ids[..., :, None] == look_adjacent(sorted_ids, *around)[..., None, :])
    return reduce(and_, conditions) if conditions else None


def _within_sliding_window(options: LSHOptions, device: torch.device) -> torch.Tensor:
    """`[C, W]`: keys no further from the query, in the sorted order, than the chunks looked at are long."""
    num_before, num_after = options.around
    query_place = torch.arange(options.chunk_length, device=device)[:, None]
    key_place = torch.arange(-num_before * options.chunk_length, (1 + num_after) * options.chunk_length, device=device)
    return _is_in_sliding_window(key_place - query_place, options)


def _is_in_sliding_window(distance: torch.Tensor, options: LSHOptions) -> torch.Tensor:
    """Whether a key so many places behind its query is in its window."""
    before, after = (number * options.chunk_length for number in options.around)
    return (distance >= -before) & (distance <= after)


def _bucket_ids(buckets: torch.Tensor) -> torch.Tensor:
    """Bucket numbers `[B, H, R, P]` that no two rounds share."""
    rounds = torch.arange(buckets.shape[2], device=buckets.device).view(1, 1, -1, 1)
    return buckets.long() + (rounds << 32)


def _count_meetings(rank, positions, key_positions, bucket_ids, options):
    """
    How often a query meets a key over all rounds and windows: the `N_ij` of the paper's appendix A.

    Args:
        rank: `[B, H, R, P]`, the place of each position in the sorted order of its round.

    Returns:
        `[B, H, N, C, W]`, at least 1.
    """
    rounds, num_chunks = rank.shape[2], positions.shape[2]
    places = _place_in_all_rounds(rank)

    def at(table, where):
        return table.gather(2, where.flatten(2)).view_as(where)

    met = 0
    for query_round in range(rounds):
        query_place = at(places[:, :, query_round], positions)[..., :, None]
        for key_round in range(rounds) if options.circular_look_around else [query_round]:
            key_place = at(places[:, :, key_round], key_positions)[..., None, :]
            hits = _count_hits(query_place, key_place, num_chunks, options)
            if bucket_ids is not None:
                query_bucket = at(bucket_ids[:, :, query_round], positions)[..., :, None]
                hits = hits * (query_bucket == at(bucket_ids[:, :, key_round], key_positions)[..., None, :])
            met = met + hits
    # Keys that another condition hides may not be met at all.
    return met.clamp(min=1)


def _count_hits(query_place, key_place, num_chunks, options):
    """How often a query's window in one round holds a key of one round, by their places in all rounds."""
    if options.sliding_window:
        return _is_in_sliding_window(key_place - query_place, options).long()
    num_before, num_after = options.around
    query_chunk, key_chunk = query_place // options.chunk_length, key_place // options.chunk_length
    hits = 0
    for offset in range(-num_before, num_after + 1):
        if options.circular_look_around:
            hits = hits + ((query_chunk + circular_offset(offset, num_chunks)) % num_chunks == key_chunk)
        else:
            hits = hits + (query_chunk + offset == key_chunk)
    return hits


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
    # The largest probability is exp(largest score - log-sum-exp). Dividing by the weights' own sum keeps tokens that
    # see only themselves exact, where a log-sum-exp near -1e5 has lost its last digits.
    log_sum_exp = scores.amax(-1) - probabilities.amax(-1).log()
    return probabilities, log_sum_exp.flatten(2).view(rank.shape).gather(3, rank).softmax(dim=2)


def _combine_rounds(output: torch.Tensor, round_weights: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """`[B, H, R * P, D]` in sorted order to the weighted sum over rounds `[B, H, P, D]` in original positions."""
    unsorted = gather_rows(output, _place_in_all_rounds(rank).flatten(2)).unflatten(2, rank.shape[2:])
    if rank.shape[2] == 1:
        return unsorted.squeeze(2)
    return (unsorted * round_weights[..., None].to(unsorted.dtype)).sum(dim=2)


def _place_in_all_rounds(rank: torch.Tensor) -> torch.Tensor:
    """`rank` counted on from round to round, as the sorted rounds stand one behind the other."""
    rounds, padded_length = rank.shape[2:]
    return rank + torch.arange(rounds, device=rank.device).view(1, 1, -1, 1) * padded_length
