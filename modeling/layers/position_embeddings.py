"""Position embeddings: axial, one small table per axis of a grid of positions, or one learned vector per position."""

from collections.abc import Sequence

import torch
from torch import nn


class AxialTables(nn.ParameterList):
    """
    The tables of `AxialPositionEmbeddings`.

    A class of its own, because transformers initialises modules of packages outside it only where parameters are
    direct members. And called like one, because a hook that loads parameters from elsewhere runs at the module's call.
    """

    # A ParameterList refuses to be called.
    __call__ = nn.Module.__call__

    def forward(self, coordinates: Sequence[torch.Tensor]) -> torch.Tensor:
        """Each axis's `[B, L]` to the vectors at these coordinates side by side, `[B, L, hidden_size]`."""
        vectors = [
            nn.functional.embedding(coordinate, table.flatten(0, -2))
            for coordinate, table in zip(coordinates, self, strict=True)
        ]
        return torch.cat(vectors, dim=-1)


class AxialPositionEmbeddings(nn.Module):
    """
    Position vectors put together from one table per axis.

    Position `p` has the row-major coordinates of `p` in a grid of shape `axial_pos_shape`; its vector is the
    concatenation of each axis's vector at that coordinate. `prod(shape)` positions need `sum(shape)` vectors.
    """

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.weights = AxialTables()
        shape = tuple(config.axial_pos_shape)
        for axis, size in enumerate(config.axial_pos_embds_dim):
            grid = [1] * len(shape)
            grid[axis] = shape[axis]
            self.weights.append(nn.Parameter(torch.empty(*grid, size)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return tuple(table.shape[axis] for axis, table in enumerate(self.weights))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """`[B, L]`, values in `[0, prod(shape))`, to `[B, L, hidden_size]`."""
        shape, coordinates, rest = self.shape, [], position_ids
        for size in shape[:0:-1]:
            coordinates.append(rest % size)
            # The difference divides evenly. Compiled for the CPU, torch 2.13 gets other divisions of integers wrong.
            rest = (rest - coordinates[-1]).div(size, rounding_mode="floor")
        # What is left for the first axis is too large for it when the position is beyond the grid, and fails there.
        coordinates.append(rest)
        embeddings = self.weights(coordinates[::-1])
        if self.dropout.training and self.dropout.p > 0:
            # Whole columns of the grid are dropped, as in stock Reformer.
            kept = self.dropout(embeddings.new_ones(position_ids.shape[0], shape[-1]))
            embeddings = embeddings * kept.gather(1, position_ids % shape[-1])[..., None]
        return embeddings

    def resize(self, shape: Sequence[int]):
        """Crop or extend each axis's table; see `resized_table`."""
        if isinstance(shape, int) or len(shape) != len(self.weights) or min(shape) < 1:
            raise ValueError(
                f"The position embeddings have {len(self.weights)} axes of lengths {list(self.shape)} and cannot be "
                f"resized to {shape}. Give one positive length per axis."
            )
        for axis, length in enumerate(shape):
            table = self.weights[axis]
            self.weights[axis] = nn.Parameter(resized_table(table.data, length, axis), table.requires_grad)


class PositionEmbeddings(nn.Module):
    """One learned vector for each of `max_position_embeddings` positions."""

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """`[B, L]`, values in `[0, max_position_embeddings)`, to `[B, L, hidden_size]`."""
        return self.dropout(self.embedding(position_ids))

    @property
    def shape(self) -> int:
        """Number of positions."""
        return len(self.embedding.weight)

    def resize(self, length: int):
        """Crop or extend the table; see `resized_table`."""
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"The number of positions must be a positive integer, but got {length!r}.")
        old = self.embedding.weight
        self.embedding = nn.Embedding.from_pretrained(resized_table(old.data, length, 0), freeze=not old.requires_grad)


def resized_table(table: torch.Tensor, length: int, axis: int) -> torch.Tensor:
    """
    The first `length` vectors along `axis`. Where the table ends it starts again, so added positions have vectors that
    the model was trained with.
    """
    source = torch.arange(length, device=table.device) % table.shape[axis]
    return table.index_select(axis, source)
