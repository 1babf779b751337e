"""
Local attention as an operator on projected vectors: one of several implementations runs.

Shapes: B batch, L length, H heads, D head size, P padded length.
"""

import torch
from torch import nn

from .chunking import may_pad, pad_mask, padded_to_multiple
from .implementations import Implementation, choose_implementation
from .local_eager import local_attention_eager
from .local_options import LocalOptions
from .local_sdpa import local_attention_sdpa, why_not_sdpa
from .local_triton import local_attention_triton
from .triton_support import why_not_triton


LOCAL_IMPLEMENTATIONS = {
    "triton": Implementation(local_attention_triton, why_not_triton, is_default_on=("cuda",)),
    # PyTorch's fused kernel for the CPU is slow in bfloat16, up to ten times slower than products of small matrices.
    "sdpa": Implementation(
        local_attention_sdpa,
        why_not_sdpa,
        is_default_on=("cpu", "cuda"),
        not_by_default=(("cpu", torch.bfloat16),),
    ),
    "eager": Implementation(local_attention_eager),
}


def local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    causal: bool = False,
    circular_look_around: bool = True,
    dropout_p: float = 0.0,
    attention_mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    padded_length: int | None = None,
    return_weights: bool = False,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention of each chunk of tokens to itself and its neighbours.

    Args:
        query, key, value: `[B, L, H, D]`, one floating dtype.
        chunk_length and those after it: The attributes of `LocalOptions`.
        attention_mask: `[B, L]`, bool, True for real tokens.
        documents: `[B, L]`, integer, not negative: which document of its row a token belongs to. None attends to
            another. None if a row is one.
        padded_length: Tokens in all chunks, padding included; a multiple of `chunk_length`, by default the next one.
            It changes results only with `circular_look_around`.
        return_weights: Also return the attention probabilities, dense: `[B, H, L, L]`.
        implementation: One of `LOCAL_IMPLEMENTATIONS`, or None for the fastest that can do what is asked.

    Returns:
        Output `[B, L, H, D]`, and the attention map or None.

    Raises:
        ValueError: An implementation that is not there or cannot do what is asked.
    """
    batch, length = query.shape[:2]
    options = LocalOptions(
        chunk_length=chunk_length,
        num_chunks_before=num_chunks_before,
        num_chunks_after=num_chunks_after,
        padded_length=padded_to_multiple(length, chunk_length) if padded_length is None else padded_length,
        causal=causal,
        circular_look_around=circular_look_around,
        dropout_p=dropout_p,
    )
    attend = choose_implementation(
        LOCAL_IMPLEMENTATIONS, implementation, query, options, return_weights, has_documents=documents is not None
    )
    added = options.padded_length - length
    if may_pad(added):
        attention_mask = pad_mask(attention_mask, batch, length, options.padded_length, query.device)
        documents = None if documents is None else nn.functional.pad(documents, (0, added), value=-1)
    return attend(query, key, value, attention_mask, documents, options, return_weights)
