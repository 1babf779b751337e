"""
Hashing and sorting for LSH attention as Triton kernels.

A vector is projected, compared and put into its bucket without the projections ever being in memory. Sorting counts:
tokens are moved by one digit of their bucket's number after another, the lowest first, and keep their order otherwise.
Each digit takes a kernel that counts, a running sum and a kernel that moves; nothing is added up atomically, so two
runs agree. Tokens that are masked come last, as if in a bucket of their own.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

from .triton_kernels import jit, tl


@jit
def _extremes(rows, rotations, row_stride, HALF: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr):
    """Where `[xR; -xR]` is largest, for `[block, D]` rows x and the first `HALF` columns of R; the first of equals."""
    largest = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    smallest = tl.full([rows.shape[0]], float("inf"), tl.float32)
    argmax = tl.zeros([rows.shape[0]], tl.int32)
    argmin = tl.zeros([rows.shape[0]], tl.int32)
    for start in range(0, HALF, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        pointers = rotations + tl.arange(0, rows.shape[1])[:, None] * row_stride + column[None, :]
        rotation = tl.load(pointers, mask=(column < HALF)[None, :], other=0.0)
        left = rows
        if WIDEN:
            left, rotation = left.to(tl.float32), rotation.to(tl.float32)
        # Rounded as a matrix product in the dtype of the vectors is, so that the same ones are equal.
        projection = tl.dot(left, rotation, input_precision="ieee").to(rows.dtype).to(tl.float32)
        highs = tl.where((column < HALF)[None, :], projection, float("-inf"))
        lows = tl.where((column < HALF)[None, :], projection, float("inf"))
        high, high_column = tl.max(highs, 1, return_indices=True)
        low, low_column = tl.min(lows, 1, return_indices=True)
        argmax = tl.where(high > largest, start + high_column, argmax)
        argmin = tl.where(low < smallest, start + low_column, argmin)
        largest, smallest = tl.maximum(largest, high), tl.minimum(smallest, low)
    return tl.where(largest >= -smallest, argmax, argmin + HALF)


@jit
def hash_kernel(
    vectors,
    rotations,
    buckets,
    strides,
    sizes,
    ROUNDS: tl.constexpr,
    HALF: tl.constexpr,
    SECOND_HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """
    Buckets of a block of vectors in all rounds, as `lsh_hashing.hash_vectors` finds them.

    Args:
        vectors: `[B, L, H, D]` with `strides` of B, L and H.
        rotations: `[H, D, R, HALF + SECOND_HALF]`, in the dtype of the vectors.
        buckets: `[B, H, R, L]`, int32; written.
        sizes: H, L.
        HALF, SECOND_HALF: Half of each factor of the number of buckets; the second is 0 if there is one factor.
    """
    heads, length = sizes
    blocks = tl.cdiv(length, BLOCK)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    batch_row, head = batch_head // heads, batch_head % heads
    pointers = vectors + batch_row * strides[0] + head * strides[2] + position.to(tl.int64)[:, None] * strides[1]
    rows = tl.load(pointers + tl.arange(0, SIZE)[None, :], mask=(position < length)[:, None], other=0.0)
    row_stride = ROUNDS * (HALF + SECOND_HALF)
    rotations += head * SIZE * row_stride
    for r in range(ROUNDS):
        columns = rotations + r * (HALF + SECOND_HALF)
        bucket = _extremes(rows, columns, row_stride, HALF, COLUMNS, WIDEN)
        if SECOND_HALF:
            bucket += 2 * HALF * _extremes(rows, columns + HALF, row_stride, SECOND_HALF, COLUMNS, WIDEN)
        tl.store(buckets + (batch_head * ROUNDS + r) * length + position, bucket, mask=position < length)


@jit
def _locate_tile(length, TILE: tl.constexpr):
    """This program's row of tokens, its tile of the row, and how many tiles a row has."""
    tiles = tl.cdiv(length, TILE)
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles, tiles


@jit
def _load_digits(
    buckets,
    key_mask,
    positions,
    sizes,
    shift,
    IS_FIRST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One digit of each token in a tile, the token's position, and which places of the tile are there."""
    rows_per_mask, length, num_buckets = sizes
    row, tile, _ = _locate_tile(length, TILE)
    place = tile * TILE + tl.arange(0, TILE)
    exists = place < length
    position = place
    if not IS_FIRST:
        position = tl.load(positions + row * length + place, mask=exists, other=0)
    bucket = tl.load(buckets + row * length + position, mask=exists, other=0)
    if HAS_MASK:
        is_real = tl.load(key_mask + row // rows_per_mask * length + position, mask=exists, other=0) != 0
        bucket = tl.where(is_real, bucket, num_buckets)
    return (bucket >> shift) & ((1 << BITS) - 1), position, exists


@jit
def count_digits_kernel(
    buckets,
    key_mask,
    positions,
    counts,
    sizes,
    shift,
    IS_FIRST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """
    How often each digit occurs in a tile.

    Args:
        buckets: `[B, H, R, P]`, int32, in `[0, num_buckets)`.
        key_mask: `[B, P]`, int8; read with `HAS_MASK`.
        positions: `[B, H, R, P]`, int32: the order so far; read unless `IS_FIRST`.
        counts: `[B * H * R, digits, tiles]`, int32; written.
        sizes: H * R, P, num_buckets.
        shift: Bits below the digit, which has `BITS`.
    """
    digit, _, exists = _load_digits(buckets, key_mask, positions, sizes, shift, IS_FIRST, HAS_MASK, BITS, TILE)
    row, tile, tiles = _locate_tile(sizes[1], TILE)
    digits = tl.arange(0, 1 << BITS)
    found = tl.histogram(digit, 1 << BITS, mask=exists)
    tl.store(counts + (row * (1 << BITS) + digits) * tiles + tile, found)


@jit
def move_by_digit_kernel(
    buckets,
    key_mask,
    positions,
    counts,
    ends,
    moved,
    sizes,
    shift,
    IS_FIRST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """
    Move the tokens of a tile to where their digit belongs.

    Args:
        counts, ends: `[B * H * R, digits, tiles]`, int32: from `count_digits_kernel`, and their running sum per row.
        moved: `[B, H, R, P]`, int32: the order by this digit and all before; written.
        **others: As of `count_digits_kernel`.
    """
    digit, position, exists = _load_digits(buckets, key_mask, positions, sizes, shift, IS_FIRST, HAS_MASK, BITS, TILE)
    row, tile, tiles = _locate_tile(sizes[1], TILE)
    # Different numbers, hence in the order in which they came where the digit is the same.
    slot = tl.arange(0, TILE)
    packed = tl.sort(tl.where(exists, digit, 1 << BITS) * TILE + slot)
    came_from, digit = packed % TILE, packed // TILE
    in_tile = (row * (1 << BITS) + tl.arange(0, 1 << BITS)) * tiles + tile
    count = tl.load(counts + in_tile)
    first = tl.load(ends + in_tile) - count
    # The tokens of a digit follow each other both in the tile and where they go.
    offset = tl.gather(first - (tl.cumsum(count, 0) - count), tl.minimum(digit, (1 << BITS) - 1), 0)
    position = tl.gather(position, came_from, 0)
    tl.store(moved + row * sizes[1] + offset + slot, position, mask=digit < (1 << BITS))
