"""Local self-attention: a chunk of tokens attends to itself and its neighbours."""

import torch
from torch import nn

from ..decoding.decoding_attention import attend_to_rows, in_pieces, join_pieces, neighbour_chunks
from ..decoding.decoding_cache import CROP_REACH, CachedStep, LocalCacheLayer
from ..ops.chunking import MASKED_SCORE, padded_to_multiple
from ..ops.documents import Documents
from ..ops.local_operator import local_attention
from ..ops.row_layout import RowLayout, attend_by_map
from .rotary_positions import Rotation


class LocalSelfAttention(nn.Module):
    """Multi-head attention within chunks of `local_attn_chunk_length` tokens and their neighbours."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_size = config.attention_head_size
        self.dropout = nn.Dropout(config.local_attention_probs_dropout_prob)
        self.query = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)
        self.key = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)
        self.value = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        circle_length: int | None = None,
        return_weights: bool = False,
        layout: RowLayout | None = None,
        documents: Documents | None = None,
        cached: CachedStep[LocalCacheLayer] | None = None,
        rotation: Rotation | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """
        Args:
            hidden_states, attention_mask: `[B, L, hidden_size]`; `[B, L]`, bool, or None.
            circle_length: Tokens on the circle of chunks, padding included; None without a circle.
            layout, documents: Where the caller's tokens stand, and the documents of each row; None for as they came.
            cached: What is known of the text so far, and where the tokens of this call go in it.
            rotation: Of queries and keys; None leaves them as they are.

        Returns:
            Output `[B, L, H * D]`, the attention map `[B, H, L, L]` or, of what continues a text,
            `[B, H, L, cached.step.longest]`, or None; and None (nothing is hashed).
        """
        projections = self.query, self.key, self.value
        query, key, value = (project(hidden_states).unflatten(-1, (-1, self.head_size)) for project in projections)
        if rotation is not None:
            query = rotation.turn(query)  # and freed before the next is turned
            key = rotation.turn(key)
        if cached is not None:
            if not cached.step.is_first:
                output, weights = self._attend_to_cache(query, key, value, cached, circle_length, return_weights)
                return output.flatten(2), weights, None
            cached.layer.update(key, value, cached.step)
        # Longer than `hidden_states` where the sequence is sharded over processes (docs/sequence_parallel.md).
        length = query.shape[1]
        config, chunk_length = self.config, self.config.local_attn_chunk_length
        around = (config.local_num_chunks_before, config.local_num_chunks_after)
        # A single chunk has no neighbours, and on a circle of one chunk none is its own.
        if (circle_length or length) <= chunk_length:
            chunk_length, around, circle_length = length, (0, 0), None
        output, weights = local_attention(
            query,
            key,
            value,
            attention_mask=attention_mask,
            documents=None if documents is None else documents.number,
            padded_length=circle_length,
            chunk_length=chunk_length,
            num_chunks_before=around[0],
            num_chunks_after=around[1],
            causal=config.is_decoder,
            circular_look_around=config.circular_look_around,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
            return_weights=return_weights,
            implementation=config._attn_implementation,
        )
        if weights is not None:
            output, weights = attend_by_map(weights, value, layout, layout)
        return output.flatten(2), weights, None

    def _attend_to_cache(self, query, key, value, cached, circle_length, return_weights):
        """New tokens' `[B, M, H, D]` to what the cache holds and to each other; output and map."""
        cache, step = cached.layer, cached.step
        config, circular = self.config, self.config.circular_look_around
        length = config.local_attn_chunk_length
        around = (config.local_num_chunks_before, config.local_num_chunks_after)
        if (circle_length or step.num_columns) <= length:
            around, circular = (0, 0), False
        num_chunks = padded_to_multiple(circle_length or step.num_columns, length) // length

        def attend(query, step, where):
            chunks, exists = neighbour_chunks(step.positions // length, num_chunks, around, circular)
            positions = chunks[..., None] * length + torch.arange(length, device=chunks.device)
            exists = exists[..., None].expand(positions.shape)
            positions, exists = (table.flatten(-2)[:, None] for table in (positions, exists))
            hidden = ~(exists & step.sees(positions))

            def mask(scores):
                scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
                return scores.masked_fill(hidden, MASKED_SCORE[scores.dtype])

            positions = positions.expand(-1, self.num_heads, -1, -1)
            map_length = step.longest if return_weights else None
            return attend_to_rows(query, cache.rows, positions, mask, self.head_size**-0.5, map_length)

        numbers_per_token = length * (sum(around) + 1) * self.num_heads * self.head_size
        pieces = []
        # A ring holds no more new tokens at a time than it keeps beyond a window.
        for first in range(0, query.shape[1], CROP_REACH):
            where = slice(first, first + CROP_REACH)
            piece = step.piece(first, first + CROP_REACH)
            cache.update(key[:, where], value[:, where], piece)
            pieces.append(in_pieces(attend, query[:, where], piece, numbers_per_token))
        return join_pieces(pieces)
