"""Where a row's real tokens are: rows moved so that they start at the front, and the token that stands for a row."""

from typing import overload

import torch


def first_real_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """`[B, L]`, bool, to the index of each row's first True, `[B]`; 0 in a row without any."""
    return attention_mask.int().argmax(dim=1)


def last_real_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """`[B, L]`, bool, to the index of each row's last True, `[B]`; 0 in a row without any."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * attention_mask).amax(dim=1)


@overload
def shift_rows(tensor: torch.Tensor, shift: torch.Tensor | None, dim: int = 1) -> torch.Tensor: ...


@overload
def shift_rows(tensor: None, shift: torch.Tensor | None, dim: int = 1) -> None: ...


def shift_rows(tensor: torch.Tensor | None, shift: torch.Tensor | None, dim: int = 1) -> torch.Tensor | None:
    """
    Each row rotated along `dim`, so that what stood at `shift` stands at the front.

    Args:
        tensor: `[B, ...]` or `[1, ...]` (the same for all rows), or None.
        shift: `[B]`, integer; negative values undo the rotation by the positive ones. None moves nothing.

    Returns:
        `[B, ...]`, or None for None.
    """
    if tensor is None or shift is None:
        return tensor
    length = tensor.shape[dim]
    tensor = tensor.expand(shift.shape[0], *tensor.shape[1:])
    # Not as a remainder, which ONNX has for fixed lengths only.
    places = torch.arange(length, device=tensor.device).repeat(3)
    source = places[torch.arange(length, 2 * length, device=tensor.device) + shift[:, None]]
    view = [1] * tensor.ndim
    view[0], view[dim] = source.shape
    return tensor.gather(dim, source.view(view).expand(tensor.shape))


def shift_back(tensor: torch.Tensor, shift: torch.Tensor | None, dim: int = 1) -> torch.Tensor:
    """The reverse of `shift_rows`."""
    return shift_rows(tensor, None if shift is None else -shift, dim)


def attend_by_map(
    weights: torch.Tensor, value: torch.Tensor, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The output of attention as a product of its map, so that the map a caller gets has the output's gradient.

    Args:
        weights: The map `[B, H, L, L]` of rows that were shifted by `shift` (see `shift_rows`).
        value: `[B, L, H, D]`, of the same.

    Returns:
        The output of the shifted rows, `[B, L, H, D]`, and the map of the rows before.
    """
    shown = shift_back(shift_back(weights, shift, dim=2), shift, dim=3)
    weights = shift_rows(shift_rows(shown, shift, dim=2), shift, dim=3)
    return (weights.to(value.dtype) @ value.transpose(1, 2)).transpose(1, 2), shown


def pool(
    hidden_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, config
) -> torch.Tensor:
    """
    The vector of the token that has seen the whole row: the last one when attention is causal, the first one
    otherwise.

    Args:
        hidden_states: `[B, L, size]`.
        input_ids: `[B, L]`; without `attention_mask` their `pad_token_id`s count as padding.
        attention_mask: `[B, L]`, bool or numbers, nonzero for real tokens.

    Returns:
        `[B, size]`.
    """
    if attention_mask is None and input_ids is not None and config.pad_token_id is not None:
        attention_mask = input_ids != config.pad_token_id
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
    is_real = attention_mask.bool()
    token = last_real_token(is_real) if config.is_decoder else first_real_token(is_real)
    return hidden_states[torch.arange(token.shape[0], device=token.device), token]
