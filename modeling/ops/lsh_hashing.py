"""
Locality-sensitive hashing of vectors into buckets, and the order in which LSH attention visits tokens.

Angular hashing (paper section 2, "Locality sensitive hashing"; Andoni et al. 2015, arXiv 1509.02897): a vector `x` is
rotated by a random Gaussian matrix `R` and falls into the bucket `argmax([xR; -xR])`.

Shapes: B batch, L length, H heads, D head size, R hashing rounds, F bucket factors.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .chunking import padded_to_multiple
from .operators import operator
from .triton_support import DTYPES, HEAD_SIZES, why_not_on


# Projected elements that are computed at once.
PROJECTIONS_AT_ONCE = 2**22
# More than any sequence has.
MOST_POSITIONS = 2**32


def bucket_factors(num_buckets: int | Sequence[int]) -> tuple[int, ...]:
    """The factors of `num_buckets`, which is one even number or a sequence of them."""
    return (num_buckets,) if isinstance(num_buckets, int) else tuple(num_buckets)


def default_num_buckets(length: int, chunk_length: int, max_position_embeddings: int) -> int | list[int]:
    """
    The number of buckets that stock Reformer picks for `length` tokens: the power of two below `2 * length /
    chunk_length`, in two factors when it is large.

    Args:
        length: Tokens, padding included; more than `chunk_length`.
        chunk_length: Tokens per chunk of the LSH layers.
        max_position_embeddings: Longest input of the model; it only moves the point from which two factors are used.
    """
    exponent = (2 * (length // chunk_length)).bit_length() - 1
    largest_single_factor = 2 * max(int((max_position_embeddings // chunk_length) ** 0.5), chunk_length)
    if 2**exponent > largest_single_factor:
        return [2 ** (exponent // 2), 2 ** (exponent - exponent // 2)]
    return 2**exponent


def num_buckets_of(config, length: int, circle_length: int | None) -> int | list[int]:
    """The config's number of buckets, or the default for `length` tokens, padded to `circle_length` if it is given."""
    # CODEPATH: published checkpoints give the number; stock's default config leaves it to the length.
    if config.num_buckets is not None:
        return config.num_buckets
    padded_length = circle_length or padded_to_multiple(length, config.lsh_attn_chunk_length)
    return default_num_buckets(padded_length, config.lsh_attn_chunk_length, config.max_position_embeddings)


