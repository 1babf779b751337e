"""Language-model loss in chunks: the logits of a long sequence never exist all at once."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    *,
    chunk_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """
    Cross-entropy of `head(hidden_states)` against `labels`, a piece of the sequence at a time, recomputed in backward.

    Args:
        hidden_states: `[B, L, size]`.
        head: Maps `[B, l, size]` to logits `[B, l, vocab_size]`.
        labels: `[B, L]`, aligned with the logits (already shifted for causal models).
        chunk_size: Tokens of each sequence per piece, at least 1.
        num_items_in_batch: Divide the summed loss by this instead of by the number of labels that count.
        ignore_index: Labels that do not count.

    Returns:
        Scalar, float32 (float64 for float64 input), nats per item.
    """

    def summed_loss(piece, piece_labels):
        logits = head(piece)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        return nn.functional.cross_entropy(logits, piece_labels.flatten(), ignore_index=ignore_index, reduction="sum")

    labels = labels.to(hidden_states.device)
    pieces = zip(hidden_states.split(chunk_size, dim=1), labels.split(chunk_size, dim=1), strict=True)
    losses = [checkpoint(summed_loss, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    items = (labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return torch.stack(losses).sum() / items
