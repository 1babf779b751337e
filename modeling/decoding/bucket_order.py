"""
The order in which LSH attention visits the tokens of a growing text.

A token's code holds its round and bucket in the upper half and its position in the lower one, so codes sort by
(bucket, position). A step must neither sort the text again nor move all that stands behind a new token; hence the
codes are in two parts, the sorted ones and a few recent ones, which are merged now and then.

Shapes: B batch, H heads, R hashing rounds.
"""

import torch


# The code of what is not attended to: padding. It sorts behind every token.
NO_TOKEN = torch.iinfo(torch.int64).max
_POSITION_BITS = 32


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
    return codes & ((1 << _POSITION_BITS) - 1)


def bucket_of(codes: torch.Tensor) -> torch.Tensor:
    """Numbers of buckets, of which no two rounds share one."""
    return codes >> _POSITION_BITS


class BucketOrder:
    """
    The codes of each round in their order.

    Args:
        codes: `[B, H, R, L]`, of the text so far, one for each of its columns.
    """

    # Recent codes are looked through in each step, all codes are moved in each merge.
    most_recent = 64

    def __init__(self, codes: torch.Tensor):
        self._sorted = codes.sort(dim=-1).values
        self._set_recent(codes.new_empty(*codes.shape[:3], 0))

    def _set_recent(self, codes: torch.Tensor):
        self._recent = codes
        self._ordered_recent, self._recent_places = self._places_among_sorted(codes)

    def append(self, codes: torch.Tensor):
        """Add the codes `[B, H, R, M]` of new columns."""
        recent = torch.cat([self._recent, codes], dim=3)
        if recent.shape[3] > self.most_recent:
            self._merge(self._recent)
            recent = codes
        if recent.shape[3] > self.most_recent:
            self._merge(recent)
            recent = codes.new_empty(*codes.shape[:3], 0)
        self._set_recent(recent)

    def _merge(self, codes: torch.Tensor):
        added, places = self._places_among_sorted(codes)
        merged = added.new_empty(*added.shape[:3], self._sorted.shape[3] + added.shape[3])
        is_added = torch.zeros_like(merged, dtype=torch.bool).scatter_(3, places, True)
        self._sorted = merged.masked_scatter_(~is_added, self._sorted).scatter_(3, places, added)

    def _places_among_sorted(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`codes` in order, and the place of each when they stand among the sorted ones."""
        codes = codes.sort(dim=-1).values.contiguous()
        places = torch.searchsorted(self._sorted, codes)
        return codes, places + torch.arange(codes.shape[3], device=codes.device)

    def crop(self, count: int, lengths: torch.Tensor):
        """Forget `count` columns, the newest ones; `lengths`, `[B]`, is how many positions of each row remain."""
        from_sorted = count - self._recent.shape[3]
        if from_sorted > 0:
            is_gone = position_of(self._sorted) >= lengths.to(self._sorted.device)[:, None, None, None]
            kept = self._sorted.masked_fill(is_gone, NO_TOKEN).sort(dim=-1).values
            self._sorted = kept[..., : kept.shape[3] - from_sorted].contiguous()
        self._set_recent(self._recent[..., : max(0, -from_sorted)].contiguous())

    def select(self, rows: torch.Tensor):
        """Keep the rows of the batch that are listed, in this order."""
        rows = rows.to(self._sorted.device)
        self._sorted = self._sorted.index_select(0, rows)
        self._set_recent(self._recent.index_select(0, rows))

    def places(self, codes: torch.Tensor) -> torch.Tensor:
        """Where in its round each of the codes `[B, H, R, M]` stands."""
        codes = codes.contiguous()
        return torch.searchsorted(self._sorted, codes) + torch.searchsorted(self._ordered_recent, codes)

    def look_up(self, places: torch.Tensor, padded_length: int) -> torch.Tensor:
        """
        The codes that stand at `places`.

        Args:
            places: `[B, H, Q]`, counted on from round to round, each of which takes `padded_length` places.

        Returns:
            `[B, H, Q]`; `NO_TOKEN` where no column has put one.
        """
        num_rounds, num_sorted = self._sorted.shape[2:]
        num_recent = self._recent.shape[3]
        in_round = places.div(padded_length, rounding_mode="floor")
        starts = torch.arange(num_rounds, device=places.device)[:, None] * padded_length
        recent_places = (self._recent_places + starts).flatten(2)
        recent_before = torch.searchsorted(recent_places, places.contiguous())
        index = places - in_round * (padded_length - num_recent) - recent_before
        found = self._sorted.flatten(2).gather(2, index.clamp(0, num_sorted - 1) + in_round * num_sorted)
        found = found.masked_fill(index >= num_sorted, NO_TOKEN)
        if num_recent:
            candidate = recent_before.clamp(max=recent_places.shape[2] - 1)
            is_recent = recent_places.gather(2, candidate) == places
            found = torch.where(is_recent, self._ordered_recent.flatten(2).gather(2, candidate), found)
        return found
