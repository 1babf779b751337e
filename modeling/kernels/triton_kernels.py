"""
Chunked attention as Triton kernels: LSH attention and local attention, forward and backward.

Rows are gathered inside the kernels in the order of the buckets, so nothing is sorted, repeated or unsorted in memory.
One program computes one block of rows of a chunk. In the backward pass it owns the block as keys and as queries, and
no other program adds to its gradients: there are no atomic operations, and two runs agree bit for bit.

Keys of LSH attention are the queries at unit length (paper section 2, "shared-QK"). The length is taken off the
scores, one factor per column, so that query rows serve as keys as they are.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length, C chunk length, N = P / C chunks per round.
A place counts the tokens of all rounds in sorted order, `[0, R * P)`; a position is an index into the sequence.
Scores and log-sum-exps are in base 2.
"""

from types import SimpleNamespace


try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    # The kernels can then be read, but not run: `triton_support.why_not_triton` says so.
    triton, tl = None, SimpleNamespace(constexpr=lambda number: number)

    def jit(kernel):
        """Leave the kernel as it is."""
        return kernel


LOG2_E = tl.constexpr(1.4426950408889634)
# Log-sum-exp of a query that sees no key but itself. Finite, so that differences of two of them are; below all scores.
NOTHING_SEEN = tl.constexpr(-(2.0**126))
# Position of a key that may not be seen: after every query.
HIDDEN = tl.constexpr(2**31 - 1)
KEY_EPSILON = tl.constexpr(1e-6)


@jit
def _dot(left, right, OPTIONS: tl.constexpr):
    if OPTIONS.widen:
        left, right = left.to(tl.float32), right.to(tl.float32)
    # "ieee": operands in float32 stay what they are, rather than being rounded to TF32.
    return tl.dot(left, right, input_precision="ieee")


@jit
def _locate(sizes, OPTIONS: tl.constexpr):
    """This program's batch row, head, chunk, and first row in the chunk. One axis: the others end at 65535."""
    _, heads, _, num_chunks, _ = sizes
    blocks_per_chunk: tl.constexpr = OPTIONS.chunk_length // OPTIONS.block
    program = tl.program_id(0)
    batch_head, block = program // (num_chunks * blocks_per_chunk), program % (num_chunks * blocks_per_chunk)
    batch_row, head = batch_head // heads, batch_head % heads
    start = block % blocks_per_chunk * OPTIONS.block
    return batch_row.to(tl.int64), head.to(tl.int64), block // blocks_per_chunk, start


@jit
def _head_rows(rows, strides, batch_row, head):
    """Where the rows of one head begin in `[B, L, H, D]` with strides of B, L and H."""
    return rows + batch_row * strides[0] + head * strides[2]


@jit
def _neighbour(chunk, offset, sizes, OPTIONS: tl.constexpr):
    """The chunk `offset` chunks on, and whether there is one; any chunk if not."""
    _, _, _, num_chunks, chunks_per_round = sizes
    if OPTIONS.circular_look_around:
        # Further round the circle than once is the chunk itself (`chunking.circular_offsets`). With no more than two
        # neighbours on a side, which `triton_support.MAX_NEIGHBOURS` sees to, the remainder says the same.
        neighbour = (chunk + offset + 2 * num_chunks) % num_chunks
        exists = neighbour >= 0
    else:
        chunk_in_round = chunk % chunks_per_round + offset
        exists = (chunk_in_round >= 0) & (chunk_in_round < chunks_per_round)
        neighbour = tl.where(exists, chunk + offset, chunk)
    return neighbour, exists


@jit
def _load_tokens(tables, chunk, start, sizes, OPTIONS: tl.constexpr):
    """Places, positions, buckets that no two rounds share, and which positions are tokens: `[block]` each."""
    order, buckets, _ = tables
    _, _, length, _, chunks_per_round = sizes
    place = chunk * OPTIONS.chunk_length + start + tl.arange(0, OPTIONS.block)
    position, bucket = place, place
    if OPTIONS.is_sorted:
        position = tl.load(order + place)
    if not OPTIONS.attend_across_buckets:
        round_index = chunk // chunks_per_round
        first_place = round_index * chunks_per_round * OPTIONS.chunk_length
        bucket = tl.load(buckets + first_place + position).to(tl.int64) + (round_index.to(tl.int64) << 32)
    return place, position, bucket, position < length


