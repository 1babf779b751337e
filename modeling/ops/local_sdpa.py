"""
Local attention through PyTorch's fused kernels, some chunks at a time.

The windows of neighbouring chunks overlap in memory, so nothing is copied but the rows at the seam of the circle and a
last chunk that the text does not fill. Backward computes the scores again (see `softmax_kernels`).

Shapes: B batch, L length, H heads, D head size, P padded length, C chunk length, N = P / C chunks, n chunks of a
piece, W window length.
"""

from collections.abc import Iterator

import torch

from .chunking import MASKED_SCORE, circular_offsets, look_adjacent, sum_windows
from .differentiation import once_differentiable
from .implementations import AttentionCall
from .local_options import LocalOptions
from .operators import AttentionFunction, arguments_of, operator, schema_of
from .softmax_kernels import additive_mask_dtype, attend, attend_backward, distinct
from .visibility import visible_local_keys


# Scores per kernel call, over all heads.
SCORES_AT_ONCE = 2**20


def why_not_sdpa(call: AttentionCall) -> str | None:
    """Why fused kernels cannot serve a call of local attention, or None."""
    return call.why_not_fused("Set `local_attention_probs_dropout_prob=0`")


def local_attention_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    options: LocalOptions,
    return_weights: bool = False,
) -> tuple[torch.Tensor, None]:
    """
    Attention of each chunk to itself and its neighbours.

    Args:
        query, key, value: `[B, L, H, D]`.
        key_mask: `[B, P]`, bool, or None if every token is real.
        documents: `[B, P]`, the document of each position, or None if a row is one.

    Returns:
        Output `[B, L, H, D]`, and None for the attention map.
    """
    output, _ = _LocalAttention.apply(query, key, value, key_mask, documents, options)
    return output, None


class _LocalAttention(AttentionFunction):
    @staticmethod
    def forward(query, key, value, key_mask, documents, options):
        return _local_sdpa(query, key, value, key_mask, documents, *arguments_of(options))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        gradients = _local_sdpa_backward(gradient, *ctx.saved_tensors, *arguments_of(ctx.options))
        return *gradients, None, None, None


def _shapes_forward(query, key, value, key_mask, documents, *options):
    options = LocalOptions(*options)
    num_chunks = options.padded_length // options.chunk_length
    dtype = torch.promote_types(query.dtype, torch.float32)
    log_sum_exp = query.new_empty(query.shape[0], num_chunks, query.shape[2], options.chunk_length, dtype=dtype)
    return torch.empty_like(query, memory_format=torch.contiguous_format), log_sum_exp


def _shapes_backward(gradient, query, key, value, *_):
    return tuple(torch.empty_like(rows, memory_format=torch.contiguous_format) for rows in (query, key, value))


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? documents"


@operator(f"({_INPUTS}, {schema_of(LocalOptions)}) -> (Tensor, Tensor)", _shapes_forward)
def _local_sdpa(query, key, value, key_mask, documents, *options):
    windows = _Windows(query, key_mask, documents, LocalOptions(*options))
    output, log_sum_exp = _shapes_forward(query, key, value, key_mask, documents, *options)
    for row, chunks in distinct(windows.pieces(), query):
        piece_output, log_sum_exp[row, chunks] = attend(
            windows.queries(query[row], chunks),
            windows.keys(key[row], chunks),
            windows.keys(value[row], chunks),
            windows.mask(row, chunks),
            windows.scale,
        )
        windows.put(output[row], chunks, piece_output)
        # Free this piece before the next one is allocated.
        del piece_output
    # A query that sees nothing gets probabilities of zero. The difference of two mask scores could be any number.
    log_sum_exp.masked_fill_(log_sum_exp < MASKED_SCORE[windows.mask_dtype] / 2, 0)
    return output, log_sum_exp


@operator(
    f"(Tensor gradient, {_INPUTS}, Tensor output, Tensor log_sum_exp, {schema_of(LocalOptions)}) "
    "-> (Tensor, Tensor, Tensor)",
    _shapes_backward,
)
def _local_sdpa_backward(gradient, query, key, value, key_mask, documents, output, log_sum_exp, *options):
    windows = _Windows(query, key_mask, documents, LocalOptions(*options))
    query_grad = torch.empty_like(query, memory_format=torch.contiguous_format)
    key_grad, value_grad = (
        torch.zeros(rows.shape, dtype=log_sum_exp.dtype, device=rows.device) for rows in (key, value)
    )
    for row, chunks in distinct(windows.pieces(), query):
        query_part, key_part, value_part = attend_backward(
            windows.queries(query[row], chunks),
            windows.keys(key[row], chunks),
            windows.keys(value[row], chunks),
            windows.mask(row, chunks),
            windows.queries(gradient[row], chunks),
            windows.queries(output[row], chunks),
            log_sum_exp[row, chunks],
            windows.scale,
        )
        windows.put(query_grad[row], chunks, query_part)
        windows.add(key_grad[row], chunks, key_part)
        windows.add(value_grad[row], chunks, value_part)
        del query_part, key_part, value_part
    return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype)


