"""
LSH attention as an operator on projected vectors: one of several implementations runs.

Shapes: B batch, L length, H heads, D head size, R hashing rounds.

The squared length of a vector must fit in float32. As every float32 score is rounded, so are probabilities, in
proportion to the query's length; fused kernels round once more, as they keep a log-sum-exp only. Where keys are
equally near to queries longer than 1e5, their gradients need "eager". In float16 on a GPU, "sdpa" takes queries
shorter than 16,000.

Example:

>>> import torch
>>> from hf_reformer.modeling.ops.lsh_hashing import draw_rotations, hash_vectors
>>> query_key, value = torch.randn(2, 1, 100, 4, 16)
>>> rotations = draw_rotations(4, 16, num_hashes=2, num_buckets=8, device=query_key.device, seed=0)
>>> buckets = hash_vectors(query_key, rotations, num_buckets=8)
>>> output, _ = lsh_attention(query_key, value, buckets, chunk_length=32, causal=True)
>>> output.shape
torch.Size([1, 100, 4, 16])
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from .chunking import may_pad, pad_mask, padded_to_multiple
from .implementations import Implementation, choose_implementation
from .lsh_eager import lsh_attention_eager
from .lsh_hashing import bucket_factors, sort_by_bucket
from .lsh_options import LSHOptions
from .lsh_sdpa import lsh_attention_sdpa, why_not_sdpa
from .lsh_triton import lsh_attention_triton
from .triton_support import why_not_triton
from .value_shift import of_shifted, shift_values


# What int32 holds.
MOST_BUCKETS = 2**31 - 1
LSH_IMPLEMENTATIONS = {
    "triton": Implementation(lsh_attention_triton, why_not_triton, is_default_on=("cuda",)),
    "sdpa": Implementation(lsh_attention_sdpa, why_not_sdpa, is_default_on=("cpu", "cuda")),
    "eager": Implementation(lsh_attention_eager),
}


def lsh_attention(
    query_key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    *,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    causal: bool = False,
    circular_look_around: bool = True,
    attend_across_buckets: bool = True,
    allow_duplicate_attention: bool = True,
    sliding_window: bool = False,
    value_shift: int = 0,
    dropout_p: float = 0.0,
    attention_mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    padded_length: int | None = None,
    return_weights: bool = False,
    num_buckets: int | Sequence[int] | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    `attend_by_hash` for callers without a layer: with the attributes of `LSHOptions` as arguments, which are checked.

    With `value_shift=1` it shifts the values, and a column of the map is what a query reads of that token's value.
    Shapes and results are else those of `attend_by_hash`; the attention mask may be of any dtype, nonzero for real
    tokens.

    Raises:
        ValueError: Shapes or values that do not fit together; an implementation that cannot do what is asked.
    """
    options = LSHOptions(
        chunk_length=chunk_length,
        num_chunks_before=num_chunks_before,
        num_chunks_after=num_chunks_after,
        causal=causal,
        circular_look_around=circular_look_around,
        attend_across_buckets=attend_across_buckets,
        allow_duplicate_attention=allow_duplicate_attention,
        sliding_window=sliding_window,
        value_shift=value_shift,
        dropout_p=dropout_p,
    )
    _check_shapes(query_key, value, buckets, attention_mask)
    _check_padded_length(padded_length, query_key.shape[1], chunk_length)
    attention_mask = None if attention_mask is None else attention_mask.bool()
    output, weights = attend_by_hash(
        query_key,
        shift_values(value, attention_mask, documents) if value_shift else value,
        buckets,
        options,
        attention_mask=attention_mask,
        documents=documents,
        padded_length=padded_length,
        return_weights=return_weights,
        num_buckets=num_buckets,
        implementation=implementation,
    )
    return of_shifted(output, weights, attention_mask, documents) if value_shift else (output, weights)