def draw_rotations(
    num_heads: int,
    head_size: int,
    num_hashes: int,
    num_buckets: int | Sequence[int],
    *,
    device: torch.device,
    seed: int | None = None,
) -> torch.Tensor:
    """
    Random rotations for `hash_vectors`.

    Args:
        num_heads, head_size, num_hashes: Sizes H, D and R.
        num_buckets: Even number of buckets, or a sequence of even factors.
        device: Where the rotations are needed.
        seed: With a seed the rotations come from a private generator on the CPU, hence are the same on every device,
            and equal those of stock Reformer with `hash_seed`. Without one they come from the default generator of
            `device`.

    Returns:
        `[H, D, R, sum(factors) / 2]`, float32.
    """
    shape = (num_heads, head_size, num_hashes, sum(bucket_factors(num_buckets)) // 2)
    if seed is None:
        return torch.randn(shape, dtype=torch.float32, device=device)
    # An exported program would hold the generator and draw on from it at each call; hidden from `torch.export`, the
    # numbers become a constant of the program.
    with _disable_current_modes() if torch.compiler.is_exporting() else nullcontext():
        rotations = _draw_from_seed(shape, seed)
    return rotations.to(device)


@operator("(SymInt[] shape, int seed) -> Tensor", lambda shape, seed: torch.empty(shape, dtype=torch.float32))
def _draw_from_seed(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float32, generator=generator)


@torch.no_grad()
def hash_vectors(
    vectors: torch.Tensor,
    rotations: torch.Tensor,
    num_buckets: int | Sequence[int],
    implementation: str | None = None,
) -> torch.Tensor:
    """
    Buckets of vectors under each round's rotation.

    With factors `[a, b]` the bucket is `first + a * second`, where each part is hashed with columns of its own.

    Args:
        vectors: `[B, L, H, D]`, floating point.
        rotations: `[H, D, R, sum(factors) / 2]`, from `draw_rotations`.
        num_buckets: What `rotations` was drawn for.
        implementation: Of the attention. With "triton", and on a CUDA device without a choice, a kernel hashes if it
            can; projections that differ in the last digit may then compare in another way.

    Returns:
        `[B, H, R, L]`, int32, values in `[0, prod(factors))`.
    """
    factors = bucket_factors(num_buckets)
    halves = [factor // 2 for factor in factors]
    is_possible = vectors.shape[3] in HEAD_SIZES and vectors.dtype in DTYPES and len(factors) <= 2
    if is_possible and _takes_kernels(vectors, implementation):
        return _triton_hash(vectors, rotations, halves)
    vectors = vectors.transpose(1, 2)
    rotations = rotations.to(vectors.dtype)
    # Round by round and piece by piece, the projections are never larger than the vectors, nor than a system gives out
    # again without clearing it.
    width = rotations.shape[3]
    pieces = (vectors,)
    # An exported program serves all lengths, whatever their number of pieces.
    if not torch.compiler.is_exporting():
        at_once = min(vectors.numel(), PROJECTIONS_AT_ONCE)
        pieces = vectors.split(max(1, at_once // (vectors.shape[0] * vectors.shape[1] * width)), dim=2)
    rounds = []
    for rotation in rotations.unbind(2):
        hashed = [_hash_one_piece(piece, rotation, halves) for piece in pieces]
        rounds.append(torch.cat(hashed, dim=2))
    return torch.stack(rounds, dim=2)


def _hash_one_piece(vectors: torch.Tensor, rotations: torch.Tensor, halves: list[int]) -> torch.Tensor:
    parts, stride = [], 1
    for projection, half in zip((vectors @ rotations).split(halves, dim=-1), halves, strict=True):
        largest, argmax = projection.max(dim=-1)
        smallest, argmin = projection.min(dim=-1)
        parts.append(stride * torch.where(largest >= -smallest, argmax, argmin + half))
        stride *= 2 * half
    return reduce(torch.add, parts).to(torch.int32)


def _takes_kernels(tensor: torch.Tensor, implementation: str | None) -> bool:
    is_wanted = implementation == "triton" or (implementation is None and tensor.device.type == "cuda")
    return is_wanted and why_not_on(tensor.device) is None


def sort_by_bucket(
    buckets: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    num_buckets: int | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """
    Positions of each round in the order (bucket, position), masked tokens last.

    Args:
        buckets: `[B, H, R, L]`, integer.
        attention_mask: `[B, L]`, bool, True for real tokens.
        num_buckets: What all buckets are below, if it is known, and none is negative.
        implementation: Of the attention. Kernels sort where it is "triton", or none on a CUDA device, and
            `num_buckets` is known; the order is the same.

    Returns:
        `[B, H, R, L]`, int32: entry `s` is the position that stands at place `s` of the sorted round.
    """
    if num_buckets is not None and _takes_kernels(buckets, implementation):
        return _triton_sort(buckets, attention_mask, num_buckets)
    if attention_mask is not None:
        after_all_buckets = torch.iinfo(buckets.dtype).max
        buckets = buckets.masked_fill(~attention_mask[:, None, None, :], after_all_buckets)
    if torch.compiler.is_exporting():
        # ONNX knows no stable order, so no two numbers may be equal.
        positions = torch.arange(buckets.shape[-1], device=buckets.device)
        return torch.sort(buckets.long() * MOST_POSITIONS + positions, dim=-1).indices.int()
    return torch.sort(buckets, dim=-1, stable=True).indices.int()


def _shape_of_hash(vectors, rotations, halves):
    batch, length, heads, _ = vectors.shape
    return vectors.new_empty((batch, heads, rotations.shape[2], length), dtype=torch.int32)


def _shape_of_order(buckets, attention_mask, num_buckets):
    return buckets.new_empty(buckets.shape, dtype=torch.int32)


@operator("(Tensor vectors, Tensor rotations, int[] halves) -> Tensor", _shape_of_hash)
def _triton_hash(vectors, rotations, halves):
    from ..kernels.triton_hash_launch import hash_with_kernels

    return hash_with_kernels(vectors, rotations, halves)


@operator("(Tensor buckets, Tensor? attention_mask, SymInt num_buckets) -> Tensor", _shape_of_order)
def _triton_sort(buckets, attention_mask, num_buckets):
    from ..kernels.triton_hash_launch import sort_with_kernels

    return sort_with_kernels(buckets, attention_mask, num_buckets)
