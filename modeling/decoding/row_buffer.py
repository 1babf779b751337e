"""Buffers with something for each position of a text that grows."""

import torch

from .cache_step import CacheStep
from .growing import room_for, with_any_size


class RowBuffer:
    """
    Tensors with something for each position: `[B, capacity, ...]`, growing geometrically.

    `attend_to_rows` and `attend_to_all` of `decoding_attention.py`, `FullSelfAttention` and the cache layers read
    them, by the places that `slots` says.

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
        if step.is_real is None:
            # A ring keeps the newest.
            newest = count if self.ring is None else min(count, self.ring)
            slots = self.slots(step.positions[:, count - newest :])
            rows_of_batch = torch.arange(len(new[0]), device=new[0].device)[:, None]
            for tensor, rows in zip(self.tensors, new, strict=True):
                tensor[rows_of_batch, slots] = rows[:, count - newest :].to(tensor.dtype)
            return
        kept = step.is_real
        if self.ring is not None and count > self.ring:
            kept = kept & (step.positions >= step.lengths[:, None] - self.ring)
        row, column = kept.nonzero(as_tuple=True)
        slots = self.slots(step.positions)[row, column]
        for tensor, rows in zip(self.tensors, new, strict=True):
            tensor[row, slots] = rows[row, column]

    def _reserve(self, longest: int, like: tuple[torch.Tensor, ...]):
        old, capacity = self.tensors, self.capacity
        # One more than are held. The rows of a full buffer would be contiguous, and a compiled step compiled again.
        needed = longest + 1 if self.ring is None else self.ring
        if needed > capacity:
            if self.ring is None:
                needed = room_for(needed, capacity, None if self.most is None else self.most + 1)
            self.tensors = [with_any_size(rows.new_empty(len(rows), needed, *rows.shape[2:]), dim=1) for rows in like]
            for tensor, rows in zip(self.tensors, old, strict=False):
                tensor[:, :capacity] = rows
            # Positions without a token are read, too, and count nothing; that needs numbers.
            for tensor in self.tensors:
                tensor[:, capacity:] = 0

    def select(self, rows: torch.Tensor):
        """Keep the rows of the batch that are listed, in this order."""
        self.tensors = [
            with_any_size(tensor.index_select(0, rows.to(tensor.device)), dim=1) for tensor in self.tensors
        ]
