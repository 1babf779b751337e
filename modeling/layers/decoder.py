"""A decoder's layers, which read an encoder between self-attention and feed-forward."""

from functools import partial
from typing import Any, cast

from torch import nn

from .cross_attention import CrossAttention
from .encoder import ReformerEncoder, ReformerLayer
from .reversible import Half, whole
from .source import Source


class ReformerDecoderLayer(ReformerLayer):
    """
    `a = x1 + attention(x2)`, `b = x2 + cross_attention(a)`, `c = a + feed_forward(b)`; the streams b and c come out.

    With three updates the streams change their roles from layer to layer, as in trax's `EncoderDecoderBlock`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.cross_attention = CrossAttention(config, layer_idx)

    def updating(self) -> list[nn.Module]:
        attention, feed_forward = super().updating()
        return [attention, self.cross_attention, feed_forward]

    def halves(self, attention_kwargs: dict[str, Any], source: Source | None = None) -> list[Half]:
        attention, feed_forward = super().halves(attention_kwargs)
        names = ("attention_mask", "documents", "layout", "return_weights")
        kwargs = {name: attention_kwargs[name] for name in names if name in attention_kwargs}
        # Documents and maps are those of whole rows.
        of_rows = kwargs.get("return_weights") or kwargs.get("documents") is not None
        split = whole if of_rows else partial(self.cross_attention.split, source=cast(Source, source))
        cross = Half(self.cross_attention, kwargs, split, reads_source=True)
        return [attention, cross, feed_forward]


class ReformerDecoderStack(ReformerEncoder):
    """`ReformerEncoder`, whose `forward` also takes a `source`, with layers that read it."""

    layer_class = ReformerDecoderLayer
    repeatable = (*ReformerEncoder.repeatable, ReformerDecoderLayer, CrossAttention)