@jit
def _load_keys(tables, chunk, exists, start, sizes, OPTIONS: tl.constexpr):
    """As `_load_tokens`, with the positions at which queries see the keys, and which keys may be seen at all."""
    place, position, bucket, is_real = _load_tokens(tables, chunk, start, sizes, OPTIONS)
    if OPTIONS.has_mask:
        is_real = is_real & (tl.load(tables[2] + position, mask=is_real, other=0) != 0)
    seen_at = position
    if OPTIONS.has_mask or OPTIONS.is_padded:
        seen_at = tl.where(is_real, seen_at, HIDDEN)
    if not OPTIONS.circular_look_around:
        seen_at = tl.where(exists, seen_at, HIDDEN)
    return (place, seen_at, bucket), position, is_real


@jit
def _load_rows(rows, position, is_real, stride, OPTIONS: tl.constexpr):
    """`[block, D]`, zeros where a row is not real: whatever stands in masked rows stays out."""
    columns = tl.arange(0, OPTIONS.head_size)
    pointers = rows + position.to(tl.int64)[:, None] * stride + columns[None, :]
    if OPTIONS.has_mask or OPTIONS.is_padded:
        return tl.load(pointers, mask=is_real[:, None], other=0.0)
    return tl.load(pointers)


@jit
def _load_numbers(numbers, position, is_real, OPTIONS: tl.constexpr):
    """`[block]`, one number per token."""
    if OPTIONS.has_mask or OPTIONS.is_padded:
        return tl.load(numbers + position, mask=is_real, other=0.0)
    return tl.load(numbers + position)


@jit
def _as_columns(numbers, OPTIONS: tl.constexpr):
    """
    The same numbers, one for each column of a matrix.

    They go through shared memory. Without this, the compiler has every thread load what it needs from where they were
    gathered.
    """
    return tl.gather(numbers, tl.arange(0, OPTIONS.block), 0)


@jit
def _for_columns(scale, key_tokens, OPTIONS: tl.constexpr):
    """Scale and tokens of keys as columns, as far as they come from memory."""
    place, position, bucket = key_tokens
    if OPTIONS.shared_qk:
        scale = _as_columns(scale, OPTIONS)
    if OPTIONS.is_sorted:
        position = _as_columns(position, OPTIONS)
    return scale, (place, position, bucket)


@jit
def _load_scale(key_scale, position, is_real, OPTIONS: tl.constexpr):
    """What the scores of each key are multiplied with."""
    if OPTIONS.shared_qk:
        return _load_numbers(key_scale, position, is_real, OPTIONS)
    return tl.full([OPTIONS.block], OPTIONS.head_size**-0.5, tl.float32)


@jit
def _scores(query, key, scale, OPTIONS: tl.constexpr):
    """Scores, `[queries, keys]`."""
    return _dot(query, tl.trans(key), OPTIONS) * scale[None, :]


@jit
def _is_visible(query_tokens, key_tokens, OPTIONS: tl.constexpr):
    """Which queries may see which keys; `[queries, keys]`, or 1 for queries."""
    query_place, query_position, query_bucket = query_tokens
    key_place, key_position, key_bucket = key_tokens
    if OPTIONS.causal:
        if OPTIONS.shared_qk:
            visible = query_position[:, None] > key_position[None, :]
        else:
            visible = query_position[:, None] >= key_position[None, :]
    else:
        visible = (key_position != HIDDEN)[None, :]
        if OPTIONS.shared_qk:
            visible = visible & (query_position[:, None] != key_position[None, :])
    if not OPTIONS.attend_across_buckets:
        visible = visible & (query_bucket[:, None] == key_bucket[None, :])
    if OPTIONS.sliding_window:
        distance = key_place[None, :] - query_place[:, None]
        visible = visible & (distance >= -OPTIONS.num_chunks_before * OPTIONS.chunk_length)
        visible = visible & (distance <= OPTIONS.num_chunks_after * OPTIONS.chunk_length)
    return visible


