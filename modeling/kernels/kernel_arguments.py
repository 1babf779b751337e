"""
What the attention kernels are given and give back, by name. It can be written down without Triton.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

from typing import NamedTuple

import torch


class AttentionInputs(NamedTuple):
    """
    What attention is computed of.

    Attributes:
        query, key, value: `[B, L, H, D]`; without keys those are the queries at unit length.
        order, buckets: `[B, H, R, P]`, int32, contiguous. Without an order the tokens stand as in the sequence, and
            without buckets every key within reach counts.
        key_mask: `[B, P]`, bool, contiguous; None if every token is real.
    """

    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor
    order: torch.Tensor | None
    buckets: torch.Tensor | None
    key_mask: torch.Tensor | None

    def with_contiguous_rows(self) -> "AttentionInputs":
        """The same with a contiguous last dimension of queries, keys and values, which is all that kernels need."""
        key = None if self.key is None else with_contiguous_rows(self.key)
        return self._replace(query=with_contiguous_rows(self.query), key=key, value=with_contiguous_rows(self.value))


class AttentionResults(NamedTuple):
    """
    What attention gives, all rounds combined. Backward needs all of it.

    Attributes:
        output: `[B, L, H, D]`.
        log_sum_exp: `[B, H, L]`, float32, in base 2.
        key_scale: What makes a key of a query, `[B, H, L]`, float32; None if keys were given.
    """

    output: torch.Tensor
    log_sum_exp: torch.Tensor
    key_scale: torch.Tensor | None


class KernelSizes(NamedTuple):
    """Sizes B, H and L, and chunks of all rounds and of one, in the order in which attention kernels take them."""

    batch: int
    heads: int
    length: int
    num_chunks: int
    chunks_per_round: int


def with_contiguous_rows(rows: torch.Tensor) -> torch.Tensor:
    """`rows` with a contiguous last dimension."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()
