"""
Launches of the kernels that hash and sort.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

from collections.abc import Sequence

import torch

from .kernel_arguments import with_contiguous_rows
from .triton_hash_kernels import add_counts_kernel, hash_kernel, move_by_digit_kernel, sort_tiles_kernel
from .triton_kernels import triton
from .triton_launch import IS_INTERPRETED, launching_on


LEAST_COLUMNS = 16
# A digit and two numbers of tokens in a tile go into 31 bits.
TOKENS_PER_TILE, LEAST_TOKENS_PER_TILE = 1024, 32
MOST_BITS, LEAST_BITS = 11, 4
COUNTS_PER_PROGRAM = 1024
SORT_WARPS = 8  # a fourth faster than 4 on an H100


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
    half, second_half = halves if len(halves) == 2 else (*halves, 0)

    def columns_for(half):
        return min(most_columns, max(LEAST_COLUMNS, triton.next_power_of_2(half)))

    constants = {"ROUNDS": rounds, "HALF": half, "SECOND_HALF": second_half}
    constants |= {"COLUMNS": columns_for(half), "SECOND_COLUMNS": columns_for(second_half)}
    constants |= {"BLOCK": block, "SIZE": size}
    programs = triton.cdiv(length, block) * batch * heads
    rotations = rotations.to(vectors.dtype).contiguous()
    with launching_on(vectors) as launch:
        launch(
            hash_kernel, programs, vectors, rotations, buckets, vectors.stride()[:3], (heads, length),
            **constants, WIDEN=IS_INTERPRETED, num_warps=4, num_stages=1,
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
    has_mask = key_mask is not None
    # With a mask, `num_buckets` itself stands for what comes last.
    significant = (num_buckets - 1 + has_mask).bit_length()
    passes = max(1, triton.cdiv(significant, MOST_BITS))
    bits = max(LEAST_BITS, triton.cdiv(significant, passes))
    tile = min(TOKENS_PER_TILE, max(LEAST_TOKENS_PER_TILE, triton.next_power_of_2(length)))
    tiles, rows = triton.cdiv(length, tile), batch * heads * rounds
    digits = min(2**bits, 64)
    at_once = min(COUNTS_PER_PROGRAM // digits, triton.next_power_of_2(tiles))
    moving = {"BITS": bits, "TILE": tile, "num_warps": 4}
    sorting = moving | {"HAS_MASK": has_mask, "num_warps": SORT_WARPS}
    adding = {"BITS": bits, "DIGITS": digits, "TILES": at_once, "num_warps": 4}
    buckets = buckets.int().contiguous()
    mask = buckets if key_mask is None else key_mask.contiguous().view(torch.int8)
    totals = torch.empty((rows, 2**bits), dtype=torch.int32, device=buckets.device)
    sizes = (heads * rounds, length, num_buckets)
    order = buckets
    with launching_on(buckets) as launch:
        for i in range(passes):
            counts = torch.zeros((rows, tiles, 2**bits), dtype=torch.int32, device=buckets.device)
            sorted_tiles, moved = torch.empty_like(buckets), torch.empty_like(buckets)
            unsorted = (buckets, mask, order, sorted_tiles, counts, sizes, i * bits)
            launch(sort_tiles_kernel, rows * tiles, *unsorted, IS_FIRST=i == 0, **sorting)
            launch(add_counts_kernel, rows * (2**bits // digits), counts, totals, tiles, **adding)
            tiled = (sorted_tiles, order, counts, totals, moved, sizes)
            launch(move_by_digit_kernel, rows * tiles, *tiled, IS_FIRST=i == 0, **moving)
            order = moved
    return order