@jit
def _load_key_rows(
    key, value, key_scale, queries, tables, chunk, exists, start, strides, sizes, OPTIONS: tl.constexpr
):
    """A block of keys and values, the scale of their scores, and the tokens; `queries` if they are the keys."""
    tokens, position, is_key = _load_keys(tables, chunk, exists, start, sizes, OPTIONS)
    if OPTIONS.shared_qk and queries is not None:
        keys = queries
    else:
        keys = _load_rows(key, position, is_key, strides[1][1], OPTIONS)
    values = _load_rows(value, position, is_key, strides[2][1], OPTIONS)
    return keys, values, _load_scale(key_scale, position, is_key, OPTIONS), tokens


@jit
def _add_block(largest, total, weighted, scores, values, IS_FIRST: tl.constexpr, OPTIONS: tl.constexpr):
    """One step of a softmax over blocks: the largest score, the sum of weights, and the weighted sum of values."""
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_largest[:, None])
    added = tl.sum(weights, 1)
    if IS_FIRST:
        return new_largest, added, _dot(weights.to(values.dtype), values, OPTIONS)
    shrink = tl.exp2(largest - new_largest)
    weighted = weighted * shrink[:, None] + _dot(weights.to(values.dtype), values, OPTIONS)
    return new_largest, total * shrink + added, weighted


@jit
def attention_forward_kernel(
    query, key, value, key_scale, tables, output, log_sum_exp, strides, sizes, OPTIONS: tl.constexpr
):
    """
    Attention of one block of queries within one round.

    Args:
        query, key, value: `[B, L, H, D]` with `strides`, three triples for B, L and H.
        key_scale: `[B, H, L]`, float32; read with `shared_qk`.
        tables: Order and buckets, `[B, H, R, P]`, int32, and mask `[B, P]`, int8; read as the options need them.
        output, log_sum_exp: `[R, B, L, H, D]` and `[R, B, H, L]`, float32; written.
        sizes: B, H, L, R * N, N.
    """
    BLOCK: tl.constexpr = OPTIONS.block
    SIZE: tl.constexpr = OPTIONS.head_size
    IS_CHUNK: tl.constexpr = OPTIONS.chunk_length == BLOCK
    EARLY: tl.constexpr = IS_CHUNK and OPTIONS.is_sorted
    FIRST: tl.constexpr = -OPTIONS.num_chunks_before
    LAST: tl.constexpr = OPTIONS.num_chunks_after
    batch, heads, length, _, chunks_per_round = sizes
    batch_row, head, chunk, start = _locate(sizes, OPTIONS)
    query = _head_rows(query, strides[0], batch_row, head)
    key = _head_rows(key, strides[1], batch_row, head)
    value = _head_rows(value, strides[2], batch_row, head)
    key_scale += (batch_row * heads + head) * length
    tables = _head_tables(tables, batch_row, head, sizes, OPTIONS)

    place, position, bucket, is_real = _load_tokens(tables, chunk, start, sizes, OPTIONS)
    queries = _load_rows(query, position, is_real, strides[0][1], OPTIONS)
    if EARLY:
        # Prefetch: the load overlaps with the arithmetic on the current keys.
        own = _load_key_rows(key, value, key_scale, queries, tables, chunk, chunk >= 0, 0, strides, sizes, OPTIONS)
    largest = tl.full([BLOCK], NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK, SIZE], tl.float32)
    for offset in tl.static_range(FIRST, LAST + 1):
        neighbour, exists = _neighbour(chunk, offset, sizes, OPTIONS)
        for key_start in range(0, OPTIONS.chunk_length, BLOCK):
            if offset == 0 and EARLY:
                keys, values, scale, key_tokens = own
            else:
                keys, values, scale, key_tokens = _load_key_rows(
                    key, value, key_scale, None, tables, neighbour, exists, key_start, strides, sizes, OPTIONS
                )
            scale, key_tokens = _for_columns(scale * LOG2_E, key_tokens, OPTIONS)
            visible = _is_visible((place, position, bucket), key_tokens, OPTIONS)
            scores = tl.where(visible, _scores(queries, keys, scale, OPTIONS), float("-inf"))
            largest, total, weighted = _add_block(
                largest, total, weighted, scores, values, offset == FIRST and IS_CHUNK, OPTIONS
            )

    if OPTIONS.is_sorted:
        # Loaded again instead of kept: with 128 registers four programs fit on a multiprocessor, otherwise three.
        position = tl.load(tables[0] + chunk * OPTIONS.chunk_length + start + tl.arange(0, BLOCK))
        is_real = position < length
    row = chunk // chunks_per_round * batch + batch_row
    own_values = value + position.to(tl.int64)[:, None] * strides[2][1]
    _store_round(
        output, log_sum_exp, own_values, largest, total, weighted, position, is_real, row, head, sizes, OPTIONS
    )


