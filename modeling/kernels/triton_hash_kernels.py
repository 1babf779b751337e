"""
Hashing and sorting for LSH attention as Triton kernels.

A vector is projected, compared and put into its bucket without the projections ever being in memory. Sorting goes by
one digit of the bucket's number after another, the lowest first, and keeps the order otherwise. Each digit takes a
kernel that sorts short pieces and counts, one that adds the counts up and one that moves. Tokens that are masked come
last, as if in a bucket of their own.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

from .triton_kernels import jit, tl


@jit
def _hash(rows, rotations, row_stride, HALF: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr):
    """
    Where `[xR; -xR]` is largest, for `[block, D]` rows x and the first `HALF` columns of R; the first of equals.

    That is where xR is farthest from zero. Of numbers without a sign the bits compare as the numbers do, so one
    comparison of integers does it all: the projection's bits, and below them how early the column comes.
    """
    # A projection in half precision leaves the lowest 13 bits of a float32 free.
    IS_SHORT: tl.constexpr = (rows.dtype != tl.float32) and (2 * HALF <= 1 << 13)
    KEY: tl.constexpr = tl.int32 if IS_SHORT else tl.int64
    SHIFT: tl.constexpr = 0 if IS_SHORT else 32
    LAST: tl.constexpr = 2**13 - 1 if IS_SHORT else 2**31 - 1
    largest = tl.zeros([rows.shape[0]], KEY)
    for start in range(0, HALF, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        pointers = rotations + tl.arange(0, rows.shape[1])[:, None] * row_stride + column[None, :]
        if HALF % COLUMNS == 0:
            rotation = tl.load(pointers)
        else:
            rotation = tl.load(pointers, mask=(column < HALF)[None, :], other=0.0)
        left = rows
        if WIDEN:
            left, rotation = left.to(tl.float32), rotation.to(tl.float32)
        # Rounded as a matrix product in the dtype of the vectors is, so that the same ones are equal.
        projection = tl.dot(left, rotation, input_precision="ieee").to(rows.dtype).to(tl.float32)
        earliness = LAST - tl.where(projection < 0, HALF + column[None, :], column[None, :])
        bits = projection.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        key = (bits.to(KEY) << SHIFT) | earliness
        if HALF % COLUMNS != 0:
            key = tl.where((column < HALF)[None, :], key, 0)
        largest = tl.maximum(largest, tl.max(key, 1))
    return LAST - (largest & LAST).to(tl.int32)


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
    SECOND_COLUMNS: tl.constexpr,
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
        COLUMNS, SECOND_COLUMNS: How many of them are multiplied at a time.
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
        bucket = _hash(rows, columns, row_stride, HALF, COLUMNS, WIDEN)
        if SECOND_HALF:
            bucket += 2 * HALF * _hash(rows, columns + HALF, row_stride, SECOND_HALF, SECOND_COLUMNS, WIDEN)
        tl.store(buckets + (batch_head * ROUNDS + r) * length + position, bucket, mask=position < length)


@jit
def _locate_tile(length, TILE: tl.constexpr):
    """This program's row of tokens, and its tile of the row."""
    tiles = tl.cdiv(length, TILE)
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles


@jit
def _larger(left, right):
    return tl.maximum(left, right)


