"""
Launches of the kernels that hash and sort.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

from collections.abc import Sequence

import torch

from .lsh_triton import with_contiguous_rows
from .triton_hash_kernels import count_digits_kernel, hash_kernel, move_by_digit_kernel
from .triton_kernels import triton
from .triton_launch import IS_INTERPRETED, device_of


LEAST_COLUMNS = 16
TOKENS_PER_TILE, LEAST_TOKENS_PER_TILE = 1024, 32
MOST_BITS, LEAST_BITS = 8, 4


def hash_block(dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns that are multiplied at a time: in float32, without tensor cores, few, or registers run out."""
    return (32, 32) if dtype == torch.float32 else (128, 64)


def hash_with_kernels(vectors: torch.Tensor, rotations: torch.Tensor, halves: Sequence[int]) -> torch.Tensor:
    """
    Args:
        vectors: `[B, L, H, D]`, any strides.
        rotations: `[H, D, R, sum(halves)]`.
        halves: Half of each factor of the number of buckets, one or two.

    Returns:
        `[B, H, R, L]`, int32.
    """
    vectors = with_contiguous_rows(vectors)
    batch, length, heads, size = vectors.shape
    rounds = rotations.shape[2]
    buckets = torch.empty((batch, heads, rounds, length), dtype=torch.int32, device=vectors.device)
    block, most_columns = hash_block(vectors.dtype)
    columns = min(most_columns, max(LEAST_COLUMNS, triton.next_power_of_2(max(halves))))
    with device_of(vectors):
        hash_kernel[(triton.cdiv(length, block) * batch * heads,)](
            vectors, rotations.to(vectors.dtype).contiguous(), buckets, vectors.stride()[:3],
            (heads, length), ROUNDS=rounds, HALF=halves[0], SECOND_HALF=(*halves, 0)[1], COLUMNS=columns,
            BLOCK=block, SIZE=size, WIDEN=IS_INTERPRETED, num_warps=4, num_stages=1,
        )  # fmt: skip
    return buckets


def sort_with_kernels(buckets: torch.Tensor, key_mask: torch.Tensor | None, num_buckets: int) -> torch.Tensor:
    """
    Args:
        buckets: `[B, H, R, P]`, integers in `[0, num_buckets)`.
        key_mask: `[B, P]`, bool, or None if every token is real.

    Returns:
        `[B, H, R, P]`, int32: positions in the order (bucket, position), masked ones last.
    """
    batch, heads, rounds, length = buckets.shape
    # Numbers go up to `num_buckets`, which stands for what comes last.
    passes = triton.cdiv(num_buckets.bit_length(), MOST_BITS)
    bits = max(LEAST_BITS, triton.cdiv(num_buckets.bit_length(), passes))
    tile = min(TOKENS_PER_TILE, max(LEAST_TOKENS_PER_TILE, triton.next_power_of_2(length)))
    tiles = triton.cdiv(length, tile)
    rows = batch * heads * rounds
    buckets = buckets.int().contiguous()
    mask = buckets if key_mask is None else key_mask.contiguous().view(torch.int8)
    counts = torch.empty((rows, 2**bits, tiles), dtype=torch.int32, device=buckets.device)
    sizes = (heads * rounds, length, num_buckets)
    order = buckets
    with device_of(buckets):
        for i in range(passes):
            facts = {"IS_FIRST": i == 0, "HAS_MASK": key_mask is not None, "BITS": bits, "TILE": tile, "num_warps": 4}
            count_digits_kernel[(rows * tiles,)](buckets, mask, order, counts, sizes, i * bits, **facts)
            ends = counts.flatten(1).cumsum(1, dtype=torch.int32)
            moved = torch.empty_like(buckets)
            move_by_digit_kernel[(rows * tiles,)](buckets, mask, order, counts, ends, moved, sizes, i * bits, **facts)
            order = moved
    return order
