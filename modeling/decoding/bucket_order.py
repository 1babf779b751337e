"""
The order in which LSH attention visits the tokens of a growing text.

A token's code holds its round and bucket in the upper half and its position in the lower one, so codes sort by
(bucket, position). A step must neither sort the text again nor move all that stands behind a new token; hence the
codes are in two parts, the sorted ones and a few recent ones, which are merged now and then. Both parts have room
behind their codes, filled with `NO_TOKEN`, so that shapes stay from step to step and a compiled step stays valid.

Shapes: B batch, H heads, R hashing rounds.
"""

import torch

from ..ops.operators import operator
from .growing import room_for, with_any_size


# The code of what is not attended to: padding. It sorts behind every token.
NO_TOKEN = torch.iinfo(torch.int64).max
_POSITION_BITS = 32
_POSITIONS = (1 << _POSITION_BITS) - 1


def encode(
    buckets: torch.Tensor, positions: torch.Tensor, is_token: torch.Tensor | None, num_buckets: int
) -> torch.Tensor:
    """
    The codes of tokens.

    Args:
        buckets: `[B, H, R, M]`, integer, values below `num_buckets`.
        positions: `[B, M]`, places in each row's text.
        is_token: `[B, M]`, bool; False for padding. None if there is none.

    Returns:
        `[B, H, R, M]`, int64.
    """
    rounds = torch.arange(buckets.shape[2], device=buckets.device).view(1, 1, -1, 1)
    codes = ((buckets.long() + rounds * num_buckets) << _POSITION_BITS) + positions[:, None, None]
    return codes if is_token is None else codes.masked_fill(~is_token[:, None, None], NO_TOKEN)


def position_of(codes: torch.Tensor) -> torch.Tensor:
    """Positions; for `NO_TOKEN` one that no text reaches."""
    return codes & _POSITIONS


def bucket_of(codes: torch.Tensor) -> torch.Tensor:
    """Numbers of buckets, of which no two rounds share one."""
    return codes >> _POSITION_BITS


