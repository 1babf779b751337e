"""Dense self-attention through transformers' attention interface: the exact twin of the sparse layers."""

import copy

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..decoding.cache_naming import CACHE_NAME
from ..decoding.decoding_attention import in_pieces
from ..decoding.decoding_cache import CachedStep, ReformerCacheLayer
from ..ops.differentiation import is_inside_transform
from ..ops.documents import Documents, attend_by_document
from ..ops.implementations import check_keeps_weights
from ..ops.row_layout import RowLayout, attend_by_map
from .rotary_positions import Rotation


class FullSelfAttention(nn.Module):
    """Multi-head attention to everything; any implementation that transformers knows."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_size = config.attention_head_size
        self.is_causal = config.is_decoder
        self.num_key_value_groups = 1
        self.dropout = nn.Dropout(config.local_attention_probs_dropout_prob)
        self.query = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)
        self.key = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)
        self.value = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        full_attention_mask: torch.Tensor | None = None,
        return_weights: bool = False,
        layout: RowLayout | None = None,
        documents: Documents | None = None,
        cached: CachedStep[ReformerCacheLayer] | None = None,
        rotation: Rotation | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """
        Args:
            hidden_states: `[B, L, hidden_size]`.
            attention_mask: `[B, L]`, bool; looked at with `documents` only.
            full_attention_mask: As `transformers.masking_utils` makes it for the implementation in use.
            layout, documents: Where the caller's tokens stand, and the documents of each row; None for as they came.
            cached: What is known of the text so far, and where the tokens of this call go in it.
            rotation: Of queries and keys; None leaves them as they are.

        Returns:
            Output `[B, L, H * D]`, the attention map `[B, H, L, L]` or, of what continues a text,
            `[B, H, L, cached.step.longest]`, or None; and None (nothing is hashed).
        """
        heads = (-1, self.head_size)
        query, key, value = (
            project(hidden_states).unflatten(-1, heads) for project in (self.query, self.key, self.value)
        )
        if rotation is not None:
            query, key = rotation.turn(query), rotation.turn(key)
        if cached is not None:
            cached.layer.update(key, value, cached.step)
            if not cached.step.is_first:
                output, weights = self._attend_to_cache(query, cached, return_weights)
                return output.flatten(2), weights, None
        if documents is None:
            output, weights = self._attend(query, key, value, full_attention_mask, return_weights)
        else:
            output, weights = self._attend_in_documents(query, key, value, documents, attention_mask, return_weights)
        if weights is not None:
            output, weights = attend_by_map(weights, value, layout, layout)
        return output.flatten(2), weights, None

    def _attend(self, query, key, value, mask, return_weights):
        implementation = dense_implementation(self.config, return_weights)
        if return_weights:
            check_keeps_weights(implementation)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, dense_attention)
        output, weights = attend(
            self,
            *(vectors.transpose(1, 2) for vectors in (query, key, value)),
            mask,
            scaling=self.head_size**-0.5,
            dropout=self.dropout.p if self.dropout.training else 0.0,
            output_attentions=return_weights,
        )
        return output, weights if return_weights else None

    def _attend_in_documents(self, query, key, value, documents, is_real, return_weights):
        implementation = dense_implementation(self.config, return_weights)

        def attend(query, key, value):
            mask = None
            if self.is_causal and implementation != "sdpa":
                later = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool, device=query.device).triu(1)
                mask = query.new_zeros(later.shape).masked_fill(later, torch.finfo(query.dtype).min)
            return self._attend(query, key, value, mask, return_weights)

        return attend_by_document(attend, query, key, value, is_real, (documents, documents), return_weights)

    def _attend_to_cache(self, query, cached, return_weights):
        """New tokens' `[B, M, H, D]` to what the cache holds, them included; output and map."""
        cache, step = cached.layer, cached.step
        key, value = cache.rows.keys[:, : step.longest], cache.rows.values[:, : step.longest]
        positions = torch.arange(step.longest, device=query.device).view(1, 1, 1, -1)

        def attend(query, step, where):
            mask = None
            # The newest token sees everything.
            if step.start is None or step.start + 1 < step.longest:
                hidden = ~step.sees(positions)
                mask = query.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(query.dtype).min)
            return self._attend(query, key, value, mask, return_weights)

        output, weights = in_pieces(attend, query.to(key.dtype), step, step.longest * self.num_heads)
        return output.to(query.dtype), weights


def full_attention_mask(
    config, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, return_weights: bool = False
) -> torch.Tensor | None:
    """
    The mask of transformers' attention interface for the layers of full attention; None where there is no need.

    Args:
        hidden_states: `[B, L, ...]`.
        attention_mask: `[B, L]`, bool, or None.
        return_weights: Whether layers return their maps, which decides who computes them.
    """
    # CODEPATH: no published checkpoint has full layers; they are the dense twin of a new model.
    if "full" not in config.attn_layers:
        return None
    create_mask = create_causal_mask if config.is_decoder else create_bidirectional_mask
    arguments = {CACHE_NAME: None} if config.is_decoder else {}
    if hidden_states.is_meta:
        # transformers looks for something masked, and there is nothing to look at.
        attention_mask = None
    config = copy.copy(config)
    config._attn_implementation_internal = dense_implementation(config, return_weights)
    return create_mask(config=config, inputs_embeds=hidden_states, attention_mask=attention_mask, **arguments)


def dense_implementation(config, return_weights: bool = False) -> str:
    """The entry of transformers' attention interface for layers of full attention."""
    name = config._attn_implementation
    if name is None:
        # Fused kernels support neither forward-mode derivatives nor `vmap`.
        return "eager" if return_weights or is_inside_transform() else "sdpa"
    # PyTorch's own kernels are the fastest for dense attention on a GPU, too.
    return "sdpa" if name == "triton" else name


def dense_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The "eager" entry of the attention interface: plain operations, which have all derivatives.

    Args:
        query, key, value: `[B, H, L, D]`.
        attention_mask: Additive, broadcastable to `[B, H, L, L]`, or None.

    Returns:
        Output `[B, L, H, D]` and probabilities `[B, H, L, L]`.
    """
    if attention_mask is not None:
        # Under autocast the projections have a narrower dtype than the streams that the mask was made for.
        attention_mask = attention_mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    probabilities = nn.functional.dropout(scores.softmax(dim=-1), p=dropout).to(value.dtype)
    return (probabilities @ value).transpose(1, 2), probabilities
