"""Where tokens stand while the layers work on them: rows without their padding, or their documents side by side."""

from dataclasses import dataclass

import torch

from .movable import Movable


# trf-ignore: TRF031 this goes into the layers, it is no output
@dataclass(frozen=True)
class RowLayout(Movable):
    """
    Places of the caller's tokens, `[B, L]`, in rows of P places.

    Attributes:
        place: `[B, L]`, in `[0, P)`; that of another token where a token has none.
        source: `[B, P]`, the token that stands at a place. What stands where none was put is any token, masked.
    """

    place: torch.Tensor
    source: torch.Tensor

    @classmethod
    def of_places(cls, place: torch.Tensor, num_places: int) -> "RowLayout":
        """Tokens at `place`, `[B, L]`, of `num_places`; those at `num_places` itself, which is none, get no place."""
        source = _inverse(place, num_places + 1)[:, :-1]
        return cls(torch.where(place < num_places, place, 0), source)

    @classmethod
    def of_mask(cls, is_real: torch.Tensor) -> "RowLayout":
        """
        Real tokens, `[B, L]`, bool, side by side from the front on; padding behind them, in order, too.

        What comes back for padding behind a real token is that token's, so that the last column is that of the last
        real token: `generate` continues there.
        """
        num_real, num_padding = is_real.long().cumsum(1), (~is_real).long().cumsum(1)
        place = torch.where(is_real, num_real, num_real[:, -1:] + num_padding) - 1
        source = _inverse(place, place.shape[1])
        return cls(torch.where(num_real > 0, num_real - 1, place), source)

    def into(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """`[B or 1, ..., L, ...]` to `[B, ..., P, ...]`."""
        return _take(tensor, self.source, dim)

    def back(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """`[B, ..., P, ...]` to `[B, ..., L, ...]`."""
        return _take(tensor, self.place, dim)

    @property
    def has_place(self) -> torch.Tensor:
        """`[B, L]`, bool: which tokens were put somewhere."""
        return self.source.gather(1, self.place) == torch.arange(self.place.shape[1], device=self.place.device)

    @property
    def is_taken(self) -> torch.Tensor:
        """`[B, P]`, bool: at which places a token was put."""
        return self.place.gather(1, self.source) == torch.arange(self.source.shape[1], device=self.source.device)


def _inverse(place, num_places):
    tokens = torch.arange(place.shape[1], device=place.device).expand_as(place)
    return tokens.new_zeros(place.shape[0], num_places).scatter(1, place, tokens)


def _take(tensor, index, dim):
    tensor = tensor.expand(index.shape[0], *tensor.shape[1:])
    view = [1] * tensor.ndim
    view[0], view[dim] = index.shape
    shape = [*tensor.shape]
    shape[dim] = index.shape[1]
    return tensor.gather(dim, index.view(view).expand(shape))


def into_rows(layout: RowLayout | None, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """`layout.into(tensor)`, where both are given."""
    return tensor if layout is None or tensor is None else layout.into(tensor)


def out_of_rows(layout: RowLayout | None, tensor: torch.Tensor) -> torch.Tensor:
    """`layout.back(tensor)`, where there is a layout."""
    return tensor if layout is None else layout.back(tensor)


def attend_by_map(
    weights: torch.Tensor, value: torch.Tensor, layout: RowLayout | None, key_layout: RowLayout | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The output of attention as a product of its map, so that the map a caller gets has the output's gradient.

    Args:
        weights: The map `[B, H, P, S]`.
        value: `[B, S, H, D]`.
        layout, key_layout: Of the queries and of the keys.

    Returns:
        The output, `[B, P, H, D]`, and the map of the caller's tokens.
    """
    shown = weights
    if layout is not None:
        shown = layout.back(shown, dim=2) * layout.has_place[:, None, :, None]
    if key_layout is not None:
        shown = key_layout.back(shown, dim=3) * key_layout.has_place[:, None, None]
    weights = shown if layout is None else layout.into(shown, dim=2)
    if key_layout is not None:
        weights = key_layout.into(weights, dim=3) * key_layout.is_taken[:, None, None]
    return (weights.to(value.dtype) @ value.transpose(1, 2)).transpose(1, 2), shown
