"""
Where the tokens of one call go in a cache, and the buffers that they go into.

Shapes: B batch, M new tokens, H heads, D head size.
"""

from dataclasses import dataclass, replace

import torch

from ..ops.movable import Movable


# trf-ignore: TRF031 this goes into the layers, it is no output
@dataclass(frozen=True)
class CacheStep(Movable):
    """
    Where the tokens of one call go.

    Attributes:
        positions: `[B, M]`; of padding, that of the real token before it.
        is_real: `[B, M]`, bool; False for padding, which is not kept. None if everything is real.
        start: Position of the first token, if it is the same in every row and everything is real, or None.
        earliest: A position that no token of the call stands before.
        lengths: `[B]`, real tokens of each row, the new ones included.
        longest: The largest of `lengths`.
        num_columns: Columns of the batch, the new ones included.
        columns: `[B, C]`, bool, which of the first columns are real; all others are. None if all are.
        is_first: Whether the cache was empty, so that the ordinary forward pass computes this call.
    """

    positions: torch.Tensor
    is_real: torch.Tensor | None
    start: int | None
    earliest: int
    lengths: torch.Tensor
    longest: int
    num_columns: int
    columns: torch.Tensor | None
    is_first: bool

    def piece(self, first: int, last: int) -> "CacheStep":
        """The tokens from `first` up to `last`, for what is done a piece at a time."""
        if first == 0 and last >= self.positions.shape[1]:
            return self
        return replace(
            self,
            positions=self.positions[:, first:last],
            is_real=None if self.is_real is None else self.is_real[:, first:last],
            start=None if self.start is None else self.start + first,
        )

    def sees(self, key_positions: torch.Tensor) -> torch.Tensor:
        """
        Whether keys are no later than the query.

        Args:
            key_positions: `[B or 1, H or 1, M or 1, K]`.

        Returns:
            `[B, H or 1, M, K]`, bool.
        """
        return (key_positions <= self.positions[:, None, :, None]) & (key_positions >= 0)

    def in_columns(self, weights: torch.Tensor) -> torch.Tensor:
        """An attention map over positions, `[B, H, M, longest]`, to one over columns, `[B, H, M, num_columns]`."""
        if self.columns is None:
            return weights
        columns = self.columns.to(weights.device)
        columns = torch.nn.functional.pad(columns, (0, self.num_columns - columns.shape[1]), value=True)
        positions = (columns.cumsum(1) - 1).clamp(min=0)
        positions, columns = (table[:, None, None].expand(*weights.shape[:3], -1) for table in (positions, columns))
        return weights.gather(3, positions) * columns
