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
    A vector for each row, or for each document, by `config.classifier_pooling`.

    With "token" it is that of the token that has seen everything: the last one when attention is causal, the first one
    otherwise. With "mean" it is the mean of all tokens' vectors.

    Args:
        hidden_states: `[B, L, size]`.
        input_ids: `[B, L]`; without `attention_mask` their `pad_token_id`s count as padding.
        attention_mask: `[B, L]`, bool or numbers, nonzero for real tokens.
        numbers: `[B, L]`, which document of its row each token belongs to, 0 for padding; None if a row is one.

    Returns:
        `[B, size]`; with `numbers` a vector for each document, row by row.
    """
    takes_mean = config.classifier_pooling == "mean"
    if numbers is not None:
        # Also of the neighbour that a row does not have.
        outside = torch.nn.functional.pad(numbers, (1, 1))
        at_next = takes_mean or config.is_decoder
        is_end = (numbers > 0) & (numbers != (outside[:, 2:] if at_next else outside[:, :-2]))
        return _mean_of_documents(hidden_states, numbers > 0, is_end) if takes_mean else hidden_states[is_end]
    if attention_mask is None and input_ids is not None and config.pad_token_id is not None:
        attention_mask = input_ids != config.pad_token_id
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
    is_real = attention_mask.bool()
    if takes_mean:
        return mean_of_rows(hidden_states, is_real).to(hidden_states.dtype)
    token = last_real_token(is_real) if config.is_decoder else first_real_token(is_real)
    return hidden_states[torch.arange(token.shape[0], device=token.device), token]


def mean_of_rows(hidden_states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """The mean of each row's real tokens, `[B, size]`, float32 at least; zeros for a row without any."""
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    # What stands in the place of padding may be no number.
    total = wide.masked_fill(~is_real[..., None], 0).sum(dim=1)
    return total / is_real.sum(dim=1, keepdim=True).clamp(min=1)


def _mean_of_documents(hidden_states, is_real, is_last):
    """The mean of each document's tokens, `[documents, size]`; the last token of each is marked."""
    wide = hidden_states[is_real].to(torch.promote_types(hidden_states.dtype, torch.float32))
    ends = is_last[is_real]
    document = ends.cumsum(0) - ends.long()
    total = wide.new_zeros(int(ends.sum()), wide.shape[1]).index_add(0, document, wide)
    return (total / document.bincount(minlength=len(total))[:, None]).to(hidden_states.dtype)