@jit
def _store_round(
    output,
    log_sum_exp,
    own_values,
    largest,
    total,
    weighted,
    position,
    is_real,
    row,
    head,
    sizes,
    OPTIONS: tl.constexpr,
):
    """Write the output and log-sum-exp of a block of queries, `row` rows of `[L, H, D]` on."""
    SIZE: tl.constexpr = OPTIONS.head_size
    _, heads, length, _, _ = sizes
    saw_nothing = total == 0
    total = tl.where(saw_nothing, 1.0, total)
    tl.store(log_sum_exp + (row * heads + head) * length + position, largest + tl.log2(total), mask=is_real)
    columns = tl.arange(0, SIZE)
    pointers = output + ((row * length + position)[:, None] * heads + head) * SIZE + columns[None, :]
    if OPTIONS.own_value:
        # The output of a token that sees nothing but itself is exactly its value.
        is_alone = (is_real & saw_nothing)[:, None]
        tl.store(pointers, tl.load(own_values + columns[None, :], mask=is_alone), mask=is_alone)
        is_real = is_real & ~saw_nothing
    # One division for each row instead of one for each element.
    weighted *= (1 / total)[:, None]
    tl.store(pointers, weighted.to(output.dtype.element_ty), mask=is_real[:, None])


@jit
def _head_tables(tables, batch_row, head, sizes, OPTIONS: tl.constexpr):
    """Where order and buckets of one head and the mask of one batch row begin."""
    order, buckets, key_mask = tables
    _, heads, _, num_chunks, chunks_per_round = sizes
    first = (batch_row * heads + head) * num_chunks * OPTIONS.chunk_length
    return order + first, buckets + first, key_mask + batch_row * chunks_per_round * OPTIONS.chunk_length


@jit
def combine_rounds_kernel(
    outputs, log_sum_exps, output, log_sum_exp, sizes, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    """
    The softmax over all rounds from those of each: rounds weigh as much as the exponentials they have summed up.

    Args:
        outputs, log_sum_exps: `[R, B, L, H, D]` and `[R, B, H, L]`.
        output, log_sum_exp: `[B, L, H, D]` and `[B, H, L]`; written.
        sizes: B, H, L.
    """
    batch, heads, length = sizes
    blocks = tl.cdiv(length, BLOCK)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_real = position < length
    batch_row, head = batch_head // heads, batch_head % heads
    numbers = batch_head * length + position
    rows = ((batch_row * length + position)[:, None] * heads + head) * SIZE + tl.arange(0, SIZE)[None, :]
    per_round = tl.cast(batch * heads, tl.int64) * length

    largest = tl.full([BLOCK], NOTHING_SEEN, tl.float32)
    for r in tl.static_range(ROUNDS):
        largest = tl.maximum(largest, tl.load(log_sum_exps + r * per_round + numbers, mask=is_real, other=0.0))
    is_alone = largest == NOTHING_SEEN
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK, SIZE], tl.float32)
    for r in tl.static_range(ROUNDS):
        weight = tl.exp2(tl.load(log_sum_exps + r * per_round + numbers, mask=is_real, other=0.0) - largest)
        # All rounds of a token that is alone in each hold its value; one of them is exact.
        weight = tl.where(is_alone, 1.0 if r == 0 else 0.0, weight)
        total += weight
        summand = tl.load(outputs + r * per_round * SIZE + rows, mask=is_real[:, None], other=0.0)
        weighted += weight[:, None] * summand.to(tl.float32)
    weighted *= (1 / total)[:, None]
    tl.store(output + rows, weighted.to(output.dtype.element_ty), mask=is_real[:, None])
    tl.store(log_sum_exp + numbers, largest + tl.log2(total), mask=is_real)


