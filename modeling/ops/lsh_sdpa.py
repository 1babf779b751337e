"""
LSH attention through PyTorch's fused kernels, a piece of one round at a time.

On a CPU no tensor is larger than one head's share of the inputs where texts are long, and what a kernel works on fits
a core's cache; on a GPU more is done at once. Rounds are combined while they come. Backward computes each round's
scores again and needs, of forward, the output and the log-sum-exp of all rounds together (see `softmax_kernels`).

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length, C chunk length, N chunks of all rounds, W
window length. A group is some heads of one row of the batch, or all heads of some rows; it has G heads in all. Of the
N chunks n are worked on at a time, m with their neighbours.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .chunking import MASKED_SCORE, SELF_SCORE, key_scale, sum_windows, window_views
from .differentiation import once_differentiable
from .implementations import AttentionCall
from .lsh_options import LSHOptions
from .operators import AttentionFunction, arguments_of, operator, schema_of
from .softmax_kernels import (
    CausalAttention,
    additive_mask_dtype,
    attend,
    attend_backward,
    distinct,
    has_causal_kernel,
)
from .visibility import LSHVisibility


# Scores that a kernel is given at once: on a CPU enough to be worth a call, and so few that mask and rows stay in the
# cache; on a GPU enough to keep it busy.
SCORES_AT_ONCE, SCORES_AT_ONCE_ON_GPU = 2**18, 2**23
# Tokens that are processed together, summed over heads.
TOKENS_AT_ONCE, TOKENS_AT_ONCE_ON_GPU = 2**14, 2**18
# Float32 represents integers exactly up to here.
LONGEST = 2**24
# Rows that are squared at once on a CPU, in memory that one piece leaves to the next.
ROWS_AT_ONCE = 2**12


def why_not_sdpa(call: AttentionCall) -> str | None:
    """Why fused kernels cannot serve a call of LSH attention, or None."""
    if call.length > LONGEST:
        return f"counts positions up to {LONGEST}, but the text has {call.length} tokens; use 'eager'."
    return call.why_not_fused("Set `lsh_attention_probs_dropout_prob=0` (stock Reformer's default)")


def lsh_attention_sdpa(
    query_key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    order: torch.Tensor,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    options: LSHOptions,
    return_weights: bool = False,
) -> tuple[torch.Tensor, None]:
    """
    Chunked LSH attention to what `lsh_operator.lsh_attention` has sorted.

    Args:
        query_key, value: `[B, L, H, D]`; with `options.value_shift` the values are what the keys carry.
        buckets: `[B, H, R, P]`, the bucket of each position.
        order: `[B, H, R, P]`, the positions of each round in sorted order.
        key_mask: `[B, P]`, bool, or None if every token is real.
        documents: `[B, P]`, the document of each position, or None if a row is one. No two have a bucket in common.

    Returns:
        Output `[B, L, H, D]`, and None for the attention map.
    """
    all_are_real = key_mask is None and documents is None
    if all_are_real and _is_dense_and_causal(query_key, order, options) and has_causal_kernel(query_key):
        return _attend_to_all_earlier(query_key, value, options), None
    output, _ = _LSHAttention.apply(query_key, value, buckets, order, key_mask, documents, options)
    return output, None


def _is_dense_and_causal(query_key, order, options):
    """Whether a token attends to every earlier one: one round has one chunk, and buckets do not matter."""
    if not options.causal or options.around != (0, 0) or not options.attend_across_buckets:
        return False
    length = query_key.shape[1]
    return order.shape[2] == 1 and options.chunk_length == length == order.shape[3] and length > 1


def _attend_to_all_earlier(query_key, value, options):
    """
    Causal attention with shared queries and keys to everything, of vectors `[B, L, H, D]`, for `has_causal_kernel`.

    A token that leaves itself out attends to the keys up to the place before it. So without the first query and the
    last key this is ordinary causal attention. The first token sees nothing but itself.
    """
    dtype = torch.promote_types(query_key.dtype, torch.float32)
    rows = query_key.transpose(1, 2).to(dtype)
    read = value[:, :-1].transpose(1, 2).to(dtype)
    keys = rows[:, :, :-1]
    output, _ = CausalAttention.apply(rows[:, :, 1:], keys * key_scale(keys), read, 1.0)
    first = torch.zeros_like(value[:, :1]) if options.value_shift else value[:, :1]
    return torch.cat([first, output.transpose(1, 2).to(value.dtype)], dim=1)


class _LSHAttention(AttentionFunction):
    @staticmethod
    def forward(query_key, value, buckets, order, key_mask, documents, options):
        return _lsh_sdpa(query_key, value, buckets, order, key_mask, documents, *arguments_of(options))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        gradients = _lsh_sdpa_backward(gradient, *ctx.saved_tensors, *arguments_of(ctx.options))
        return *gradients, *[None] * 5


def _shapes_forward(query_key, value, buckets, order, *_):
    batch, _, num_heads, _ = query_key.shape
    dtype = torch.promote_types(query_key.dtype, torch.float32)
    # Two numbers for each token: their sum would lose the digits of the smaller one.
    return _empty(query_key), query_key.new_empty(2, batch, num_heads, order.shape[3], dtype=dtype)


def _shapes_backward(gradient, query_key, value, *_):
    return _empty(query_key), _empty(value)


def _empty(rows):
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


_INPUTS = "Tensor query_key, Tensor value, Tensor buckets, Tensor order, Tensor? key_mask, Tensor? documents"


@operator(f"({_INPUTS}, {schema_of(LSHOptions)}) -> (Tensor, Tensor)", _shapes_forward)
def _lsh_sdpa(query_key, value, buckets, order, key_mask, documents, *options):
    output, log_sums = _shapes_forward(query_key, value, buckets, order)
    tables, scratch = (buckets, order, key_mask, documents), _Scratch(query_key)
    for heads in distinct(_groups(order), query_key):
        group = _Group(query_key, value, tables, LSHOptions(*options), heads, scratch)
        group_output, *of_group = group.attend()
        group.put(group_output, output)
        for whole, part in zip(log_sums, of_group, strict=True):
            whole[heads] = part.unflatten(0, (-1, group.heads))
        # Free this group before the next one is allocated.
        del group, group_output, of_group, part
    return output, log_sums


@operator(
    f"(Tensor gradient, {_INPUTS}, Tensor output, Tensor log_sums, {schema_of(LSHOptions)}) -> (Tensor, Tensor)",
    _shapes_backward,
)
def _lsh_sdpa_backward(gradient, query_key, value, buckets, order, key_mask, documents, output, log_sums, *options):
    gradients = _shapes_backward(gradient, query_key, value)
    tables, scratch = (buckets, order, key_mask, documents), _Scratch(query_key)
    for heads in distinct(_groups(order), query_key):
        group = _Group(query_key, value, tables, LSHOptions(*options), heads, scratch)
        of_group = group.attend_backward(
            group.take(gradient, "gradient"),
            group.take(output, "output"),
            *(numbers[heads].flatten(0, 1) for numbers in log_sums),
        )
        for whole, part in zip(gradients, of_group, strict=True):
            group.put(part, whole)
        del group, of_group, part
    return gradients


class _HeadSlice(NamedTuple):
    """Heads of some rows of the batch: `rows[heads]` is those of `rows`, `[B, H, ...]`."""

    batch: slice
    heads: slice


def _groups(order: torch.Tensor) -> Iterator[_HeadSlice]:
    """Heads that are worked on together: few where texts are long."""
    batch, heads, _, padded_length = order.shape
    at_once = _heads_at_once(padded_length, order.device.type)
    if at_once < heads:
        for row in range(batch):
            for head in range(0, heads, at_once):
                yield _HeadSlice(slice(row, row + 1), slice(head, min(head + at_once, heads)))
    else:
        for row in range(0, batch, at_once // heads):
            yield _HeadSlice(slice(row, row + at_once // heads), slice(0, heads))


def _heads_at_once(padded_length: int, device_type: str) -> int:
    return max(1, (TOKENS_AT_ONCE if device_type == "cpu" else TOKENS_AT_ONCE_ON_GPU) // padded_length)


def _chunks_at_once(scores_of_a_chunk: int, device_type: str) -> int:
    return max(1, (SCORES_AT_ONCE if device_type == "cpu" else SCORES_AT_ONCE_ON_GPU) // scores_of_a_chunk)


class _Scratch:
    """
    Memory that one group after another works in.

    A system clears new memory before it gives it out, which takes longer than most of what is done in it.
    """

    def __init__(self, like: torch.Tensor):
        self._like = like
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The memory of a name, as a tensor of any content."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype] = self._like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)


class _Group:
    """
    LSH attention of some heads.

    Their rows, `[G, P, D]`, are gathered from contiguous copies, by row numbers in `[0, G * P)`.
    """

    def __init__(self, query_key, value, tables, options, where, scratch):
        self.options, self.where, self.scratch = options, where, scratch
        buckets, order = (table[where] for table in tables[:2])
        self.heads, self.rounds, self.padded_length = order.shape[1:]
        key_mask, documents = (None if table is None else table[where.batch] for table in tables[2:])
        self.visibility = LSHVisibility(buckets, order, key_mask, options, documents)
        self.dtype = query_key.dtype
        if query_key.device.type == "cpu":
            # The rows are copied anyway, and the CPU kernel is slower in half precision.
            self.dtype = torch.promote_types(self.dtype, torch.float32)
        self.query, self.value = self.take(query_key, "query"), self.take(value, "value")
        self.size = len(self.query)
        at_once = max(1, ROWS_AT_ONCE // self.size) if query_key.device.type == "cpu" else self.padded_length
        pieces = self.query.split(at_once, dim=1)
        self.key_scale = torch.cat([key_scale(piece) for piece in pieces], dim=1)
        self.mask_dtype = additive_mask_dtype(self.query)
        # The dtype that positions are compared in: bfloat16 cannot represent them all.
        self.count_dtype = torch.promote_types(self.mask_dtype, torch.float32)
        positions, self.key_positions = (
            table.flatten(0, 1).to(self.count_dtype)
            for table in (self.visibility.positions, self.visibility.key_positions)
        )
        # With what the keys' positions are compared: without looking ahead, the last that a query attends to.
        self.compared = positions - 1 if options.causal else positions
        # `index_add_` is several times faster with 64-bit indices.
        first_row = torch.arange(self.size, device=order.device) * self.padded_length
        self.query_rows, self.window_rows = (
            table.flatten(0, 1) + first_row[:, None, None]
            for table in (self.visibility.positions, self.visibility.key_positions)
        )
        self.num_neighbours = sum(options.around)
        # With fewer chunks than neighbours a window goes around the circle more than once.
        self.windows_overlap = self.visibility.num_chunks > max(options.around)
        if self.windows_overlap:
            # Each chunk once, and at the end the neighbours of the last window.
            last = self.window_rows[:, -1].unflatten(1, (-1, options.chunk_length))[:, 1:]
            self.key_rows = torch.cat([self.window_rows[..., : options.chunk_length], last], dim=1)

    def _scratch_for_rows(self, name, dtype=None):
        return self.scratch(name, self.query.shape, dtype or self.dtype)

    def take(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """This group's share of `[B, L, H, D]`: a copy, `[G, P, D]`, filled up with zeros."""
        share = rows[self.where.batch, :, self.where.heads].transpose(1, 2)
        batch, heads, length, size = share.shape
        taken = self.scratch(name, (batch, heads, self.padded_length, size), self.dtype)
        taken[:, :, :length] = share
        taken[:, :, length:] = 0
        return taken.flatten(0, 1)

    def put(self, taken: torch.Tensor, rows: torch.Tensor):
        """The reverse of `take`: write `taken` into `rows`."""
        taken = taken.unflatten(0, (-1, self.heads))[:, :, : rows.shape[1]]
        rows[self.where.batch, :, self.where.heads] = taken.transpose(1, 2)

    def pieces(self, round_index: int) -> Iterator[tuple[slice, slice]]:
        """Chunks of a round, as many at a time as a kernel is given: their numbers, and their places in the round."""
        chunk_length, in_round = self.options.chunk_length, self.visibility.chunks_per_round
        first = round_index * in_round
        step = _chunks_at_once(self.size * chunk_length * self.window_rows.shape[2], self.query.device.type)
        for start in range(0, in_round, step):
            stop = min(start + step, in_round)
            yield slice(first + start, first + stop), slice(start * chunk_length, stop * chunk_length)

    def key_rows_of(self, chunks: slice) -> torch.Tensor:
        """Row numbers of what the chunks look at: `[G * (n + neighbours) * C]`, or windows in full, `[G * n * W]`."""
        if self.windows_overlap:
            return self.key_rows[:, chunks.start : chunks.stop + self.num_neighbours].flatten()
        return self.window_rows[:, chunks].flatten()

    def gather(self, rows: torch.Tensor, row_numbers: torch.Tensor, name: str) -> torch.Tensor:
        """Rows by their numbers, `[G, P, ...]` to chunks `[G, m, C, ...]`, in the scratch memory of `name`."""
        gathered = self.scratch(f"{name} of a piece", (len(row_numbers), *rows.shape[2:]), rows.dtype)
        torch.index_select(rows.flatten(0, 1), 0, row_numbers, out=gathered)
        return gathered.view(self.size, -1, self.options.chunk_length, *rows.shape[2:])

    def windows(self, chunks: torch.Tensor, num_chunks: int) -> torch.Tensor:
        """Rows at `key_rows_of(chunks)`, `[G, m, C, D]`, to the windows of the chunks, `[G, n, W, D]`."""
        if self.windows_overlap:
            return window_views(chunks, num_chunks, self.num_neighbours)
        return chunks.view(self.size, num_chunks, -1, chunks.shape[3])

    def mask(self, chunks: slice) -> torch.Tensor:
        """`[G, n, C, W]`, added to the scores of a piece."""
        visibility, weakest = self.visibility, SELF_SCORE[self.mask_dtype]
        query, key = self.compared[:, chunks, :, None], self.key_positions[:, chunks, None, :]
        mask = self.scratch("mask of a piece", (*query.shape[:3], key.shape[3]), self.count_dtype)
        torch.sub(query, key, out=mask)
        if self.options.causal:
            # An earlier key adds 0, the query itself adds `weakest`, a later key 2 * `weakest`.
            mask.clamp_(-2, 0).mul_(-weakest)
        else:
            mask.eq_(0).mul_(weakest)
        by_head = mask.unflatten(0, (-1, self.heads))
        for condition in visibility.conditions(chunks):
            by_head.masked_fill_(~condition, MASKED_SCORE[self.mask_dtype])
        if not self.options.allow_duplicate_attention:
            by_head.sub_(visibility.count_meetings(chunks).to(mask.dtype).log_())
        return mask.to(self.mask_dtype)

    def attend(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        All rounds, in original positions.

        Returns:
            Output `[G, P, D]`, and of the rounds' log-sum-exps, `[G, P]`, the largest and the sum of all exponentials
            relative to it.
        """
        output, largest = self._attend_in_round(0)
        total = torch.ones_like(largest)
        if self.rounds > 1:
            # The rounds are accumulated here, in float32 at least.
            output = self._scratch_for_rows("output", largest.dtype).copy_(output)
        for round_index in range(1, self.rounds):
            round_output, round_log_sum_exp = self._attend_in_round(round_index)
            new_largest = torch.maximum(largest, round_log_sum_exp)
            old, new = (largest - new_largest).exp_(), (round_log_sum_exp - new_largest).exp_()
            output.mul_(old[..., None]).addcmul_(round_output, new[..., None])
            largest, total = new_largest, total.mul_(old).add_(new)
        if self.rounds > 1:
            output /= total[..., None]
        is_alone = self._is_alone(largest)[..., None]
        if self.options.value_shift:
            output.masked_fill_(is_alone, 0)
        else:
            torch.where(is_alone, self.value, output, out=output)
        return output, largest, total

    def _attend_in_round(self, round_index):
        sorted_output = self._scratch_for_rows("sorted output")
        sorted_log_sum_exp = self.query.new_empty(self.query.shape[:2], dtype=self.count_dtype)
        for chunks, places in distinct(self.pieces(round_index), self.query):
            output, log_sum_exp = self._turned(*attend(*self._turned(*self._inputs(chunks)), scale=1.0))
            sorted_output[:, places] = output.flatten(1, 2)
            sorted_log_sum_exp[:, places] = log_sum_exp.flatten(1)
            del output, log_sum_exp
        in_round = self.visibility.chunks_per_round
        order = self.query_rows[:, round_index * in_round : (round_index + 1) * in_round].flatten()
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        output = self._scratch_for_rows("round's output")
        torch.index_select(sorted_output.flatten(0, 1), 0, place, out=output.flatten(0, 1))
        return output, sorted_log_sum_exp.flatten().index_select(0, place).view_as(sorted_log_sum_exp)

    def _inputs(self, chunks):
        """Queries, windows of keys and values, and mask of some chunks."""
        num_chunks, key_rows = chunks.stop - chunks.start, self.key_rows_of(chunks)
        rows = self.gather(self.query, key_rows, "query")
        scale, value = self.gather(self.key_scale, key_rows, "scale"), self.gather(self.value, key_rows, "value")
        key = torch.mul(rows, scale, out=self.scratch("key of a piece", rows.shape, self.dtype))
        if self.windows_overlap:
            query = rows[:, self.options.num_chunks_before :][:, :num_chunks]
        else:
            # In the memory of `rows`, which has become the keys.
            query = self.gather(self.query, self.query_rows[:, chunks].flatten(), "query")
        return query, self.windows(key, num_chunks), self.windows(value, num_chunks), self.mask(chunks)

    def _turned(self, *tensors):
        """
        On a CPU `[G, n, ...]` to `[n, G, ...]`, or back.

        Its kernel writes `[n, C, G, D]` for `[n, G, C, D]`: with one head, chunks come out one behind the other.
        """
        return [tensor.transpose(0, 1) if tensor.device.type == "cpu" else tensor for tensor in tensors]

    def _is_alone(self, log_sum_exp: torch.Tensor) -> torch.Tensor:
        """Which tokens have nothing but themselves to attend to. Their output is exactly their value, or zeros."""
        return log_sum_exp < SELF_SCORE[self.mask_dtype] / 2

    def attend_backward(
        self, gradient: torch.Tensor, output: torch.Tensor, log_sum_exp: torch.Tensor, total: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            gradient, output: `[G, P, D]`, of all rounds; the gradient is overwritten.
            log_sum_exp, total: `[G, P]`, as `attend` returns them.

        Returns:
            Gradients of `query` and `value`, `[G, P, D]`, float32 at least.
        """
        is_alone = self._is_alone(log_sum_exp)[..., None]
        query_grad, key_grad, value_grad, product = (
            self._scratch_for_rows(name, log_sum_exp.dtype)
            for name in ("query's gradient", "key's gradient", "value's gradient", "product")
        )
        if self.options.value_shift:
            value_grad.zero_()
        else:
            value_grad.copy_(gradient).masked_fill_(~is_alone, 0)
        gradient.masked_fill_(is_alone, 0)
        # All their probabilities become zero. The difference of two mask scores could be any number.
        log_sum_exp = log_sum_exp.masked_fill(is_alone.squeeze(-1), 0)
        if self.rounds > 1:
            # The kernel computes probabilities relative to the round with the largest log-sum-exp.
            gradient /= total[..., None]
        query_grad.zero_(), key_grad.zero_()
        pieces = (piece for round_index in range(self.rounds) for piece in self.pieces(round_index))
        for chunks, _ in distinct(pieces, self.query):
            query_rows, key_rows = self.query_rows[:, chunks].flatten(), self.key_rows_of(chunks)
            query, key, value, mask = self._turned(*self._inputs(chunks))
            gradient_, output_, log_sum_exp_ = self._turned(
                self.gather(gradient, query_rows, "gradient"),
                self.gather(output, query_rows, "output"),
                self.gather(log_sum_exp, query_rows, "log-sum-exp"),
            )
            parts = attend_backward(query, key, value, mask, gradient_, output_, log_sum_exp_, scale=1.0)
            query_part, *of_keys = self._turned(*parts)
            _add_rows(query_grad, query_rows, query_part)
            for whole, part in zip((key_grad, value_grad), of_keys, strict=True):
                part = part.to(whole.dtype)
                _add_rows(whole, key_rows, sum_windows(part, self.num_neighbours) if self.windows_overlap else part)
            del parts, query_part, of_keys, part
        # The gradient through `key = query * scale`; the scale depends on the query.
        scale = self.key_scale
        along = torch.mul(self.query, key_grad, out=product).sum(-1, keepdim=True) * scale.square()
        query_grad.addcmul_(key_grad.sub_(torch.mul(self.query, along, out=product)), scale)
        return query_grad, value_grad


def _add_rows(whole: torch.Tensor, rows: torch.Tensor, part: torch.Tensor):
    whole.flatten(0, 1).index_add_(0, rows, part.reshape(-1, whole.shape[2]).to(whole.dtype))
