"""
Attention of many new tokens to a cache, within windows of one round.

The new tokens of a bucket stand side by side in it, so what several of them meet is one stretch of the order. Its keys
are gathered once for the whole group, where `attend_to_rows` gathers them for each token.

Shapes: B batch, M new tokens, H heads, D head size, G groups, W codes of a stretch.
"""

import torch

from ..ops.chunking import MASKED_SCORE, SELF_SCORE
from .bucket_order import bucket_of, position_of
from .row_buffer import RowBuffer


# Tokens of a bucket that share a stretch.
GROUP = 16
# From how many new tokens on groups are worth it.
MANY_TOKENS = 64


def attend_in_groups(
    query: torch.Tensor,
    rows: RowBuffer,
    codes: torch.Tensor,
    order: torch.Tensor,
    reach: int,
    value_shift: int,
    most_numbers: int,
) -> torch.Tensor:
    """
    What `attend_in_buckets` computes of one round with windows.

    Args:
        query: `[B, M, H, D]`.
        rows: Keys, values and scales, those of the new tokens included.
        codes: `[B, H, M]`, of the new tokens.
        order: `[B, H, L]`, all codes, sorted, those of the new tokens included.
        reach: Codes before its own that a token meets in its bucket.
        value_shift: A key carries the value of so many tokens further.
        most_numbers: Elements that are gathered at once.

    Returns:
        `[B, M, H, D]`.
    """
    dtype, size = query.dtype, query.shape[3]
    members, places, is_member = _groups(codes, order)
    batch, heads, count, _ = members.shape
    # One place more, where what stands for nobody is put.
    output = query.new_zeros(batch, heads, query.shape[1] + 1, size)
    query = query.transpose(1, 2).to(rows.keys.dtype)
    at_once = max(1, most_numbers // (batch * heads * (reach + GROUP) * size))
    for begin in range(0, count, at_once):
        piece = slice(begin, begin + at_once)
        chosen = members[:, :, piece].flatten(2)
        asked = query.gather(2, chosen[..., None].expand(-1, -1, -1, size)).unflatten(2, (-1, GROUP))
        its_codes = codes.gather(2, chosen).unflatten(2, (-1, GROUP))
        found = _attend(asked, its_codes, places[:, :, piece], rows, order, reach, value_shift)
        target = torch.where(is_member[:, :, piece].flatten(2), chosen, output.shape[2] - 1)
        output = output.scatter(2, target[..., None].expand(-1, -1, -1, size), found.flatten(2, 3).to(dtype))
    return output[:, :, :-1].transpose(1, 2)


def _groups(codes: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Up to `GROUP` tokens of a bucket each, which are neighbours in it.

    Returns:
        Tokens, and their places in the order, `[B, H, G, GROUP]` each; which there are, bool.
    """
    ordered, tokens = codes.sort(dim=-1)
    places = torch.searchsorted(order, ordered)
    number = torch.arange(codes.shape[2], device=codes.device)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[..., 1:] = bucket_of(ordered[..., 1:]) != bucket_of(ordered[..., :-1])
    rank = number - torch.where(begins, number, 0).cummax(-1).values
    slot = rank % GROUP
    group = (slot == 0).cumsum(-1) - 1
    count = int(group[..., -1].max()) + 1
    index = group * GROUP + slot
    members = tokens.new_zeros(*codes.shape[:2], count * GROUP).scatter_(2, index, tokens)
    is_member = torch.zeros_like(members, dtype=torch.bool).scatter_(2, index, True)
    # Where there is no token, the place is behind all others.
    places = torch.full_like(members, order.shape[2]).scatter_(2, index, places)
    return tuple(table.unflatten(2, (count, GROUP)) for table in (members, places, is_member))


def _attend(query, codes, places, rows, order, reach, value_shift):
    """Of groups, given queries `[B, H, G, GROUP, D]`, their codes and their places, `[B, H, G, GROUP]`."""
    batch, heads = query.shape[:2]
    stretch = places.amin(-1, keepdim=True) - reach + torch.arange(reach + GROUP, device=query.device)
    met = order.gather(2, stretch.clamp(0, order.shape[2] - 1).flatten(2)).view(stretch.shape)
    met = met.masked_fill((stretch < 0) | (stretch >= order.shape[2]), -1)
    # Each row of the batch and head has a place for its first token in a table of all vectors.
    capacity = rows.keys.shape[1]
    start = torch.arange(batch, device=query.device)[:, None] * (capacity * heads)
    start = (start + torch.arange(heads, device=query.device))[..., None, None]

    def look_up(table, positions):
        index = torch.add(start, rows.slots(positions), alpha=heads).flatten()
        return table.flatten(0, 2).index_select(0, index).view(*stretch.shape, *table.shape[3:])

    positions = position_of(met)
    scores = query @ look_up(rows.keys, positions).transpose(-1, -2)
    scores = scores * look_up(rows.tensors[2], positions)[..., None, :]
    met, own = met[..., None, :], codes[..., None]
    is_near = stretch[..., None, :] >= places[..., None] - reach
    visible = (met < own) & (bucket_of(met) == bucket_of(own)) & is_near
    is_self = met == own
    scores = scores.masked_fill(~visible, MASKED_SCORE[scores.dtype]).masked_fill(is_self, SELF_SCORE[scores.dtype])
    output = scores.softmax(dim=-1).to(rows.values.dtype) @ look_up(rows.values, positions + value_shift)
    return output.masked_fill(~visible.any(-1, keepdim=True), 0) if value_shift else output