@jit
def sort_tiles_kernel(
    buckets,
    key_mask,
    positions,
    sorted_tiles,
    counts,
    sizes,
    shift,
    IS_FIRST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """
    Sort the tokens of a tile by one digit, and count how often each digit occurs.

    Args:
        buckets: `[B, H, R, P]`, int32, in `[0, num_buckets)`.
        key_mask: `[B, P]`, int8; read with `HAS_MASK`.
        positions: `[B, H, R, P]`, int32: the order so far; read unless `IS_FIRST`.
        sorted_tiles: `[B, H, R, P]`, int32; written: of each token `(digit * TILE + rank) * TILE + place`, where the
            rank counts tokens with that digit before it in the tile, and the place is the one it had there.
        counts: `[B * H * R, tiles, digits]`, int32, zeros; written.
        sizes: H * R, P, num_buckets.
        shift: Bits below the digit, which has `BITS`.
    """
    rows_per_mask, length, num_buckets = sizes
    row, tile = _locate_tile(length, TILE)
    slot = tl.arange(0, TILE)
    place = tile * TILE + slot
    exists = place < length
    position = place
    if not IS_FIRST:
        position = tl.load(positions + row * length + place, mask=exists, other=0)
    bucket = tl.load(buckets + row * length + position, mask=exists, other=0)
    if HAS_MASK:
        is_real = tl.load(key_mask + row // rows_per_mask * length + position, mask=exists, other=0) != 0
        bucket = tl.where(is_real, bucket, num_buckets)
    digit = tl.where(exists, (bucket >> shift) & ((1 << BITS) - 1), 1 << BITS)
    # Different numbers, hence in the order in which they came where the digit is the same.
    packed = tl.sort(digit * TILE + slot)
    came_from, digit = packed % TILE, packed // TILE
    is_first = (slot == 0) | (digit != tl.gather(digit, tl.maximum(slot - 1, 0), 0))
    is_last = (slot == TILE - 1) | (digit != tl.gather(digit, tl.minimum(slot + 1, TILE - 1), 0))
    rank = slot - tl.associative_scan(tl.where(is_first, slot, 0), 0, _larger)
    counts += (tl.program_id(0).to(tl.int64) << BITS) + digit
    tl.store(counts, rank + 1, mask=is_last & (digit < 1 << BITS))
    tl.store(sorted_tiles + row * length + place, (digit * TILE + rank) * TILE + came_from, mask=exists)


@jit
def add_counts_kernel(counts, totals, tiles, BITS: tl.constexpr, DIGITS: tl.constexpr, TILES: tl.constexpr):
    """
    How often some digits occur in the tiles before each, and in all.

    Args:
        counts: `[B * H * R, tiles, digits]`, int32, from `sort_tiles_kernel`; the sums take their place.
        totals: `[B * H * R, digits]`, int32; written.
        DIGITS, TILES: How many are added up at a time.
    """
    BLOCKS: tl.constexpr = (1 << BITS) // DIGITS
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    digits = tl.program_id(0) % BLOCKS * DIGITS + tl.arange(0, DIGITS)
    counts += (row * tiles << BITS) + digits[None, :]
    before = tl.zeros([DIGITS], tl.int32)
    start = 0
    # No `range`: with recent NumPy the interpreter has none whose end is an argument.
    while start < tiles:
        tile = start + tl.arange(0, TILES)
        places = counts + (tile[:, None] << BITS)
        count = tl.load(places, mask=(tile < tiles)[:, None], other=0)
        tl.store(places, before[None, :] + tl.cumsum(count, 0) - count, mask=(tile < tiles)[:, None])
        before += tl.sum(count, 0)
        start += TILES
    tl.store(totals + (row << BITS) + digits, before)


@jit
def move_by_digit_kernel(
    sorted_tiles,
    positions,
    before,
    totals,
    moved,
    sizes,
    IS_FIRST: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """
    Move the tokens of a tile to where their digit belongs.

    Args:
        sorted_tiles, positions: As of `sort_tiles_kernel`.
        before, totals: As `add_counts_kernel` has written them.
        moved: `[B, H, R, P]`, int32: the order by this digit and all before; written.
        sizes: H * R, P, num_buckets.
    """
    length = sizes[1]
    row, tile = _locate_tile(length, TILE)
    place = tile * TILE + tl.arange(0, TILE)
    exists = place < length
    packed = tl.load(sorted_tiles + row * length + place, mask=exists, other=0)
    position = tile * TILE + packed % TILE
    if not IS_FIRST:
        position = tl.load(positions + row * length + position, mask=exists, other=0)
    digits = tl.arange(0, 1 << BITS)
    total = tl.load(totals + (row << BITS) + digits)
    first = tl.cumsum(total, 0) - total + tl.load(before + (tl.program_id(0).to(tl.int64) << BITS) + digits)
    new_place = tl.gather(first, packed // (TILE * TILE), 0) + packed // TILE % TILE
    tl.store(moved + row * length + new_place, position, mask=exists)
