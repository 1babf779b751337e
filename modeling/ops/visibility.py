"""
Which keys a query attends to, and how often it meets them: what the implementations of chunked attention share.

Shapes: B batch, H heads, R rounds, P padded length, C chunk length, N chunks (of all rounds), W window length.
Positions are indices into the unsorted, padded sequence; places are indices into the sorted order.
"""

from functools import reduce
from operator import and_
from typing import NamedTuple

import torch

from .chunking import circular_offsets, look_adjacent, neighbour_exists
from .local_options import LocalOptions
from .lsh_options import LSHOptions


class _BucketNumbers(NamedTuple):
    """
    Buckets by numbers that no two rounds share.

    Attributes:
        by_position: `[B, H, R, P]`.
        of_queries, of_keys: In sorted order, `[B, H, N, C]` and `[B, H, N, W]`.
    """

    by_position: torch.Tensor
    of_queries: torch.Tensor
    of_keys: torch.Tensor


class LSHVisibility:
    """
    What the queries of LSH attention see in their windows, for any range of chunks at a time.

    Args:
        buckets: `[B, H, R, P]`, the bucket of each position.
        order: `[B, H, R, P]`, the positions of each round in sorted order.
        key_mask: `[B, P]`, bool, or None if every token is real.
        documents: `[B, P]`, the document of each position, or None if a row is one.

    Attributes:
        positions, key_positions: `[B, H, N, C]` and `[B, H, N, W]`, of the queries and of what they meet.
        offsets: Of the chunks in a window (`circular_offsets`).
    """

    def __init__(
        self,
        buckets: torch.Tensor,
        order: torch.Tensor,
        key_mask: torch.Tensor | None,
        options: LSHOptions,
        documents: torch.Tensor | None = None,
    ):
        self.options = options
        self.rounds, padded_length = order.shape[2:]
        self.chunks_per_round = padded_length // options.chunk_length
        self.num_chunks = self.rounds * self.chunks_per_round
        self.positions = order.flatten(2).unflatten(2, (-1, options.chunk_length))
        self.offsets = circular_offsets(options.num_chunks_before, options.num_chunks_after, self.num_chunks)
        self.key_positions = look_adjacent(self.positions, self.offsets)
        self._key_is_real = None if key_mask is None else _at(key_mask, self.key_positions)
        # Documents have no bucket in common, so there buckets tell them apart, too.
        self._documents: tuple[torch.Tensor, torch.Tensor] | None = None
        if documents is not None and options.attend_across_buckets:
            self._documents = _at(documents, self.positions), _at(documents, self.key_positions)
        self._buckets: _BucketNumbers | None = None
        if not options.attend_across_buckets:
            rounds = torch.arange(self.rounds, device=buckets.device).view(1, 1, -1, 1)
            numbers = buckets.long() + (rounds << 32)
            in_order = numbers.gather(3, order.long()).view_as(self.positions)
            self._buckets = _BucketNumbers(numbers, in_order, look_adjacent(in_order, self.offsets))
        # What is true of a place in any round's order: `[N, 1, W]`, `[C, W]`.
        self._neighbour_exists: torch.Tensor | None = None
        if not options.circular_look_around:
            around = options.num_chunks_before, options.num_chunks_after
            sizes = self.num_chunks, self.chunks_per_round, *around, options.chunk_length
            self._neighbour_exists = neighbour_exists(*sizes, order.device)
        self._is_in_window: torch.Tensor | None = None
        if options.sliding_window:
            places = torch.arange(self.key_positions.shape[3], device=order.device)
            query_place = places[: options.chunk_length, None] + options.num_chunks_before * options.chunk_length
            self._is_in_window = _is_in_sliding_window(places - query_place, options)
        # Where each position stands in each round; only for counting.
        self._places = order
        if not options.allow_duplicate_attention:
            # Rounds stand one behind the other.
            rounds = torch.arange(self.rounds, device=order.device).view(1, 1, -1, 1)
            self._places = order.argsort(dim=-1) + rounds * padded_length

    def conditions(self, chunks: slice) -> list[torch.Tensor]:
        """
        What must be true for a query to attend to a key, except causality, which `lsh_attention_eager` and
        `lsh_sdpa._Group.mask` add: each `[B, H, n, C, W]` or broadcastable to it.
        """
        conditions = []
        if self._key_is_real is not None:
            conditions.append(self._key_is_real[:, :, chunks, None, :])
        if self._neighbour_exists is not None:
            conditions.append(self._neighbour_exists[chunks])
        if self._is_in_window is not None:
            conditions.append(self._is_in_window)
        if self._documents is not None:
            own, met = self._documents
            conditions.append(own[:, :, chunks, :, None] == met[:, :, chunks, None, :])
        if self._buckets is not None:
            own, met = self._buckets.of_queries[:, :, chunks], self._buckets.of_keys[:, :, chunks]
            conditions.append(own[..., :, None] == met[..., None, :])
        return conditions

    def count_meetings(self, chunks: slice) -> torch.Tensor:
        """
        How often a query meets a key over all rounds and windows: the `N_ij` of the paper's appendix A.

        Returns:
            `[B, H, n, C, W]`, int64, at least 1.
        """
        positions, key_positions = self.positions[:, :, chunks], self.key_positions[:, :, chunks]

        def at(table, where):
            return table.gather(2, where.flatten(2).long()).view_as(where)

        met = torch.zeros((), dtype=torch.int64, device=positions.device)
        for query_round in range(self.rounds):
            query_place = at(self._places[:, :, query_round], positions)[..., :, None]
            for key_round in range(self.rounds) if self.options.circular_look_around else [query_round]:
                key_place = at(self._places[:, :, key_round], key_positions)[..., None, :]
                hits = self._count_hits(query_place, key_place)
                if self._buckets is not None:
                    numbers = self._buckets.by_position
                    query_bucket = at(numbers[:, :, query_round], positions)[..., :, None]
                    hits = hits * (query_bucket == at(numbers[:, :, key_round], key_positions)[..., None, :])
                met = met + hits
        # A key that another condition hides may not be counted at all.
        return met.clamp(min=1)

    def _count_hits(self, query_place, key_place):
        """How often a query's window in one round holds a key of one round, by their places in all rounds."""
        options = self.options
        if options.sliding_window:
            return _is_in_sliding_window(key_place - query_place, options).long()
        query_chunk, key_chunk = query_place // options.chunk_length, key_place // options.chunk_length
        if options.circular_look_around:
            neighbours = [(query_chunk + offset) % self.num_chunks for offset in self.offsets]
        else:
            num_before, num_after = options.around
            neighbours = [query_chunk + offset for offset in range(-num_before, num_after + 1)]
        return sum(neighbour == key_chunk for neighbour in neighbours)


