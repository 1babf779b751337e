"""What a decoder keeps of its own text, and of the encoder's."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ...configuration.sides import config_of_side
from .decoding_cache import ReformerCache


class ReformerSeq2SeqCache(EncoderDecoderCache):
    """
    The cache of `ReformerForConditionalGeneration`: a `ReformerCache` of the target, keys and values of the source.

    The latter take the most memory: `2 * layers * source length * heads * head size` numbers for each row and beam,
    1.6 GB in float32 for a source of 65,536 tokens and 6 layers of 8 heads of 64.

    Args:
        config: The model's.
        max_length: See `ReformerCache`.
    """

    def __init__(self, config, max_length: int | None = None):
        super().__init__(ReformerCache(config_of_side(config, is_decoder=True), max_length), DynamicCache())

    @property
    def has_source(self) -> bool:
        """Whether keys and values of the source are there, so that the encoder's output is not read any more."""
        return len(self.is_updated) == len(self) and all(self.is_updated.values())

    def check_source(self, hidden_states: torch.Tensor):
        """ValueError where it was filled from a source of another shape than this one, `[B, L, output_size]`."""
        if not self.has_source:
            return
        first: Any = self.cross_attention_cache.layers[0]
        rows, _, length, _ = first.keys.shape
        if (rows, length) != hidden_states.shape[:2]:
            raise ValueError(
                f"The cache was filled from a source of {rows} rows and {length} tokens, and the encoder's output has "
                f"{hidden_states.shape[0]} rows and {hidden_states.shape[1]} tokens. Give the same source as before, "
                "or a new cache, or call `reset()`."
            )

    def check_dynamic_cache(self, method: str):
        """Nothing: all that transformers' class does with two `DynamicCache` can be done with these."""

    def reset(self):
        """Forget both texts."""
        self.self_attention_cache.reset()
        self.cross_attention_cache, self.is_updated = DynamicCache(), {}

    def batch_select_indices(self, indices: torch.Tensor):
        """Keep the rows listed, in this order."""
        self.self_attention_cache.batch_select_indices(indices)
        layers: list[Any] = self.cross_attention_cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[indices], layer.values[indices]
