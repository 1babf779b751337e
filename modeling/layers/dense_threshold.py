"""Short texts are not hashed: which tokens get dense attention instead."""

from dataclasses import dataclass

import torch


# trf-ignore: TRF031 this goes in, it is no output
@dataclass(frozen=True)
class DenseThreshold:
    """
    Which tokens of an LSH layer get dense attention.

    Attributes:
        length: Texts of up to this many tokens do (`config.full_attention_threshold`; by default one chunk).
        by_row: Each row counts by its own length, so that it gets in a batch what it gets alone. Not on the circle,
            where padding counts, as in stock Reformer, and the length of the batch decides; and not where hashing
            gives a text of this length the same output.
        keeps_beginning: The first `length` tokens of a longer text do, too. So a causal model with windows gives them
            the same output before and after the text has grown.
    """

    length: int
    by_row: bool
    keeps_beginning: bool

    @classmethod
    def of(cls, config) -> "DenseThreshold":
        """The threshold that a `ReformerConfig` says."""
        chunk_length, length = config.lsh_attn_chunk_length, config.full_attention_threshold
        length = chunk_length if length is None else length
        differs = length > chunk_length or not config.attend_across_buckets
        return cls(
            length=length,
            by_row=differs and not config.circular_look_around,
            keeps_beginning=config.lsh_sliding_window and config.is_decoder,
        )

    def covers(self, length: int, circle_length: int | None) -> bool:
        """Whether all tokens of a batch of this length get dense attention."""
        return (circle_length or length) <= self.length

    def keeps(self, position: int) -> bool:
        """Whether a token at this position of a longer text gets dense attention because its beginning does."""
        return self.keeps_beginning and position < self.length

    def queries(self, positions: torch.Tensor, row_lengths: torch.Tensor | None) -> torch.Tensor | None:
        """
        Which queries of a longer batch get dense attention.

        Args:
            positions: `[B, L]`, of the queries.
            row_lengths: `[B]`, tokens of each row so far; not needed with `keeps_beginning`.

        Returns:
            `[B, L]` or `[B, 1]`, bool; None for none.
        """
        if self.keeps_beginning:
            return positions < self.length
        return None if row_lengths is None or not self.by_row else row_lengths[:, None] <= self.length
