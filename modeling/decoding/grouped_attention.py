"""
Attention of many new tokens to a cache.

New tokens of a bucket or chunk stand side by side in the order, so what several of them meet is one stretch of it. Its
keys are gathered once for the whole group, where `attend_to_rows` gathers them for each token. Rounds come one after
another and are combined as one softmax.

Shapes: B batch, M new tokens, H heads, D head size, R hashing rounds, G groups, S tokens of a group, W places of a
stretch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch

from ..ops.chunking import MASKED_SCORE, SELF_SCORE
from ..ops.lsh_options import LSHOptions
from .bucket_order import bucket_of, position_of
from .row_buffer import RowBuffer


# Tokens that share a stretch, in a bucket; in a chunk, whose stretch is the longer one, twice as many.
GROUP = 8
# From how many new tokens on groups are worth it, and from how many in a group, expected.
MANY_TOKENS, MANY_IN_GROUP = 65, 2


class Softmax(NamedTuple):
    """
    A softmax that more can be added to.

    Scores are in base 2: PyTorch's `exp` takes 40 times as long where its result is 0, as of all masked ones.

    Attributes:
        output: `[..., D]`, the mean of values, weighted by 2 to the power of their scores.
        largest, total: `[..., 1]`, the largest score, and the sum of the weights relative to that of the largest.
    """

    output: torch.Tensor
    largest: torch.Tensor
    total: torch.Tensor

    def add(self, other: "Softmax") -> "Softmax":
        """Over what both have seen."""
        largest = torch.maximum(self.largest, other.largest)
        ours = self.total * (self.largest - largest).exp2()
        theirs = other.total * (other.largest - largest).exp2()
        total = ours + theirs
        return Softmax(torch.lerp(self.output, other.output, theirs / total), largest, total)


class Groups(NamedTuple):
    """
    Some tokens each, whose stretches are one.

    Attributes:
        members: Which of the new tokens, `[B, H, G, S]`.
        places: Where they stand in the order, the same shape; where there is no token, behind all others.
        is_member: Which there are, bool.
    """

    members: torch.Tensor
    places: torch.Tensor
    is_member: torch.Tensor

    def pieces(self, length: int) -> Iterator["Groups"]:
        """So many groups at a time."""
        for parts in zip(*(table.split(length, dim=2) for table in self), strict=True):
            yield Groups(*parts)


# trf-ignore: TRF031 this is what attention is called with, it is no output
@dataclass(frozen=True)
class GroupedAttention:
    """
    What `attend_in_buckets` computes, where it `serves`.

    Args:
        rows: Keys and values, those of the new tokens included.
        scales: What dot products with keys are multiplied with, `[B, capacity, H]`.
        order: `[B, H, R, L]`, the codes of each round, sorted, those of the new tokens included.
        options: Of the layer.
        padded_length: Places that a round takes.
        most_numbers: Elements of the vectors and scores that are in memory at once.
    """

    rows: RowBuffer
    scales: torch.Tensor
    order: torch.Tensor
    options: LSHOptions
    padded_length: int
    most_numbers: int

    def serves(self, codes: torch.Tensor) -> bool:
        """Whether groups are worth it for new tokens with these codes, `[B, H, R, M]`, and give the right result."""
        (rounds, num_tokens), options = codes.shape[2:], self.options
        if num_tokens < max(MANY_TOKENS, MANY_IN_GROUP * self.padded_length / options.chunk_length) or codes.is_meta:
            return False
        # What other rounds have found is not known here, so a key cannot count once only.
        may_count_again = options.allow_duplicate_attention or rounds == 1
        # On a short circle a stretch would meet its own beginning.
        return may_count_again and (not options.circular_look_around or self._width <= rounds * self.padded_length)

    def __call__(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            query: `[B, M, H, D]`, of the newest tokens: no other stands behind them in their buckets.
            codes: `[B, H, R, M]`, of the same.

        Returns:
            `[B, M, H, D]`.
        """
        dtype, query = query.dtype, query.to(self.rows.keys.dtype).contiguous()
        rounds = (
            self._attend_in_round(query, of_round.contiguous(), index)
            for index, of_round in enumerate(codes.unbind(2))
        )
        output, largest, _ = reduce(Softmax.add, rounds)
        if self.options.value_shift:
            output = output.masked_fill(largest <= SELF_SCORE[largest.dtype], 0)
        return output.to(dtype)

    def _attend_in_round(self, query: torch.Tensor, codes: torch.Tensor, round_index: int) -> Softmax:
        """Of queries `[B, M, H, D]` with codes `[B, H, M]`, in their places."""
        batch, count, heads, size = query.shape
        groups = self._groups(codes, round_index)
        # One place more, where what stands for nobody is put.
        dtype = torch.promote_types(query.dtype, torch.float32)
        whole = Softmax(*(query.new_empty(batch, count + 1, heads, width, dtype=dtype) for width in (size, 1, 1)))
        width, members = self._width, self._group_size
        numbers_of_group = batch * heads * ((width + members) * size + members * width)
        for piece in groups.pieces(max(1, self.most_numbers // numbers_of_group)):
            own_codes = codes.gather(2, piece.members.flatten(2)).view(piece.members.shape)
            asked = _look_up(query, _index(query, piece.members))
            target = _index(whole.output, torch.where(piece.is_member, piece.members, count)).flatten()
            for table, part in zip(whole, self._attend(asked, own_codes, piece.places, round_index), strict=True):
                table.flatten(0, 2).index_copy_(0, target, part.flatten(0, 3))
        return Softmax(*(table[:, :-1] for table in whole))

    @property
    def _group_size(self) -> int:
        """S, at most."""
        return GROUP if self.options.sliding_window else min(2 * GROUP, self.options.chunk_length)

    @property
    def _reach(self) -> int:
        """Places of a stretch before the first token of its group, with windows, or else before its chunk."""
        return self.options.num_chunks_before * self.options.chunk_length

    @property
    def _width(self) -> int:
        """W."""
        if self.options.sliding_window:
            return self._reach + self._group_size
        return self._reach + (1 + self.options.num_chunks_after) * self.options.chunk_length

    def _groups(self, codes: torch.Tensor, round_index: int) -> Groups:
        """Of tokens that are neighbours in a bucket, with windows, or else in a chunk."""
        order, size = self.order[:, :, round_index], self._group_size
        ordered, tokens = codes.sort(dim=-1)
        places = torch.searchsorted(order.contiguous(), ordered)
        if self.options.sliding_window:
            shared = bucket_of(ordered)
        else:
            shared = places.div(self.options.chunk_length, rounding_mode="floor")
        index = torch.arange(codes.shape[2], device=codes.device)
        begins = torch.ones_like(ordered, dtype=torch.bool)
        begins[..., 1:] = shared[..., 1:] != shared[..., :-1]
        slot = (index - torch.where(begins, index, 0).cummax(-1).values) % size
        group = (slot == 0).cumsum(-1) - 1
        count = int(group[..., -1].max()) + 1
        index = group * size + slot
        members = tokens.new_zeros(*codes.shape[:2], count * size).scatter_(2, index, tokens)
        is_member = torch.zeros_like(members, dtype=torch.bool).scatter_(2, index, True)
        places = torch.full_like(members, order.shape[2]).scatter_(2, index, places)
        return Groups(*(table.unflatten(2, (count, size)) for table in (members, places, is_member)))

    def _codes_met(self, places: torch.Tensor, round_index: int) -> torch.Tensor:
        """The codes of groups' stretches, `[B, H, G, W]`, given the places `[B, H, G, S]`; -1 where there is none."""
        rounds, capacity = self.order.shape[2:]
        first = places.amin(-1, keepdim=True)
        if not self.options.sliding_window:
            first = first - first % self.options.chunk_length
        stretch = first - self._reach + torch.arange(self._width, device=places.device)
        starts = torch.full_like(first, round_index * capacity)
        if self.options.circular_look_around:
            stretch = (stretch + round_index * self.padded_length) % (rounds * self.padded_length)
            starts = stretch.div(self.padded_length, rounding_mode="floor") * capacity
            stretch = stretch % self.padded_length
        codes = self.order.flatten(2).gather(2, (stretch.clamp(0, capacity - 1) + starts).flatten(2))
        return codes.view(stretch.shape).masked_fill((stretch < 0) | (stretch >= capacity), -1)

    def _attend(self, query: torch.Tensor, codes: torch.Tensor, places: torch.Tensor, round_index: int) -> Softmax:
        """Of groups, given queries `[B, H, G, S, D]`, their codes and their places, `[B, H, G, S]`."""
        met = self._codes_met(places, round_index)
        positions, value_shift = position_of(met), self.options.value_shift
        index = _index(self.rows.keys, self.rows.slots(positions))
        scores = query @ _look_up(self.rows.keys, index).transpose(-1, -2)
        dtype = torch.promote_types(scores.dtype, torch.float32)
        scales = _look_up(self.scales, index)[..., None, :].to(dtype) * math.log2(math.e)
        hidden, is_self = self._hidden(met[..., None, :], codes[..., None])
        scores = (scores.to(dtype) * scales).masked_fill_(hidden, MASKED_SCORE[dtype])
        scores = scores.masked_fill_(is_self, SELF_SCORE[dtype])
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp2_()
        total = weights.sum(-1, keepdim=True)
        index = _index(self.rows.values, self.rows.slots(positions + value_shift)) if value_shift else index
        output = (weights / total).to(self.rows.values.dtype) @ _look_up(self.rows.values, index)
        return Softmax(output.to(dtype), largest, total)

    def _hidden(self, met: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What the members of groups do not see, and where they meet themselves.

        Args:
            met: The codes of the stretches, `[B, H, G, 1, W]`.
            codes: Those of the members, `[B, H, G, S, 1]`.

        Returns:
            `[B, H, G, S, W]` and a shape that expands to it, bool.
        """
        if self.options.sliding_window:
            # The newest tokens of a bucket stand side by side at its end, so all groups have the same windows.
            index = torch.arange(self._width, device=met.device)
            ahead = index - torch.arange(self._group_size, device=met.device)[:, None]
            is_outside = (ahead < 0) | (ahead > self._reach)
            return is_outside | (bucket_of(met) != bucket_of(codes[..., :1, :])), ahead == self._reach
        # 32 bits are compared in half the time. What stands nowhere gets the position -1 by that.
        positions, own = position_of(met).int(), position_of(codes).int()
        hidden = (positions > own) | (positions < 0)
        if not self.options.attend_across_buckets:
            hidden |= bucket_of(met).int() != bucket_of(codes).int()
        return hidden, positions == own


def _index(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Where `places`, `[B, H, ...]`, of a table `[B, N, H, ...]` are if its first three dimensions are one."""
    batch, length, heads = table.shape[:3]
    start = torch.arange(batch, device=places.device)[:, None] * (length * heads)
    start = start + torch.arange(heads, device=places.device)
    return torch.add(start[..., None, None], places, alpha=heads)


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`[B, N, H, ...]` to `[B, H, G, W, ...]`."""
    return table.flatten(0, 2).index_select(0, index.flatten()).view(*index.shape, *table.shape[3:])
