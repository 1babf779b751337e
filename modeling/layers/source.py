"""What a decoder's layers read of the encoder."""

from collections import Counter
from dataclasses import dataclass

import torch
from transformers.cache_utils import EncoderDecoderCache

from ..ops.documents import Documents
from ..ops.movable import Movable
from ..ops.row_layout import RowLayout


# trf-ignore: TRF031 this goes into the layers, it is no output
@dataclass(frozen=True)
class Source(Movable):
    """
    The encoder's output, the same for all layers. One object, so that no wrapper of a layer narrows its numbers.

    Attributes:
        hidden_states: `[B, P, output_size]`.
        is_real: `[B, P]`, bool; None if every place has a real token.
        layout, documents: Where the caller's tokens stand, and the documents of each row; None if a row is one.
        cache: Holds the keys and values that layers have made of it; None without one.
    """

    hidden_states: torch.Tensor
    is_real: torch.Tensor | None = None
    layout: RowLayout | None = None
    documents: Documents | None = None
    cache: EncoderDecoderCache | None = None


def check_source(source: Source | None, target: torch.Tensor, documents: Documents | None):
    """ValueError unless each row of a target, `[B, L, ...]`, and each of its `documents` has a source, if any has."""
    if source is None:
        return
    if len(source.hidden_states) != len(target):
        raise ValueError(
            f"The source has {len(source.hidden_states)} rows, the target {len(target)}. Each row of the target needs "
            "one of the source."
        )
    rows = [[] if each is None else each.row.tolist() for each in (source.documents, documents)]
    if rows[0] != rows[1]:
        counts = [dict(Counter(found)) or "one in each row" for found in rows]
        raise ValueError(
            f"The source has other documents than the target: {counts[0]} and {counts[1]} (row: documents). Each "
            "document of a packed target reads the source's of the same number, so number both, by `attention_mask` "
            "and `decoder_attention_mask` or by positions that start again."
        )
