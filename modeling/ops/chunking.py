"""
Attention within chunks and their neighbours: the mechanics that LSH and local attention share.

Shapes: B batch, H heads, D head size, N chunks, C chunk length, W window length (number of chunks looked at, times C).
"""

import math

import torch
from torch import nn


# By dtype, the score of a token for itself, or what is added to it: it counts only where nothing else does. Stock
# Reformer's is -1e5, and there are queries with scores below that. No scores are below this one, because the square of
# a query is finite in the dtype; in base 2 it is still finite. Half precision ends at 65,504, so there scores must be
# above -16,376.
SELF_SCORE = dict.fromkeys((torch.bfloat16, torch.float32, torch.float64), -(2.0**125)) | {torch.float16: -32752.0}
# The same for a key that must not count: twice as low, so that beside it a token counts for itself.
MASKED_SCORE = {dtype: 2 * score for dtype, score in SELF_SCORE.items()}


def padded_to_multiple(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    # ONNX rounds quotients of negative integers up.
    return (length + multiple - 1) // multiple * multiple


def circle_length_of(config, length: int) -> int | None:
    """Tokens on the circle of chunks: `length`, padded as by stock Reformer to a multiple of all chunk lengths."""
    # CODEPATH: published checkpoints were trained on the circle; recipes for new models leave it out.
    if not config.circular_look_around:
        return None
    lengths = {"lsh": config.lsh_attn_chunk_length, "local": config.local_attn_chunk_length}
    in_use = [lengths[kind] for kind in set(config.attn_layers) if kind in lengths]
    if not in_use or length <= min(in_use):
        return length
    return padded_to_multiple(length, math.lcm(*in_use))


def may_pad(added: int) -> bool:
    """Whether something is to be added. An exported program serves all lengths, so there nothing may be asked."""
    return torch.compiler.is_exporting() or added > 0


def pad_rows(rows: torch.Tensor, padded_length: int) -> torch.Tensor:
    """`[B, L, H, D]` to `[B, H, padded_length, D]`, filled up with zeros."""
    rows = rows.transpose(1, 2)
    added = padded_length - rows.shape[2]
    # `pad` would copy even when the width is zero.
    return nn.functional.pad(rows, (0, 0, 0, added)) if may_pad(added) else rows


def unpad_rows(rows: torch.Tensor, length: int) -> torch.Tensor:
    """The reverse of `pad_rows`: `[B, H, padded_length, D]` to `[B, L, H, D]`."""
    rows = rows.transpose(1, 2)
    if torch.compiler.is_exporting():
        # Whether a slice is contiguous depends on the length.
        return rows.index_select(1, torch.arange(length, device=rows.device))
    return rows[:, :length]


def pad_mask(
    attention_mask: torch.Tensor | None, batch: int, length: int, padded_length: int, device: torch.device
) -> torch.Tensor:
    """`[B, L]`, or None if every token is real, to `[B, padded_length]`, False for what was added."""
    if attention_mask is None:
        return (torch.arange(padded_length, device=device) < length).expand(batch, -1)
    return nn.functional.pad(attention_mask, (0, padded_length - length), value=False)


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """
    Rows of every head in the order of `index`.

    Args:
        rows: `[B, H, L, D]`.
        index: `[B, H, M]`, positions in `[0, L)`.

    Returns:
        `[B, H, M, D]`.
    """
    batch, heads, length, size = rows.shape
    first_row = torch.arange(batch * heads, device=rows.device).view(batch, heads, 1) * length
    # `embedding` is the fastest row gather on the CPU, several times so in its backward.
    return nn.functional.embedding(index + first_row, rows.reshape(-1, size))


def look_adjacent(chunks: torch.Tensor, offsets: list[int]) -> torch.Tensor:
    """
    Each chunk together with its neighbours on the circle of chunks.

    Args:
        chunks: `[B, H, N, C, ...]`.
        offsets: From `circular_offsets`.

    Returns:
        `[B, H, N, W, ...]`, chunks in the order of `offsets`.
    """
    if len(offsets) == 1:
        return chunks
    return torch.cat([chunks.roll(-offset, dims=2) for offset in offsets], dim=3)


def window_views(chunks: torch.Tensor, num_windows: int, num_neighbours: int) -> torch.Tensor:
    """
    Windows that overlap in memory: each chunk with those behind it.

    Args:
        chunks: `[G, num_windows + num_neighbours, C, D]`, contiguous.

    Returns:
        `[G, num_windows, (num_neighbours + 1) * C, D]`.
    """
    groups, _, chunk_length, size = chunks.shape
    of_group, of_chunk, of_row, _ = chunks.stride()
    shape = (groups, num_windows, (num_neighbours + 1) * chunk_length, size)
    return chunks.as_strided(shape, (of_group, of_chunk, of_row, 1), chunks.storage_offset())


def sum_windows(windows: torch.Tensor, num_neighbours: int) -> torch.Tensor:
    """`[G, n, W, D]` to `[G, n + num_neighbours, C, D]`: the sum, for each row, over the windows that it is in."""
    groups, num_windows, width, size = windows.shape
    parts = windows.view(groups, num_windows, num_neighbours + 1, width // (num_neighbours + 1), size)
    chunks = windows.new_empty(groups, num_windows + num_neighbours, *parts.shape[3:])
    chunks[:, :num_windows] = parts[:, :, 0]
    chunks[:, num_windows:] = 0
    for i in range(1, num_neighbours + 1):
        chunks[:, i : i + num_windows] += parts[:, :, i]
    return chunks


def key_scale(query_key: torch.Tensor) -> torch.Tensor:
    """
    What a query is multiplied with to be a key, `[..., D]` to `[..., 1]`, float32 at least.

    Keys are the queries at unit length (paper section 2, "shared-QK"), with stock Reformer's epsilon.
    """
    wide = query_key.to(torch.promote_types(query_key.dtype, torch.float32))
    return (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() / query_key.shape[-1] ** 0.5


def circular_offsets(num_before: int, num_after: int, num_chunks: int) -> list[int]:
    """
    How far on the circle each neighbour is from a chunk, itself included.

    Where that is round the circle or farther, the neighbour is the chunk itself, as in stock Reformer.
    """
    return [offset if abs(offset) < num_chunks else 0 for offset in range(-num_before, num_after + 1)]


def neighbour_exists(
    num_chunks: int,
    chunks_per_round: int,
    num_before: int,
    num_after: int,
    chunk_length: int,
    device: torch.device,
    chunks: slice = slice(None),
) -> torch.Tensor:
    """
    Which entries of a `look_adjacent` window are in the chunk's own round without going round the circle.

    Returns:
        `[N, 1, W]`, bool; of `chunks` only.
    """
    chunk = torch.arange(num_chunks, device=device)[chunks, None]
    neighbour = chunk + torch.arange(-num_before, num_after + 1, device=device)
    same_round = neighbour.div(chunks_per_round, rounding_mode="floor") == chunk // chunks_per_round
    return same_round.repeat_interleave(chunk_length, dim=1)[:, None, :]


def scatter_to_map(
    probabilities: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor, padded_length: int
) -> torch.Tensor:
    """
    Chunked attention probabilities as a dense map over original positions.

    Args:
        probabilities: `[B, H, N, C, W]`.
        positions, key_positions: `[B, H, N, C]` and `[B, H, N, W]`, in `[0, padded_length)`.

    Returns:
        `[B, H, padded_length, padded_length]`; a key met several times has the sum of its probabilities.
    """
    batch, heads = probabilities.shape[:2]
    cell = positions[..., :, None] * padded_length + key_positions[..., None, :]
    dense = probabilities.new_zeros(batch, heads, padded_length * padded_length)
    dense = dense.scatter_add(2, cell.flatten(2), probabilities.flatten(2))
    return dense.unflatten(2, (padded_length, padded_length))
