"""Where a row's real tokens are, and the token that stands for a row."""

import torch


def first_real_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """`[B, L]`, bool, to the index of each row's first True, `[B]`; 0 in a row without any."""
    return attention_mask.int().argmax(dim=1)


def last_real_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """`[B, L]`, bool, to the index of each row's last True, `[B]`; 0 in a row without any."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * attention_mask).amax(dim=1)


def pool(
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    config,
    numbers: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The vector of the token that has seen the whole row, or the whole document: the last one when attention is causal,
    the first one otherwise.

    Args:
        hidden_states: `[B, L, size]`.
        input_ids: `[B, L]`; without `attention_mask` their `pad_token_id`s count as padding.
        attention_mask: `[B, L]`, bool or numbers, nonzero for real tokens.
        numbers: `[B, L]`, which document of its row each token belongs to, 0 for padding; None if a row is one.

    Returns:
        `[B, size]`; with `numbers` a vector for each document, row by row.
    """
    if numbers is not None:
        # Also of the neighbour that a row does not have.
        outside = torch.nn.functional.pad(numbers, (1, 1))
        neighbour = outside[:, 2:] if config.is_decoder else outside[:, :-2]
        return hidden_states[(numbers > 0) & (numbers != neighbour)]
    if attention_mask is None and input_ids is not None and config.pad_token_id is not None:
        attention_mask = input_ids != config.pad_token_id
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
    is_real = attention_mask.bool()
    token = last_real_token(is_real) if config.is_decoder else first_real_token(is_real)
    return hidden_states[torch.arange(token.shape[0], device=token.device), token]
