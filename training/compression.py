"""Bits per byte: from a model's loss, and the figures any model should be read beside."""

import lzma
import math

import torch


LARGEST_ORDER = 6


def bits_per_byte(nats_per_token: float, tokens_per_byte: float = 1.0) -> float:
    """Bits a model spends per byte of text.

    Args:
        nats_per_token: mean cross-entropy over the predicted tokens, natural logarithm, as a loss is reported.
        tokens_per_byte: predicted tokens divided by the bytes of text they stand for; 1 where every token is a byte.
    """
    return nats_per_token / math.log(2) * tokens_per_byte


def conditional_entropy(data: bytes, order: int) -> float:
    """Empirical entropy of a byte given the `order` bytes before it, in bits per byte.

    It is computed from the (order + 1)-gram counts of `data` itself, over the `len(data) - order` positions that have
    a full context: `sum(count * log2(count(context) / count)) / positions`. So it is what the best possible fixed
    order-k table would spend if it had been fitted on exactly these bytes and cost nothing to store: a lower bound for
    every fixed order-k model that never saw them, and the lower the fewer bytes there are.

    Raises:
        ValueError: if `order` is outside 0..6 or `data` has no byte with a full context.
    """
    if not 0 <= order <= LARGEST_ORDER:
        raise ValueError(f"order is {order}; it must lie between 0 and {LARGEST_ORDER}.")
    positions = len(data) - order
    if positions < 1:
        raise ValueError(f"{len(data)} bytes hold no byte with {order} bytes before it; give at least {order + 1}.")
    symbols = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    contexts = torch.zeros(positions, dtype=torch.long)
    for offset in range(order):
        contexts = contexts * 256 + symbols[offset : offset + positions]
    grams = contexts * 256 + symbols[order:]
    return (_count_log_count(contexts) - _count_log_count(grams)) / positions


def _count_log_count(codes: torch.Tensor) -> float:
    """Sum of `count * log2(count)` over the distinct values of `codes`."""
    counts = codes.unique(return_counts=True)[1].double()
    return (counts @ counts.log2()).item()


def lzma_bits_per_byte(data: bytes) -> float:
    """Bits per byte after `lzma` at its strongest setting (preset 9 | EXTREME), container included.

    Raises:
        ValueError: if `data` is empty.
    """
    if not data:
        raise ValueError("There are no bytes to compress.")
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def reference_figures(data: bytes) -> dict[str, float]:
    """The figures that stand beside a model's bits per byte on the same bytes: order-0, order-2 and lzma."""
    return {
        "order-0": conditional_entropy(data, 0),
        "order-2": conditional_entropy(data, 2),
        "lzma": lzma_bits_per_byte(data),
    }
