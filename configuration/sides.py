"""The two sides of a config of an encoder with a decoder."""

import copy
from typing import cast

from .configuration_reformer import ReformerConfig


def config_of_side(config: ReformerConfig, is_decoder: bool) -> ReformerConfig:
    """The config of the encoder or of the decoder of a model, each by itself a Reformer."""
    side = copy.deepcopy(config)
    if is_decoder:
        side.attn_layers = cast(tuple, config.decoder_attn_layers)
        # A causal model sees nothing of what is behind.
        side.local_num_chunks_after = side.lsh_num_chunks_after = 0
    else:
        side.lsh_value_shift = 0
    side.is_encoder_decoder, side.is_decoder, side.decoder_attn_layers = False, is_decoder, None
    side.base_model_fsdp_plan = type(config).base_model_fsdp_plan  # type: ignore[misc]
    side.tie_word_embeddings = False
    return side