@jit
def key_scale_kernel(rows, scale, strides, sizes, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """What queries `[B, L, H, D]` are multiplied with to be keys, as in `chunking.key_scale`: `[B, H, L]`."""
    heads, length = sizes
    blocks = tl.cdiv(length, BLOCK)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_real = position < length
    rows = _head_rows(rows, strides, batch_head // heads, batch_head % heads)
    pointers = rows + position.to(tl.int64)[:, None] * strides[1] + tl.arange(0, SIZE)[None, :]
    numbers = tl.load(pointers, mask=is_real[:, None], other=0.0).to(tl.float32)
    mean_square = tl.sum(numbers * numbers, 1) / SIZE
    tl.store(scale + batch_head * length + position, tl.rsqrt(mean_square + KEY_EPSILON) * SIZE**-0.5, mask=is_real)


@jit
def row_dot_kernel(left, right, products, sizes, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Dot products of the rows of two contiguous `[B, L, H, D]`: `[B, H, L]`, float32."""
    heads, length = sizes
    blocks = tl.cdiv(length, BLOCK)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_real = position < length
    batch_row, head = batch_head // heads, batch_head % heads
    rows = ((batch_row * length + position)[:, None] * heads + head) * SIZE + tl.arange(0, SIZE)[None, :]
    lefts = tl.load(left + rows, mask=is_real[:, None], other=0.0).to(tl.float32)
    rights = tl.load(right + rows, mask=is_real[:, None], other=0.0).to(tl.float32)
    tl.store(products + batch_head * length + position, tl.sum(lefts * rights, 1), mask=is_real)


@jit
def sum_rounds_kernel(parts, sums, count, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """Several `[R, count]` to several `[count]`, added in float32."""
    blocks = tl.cdiv(count, BLOCK)
    which = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.cast(count, tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(ROUNDS):
        part = parts + (which * ROUNDS + r) * count
        total += tl.load(part + index, mask=index < count, other=0.0).to(tl.float32)
    tl.store(sums + which * count + index, total.to(sums.dtype.element_ty), mask=index < count)


@jit
def _score_gradients(
    queries, keys, values, gradients, log_sum_exp, delta, scale, query_tokens, key_tokens, OPTIONS: tl.constexpr
):
    """Probabilities in the softmax over all rounds, and the gradients of their scores: `[queries, keys]`."""
    # Masked after the exponential, so that scaling and subtraction are one fused instruction.
    probabilities = tl.exp2(_scores(queries, keys, scale * LOG2_E, OPTIONS) - log_sum_exp[:, None])
    probabilities = tl.where(_is_visible(query_tokens, key_tokens, OPTIONS), probabilities, 0.0)
    return probabilities, probabilities * (_dot(gradients, tl.trans(values), OPTIONS) - delta[:, None])


@jit
def _load_queries(rows, numbers, tables, strides, chunk, start, sizes, OPTIONS: tl.constexpr):
    """A block of queries: rows, gradients of the output, log-sum-exp, delta and tokens."""
    query, _, _, gradient = rows
    _, log_sum_exp, delta = numbers
    place, position, bucket, is_real = _load_tokens(tables, chunk, start, sizes, OPTIONS)
    return (
        _load_rows(query, position, is_real, strides[0][1], OPTIONS),
        _load_rows(gradient, position, is_real, strides[3][1], OPTIONS),
        _load_numbers(log_sum_exp, position, is_real, OPTIONS),
        _load_numbers(delta, position, is_real, OPTIONS),
        (place, position, bucket),
    )


@jit
def _sum_over_queries(
    own, keys, values, scale, key_tokens, rows, numbers, tables, strides, chunk, sizes, OPTIONS: tl.constexpr
):
    """
    Gradients of a block of unscaled keys (as if they were all there is to the scores) and of its values, from all
    queries that see it; and the score gradients of its own queries, where the block is the whole chunk.
    """
    BLOCK: tl.constexpr = OPTIONS.block
    SIZE: tl.constexpr = OPTIONS.head_size
    IS_CHUNK: tl.constexpr = OPTIONS.chunk_length == BLOCK
    FIRST: tl.constexpr = -OPTIONS.num_chunks_before
    LAST: tl.constexpr = OPTIONS.num_chunks_after
    key_place, key_position, key_bucket = key_tokens
    grad_key = tl.zeros([BLOCK, SIZE], tl.float32)
    grad_value = tl.zeros([BLOCK, SIZE], tl.float32)
    own_scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for offset in tl.static_range(FIRST, LAST + 1):
        # Queries of the chunk that is `offset` chunks back see this one at `offset`.
        query_chunk, exists = _neighbour(chunk, -offset, sizes, OPTIONS)
        seen_at = key_position
        if not OPTIONS.circular_look_around:
            seen_at = tl.where(exists, key_position, HIDDEN)
        for start in range(0, OPTIONS.chunk_length, BLOCK):
            if offset == 0 and IS_CHUNK:
                queries, gradients, log_sum_exp, delta, query_tokens = own
            else:
                queries, gradients, log_sum_exp, delta, query_tokens = _load_queries(
                    rows, numbers, tables, strides, query_chunk, start, sizes, OPTIONS
                )
            probabilities, grad_scores = _score_gradients(
                queries,
                keys,
                values,
                gradients,
                log_sum_exp,
                delta,
                scale,
                query_tokens,
                (key_place, seen_at, key_bucket),
                OPTIONS,
            )
            if offset == 0 and IS_CHUNK:
                own_scores = grad_scores
            if offset == 0 and OPTIONS.own_value:
                # A token that sees nothing but itself has its value for output, once over all rounds.
                is_alone = (log_sum_exp == NOTHING_SEEN) & (chunk < sizes[4])
                is_self = query_tokens[1][:, None] == key_position[None, :]
                probabilities = tl.where(is_alone[:, None] & is_self, 1.0, probabilities)
            grad_value += _dot(tl.trans(probabilities.to(gradients.dtype)), gradients, OPTIONS)
            grad_key += _dot(tl.trans(grad_scores.to(queries.dtype)), queries, OPTIONS)
    return grad_key, grad_value, own_scores


@jit
def _sum_over_keys(
    grad_query, own, rows, numbers, tables, strides, chunk, sizes, WITH_OWN: tl.constexpr, OPTIONS: tl.constexpr
):
    """`grad_query` and what a block of queries gets from all keys that it sees, those of its own chunk `WITH_OWN`."""
    BLOCK: tl.constexpr = OPTIONS.block
    FIRST: tl.constexpr = -OPTIONS.num_chunks_before
    LAST: tl.constexpr = OPTIONS.num_chunks_after
    key, value = rows[1], rows[2]
    queries, gradients, log_sum_exp, delta, query_tokens = own
    for offset in tl.static_range(FIRST, LAST + 1):
        if WITH_OWN or offset != 0:
            neighbour, exists = _neighbour(chunk, offset, sizes, OPTIONS)
            for start in range(0, OPTIONS.chunk_length, BLOCK):
                keys, values, scale, key_tokens = _load_key_rows(
                    key, value, numbers[0], None, tables, neighbour, exists, start, strides, sizes, OPTIONS
                )
                grad_scores = _score_gradients(
                    queries, keys, values, gradients, log_sum_exp, delta, scale, query_tokens, key_tokens, OPTIONS
                )[1]
                grad_query += _dot((grad_scores * scale[None, :]).to(keys.dtype), keys, OPTIONS)
    return grad_query


@jit
def attention_backward_kernel(rows, numbers, tables, gradients, strides, sizes, OPTIONS: tl.constexpr):
    """
    Gradients of one block of a chunk within one round, as keys and as queries.

    With the log-sum-exp and the output over all rounds, this is a share of the gradient of one softmax.

    Args:
        rows: Query, key, value and gradient of the output, `[B, L, H, D]` with `strides`, four triples.
        numbers: Scale of the keys, log-sum-exp, and delta: the dot product of output and its gradient; `[B, H, L]`.
        tables: As of the forward kernel.
        gradients: Of query, key and value, `[R, B, L, H, D]`; written. With `shared_qk` the first has both.
        sizes: B, H, L, R * N, N.
    """
    BLOCK: tl.constexpr = OPTIONS.block
    SIZE: tl.constexpr = OPTIONS.head_size
    IS_CHUNK: tl.constexpr = OPTIONS.chunk_length == BLOCK
    batch, heads, length, _, chunks_per_round = sizes
    batch_row, head, chunk, start = _locate(sizes, OPTIONS)
    rows = (
        _head_rows(rows[0], strides[0], batch_row, head),
        _head_rows(rows[1], strides[1], batch_row, head),
        _head_rows(rows[2], strides[2], batch_row, head),
        _head_rows(rows[3], strides[3], batch_row, head),
    )
    first = (batch_row * heads + head) * length
    numbers = (numbers[0] + first, numbers[1] + first, numbers[2] + first)
    tables = _head_tables(tables, batch_row, head, sizes, OPTIONS)

    own = _load_queries(rows, numbers, tables, strides, chunk, start, sizes, OPTIONS)
    key_tokens, position, is_key = _load_keys(tables, chunk, chunk >= 0, start, sizes, OPTIONS)
    keys = own[0] if OPTIONS.shared_qk else _load_rows(rows[1], position, is_key, strides[1][1], OPTIONS)
    values = _load_rows(rows[2], position, is_key, strides[2][1], OPTIONS)
    scale = _load_scale(numbers[0], position, position < length, OPTIONS)

    row = chunk // chunks_per_round * batch + batch_row
    columns = tl.arange(0, SIZE)
    where = ((row * length + position)[:, None] * heads + head) * SIZE + columns[None, :]
    is_real = (position < length)[:, None]
    grad_key, grad_value, own_scores = _sum_over_queries(
        own, keys, values, scale, key_tokens, rows, numbers, tables, strides, chunk, sizes, OPTIONS
    )
    tl.store(gradients[2] + where, grad_value.to(gradients[2].dtype.element_ty), mask=is_real)
    if OPTIONS.shared_qk:
        # The gradient through the normalisation: the component along the key is removed.
        wide = keys.to(tl.float32)
        along = tl.sum(wide * grad_key, 1) * scale * scale
        grad_query = (grad_key - wide * along[:, None]) * scale[:, None]
    else:
        tl.store(gradients[1] + where, (grad_key * scale[:, None]).to(gradients[1].dtype.element_ty), mask=is_real)
        grad_query = tl.zeros([BLOCK, SIZE], tl.float32)
    if IS_CHUNK:
        grad_query += _dot((own_scores * scale[None, :]).to(keys.dtype), keys, OPTIONS)
    grad_query = _sum_over_keys(grad_query, own, rows, numbers, tables, strides, chunk, sizes, not IS_CHUNK, OPTIONS)
    tl.store(gradients[0] + where, grad_query.to(gradients[0].dtype.element_ty), mask=is_real)
