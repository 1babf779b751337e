"""
LSH attention as an operator on projected vectors: the arguments are checked here, then one implementation runs.

Shapes: B batch, L length, H heads, D head size, R hashing rounds.
"""

import torch

from .chunking import pad_mask, pad_rows, padded_to_multiple
from .lsh_eager import lsh_attention_eager
from .lsh_hashing import sort_by_bucket


LSH_IMPLEMENTATIONS = {"eager": lsh_attention_eager}


def lsh_attention(
    query_key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    *,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    causal: bool = False,
    attention_mask: torch.Tensor | None = None,
    circular_look_around: bool = True,
    attend_across_buckets: bool = True,
    allow_duplicate_attention: bool = True,
    dropout_p: float = 0.0,
    padded_length: int | None = None,
    return_weights: bool = False,
    implementation: str = "eager",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention of each token to the tokens near it in the order of hash buckets (paper section 2, "LSH attention").

    Each round sorts the tokens by bucket and position and cuts the order into chunks; a chunk attends to itself and
    its neighbours. Keys are the queries at unit length, scores are their dot products, and a token attends to itself
    only when it has nothing else. The rounds are combined as one softmax over everything they found.

    Args:
        query_key, value: `[B, L, H, D]`, one floating dtype.
        buckets: `[B, H, R, L]`, integer, from `lsh_hashing.hash_vectors`.
        chunk_length: Tokens per chunk. Any length L works; the last chunk is filled up with masked tokens.
        num_chunks_before, num_chunks_after: Neighbouring chunks looked at.
        causal: Attend to earlier positions only.
        attention_mask: `[B, L]`, bool or numbers, nonzero for real tokens. Masked tokens are sorted last and have no
            influence on real ones.
        circular_look_around: The first chunk's predecessor is the last one, with all rounds on one circle.
        attend_across_buckets: Attend to other buckets within reach too.
        allow_duplicate_attention: Count a key once for each round that finds it, rather than once.
        dropout_p: Dropout on the attention probabilities.
        padded_length: Length of a round on the circle; a multiple of `chunk_length`, by default the next one. It
            changes results only with `circular_look_around`.
        return_weights: Also return the attention probabilities, dense: `[B, H, L, L]`.
        implementation: One of `LSH_IMPLEMENTATIONS`.

    Returns:
        Output `[B, L, H, D]`, and the attention map or None.

    Raises:
        ValueError: Shapes or values that do not fit together.

    Example:

    >>> import torch
    >>> from hf_reformer.modeling.lsh_hashing import draw_rotations, hash_vectors
    >>> query_key, value = torch.randn(2, 1, 100, 4, 16)
    >>> rotations = draw_rotations(4, 16, num_hashes=2, num_buckets=8, device=query_key.device, seed=0)
    >>> buckets = hash_vectors(query_key, rotations, num_buckets=8)
    >>> output, _ = lsh_attention(query_key, value, buckets, chunk_length=32, causal=True)
    >>> output.shape
    torch.Size([1, 100, 4, 16])
    """
    _check_shapes(query_key, value, buckets, attention_mask)
    _check_numbers(chunk_length, num_chunks_before, num_chunks_after, dropout_p)
    length = query_key.shape[1]
    if padded_length is None:
        padded_length = padded_to_multiple(length, chunk_length)
    elif padded_length < length or padded_length % chunk_length:
        raise ValueError(
            f"`padded_length` must be a multiple of `chunk_length={chunk_length}` that holds {length} tokens, but is "
            f"{padded_length}."
        )
    attend = lsh_implementation(implementation)
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
    key_mask = pad_mask(attention_mask, query_key.shape[0], length, padded_length, query_key.device)
    buckets = torch.nn.functional.pad(buckets, (0, padded_length - length))
    output, weights = attend(
        pad_rows(query_key, padded_length),
        pad_rows(value, padded_length),
        buckets,
        sort_by_bucket(buckets, key_mask),
        key_mask=key_mask,
        chunk_length=chunk_length,
        num_chunks_before=num_chunks_before,
        num_chunks_after=num_chunks_after,
        causal=causal,
        circular_look_around=circular_look_around,
        attend_across_buckets=attend_across_buckets,
        allow_duplicate_attention=allow_duplicate_attention,
        dropout_p=dropout_p,
        return_weights=return_weights,
    )
    output = output[:, :, :length].transpose(1, 2)
    return output, None if weights is None else weights[:, :, :length, :length]


def lsh_implementation(name: str):
    """The implementation called `name`; ValueError with the valid names for any other."""
    if name not in LSH_IMPLEMENTATIONS:
        raise ValueError(
            f"LSH attention has no implementation {name!r}; choose one of {sorted(LSH_IMPLEMENTATIONS)}. "
            "A model takes it as `attn_implementation`."
        )
    return LSH_IMPLEMENTATIONS[name]


def _check_shapes(query_key, value, buckets, attention_mask):
    if query_key.ndim != 4 or query_key.shape != value.shape:
        raise ValueError(
            f"`query_key` and `value` must share one shape [batch, length, heads, head size], but are "
            f"{list(query_key.shape)} and {list(value.shape)}."
        )
    batch, length, heads, _ = query_key.shape
    if not length:
        raise ValueError("`query_key` is empty: attention needs at least one token.")
    expected = (batch, heads, length)
    if buckets.ndim != 4 or (buckets.shape[0], buckets.shape[1], buckets.shape[3]) != expected or not buckets.shape[2]:
        raise ValueError(
            f"`buckets` must have shape [{batch}, {heads}, rounds, {length}] to fit `query_key`, but has "
            f"{list(buckets.shape)}."
        )
    if buckets.is_floating_point():
        raise ValueError(f"`buckets` must hold integers, but is {buckets.dtype}.")
    if attention_mask is not None and attention_mask.shape != (batch, length):
        raise ValueError(
            f"`attention_mask` must have shape [{batch}, {length}], but has {list(attention_mask.shape)}."
        )


def _check_numbers(chunk_length, num_chunks_before, num_chunks_after, dropout_p):
    if chunk_length < 1 or num_chunks_before < 0 or num_chunks_after < 0:
        raise ValueError(
            f"`chunk_length` must be at least 1 and the numbers of neighbouring chunks at least 0, but got "
            f"{chunk_length}, {num_chunks_before} before and {num_chunks_after} after."
        )
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"`dropout_p` is a probability and must be between 0 and 1, but got {dropout_p}.")