def attend_by_hash(
    query_key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor | None,
    options: LSHOptions,
    *,
    attention_mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    padded_length: int | None = None,
    return_weights: bool = False,
    num_buckets: int | Sequence[int] | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention of each token to the tokens near it in the order of hash buckets (paper section 2, "LSH attention").

    Each round sorts the tokens by bucket and position and cuts the order into chunks; a chunk attends to itself and
    its neighbours. Keys are the queries at unit length, scores are their dot products, and a token attends to itself
    only when it has nothing else. The rounds are combined as one softmax over everything they found.

    Args:
        query_key, value: `[B, L, H, D]`, one floating dtype; with `options.value_shift` what the keys carry.
        buckets: `[B, H, R, L]`, integer, from `lsh_hashing.hash_vectors`; or None for dense attention with shared
            queries and keys: one bucket and one chunk hold everything.
        attention_mask: `[B, L]`, bool, True for real tokens. Masked ones are sorted last and do not influence those.
        documents: `[B, L]`, integer, from 0 to L: which document of its row a token belongs to. No document attends to
            another, and masked tokens are sorted last in theirs. Pass None if each row is one document.
        padded_length: Length of a round on the circle: a multiple of `chunk_length`, by default the next one.
        return_weights: Also return the attention probabilities, `[B, H, L, L]`.
        num_buckets: What the vectors were hashed with, if it is known; kernels can then sort by counting.
        implementation: One of `LSH_IMPLEMENTATIONS`, or None for the fastest that can do what is asked.

    Returns:
        Output `[B, L, H, D]`, and the attention map or None.

    Raises:
        ValueError: An implementation that cannot do what is asked.
    """
    if buckets is None:
        buckets, options, num_buckets = _in_one_bucket(query_key, options)
    attend = choose_implementation(
        LSH_IMPLEMENTATIONS, implementation, query_key, options, return_weights, has_documents=documents is not None
    )
    padded_length = padded_length or padded_to_multiple(buckets.shape[3], options.chunk_length)
    most = None if num_buckets is None else math.prod(bucket_factors(num_buckets))
    if documents is not None:
        attention_mask = torch.ones_like(documents, dtype=torch.bool) if attention_mask is None else attention_mask
        buckets, most = _buckets_of_documents(buckets, attention_mask, documents, most)
    key_mask, document_of = attention_mask, documents
    if may_pad(padded_length - buckets.shape[3]):
        buckets, key_mask, document_of = _pad(buckets, key_mask, document_of, padded_length, most)
    order = sort_by_bucket(buckets, key_mask if documents is None else None, most, implementation)
    return attend(query_key, value, buckets, order, key_mask, document_of, options, return_weights)


def _in_one_bucket(query_key, options):
    """Buckets and options with which every token meets every other one once, and the number of buckets."""
    batch, length, heads, _ = query_key.shape
    options = replace(
        options,
        chunk_length=length,
        num_chunks_before=0,
        num_chunks_after=0,
        circular_look_around=True,
        attend_across_buckets=True,
        allow_duplicate_attention=True,
        sliding_window=False,
    )
    return torch.zeros(batch, heads, 1, length, dtype=torch.int32, device=query_key.device), options, 1


def _pad(buckets, attention_mask, documents, padded_length, num_buckets):
    """What is known of each position, filled up with masked tokens: buckets, mask and documents."""
    batch, _, _, length = buckets.shape
    added = padded_length - length
    attention_mask = pad_mask(attention_mask, batch, length, padded_length, buckets.device)
    if documents is None:
        return nn.functional.pad(buckets, (0, added)), attention_mask, None
    last = torch.iinfo(buckets.dtype).max if num_buckets is None else num_buckets - 1
    return (
        nn.functional.pad(buckets, (0, added), value=last),
        attention_mask,
        nn.functional.pad(documents, (0, added), value=-1),
    )


def _buckets_of_documents(buckets, attention_mask, documents, num_buckets):
    """
    Buckets that no two documents share, one more in each for its masked tokens, and how many there may be.

    None for more than kernels sort, which is 32 bits.
    """
    if num_buckets is None:
        num_buckets = int(buckets.max()) + 1
    most = (buckets.shape[3] + 2) * (num_buckets + 1)
    if most > MOST_BUCKETS:
        buckets, most = buckets.long(), None
    inside = torch.where(attention_mask[:, None, None], buckets, num_buckets).to(buckets.dtype)
    buckets = inside + documents[:, None, None].to(buckets.dtype) * (num_buckets + 1)
    return buckets, most if buckets.dtype == torch.int32 else None


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


def _check_padded_length(padded_length, length, chunk_length):
    if padded_length is not None and (padded_length < length or padded_length % chunk_length):
        raise ValueError(
            f"`padded_length` must be a multiple of `chunk_length={chunk_length}` that holds {length} tokens, but is "
            f"{padded_length}."
        )
