"""A decoder's attention to what the encoder has put out: dense, in no order, and never of size target times source."""

from typing import cast

import torch
from torch import nn

from ..ops.documents import Documents, attend_by_document
from ..ops.row_layout import RowLayout, attend_by_map
from .full_attention import dense_attention, dense_implementation
from .output_projection import OutputProjection, ends_in_projection
from .source import Source


# Scores that are computed at a time where no fused kernel does it.
SCORES_AT_ONCE = 2**24


class CrossAttention(nn.Module):
    """
    LayerNorm, attention of each target token to the whole source, output projection (trax's `EncoderDecoderBlock`).

    Queries follow from the target, keys and values from the source. A row whose source has no real token reads zeros.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.head_size = config.num_attention_heads, config.attention_head_size
        size = self.num_heads * self.head_size
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.cross_attention_probs_dropout_prob)
        self.query = nn.Linear(config.hidden_size, size, bias=False)
        self.key = nn.Linear(config.output_size, size, bias=False)
        self.value = nn.Linear(config.output_size, size, bias=False)
        self.output = OutputProjection(config, size, bias=config.attention_output_bias)

    def split(self, target: torch.Tensor, source: Source) -> tuple[torch.Tensor, ...]:
        """Pieces of the target, `[B, L, ...]`, so that few scores are in memory; all where a kernel keeps none."""
        if self._is_fused(target.device) or torch.compiler.is_compiling():
            return (target,)
        scores_of_token = max(1, len(target) * self.num_heads * source.hidden_states.shape[1])
        return target.split(max(1, SCORES_AT_ONCE // scores_of_token), dim=1)

    def _is_fused(self, device):
        # On a CPU the kernels of PyTorch know no dropout.
        drops = self.dropout.training and self.dropout.p > 0
        return dense_implementation(self.config) != "eager" and not (drops and device.type == "cpu")

    @ends_in_projection
    def forward(
        self,
        hidden_states: torch.Tensor,
        source: Source,
        attention_mask: torch.Tensor | None = None,
        documents: Documents | None = None,
        layout: RowLayout | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """
        Args:
            hidden_states: `[B, L, hidden_size]`.
            source: What the encoder has put out.
            attention_mask: `[B, L]`, bool; looked at with `documents` only.
            documents: Those of each row of the target; each reads the source's document of the same number.
            layout: Where the caller's target tokens stand.
            return_weights: Also return the attention map.

        Returns:
            Output `[B, L, hidden_size]`; the map `[B, H, L, P]` of the caller's tokens, or None; None.
        """
        hidden_states = self.layer_norm(hidden_states.to(self.layer_norm.weight.dtype))
        query = self.query(hidden_states).unflatten(-1, (self.num_heads, self.head_size))
        key, value = self._keys_and_values(source)
        if documents is None:
            output, weights = self._attend(query, key, value, source.is_real, return_weights)
        else:

            def attend(*vectors):
                return self._attend(*vectors, None, return_weights)

            both = documents, cast(Documents, source.documents)
            mask = cast(torch.Tensor, attention_mask)
            output, weights = attend_by_document(attend, query, key, value, mask, both, return_weights)
        if weights is not None:
            output, weights = attend_by_map(weights, value, layout, source.layout)
        return self.output(output.flatten(2)), weights, None

    def _keys_and_values(self, source):
        """`[B, P, H, D]` each; of a text that goes on, those that the cache has."""
        cache = source.cache
        if cache is not None and cache.is_updated.get(self.layer_idx):
            kept = cache.cross_attention_cache.layers[self.layer_idx]
            return kept.keys.transpose(1, 2), kept.values.transpose(1, 2)
        hidden_states = source.hidden_states.to(self.layer_norm.weight.dtype)
        key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, self.head_size))
            for project in (self.key, self.value)
        )
        if cache is not None:
            cache.is_updated[self.layer_idx] = True
            key, value = key.detach(), value.detach()
            cache.cross_attention_cache.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
        return key, value

    def _attend(self, query, key, value, is_real, return_weights):
        """Output `[B, L, H, D]`, and the map or None. Without real tokens in its source a row reads zeros."""
        mask, reads = None, None
        if is_real is not None:
            reads = is_real.any(1)[:, None, None, None]
            mask = is_real[:, None, None] | ~reads
        query, key, value = (vectors.to(query.dtype).transpose(1, 2) for vectors in (query, key, value))
        dropout, scale = self.dropout.p if self.dropout.training else 0.0, self.head_size**-0.5
        if dense_implementation(self.config, return_weights) == "eager" or return_weights:
            if mask is not None:
                mask = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
            output, weights = dense_attention(self, query, key, value, mask, scale, dropout)
        else:
            output = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
            output, weights = output.transpose(1, 2), None
        if reads is not None:
            output, weights = output * reads, None if weights is None else weights * reads
        return output, weights if return_weights else None
