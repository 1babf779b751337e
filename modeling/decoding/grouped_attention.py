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
# From how many new tokens on groups are worth it.
MANY_TOKENS = 64


class Softmax(NamedTuple):
    """
    A softmax that more can be added to.

    Scores are in base 2: PyTorch's `exp` takes 40 times as long where its result is 0, as of all masked ones.

    Attributes:
        output: `[..., D]`, the sum of values, each times its weight, 2 to the power of its score less the largest.
        largest, total: `[..., 1]`, the largest score, and the sum of those weights.
    """

    output: torch.Tensor
    largest: torch.Tensor
    total: torch.Tensor

    def add(self, other: "Softmax") -> "Softmax":
        """Over what both have seen."""
        largest = torch.maximum(self.largest, other.largest)
        ours, theirs = (self.largest - largest).exp2(), (other.largest - largest).exp2()
        sums = (torch.addcmul(a * ours, b, theirs) for a, b in zip(self[::2], other[::2], strict=True))
        return Softmax(next(sums), largest, next(sums))


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
        rows: Keys, values and scales, those of the new tokens included.
        order: `[B, H, R, L]`, the codes of each round, sorted, those of the new tokens included.
        options: Of the layer.
        padded_length: Places that a round takes.
        most_numbers: Elements that are gathered at once.
    """

    rows: RowBuffer
    order: torch.Tensor
    options: LSHOptions
    padded_length: int
    most_numbers: int

    def serves(self, num_tokens: int) -> bool:
        """Whether it is worth it for so many new tokens, and counts each key as often as it has to."""
        rounds, options = self.order.shape[2], self.options
        counts = options.allow_duplicate_attention or rounds == 1
        # On a short circle a stretch would meet its own beginning.
        is_distinct = not options.circular_look_around or self._reach[1] <= rounds * self.padded_length
        return num_tokens >= MANY_TOKENS and counts and is_distinct

    def __call__(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            query: `[B, M, H, D]`.
            codes: `[B, H, R, M]`, of the new tokens.

        Returns:
            `[B, M, H, D]`.
        """
        dtype, query = query.dtype, query.to(self.rows.keys.dtype).contiguous()
        rounds = (self._attend_in_round(query, its.contiguous(), number) for number, its in enumerate(codes.unbind(2)))
        found = reduce(Softmax.add, rounds)
        output = found.output / found.total
        if self.options.value_shift:
            output = output.masked_fill(found.largest <= SELF_SCORE[found.largest.dtype], 0)
        return output.to(dtype)

    def _attend_in_round(self, query: torch.Tensor, codes: torch.Tensor, number: int) -> Softmax:
        """Of queries `[B, M, H, D]` with codes `[B, H, M]`, in their places."""
        batch, count, heads, size = query.shape
        groups = self._groups(codes, number)
        # One place more, where what stands for nobody is put.
        dtype = torch.promote_types(query.dtype, torch.float32)
        whole = Softmax(*(query.new_empty(batch, count + 1, heads, width, dtype=dtype) for width in (size, 1, 1)))
        for piece in groups.pieces(max(1, self.most_numbers // (batch * heads * self._reach[1] * size))):
            its_codes = codes.gather(2, piece.members.flatten(2)).view(piece.members.shape)
            asked = _look_up(query, _index(query, piece.members))
            target = _index(whole.output, torch.where(piece.is_member, piece.members, count)).flatten()
            for table, part in zip(whole, self._attend(asked, its_codes, piece.places, number), strict=True):
                table.flatten(0, 2).index_copy_(0, target, part.flatten(0, 3))
        return Softmax(*(table[:, :-1] for table in whole))

    @property
    def _size(self) -> int:
        """Tokens of a group, at most."""
        return GROUP if self.options.sliding_window else 2 * GROUP

    @property
    def _reach(self) -> tuple[int, int]:
        """Places that a stretch has before the first token of a group or its chunk, and all its places."""
        length, (before, after) = self.options.chunk_length, self.options.around
        reach = before * length
        return reach, reach + (self._size if self.options.sliding_window else (1 + after) * length)

    def _groups(self, codes: torch.Tensor, number: int) -> Groups:
        """Of tokens that are neighbours in a bucket, with windows, or else in a chunk."""
        order = self.order[:, :, number]
        ordered, tokens = codes.sort(dim=-1)
        places = torch.searchsorted(order.contiguous(), ordered)
        if self.options.sliding_window:
            shared = bucket_of(ordered)
        else:
            shared = places.div(self.options.chunk_length, rounding_mode="floor")
        index = torch.arange(codes.shape[2], device=codes.device)
        begins = torch.ones_like(ordered, dtype=torch.bool)
        begins[..., 1:] = shared[..., 1:] != shared[..., :-1]
        rank = index - torch.where(begins, index, 0).cummax(-1).values
        slot = rank % self._size
        group = (slot == 0).cumsum(-1) - 1
        count = int(group[..., -1].max()) + 1
        index = group * self._size + slot
        members = tokens.new_zeros(*codes.shape[:2], count * self._size).scatter_(2, index, tokens)
        is_member = torch.zeros_like(members, dtype=torch.bool).scatter_(2, index, True)
        places = torch.full_like(members, order.shape[2]).scatter_(2, index, places)
        return Groups(*(table.unflatten(2, (count, self._size)) for table in (members, places, is_member)))

    def _stretch(self, places: torch.Tensor) -> torch.Tensor:
        """Places that groups look at, `[B, H, G, W]`, given those of their tokens, `[B, H, G, S]`."""
        first, (reach, length) = places.amin(-1, keepdim=True), self._reach
        if not self.options.sliding_window:
            first = first - first % self.options.chunk_length
        return first - reach + torch.arange(length, device=places.device)

    def _codes_at(self, stretch: torch.Tensor, number: int) -> torch.Tensor:
        """The codes that stand there; -1 where there is nothing."""
        rounds, capacity = self.order.shape[2:]
        numbers = torch.full_like(stretch, number)
        if self.options.circular_look_around:
            stretch = (stretch + number * self.padded_length) % (rounds * self.padded_length)
            numbers, stretch = stretch.div(self.padded_length, rounding_mode="floor"), stretch % self.padded_length
        places = stretch.clamp(0, capacity - 1) + numbers * capacity
        codes = self.order.flatten(2).gather(2, places.flatten(2)).view(places.shape)
        return codes.masked_fill((stretch < 0) | (stretch >= capacity), -1)

    def _attend(self, query: torch.Tensor, codes: torch.Tensor, places: torch.Tensor, number: int) -> Softmax:
        """Of groups, given queries `[B, H, G, S, D]`, their codes and their places, `[B, H, G, S]`."""
        stretch = self._stretch(places)
        met = self._codes_at(stretch, number)
        positions, value_shift = position_of(met), self.options.value_shift
        index = _index(self.rows.keys, self.rows.slots(positions))
        scores = query @ _look_up(self.rows.keys, index).transpose(-1, -2)
        dtype = torch.promote_types(scores.dtype, torch.float32)
        scales = _look_up(self.rows.tensors[2], index)[..., None, :].to(dtype) * math.log2(math.e)
        scores = self._masked(scores.to(dtype), scales, met, codes)
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp2_()
        index = _index(self.rows.values, self.rows.slots(positions + value_shift)) if value_shift else index
        values = _look_up(self.rows.values, index)
        return Softmax((weights.to(values.dtype) @ values).to(dtype), largest, weights.sum(-1, keepdim=True))

    def _masked(
        self, scores: torch.Tensor, scales: torch.Tensor, met: torch.Tensor, codes: torch.Tensor
    ) -> torch.Tensor:
        """Scores of groups, `[B, H, G, S, W]`, given the codes that they meet and their own."""
        masked, own = MASKED_SCORE[scores.dtype], SELF_SCORE[scores.dtype]
        met, codes = met[..., None, :], codes[..., None]
        if self.options.sliding_window:
            # The newest tokens of a bucket stand side by side at its end, so all groups have the same windows.
            reach, length = self._reach
            ahead = torch.arange(length, device=met.device) - torch.arange(self._size, device=met.device)[:, None]
            window = scores.new_zeros(ahead.shape).masked_fill((ahead < 0) | (ahead > reach), masked)
            scores = torch.addcmul(window.masked_fill(ahead == reach, own), scores, scales)
            return scores.masked_fill_(bucket_of(met) != bucket_of(codes[..., :1, :]), masked)
        positions, own_position = position_of(met).int(), position_of(codes).int()
        hidden = positions > own_position
        if not self.options.attend_across_buckets:
            hidden |= bucket_of(met).int() != bucket_of(codes).int()
        # What stands nowhere has the position -1.
        hidden |= positions < 0
        return (scores * scales).masked_fill_(hidden, masked).masked_fill_(positions == own_position, own)


def _index(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Where `places`, `[B, H, ...]`, of a table `[B, N, H, ...]` are if its first three dimensions are one."""
    batch, length, heads = table.shape[:3]
    start = torch.arange(batch, device=places.device)[:, None] * (length * heads)
    start = start + torch.arange(heads, device=places.device)
    return torch.add(start[..., None, None], places, alpha=heads)


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`[B, N, H, ...]` to `[B, H, G, W, ...]`."""
    return table.flatten(0, 2).index_select(0, index.flatten()).view(*index.shape, *table.shape[3:])