def _at(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What a table `[B, P]` says of positions, `[B, H, N, ...]`."""
    by_head = table[:, None].expand(-1, positions.shape[1], -1)
    return by_head.gather(2, positions.flatten(2).long()).view_as(positions)


def _is_in_sliding_window(distance: torch.Tensor, options: LSHOptions) -> torch.Tensor:
    """Whether a key is within the chunks' length of its query, by its place minus the query's in the sorted order."""
    before, after = options.num_chunks_before * options.chunk_length, options.num_chunks_after * options.chunk_length
    return (distance >= -before) & (distance <= after)


def visible_local_keys(
    positions: torch.Tensor,
    key_positions: torch.Tensor,
    key_mask: torch.Tensor | None,
    options: LocalOptions,
    chunks: slice,
    documents: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """
    What the queries of local attention see in their windows.

    Args:
        positions, key_positions: `[N, C]` and `[N, W]`.
        key_mask: `[B, P]`, bool, or None if every token is real.
        chunks: The chunks that are asked for.
        documents: `[B, P]`, the document of each position, or None if a row is one.

    Returns:
        `[B or 1, n, C, W]` (or broadcastable), or None for everywhere.
    """
    num_chunks, chunk_length = positions.shape
    conditions = []
    if options.causal:
        conditions.append((positions[chunks, :, None] >= key_positions[chunks, None, :])[None])
    if key_mask is not None:
        conditions.append(key_mask[:, key_positions[chunks]][:, :, None, :])
    if documents is not None:
        own, met = documents[:, positions[chunks]], documents[:, key_positions[chunks]]
        conditions.append(own[:, :, :, None] == met[:, :, None, :])
    if not options.circular_look_around:
        sizes = num_chunks, num_chunks, *options.around, chunk_length
        conditions.append(neighbour_exists(*sizes, positions.device, chunks)[None])
    return reduce(and_, conditions) if conditions else None
