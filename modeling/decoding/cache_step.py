"""
Where the tokens of one call go in a cache, and the buffers that they go into.

Shapes: B batch, M new tokens, H heads, D head size.
"""

from dataclasses import dataclass, replace

import torch

from ..ops.movable import Movable
from .growing import room_for, with_any_size


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


class RowBuffer:
    """
    Tensors with something for each position: `[B, capacity, ...]`, growing geometrically.

    Args:
        ring: Keep this many of the newest positions only.
        most: Positions that will hardly be needed more of; growing stops there first.

    Attributes:
        tensors: Keys and values, `[B, capacity, H, D]`, and what else a layer keeps; empty before the first token.
    """

    def __init__(self, ring: int | None = None, most: int | None = None):
        self.ring, self.most = ring, most
        self.tensors: list[torch.Tensor] = []

    @property
    def keys(self) -> torch.Tensor:
        """`[B, capacity, H, D]`."""
        return self.tensors[0]

    @property
    def values(self) -> torch.Tensor:
        """`[B, capacity, H, D]`."""
        return self.tensors[1]

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self.tensors[0].shape[1] if self.tensors else 0

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Where positions are kept."""
        return positions.clamp(0, self.capacity - 1) if self.ring is None else positions % self.ring

    def append(self, step: CacheStep, *new: torch.Tensor):
        """Put in what belongs to the tokens of `step`, each `[B, M, ...]`, as many tensors as the first time."""
        self._reserve(step.longest, new)
        count, capacity = new[0].shape[1], self.capacity
        if step.start is not None and step.start % capacity + count <= capacity:
            first = step.start % capacity
            for tensor, rows in zip(self.tensors, new, strict=True):
                tensor[:, first : first + count] = rows
            return
        if step.is_real is None and (self.ring is None or count <= self.ring):
            rows_of_batch, slots = torch.arange(len(new[0]), device=new[0].device)[:, None], self.slots(step.positions)
            for tensor, rows in zip(self.tensors, new, strict=True):
                tensor[rows_of_batch, slots] = rows.to(tensor.dtype)
            return
        kept = torch.ones_like(step.positions, dtype=torch.bool) if step.is_real is None else step.is_real
        if self.ring is not None and count > self.ring:
            kept = kept & (step.positions >= step.lengths[:, None] - self.ring)
        row, column = kept.nonzero(as_tuple=True)
        slots = self.slots(step.positions)[row, column]
        for tensor, rows in zip(self.tensors, new, strict=True):
            tensor[row, slots] = rows[row, column]

    def _reserve(self, longest: int, like: tuple[torch.Tensor, ...]):
        old, capacity = self.tensors, self.capacity
        # One more than are held: where a buffer is full, its rows are contiguous, and a compiled step another program.
        needed = longest + 1 if self.ring is None else self.ring
        if needed > capacity:
            if self.ring is None:
                needed = room_for(needed, capacity, None if self.most is None else self.most + 1)
            self.tensors = [with_any_size(rows.new_zeros(len(rows), needed, *rows.shape[2:]), dim=1) for rows in like]
            for tensor, rows in zip(self.tensors, old, strict=False):
                tensor[:, :capacity] = rows

    def select(self, rows: torch.Tensor):
        """Keep the rows of the batch that are listed, in this order."""
        self.tensors = [
            with_any_size(tensor.index_select(0, rows.to(tensor.device)), dim=1) for tensor in self.tensors
        ]