class _Windows:
    """Where the queries of some chunks, and what they look at, stand in a row of the batch, `[L, H, D]`."""

    def __init__(
        self,
        query: torch.Tensor,
        key_mask: torch.Tensor | None,
        documents: torch.Tensor | None,
        options: LocalOptions,
    ):
        self.options, self.key_mask, self.documents = options, key_mask, documents
        self.batch, self.length, self.heads, head_size = query.shape
        self.scale = head_size**-0.5
        positions = torch.arange(options.padded_length, device=query.device).view(1, 1, -1, options.chunk_length)
        self.num_chunks = positions.shape[2]
        offsets = circular_offsets(*options.around, self.num_chunks)
        self.positions, self.key_positions = positions[0, 0], look_adjacent(positions, offsets)[0, 0]
        self.mask_dtype = additive_mask_dtype(query)

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """Row of the batch, and chunks: last those that look across the seam."""
        num_before, num_after = self.options.around
        at_once = max(1, SCORES_AT_ONCE // (self.heads * self.options.chunk_length * self.key_positions.shape[1]))
        whole_chunks = self.length // self.options.chunk_length
        inner = range(min(num_before, self.num_chunks), max(0, whole_chunks - num_after))
        seams = (range(self.num_chunks),) if not inner else (range(inner.start), range(inner.stop, self.num_chunks))
        for row in range(self.batch):
            for chunks in (inner, *seams):
                for start in chunks[::at_once]:
                    yield row, slice(start, min(start + at_once, chunks.stop))

    def _is_inner(self, chunks: slice) -> bool:
        num_before, num_after = self.options.around
        last = (chunks.stop + num_after) * self.options.chunk_length
        return chunks.start >= num_before and last <= self.length

    def queries(self, rows: torch.Tensor, chunks: slice) -> torch.Tensor:
        """`[L, H, D]` to `[n, H, C, D]`."""
        chunk_length = self.options.chunk_length
        taken = rows[chunks.start * chunk_length : chunks.stop * chunk_length]
        missing = (chunks.stop - chunks.start) * chunk_length - len(taken)
        if missing:
            taken = torch.nn.functional.pad(taken, (0, 0, 0, 0, 0, missing))
        return taken.unflatten(0, (-1, chunk_length)).transpose(1, 2)

    def put(self, rows: torch.Tensor, chunks: slice, taken: torch.Tensor):
        """The reverse of `queries`."""
        first = chunks.start * self.options.chunk_length
        taken = taken.transpose(1, 2).flatten(0, 1)[: max(0, self.length - first)]
        rows[first : first + len(taken)] = taken

    def keys(self, rows: torch.Tensor, chunks: slice) -> torch.Tensor:
        """`[L, H, D]` to `[n, H, W, D]`, a view where possible."""
        if not self._is_inner(chunks):
            return rows[self._rows_of(chunks)].transpose(1, 2)
        chunk_length, width = self.options.chunk_length, self.key_positions.shape[1]
        of_row, of_head, of_number = rows.stride()
        first = (chunks.start - self.options.num_chunks_before) * chunk_length
        return rows.as_strided(
            (chunks.stop - chunks.start, self.heads, width, rows.shape[2]),
            (chunk_length * of_row, of_head, of_row, of_number),
            rows.storage_offset() + first * of_row,
        )

    def add(self, rows: torch.Tensor, chunks: slice, windows: torch.Tensor):
        """Add `[n, H, W, D]` to the rows that `keys` took them from."""
        windows = windows.transpose(1, 2).to(rows.dtype)
        if not self._is_inner(chunks):
            rows.index_add_(0, self._rows_of(chunks).flatten(), windows.reshape(-1, *rows.shape[1:]))
            return
        num_before, num_after = self.options.around
        chunk_length = self.options.chunk_length
        part = sum_windows(windows.reshape(1, *windows.shape[:2], -1), num_before + num_after)
        first, last = (chunks.start - num_before) * chunk_length, (chunks.stop + num_after) * chunk_length
        rows[first:last] += part.view(-1, *rows.shape[1:])

    def _rows_of(self, chunks):
        # Keys beyond the end of the sequence are masked, so any row can stand for them.
        return self.key_positions[chunks].clamp(max=self.length - 1)

    def mask(self, row: int, chunks: slice) -> torch.Tensor:
        """`[n, 1, C, W]`, added to the scores."""
        key_mask, documents = (
            None if table is None else table[row, None] for table in (self.key_mask, self.documents)
        )
        visible = visible_local_keys(self.positions, self.key_positions, key_mask, self.options, chunks, documents)
        shape = (chunks.stop - chunks.start, *self.positions.shape[1:], *self.key_positions.shape[1:])
        mask = torch.zeros(shape, dtype=self.mask_dtype, device=self.positions.device)
        if visible is not None:
            mask.masked_fill_(~visible[0], MASKED_SCORE[self.mask_dtype])
        return mask[:, None]