class BucketOrder:
    """
    The codes of each round in their order.

    Args:
        codes: `[B, H, R, L]`, of the text so far, one for each of its columns.
        most: See `room_for`.
    """

    # Recent codes are looked through in each step, all codes are moved in each merge.
    most_recent = 64

    def __init__(self, codes: torch.Tensor, most: int | None = None):
        self._most = most
        # Columns so far, and how many of them were sorted when the recent ones began.
        self._num_columns = self._begin = codes.shape[3]
        self._sorted = codes.new_empty(*codes.shape[:3], 0)
        self._reserve(codes.shape[3])
        self._sorted[..., : codes.shape[3]] = codes.sort(dim=-1).values
        # A column's place among them is its remainder by their number. When they are full they begin anew.
        self._recent = codes.new_full((*codes.shape[:3], self.most_recent), NO_TOKEN)

    def _reserve(self, count: int):
        capacity = self._sorted.shape[3]
        if count > capacity:
            grown = self._sorted.new_full((*self._sorted.shape[:3], room_for(count, capacity, self._most)), NO_TOKEN)
            grown[..., :capacity] = self._sorted
            self._sorted = with_any_size(grown, dim=3)

    def append(self, codes: torch.Tensor):
        """Add the codes `[B, H, R, M]` of new columns."""
        added, most, begin = codes.shape[3], self.most_recent, self._num_columns
        self._reserve(begin + added)
        self._num_columns = begin + added
        if added > most:
            _merge(self._sorted, begin, self._recent)
            _merge(self._sorted, begin, codes)
            self._recent.fill_(NO_TOKEN)
            self._begin = self._num_columns
            return
        # A compiled step would be two programs, with a merge and without.
        put = _put_recent if torch.compiler.is_compiling() else put_recent
        until_full = added if added == 1 else most - begin % most
        put(self._sorted, self._recent, codes[..., :until_full], begin)
        if added > until_full:
            put(self._sorted, self._recent, codes[..., until_full:], begin + until_full)

    def crop(self, count: int, lengths: torch.Tensor):
        """Forget `count` columns, the newest ones; `lengths`, `[B]`, is how many positions of each row remain."""
        num_sorted = max(self._begin, (self._num_columns - 1) // self.most_recent * self.most_recent)
        self._num_columns -= count
        lengths = lengths.to(self._sorted.device)[:, None, None, None]
        self._recent.masked_fill_(position_of(self._recent) >= lengths, NO_TOKEN)
        if self._num_columns < num_sorted:
            self._begin = self._num_columns
            remains = position_of(self._sorted) < lengths
            # What remains keeps its order, which is faster than to sort again; the last place becomes free.
            places = (remains.cumsum(3) - 1).masked_fill_(~remains, self._sorted.shape[3] - 1)
            rest = torch.full_like(self._sorted, NO_TOKEN)
            self._sorted.copy_(rest.scatter_(3, places, self._sorted.masked_fill(~remains, NO_TOKEN)))

    def select(self, rows: torch.Tensor):
        """Keep the rows of the batch that are listed, in this order."""
        rows = rows.to(self._sorted.device)
        self._sorted = with_any_size(self._sorted.index_select(0, rows), dim=3)
        self._recent = self._recent.index_select(0, rows)

    def is_sorted(self) -> bool:
        """Whether all codes are among the sorted ones, as they are when many came at once."""
        return self._num_columns == self._begin and not torch.compiler.is_compiling()

    @property
    def sorted_codes(self) -> torch.Tensor:
        """`[B, H, R, capacity]`."""
        return self._sorted

    def before(self, codes: torch.Tensor, count: int) -> torch.Tensor:
        """
        The `count` codes that stand before each one in its bucket, or as many as there are.

        Args:
            codes: `[B, H, R, M]`.

        Returns:
            `[B, H, R, M, count]`, in any order; -1 where there are no more.
        """
        codes = codes.contiguous()
        capacity = self._sorted.shape[3]
        width = min(count, capacity)
        first = (torch.searchsorted(self._sorted, codes) - width).clamp(min=0)
        places = first[..., None] + torch.arange(width, device=codes.device)
        found = self._sorted.gather(3, places.flatten(3)).view(places.shape)
        recent = self._recent if self._num_columns > self._begin else self._recent[..., :0]
        found = torch.cat([found, recent[..., None, :].expand(*codes.shape, -1)], dim=-1)
        code = codes[..., None]
        is_met = (found < code) & (found >= code & ~_POSITIONS)
        return found.masked_fill(~is_met, -1).topk(min(count, found.shape[-1]), dim=-1, sorted=False).values

    def _ordered_recent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The recent codes in order, and the place of each when they stand among the sorted ones."""
        return _places_among(self._sorted, self._recent)

    def places(self, codes: torch.Tensor) -> torch.Tensor:
        """Where in its round each of the codes `[B, H, R, M]` stands."""
        codes = codes.contiguous()
        recent, _ = self._ordered_recent()
        return torch.searchsorted(self._sorted, codes) + torch.searchsorted(recent, codes)

    def look_up(self, places: torch.Tensor, padded_length: int) -> torch.Tensor:
        """
        The codes that stand at `places`.

        Args:
            places: `[B, H, Q]`, counted on from round to round, each of which takes `padded_length` places.

        Returns:
            `[B, H, Q]`; `NO_TOKEN` where no column has put one.
        """
        num_rounds, capacity = self._sorted.shape[2:]
        ordered, recent_places = self._ordered_recent()
        slots = ordered.shape[3]
        in_round = places.div(padded_length, rounding_mode="floor")
        # The room behind the recent codes would stand behind the round, so rounds begin further apart.
        starts = torch.arange(num_rounds, device=places.device)[:, None] * (padded_length + slots)
        recent_places, spread = (recent_places + starts).flatten(2), (places + in_round * slots).contiguous()
        recent_before = torch.searchsorted(recent_places, spread)
        index = spread - in_round * padded_length - recent_before
        found = self._sorted.flatten(2).gather(2, index.clamp(0, capacity - 1) + in_round * capacity)
        found = found.masked_fill(index >= capacity, NO_TOKEN)
        candidate = recent_before.clamp(max=recent_places.shape[2] - 1)
        is_recent = recent_places.gather(2, candidate) == spread
        return torch.where(is_recent, ordered.flatten(2).gather(2, candidate), found)


def _places_among(ordered: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`codes` in order, and the place of each when they stand among the `ordered` ones."""
    codes = codes.sort(dim=-1).values.contiguous()
    places = torch.searchsorted(ordered, codes)
    return codes, places + torch.arange(codes.shape[3], device=codes.device)


def _merge(ordered: torch.Tensor, count: int, codes: torch.Tensor):
    """Put `codes` among the first `count` of the `ordered` ones, as far as there is room behind these."""
    added, places = _places_among(ordered, codes)
    merged = added.new_empty(*added.shape[:3], count + added.shape[3])
    is_added = torch.zeros_like(merged, dtype=torch.bool).scatter_(3, places, True)
    merged = merged.masked_scatter_(~is_added, ordered[..., :count]).scatter_(3, places, added)
    # What has no room is no token.
    ordered[..., : merged.shape[3]] = merged[..., : ordered.shape[3]]


def put_recent(ordered: torch.Tensor, recent: torch.Tensor, codes: torch.Tensor, begin: int):
    """
    Put codes among the recent ones; before a new round of these, merge them into the `ordered` ones.

    Args:
        ordered, recent: `[B, H, R, ...]`, which are changed.
        codes: `[B, H, R, M]`, of columns from `begin` on that fit into one round.
    """
    first = begin % recent.shape[3]
    if first == 0:
        _merge(ordered, begin, recent)
        recent.fill_(NO_TOKEN)
    recent[..., first : first + codes.shape[3]] = codes


_put_recent = operator(
    "(Tensor(a!) ordered, Tensor(b!) recent, Tensor codes, SymInt begin) -> ()",
    lambda *arguments: None,
    changes=("ordered", "recent"),
)(put_recent)
