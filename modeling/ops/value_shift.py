"""
Values of the successor: a key carries the value of the next token, so that a query reads what followed its like.

Shapes: B batch, L length, H heads, D head size.
"""

from typing import cast

import torch
from torch import nn


def next_real_token(attention_mask: torch.Tensor | None, documents: torch.Tensor | None = None) -> torch.Tensor:
    """
    The index of the first real token behind each place, `[B, L]`; L where there is none.

    Args:
        attention_mask: `[B, L]`, bool; or None with `documents`, if every token is real.
        documents: `[B, L]`, the document of each token; the next one of the same counts. None if a row is one.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(cast(torch.Tensor, documents), dtype=torch.bool)
    batch, length = attention_mask.shape
    places = torch.arange(length + 1, device=attention_mask.device)
    # By cumulative sums, because ONNX has no cumulative minimum: the place of the first real token, the second, ...
    number = attention_mask.long().cumsum(1)
    found = places[-1:].expand(batch, length + 2)
    found = found.scatter(1, torch.where(attention_mask, number, 0), places[:-1].expand(batch, -1))
    found = found.gather(1, number + 1)
    if documents is None:
        return found
    of_found = nn.functional.pad(documents, (0, 1)).gather(1, found)
    return torch.where(of_found == documents, found, length)


def shift_values(
    value: torch.Tensor, attention_mask: torch.Tensor | None, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Each token's value replaced by that of the next real token, by zeros behind the last one.

    Args:
        value: `[B, L, H, D]`.
        attention_mask: `[B, L]`, bool, or None if every token is real.
        documents: See `next_real_token`.
    """
    if attention_mask is None and documents is None:
        return nn.functional.pad(value[:, 1:], (0, 0, 0, 0, 0, 1))
    successor = next_real_token(attention_mask, documents)[:, :, None, None].expand(-1, -1, *value.shape[2:])
    return nn.functional.pad(value, (0, 0, 0, 0, 0, 1)).gather(1, successor)


def weights_of_values(
    weights: torch.Tensor, attention_mask: torch.Tensor | None, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Weights of keys to weights of what the keys carry: `weights_of_values(w) @ value` is `w @ shift_values(value)`.

    Args:
        weights: `[B, H, M, L]`, of M queries.
        attention_mask: `[B, L]`, bool, or None if every token is real.
        documents: See `next_real_token`.
    """
    if attention_mask is None and documents is None:
        return nn.functional.pad(weights[..., :-1], (1, 0))
    successor = next_real_token(attention_mask, documents)[:, None, None].expand_as(weights)
    return nn.functional.pad(torch.zeros_like(weights), (0, 1)).scatter_add(3, successor, weights)[..., :-1]


def of_shifted(
    output: torch.Tensor,
    weights: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Of attention to values from `shift_values`: the output, and the map by the token whose value is read.

    Args:
        output: `[B, L, H, D]`; masked queries read nothing.
        weights: The map `[B, H, L, L]` by keys, or None.
    """
    if weights is not None:
        weights = weights_of_values(weights, attention_mask, documents)
    return (output, weights) if attention_mask is None else zero_of_masked(output, weights, attention_mask)


def zero_of_masked(
    output: torch.Tensor, weights: torch.Tensor | None, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Masked queries read nothing: the next real token behind a key is not always before them.

    Args:
        output: `[B, M, H, D]`, of M queries.
        weights: Their map `[B, H, M, L]`, or None.
        attention_mask: `[B, M]`, bool, of the queries.
    """
    output = output * attention_mask[..., None, None]
    return output, None if weights is None else weights * attention_mask[:, None, :, None]
