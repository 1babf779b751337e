"""
Attention of new tokens to a cache: the few keys that each of them meets, gathered.

Shapes: B batch, M new tokens, H heads, D head size, R hashing rounds, K keys that a query may meet.
"""

from collections.abc import Callable

import torch
from torch import nn

from ..ops.chunking import MASKED_SCORE, SELF_SCORE, circular_offsets
from ..ops.lsh_options import LSHOptions
from ..ops.value_shift import weights_of_values
from .bucket_order import bucket_of, position_of
from .cache_step import CacheStep
from .decoding_cache import CachedStep, LSHCacheLayer
from .grouped_attention import GroupedAttention
from .row_buffer import RowBuffer


# Elements that are gathered, or scores that are computed, at once.
MOST_NUMBERS = 2**22


# Attention's output, `[B, M, H, D]`, and its map over the positions of each row's text, `[B, H, M, step.longest]`, or
# None where it is not wanted.
Attended = tuple[torch.Tensor, torch.Tensor | None]


def in_pieces(
    attend: Callable[[torch.Tensor, CacheStep, slice], Attended],
    query: torch.Tensor,
    step: CacheStep,
    numbers_per_token: int,
) -> Attended:
    """`attend(query, step, where)` for as many of the tokens `[B, M, H, D]` at a time as memory allows."""
    count = query.shape[1]
    if count == 1:
        return attend(query, step, slice(None))
    length = max(1, MOST_NUMBERS // (len(query) * numbers_per_token))
    return join_pieces(
        [
            attend(query[:, first : first + length], step.piece(first, first + length), slice(first, first + length))
            for first in range(0, count, length)
        ]
    )


def join_pieces(pieces: list[Attended]) -> Attended:
    """What some tokens got after another, side by side."""
    if len(pieces) == 1:
        return pieces[0]
    outputs, weights = zip(*pieces, strict=True)
    return torch.cat(outputs, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)


def neighbour_chunks(
    chunk: torch.Tensor, num_chunks: int, around: tuple[int, int], circular: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The chunks that a chunk looks at, `[..., 1 + sum(around)]`, and which of them exist.

    Args:
        chunk: `[...]`, integer.
        num_chunks: Number of chunks, over all rounds.
    """
    offsets = circular_offsets(*around, num_chunks) if circular else list(range(-around[0], around[1] + 1))
    neighbours = chunk[..., None] + torch.tensor(offsets, device=chunk.device)
    if circular:
        return neighbours % num_chunks, torch.ones_like(neighbours, dtype=torch.bool)
    exists = (neighbours >= 0) & (neighbours < num_chunks)
    return neighbours.clamp(0, num_chunks - 1), exists


def attend_to_rows(
    query: torch.Tensor,
    rows: RowBuffer,
    positions: torch.Tensor,
    mask: Callable[[torch.Tensor], torch.Tensor],
    scales: torch.Tensor | float,
    map_length: int | None,
    value_positions: torch.Tensor | None = None,
) -> Attended:
    """
    Softmax attention of each query to keys of its own.

    Args:
        query: `[B, M, H, D]`.
        positions: `[B, H, M, K]`, of the keys.
        mask: Masks scores `[B, H, M, K]`.
        scales: What dot products with a key are multiplied with: `[B, capacity, H]`, or one number for all.
        map_length: Positions of the attention map; None for no map.
        value_positions: The same of the values, if others than those of the keys.
    """
    batch, capacity, heads, size = rows.keys.shape
    # The cache may have been made under autocast and this call not.
    dtype, query = query.dtype, query.transpose(1, 2).to(rows.keys.dtype)
    device, count = query.device, positions.shape[-1]
    # Each row of the batch and head has a place for its first token in a table of all vectors.
    first = torch.arange(batch, device=device)[:, None] * (capacity * heads) + torch.arange(heads, device=device)
    first = first[..., None, None]

    def index_of(positions):
        return torch.add(first, rows.slots(positions), alpha=heads).flatten()

    def look_up(table, index):
        return table.flatten(0, 2).index_select(0, index).view(-1, count, size)

    index = index_of(positions)
    keys = look_up(rows.keys, index)
    values = look_up(rows.values, index if value_positions is None else index_of(value_positions))
    scores = torch.bmm(query.reshape(-1, 1, size), keys.transpose(1, 2)).view(positions.shape)
    if isinstance(scales, torch.Tensor):
        scales = scales.flatten().index_select(0, index).view(positions.shape)
    probabilities = mask(scores * scales).softmax(dim=-1)
    output = torch.bmm(probabilities.to(values.dtype).view(-1, 1, count), values)
    output = output.view(query.shape).transpose(1, 2).to(dtype)
    if map_length is None:
        return output, None
    weights = probabilities.new_zeros(*positions.shape[:3], map_length)
    # Positions beyond the end of the text have no probability, so any column can stand for them.
    columns = (positions if value_positions is None else value_positions).clamp(0, map_length - 1)
    return output, weights.scatter_add_(3, columns, probabilities)


def attend_to_all(
    query: torch.Tensor, cached: CachedStep[LSHCacheLayer], reach: int, value_shift: int, return_weights: bool
) -> Attended:
    """Shared-query/key attention of `[B, M, H, D]` to all of the first `reach` positions up to their own."""
    cache, step = cached.layer, cached.step
    count = min(step.longest, reach)
    key_positions = torch.arange(count, device=query.device).view(1, 1, 1, -1)
    keys, values, scales = (table[:, :count].transpose(1, 2) for table in cache.rows.tensors[:3])
    scores = (query.transpose(1, 2).to(keys.dtype) @ keys.transpose(-1, -2)) * scales[:, :, None]
    is_self = key_positions == step.positions[:, None, :, None]
    scores = scores.masked_fill(~step.sees(key_positions), MASKED_SCORE[scores.dtype])
    scores = scores.masked_fill(is_self, SELF_SCORE[scores.dtype])
    probabilities = scores.softmax(dim=-1)
    if value_shift:
        # An earlier key's successor is at most the query itself.
        probabilities = weights_of_values(probabilities.masked_fill(is_self, 0), None)
    output = (probabilities.to(values.dtype) @ values).transpose(1, 2).to(query.dtype)
    return output, nn.functional.pad(probabilities, (0, step.longest - count)) if return_weights else None


def attend_in_buckets(
    query: torch.Tensor,
    cached: CachedStep[LSHCacheLayer],
    codes: torch.Tensor,
    options: LSHOptions,
    padded_length: int,
    return_weights: bool,
) -> Attended:
    """
    LSH attention of new tokens, which the cache already holds, as `lsh_attention` over the whole text computes it.

    All rounds are one softmax over the keys that a query meets in them.

    Args:
        query: `[B, M, H, D]`.
        codes: `[B, H, R, M]`, of the new tokens.
        padded_length: Places that a round takes.
    """
    cache, step = cached.layer, cached.step
    of_groups = GroupedAttention(
        cache.rows, cache.scales, cache.order.sorted_codes, options, padded_length, MOST_NUMBERS
    )
    if of_groups.serves(codes) and cache.order.is_sorted() and not return_weights:
        return of_groups(query, codes), None
    map_length = step.longest if return_weights else None
    find = _keys_in_windows if options.sliding_window else _keys_in_chunks

    def attend(query, step, where):
        positions, visible, is_self = find(cache, codes[..., where], step, options, padded_length)

        def mask(scores):
            if not options.allow_duplicate_attention:
                scores = scores - _count_equal(positions.masked_fill(~(visible | is_self), -1)).to(scores.dtype).log()
            scores = scores.masked_fill(~visible, MASKED_SCORE[scores.dtype])
            return scores.masked_fill(is_self, SELF_SCORE[scores.dtype])

        if not options.value_shift:
            return attend_to_rows(query, cache.rows, positions, mask, cache.scales, map_length)
        output, weights = attend_to_rows(query, cache.rows, positions, mask, cache.scales, map_length, positions + 1)
        sees_nothing = ~visible.any(dim=-1)
        output = output.masked_fill(sees_nothing.transpose(1, 2)[..., None], 0)
        return output, None if weights is None else weights.masked_fill(sees_nothing[..., None], 0)

    keys_per_head = options.chunk_length * (sum(options.around) + 1) * codes.shape[2]
    return in_pieces(attend, query, step, keys_per_head * query.shape[2] * query.shape[3])


# Of the keys that queries meet, the rounds of a query side by side: positions, which are seen, which is the query
# itself; each `[B, H, M, K]`.
Keys = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _keys_in_windows(
    cache: LSHCacheLayer, codes: torch.Tensor, step: CacheStep, options: LSHOptions, padded_length: int
) -> Keys:
    """With windows: what stands behind the query in its bucket comes later, so it looks back only."""
    met = cache.order.before(codes, options.num_chunks_before * options.chunk_length)
    positions = position_of(met).transpose(2, 3).flatten(3)
    visible = (met >= 0).transpose(2, 3).flatten(3)
    own = step.positions[:, None, :, None].expand(-1, positions.shape[1], -1, -1)
    positions, visible = torch.cat([positions, own], dim=3), nn.functional.pad(visible, (0, 1))
    return positions, visible, positions == own


def _keys_in_chunks(
    cache: LSHCacheLayer, codes: torch.Tensor, step: CacheStep, options: LSHOptions, padded_length: int
) -> Keys:
    places, exists = _window(cache.order.places(codes), options, padded_length)
    met = cache.order.look_up(places.flatten(2), padded_length).view(places.shape)
    is_met = exists
    if not options.attend_across_buckets:
        is_met = exists & (bucket_of(met) == bucket_of(codes)[..., None])
    # The rounds of a query are concatenated.
    positions, exists, is_met = (table.transpose(2, 3).flatten(3) for table in (position_of(met), exists, is_met))
    own = step.positions[:, None, :, None]
    return positions, is_met & (positions < own), exists & (positions == own)


def _window(places: torch.Tensor, options: LSHOptions, padded_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places that a query at `places`, `[B, H, R, M]`, looks at, counted on over the rounds; which exist."""
    device, length, num_rounds = places.device, options.chunk_length, places.shape[2]
    first_of_round = torch.arange(num_rounds, device=device).view(-1, 1, 1) * padded_length
    chunks_per_round = padded_length // length
    chunk = places.div(length, rounding_mode="floor")
    if options.circular_look_around:
        chunk = chunk + first_of_round.squeeze(-1) // length
        chunks, exists = neighbour_chunks(chunk, chunks_per_round * num_rounds, options.around, circular=True)
        first_of_round = torch.zeros_like(first_of_round)
    else:
        chunks, exists = neighbour_chunks(chunk, chunks_per_round, options.around, circular=False)
    window = chunks[..., None] * length + torch.arange(length, device=device)
    return window.flatten(-2) + first_of_round, exists[..., None].expand(window.shape).flatten(-2)


def _count_equal(numbers: torch.Tensor) -> torch.Tensor:
    """How often each number stands in its row (the last dimension)."""
    ordered, numbers = numbers.sort(dim=-1).values, numbers.contiguous()
    return torch.searchsorted(ordered, numbers, right=True) - torch.searchsorted(ordered, numbers)
